"""Inception's three features, against the layers themselves; weights by path, folder, checksum.

The published weights are a download and not needed here: random ones of exactly their layout
stand in. That the published ones are TensorFlow's is for docs/evaluation.md to check.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sag_dit.evaluation import inception
from sag_dit.evaluation.inception import FILE, SHA256, Inception, find_weights
from sag_dit.evaluation.reference import load_reference
from sag_dit.evaluation.suite import Suite
from tests.closeness import assert_near
from tests.evaluation.making import pixels

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights in a file like torch-fidelity's."""
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        # Its constructor always loads; on the meta device there is nothing to load into.
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        layout = fidelity.FeatureExtractorInceptionV3("layout", ["2048"], "").state_dict()
    random = torch.Generator().manual_seed(0)
    state = {}
    for name, value in layout.items():
        if value.dtype == torch.int64:
            state[name] = torch.zeros((), dtype=torch.int64)
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = torch.ones(value.shape)
        else:
            spread = (2 / max(1, value[0].numel())) ** 0.5 if value.ndim > 1 else 0.1
            state[name] = torch.randn(value.shape, generator=random) * spread
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, file)
    yield file
    file.unlink()


@pytest.fixture(scope="module")
def network(weights: Path) -> Inception:
    return Inception(weights)


@pytest.fixture(scope="module")
def seen(network: Inception) -> dict[str, Tensor]:
    """Images, their three features, and what some layers gave."""
    layers: dict[str, Tensor] = {}
    hooks = [
        network.network.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: layers.update(
                {f"{name}:in": inputs[0], name: output}
            )
        )
        for name in ("Conv2d_1a_3x3", "Mixed_6d", "AvgPool")
    ]
    images = pixels(2, 0, (3, 20, 28))
    features = network(images)
    for hook in hooks:
        hook.remove()
    assert features.spatial is not None and features.logits is not None
    return layers | {
        "images": images,
        "pool": features.pool,
        "spatial": features.spatial,
        "logits": features.logits,
    }


def test_features_have_adms_sizes(seen: dict[str, Tensor]) -> None:
    assert seen["pool"].shape == (2, 2048)
    assert seen["spatial"].shape == (2, 2023)
    assert seen["logits"].shape == (2, 1008)
    assert seen["pool"].std() > 0 and seen["spatial"].std() > 0 and seen["logits"].std() > 0


@pytest.mark.slow
def test_pool_is_torch_fidelitys(weights: Path, seen: dict[str, Tensor]) -> None:
    theirs = fidelity.FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    pool, logits = theirs(seen["images"])
    assert torch.equal(seen["pool"], pool)
    assert torch.equal(seen["logits"], logits)


def test_logits_leave_out_the_bias(network: Inception, seen: dict[str, Tensor]) -> None:
    head = network.network.get_submodule("fc")
    assert_near(seen["logits"], nn.functional.linear(seen["pool"], head.weight))
    assert head.bias.abs().max() > 0.1


def test_spatial_is_the_first_branch_after_its_relu(
    network: Inception, seen: dict[str, Tensor]
) -> None:
    """TensorFlow's mixed_6/conv[..., :7], flattened as rows, columns, channels."""
    branch = network.network.get_submodule("Mixed_6d.branch1x1")
    convolved = branch.bn(branch.conv(seen["Mixed_6d:in"]))
    assert convolved.shape == (2, 192, 17, 17)
    nhwc = convolved.clamp(min=0).permute(0, 2, 3, 1).numpy()
    expected = nhwc[..., :7].reshape(2, -1)
    np.testing.assert_allclose(seen["spatial"].numpy(), expected, rtol=1e-4, atol=1e-5)
    # The block's output begins with this branch.
    place = np.ravel_multi_index((3, 11, 5), (17, 17, 7))
    assert seen["spatial"][1, place] == seen["Mixed_6d"][1, 5, 3, 11]


def test_resize_is_tensorflow_ones(seen: dict[str, Tensor]) -> None:
    """Output pixel i is read at input i * in / out, between its two neighbours, edges repeated."""
    images = seen["images"].double().numpy()
    for axis in (2, 3):
        size = images.shape[axis]
        place = np.arange(299) * (size / 299)
        low = place.astype(int)
        high = np.minimum(low + 1, size - 1)
        part = (place - low).reshape(-1, *(1,) * (3 - axis))
        images = images.take(low, axis) * (1 - part) + images.take(high, axis) * part
    expected = (images - 128) / 128
    np.testing.assert_allclose(seen["Conv2d_1a_3x3:in"].numpy(), expected, atol=5e-5)


@pytest.mark.slow
def test_grey_is_three_equal_channels(network: Inception) -> None:
    grey = pixels(1, 0)
    one, three = network(grey), network(grey.expand(-1, 3, -1, -1))
    assert torch.equal(one.pool, three.pool)


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8), pixels(1, 0, (4, 8, 8))])
def test_other_images_are_refused(network: Inception, images: Tensor) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        network(images)


def test_weights_stand_in_the_protocol(network: Inception, weights: Path) -> None:
    assert network.protocol["weights"] == inception.sha256([weights])
    assert network.protocol["adm_statistics"] is False
    assert not network.training


@pytest.mark.slow
def test_suite_takes_all_five_metrics(network: Inception) -> None:
    reference = load_reference((pixels(6, 0), torch.zeros(6)), network, cache=None)
    suite = Suite(network, reference)
    suite.update(pixels(5, 1), torch.arange(5))
    assert all(np.isfinite(value) for value in suite.compute().values())


def test_weights_are_found_by_folder_and_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAG_DIT_WEIGHTS", str(tmp_path))
    (tmp_path / FILE).write_bytes(b"not these")
    assert find_weights() == tmp_path / FILE
    with pytest.raises(ValueError, match=f"expected {SHA256}; the file is damaged"):
        Inception()


def test_missing_weights_name_all_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, place: str, hash_prefix: str) -> None:
        assert hash_prefix == SHA256
        raise OSError("no network")

    monkeypatch.delenv("SAG_DIT_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ValueError, match=r"could not be downloaded \(no network\)") as error:
        Inception()
    assert inception.URL in str(error.value)
    assert str(tmp_path / "hub" / "checkpoints") in str(error.value)


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no weights of Inception"):
        Inception(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        Inception(tmp_path / "nowhere.pth")
