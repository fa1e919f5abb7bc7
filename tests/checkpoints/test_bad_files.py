"""What is damaged, foreign or dangerous is refused, named, and never run."""

from __future__ import annotations

import json
import os
import pickle
import resource
import time
import zipfile
from argparse import Namespace
from fractions import Fraction
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sag_dit.checkpoints import build, load
from sag_dit.checkpoints.files import Unused, read_torch
from sag_dit.models import DiT
from tests.checkpoints.conftest import Same


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", ["zip", "old", "bare pickle"])
def test_malicious_pickle_is_refused_and_never_runs(
    pixel_dit: DiT, tmp_path: Path, layout: str
) -> None:
    path, harm = tmp_path / "model.pt", tmp_path / "harm"
    value = {"ema": pixel_dit.state_dict(), "args": Namespace(vae=Payload(harm))}
    if layout == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(harm)))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=layout == "zip")
    refusal = "no file of torch.save" if layout == "bare pickle" else "refused.*mkdir.*can run code"
    with pytest.raises(ValueError, match=rf"model\.pt: .*{refusal}") as caught:
        load(path)
    assert not harm.exists()
    assert caught.value.__suppress_context__
    pickle.loads(pickle.dumps(Payload(harm)))
    assert harm.exists(), "the payload would have run"


def test_objects_of_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"ema": {}, "args": Namespace(share=Fraction(1, 3))}, tmp_path / "share.pt")
    with pytest.raises(ValueError, match=r"refused.*fractions.*save its state dict alone"):
        load(tmp_path / "share.pt")


@pytest.mark.parametrize(
    "beside",
    [
        np.float64(3.5),
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.random.RandomState(0).get_state(),
        Namespace(root=Path("/data"), pure=PureWindowsPath("C:/data")),
        {"loss": np.float32(0.1), "log": [Path("a"), np.bool_(True)]},
    ],
    ids=["number", "array", "random state", "paths", "nested"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_numpys_values_and_paths_beside_the_weights_are_no_obstacle(
    pixel_dit: DiT, tmp_path: Path, same: Same, beside: object, zipped: bool
) -> None:
    value = {"model": {}, "ema": pixel_dit.state_dict(), "beside": beside}
    torch.save(value, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert same(load(tmp_path / "x.pt").denoiser.network, pixel_dit)


def test_numpys_own_types_are_never_built(tmp_path: Path) -> None:
    """What a file says of an array's size is not believed, nor allocated."""
    torch.save({"ema": {}, "huge": np.zeros(3)}, tmp_path / "huge.pt")
    value = read_torch(tmp_path / "huge.pt")
    assert type(value["huge"]) is Unused and not vars(value["huge"])


def test_weights_as_arrays_are_named(pixel_dit: DiT, tmp_path: Path) -> None:
    state = {name: value.numpy() for name, value in pixel_dit.state_dict().items()}
    torch.save({"ema": state}, tmp_path / "arrays.pt")
    with pytest.raises(ValueError, match=r"found pos_embed.* where tensors should be"):
        load(tmp_path / "arrays.pt")


@pytest.mark.parametrize("layout", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_truncated_files_are_named(
    pixel_dit: DiT, tmp_path: Path, layout: str, share: float
) -> None:
    path = tmp_path / "cut.pt"
    if layout == "safetensors":
        save_file(pixel_dit.state_dict(), path)
    else:
        torch.save(pixel_dit.state_dict(), path, _use_new_zipfile_serialization=layout == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"cut\.pt: damaged.*expected weights of a DiT"):
        load(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n0000", "begins with b'.x89PNG"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"foreign\.pt: .*{found}.*expected weights of a DiT"):
        load(path)


def test_other_archives_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "arrays.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"numbers")
    with pytest.raises(ValueError, match=r"arrays\.npz: .*no file of torch\.save"):
        load(tmp_path / "arrays.npz")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.zeros(3), "holds a Tensor"),
        ({}, "an empty or foreign dict"),
        ({"step": 3, "loss": 0.1}, "found step, loss where tensors should be"),
        ({"conv.weight": torch.zeros(2)}, "not a DiT: x_embedder.proj.weight, .*conv.weight"),
        ({"ema": {"a": 1}}, "found a where tensors should be"),
        ({"model": {}, "opt": {}}, "ema=true: .*holds no averaged .* use ema=false"),
        ({"ema": {}}, "ema=false: .*holds no raw .*use ema=true"),
    ],
    ids=str,
)
def test_other_contents_are_named(tmp_path: Path, value: object, found: str) -> None:
    path = tmp_path / "content.pt"
    torch.save(value, path)
    with pytest.raises(ValueError, match=found):
        load(path, ema="ema=false" not in found or "ema=true: " in found)


def test_weights_of_other_shapes_are_told_as_such(pixel_dit: DiT, tmp_path: Path) -> None:
    state = pixel_dit.state_dict()
    state["blocks.0.attn.qkv.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight \(3,\) of unexpected"):
        load(tmp_path / "odd.pt")
    state = pixel_dit.state_dict()
    state["final_layer.linear.weight"] = torch.zeros(20, 128)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="5 output channels for 3 input channels"):
        load(tmp_path / "odd.pt")


def test_first_keys_that_do_not_fit_are_named(pixel_dit: DiT, tmp_path: Path) -> None:
    state = pixel_dit.state_dict()
    for name in list(state):
        if name.startswith("blocks.1.mlp"):
            del state[name]
    state["blocks.0.attn.q_norm.weight"] = torch.ones(64)
    state["final_layer.adaLN_modulation.1.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "unfit.pt")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "unfit.pt")
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("unfit.pt: the weights do not fit the model")
    assert lines[1].startswith("4 missing: blocks.1.mlp.fc1.weight; ") and lines[1].endswith(
        ", ..."
    )
    assert lines[2] == "1 unexpected: blocks.0.attn.q_norm.weight"
    assert lines[3] == (
        "1 of another shape: final_layer.adaLN_modulation.1.bias is (5,), expected (256,)"
    )


def test_config_of_another_file_is_found_out(flat: Path) -> None:
    flat.with_suffix(".json").write_text('{"model": {"depth": 3}}')
    with pytest.raises(
        ValueError, match=r"says depth=3, .* are of depth=2.*see that it is this file's"
    ):
        load(flat)
    flat.with_suffix(".json").write_text('{"model": {"num_heads": 3}}')
    with pytest.raises(ValueError, match=r"small\.pt: num_heads=3: .*divisor of hidden_size=128"):
        load(flat)
    flat.with_suffix(".json").write_text('{"model": {"heads": 2}}')
    with pytest.raises(ValueError, match=r"unknown heads; expected input_size"):
        load(flat)


def test_a_sit_on_another_path_is_refused(pixel_dit: DiT, tmp_path: Path) -> None:
    args = Namespace(model="SiT-XL/2", path_type="GVP", prediction="velocity")
    torch.save({"ema": pixel_dit.state_dict(), "args": args}, tmp_path / "sit.pt")
    with pytest.raises(ValueError, match=r"SiT with path_type='GVP'.*expected path_type='Linear'"):
        load(tmp_path / "sit.pt")


def test_raw_weights_are_not_made_up(flat: Path) -> None:
    with pytest.raises(ValueError, match=r"ema=false: .*small\.pt holds one set of weights"):
        load(flat, ema=False)


def test_folder_without_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: a folder without checkpoint; expected"):
        load(tmp_path / "empty")


def test_unreadable_json_is_named(flat: Path) -> None:
    flat.with_suffix(".json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"small\.json: expected a readable JSON file"):
        load(flat)
    flat.with_suffix(".json").write_text("[1]")
    with pytest.raises(ValueError, match=r"small\.json: expected a JSON object, found a list"):
        load(flat)


@pytest.mark.parametrize("key", ["model", "process", "defaults"])
def test_configs_of_the_wrong_kind_are_named(pixel_dit: DiT, tmp_path: Path, key: str) -> None:
    path = tmp_path / "wrong.safetensors"
    save_file(pixel_dit.state_dict(), path, metadata={"sag_dit": json.dumps({key: "DiT"})})
    with pytest.raises(ValueError, match=rf"its config's {key} is 'DiT'; expected a mapping"):
        load(path)
    save_file(pixel_dit.state_dict(), path, metadata={"sag_dit": "[1]"})
    with pytest.raises(ValueError, match=r"metadata's sag_dit is no JSON object but \[1\]"):
        load(path)


def test_number_in_a_name_is_not_trusted(pixel_dit: DiT, tmp_path: Path) -> None:
    state = {**pixel_dit.state_dict(), "blocks.999999999.x": torch.zeros(1)}
    torch.save(state, tmp_path / "deep.pt")
    with pytest.raises(ValueError, match=r"1 unexpected: blocks\.999999999\.x"):
        load(tmp_path / "deep.pt")


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"hidden_size": 1e9}, "says hidden_size=1000000000, and its weights are of hidden_size="),
        ({"depth": 10**9}, "says depth=1000000000, and its weights are of depth=2"),
        ({"depth": 10**400}, r"model\.depth=1000.*: expected a whole number, 1 to"),
        ({"num_heads": 0}, r"model\.num_heads=0: expected a whole number, 1 to"),
        ({"patch_size": -2}, r"model\.patch_size=-2: expected a whole number"),
        ({"patch_size": 8}, "says patch_size=8, and"),
        ({"mlp_ratio": 1e3}, "says int.hidden_size mlp_ratio.=128000, and"),
        ({"mlp_ratio": float("nan")}, r"model\.mlp_ratio=nan: expected a number"),
        ({"num_classes": 10**9}, "says rows of the label table=100000000., and"),
        ({"input_size": [2**20, 2**20]}, "says tokens=274877906944, and"),
        ({"input_size": "ab"}, r"model\.input_size='ab': expected a whole number"),
        ({"learn_sigma": 1}, r"model\.learn_sigma=1: expected true or false"),
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have_cost_nothing(
    flat: Path, stated: dict[str, Any], told: str
) -> None:
    flat.with_suffix(".json").write_text(json.dumps({"model": stated}))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError, match=rf"small\.pt: .*{told}") as caught:
        load(flat)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"x_0_range": "ab"}, "x_0_range=ab: expected a list of 2 numbers, or null"),
        ({"x_0_range": [1]}, r"x_0_range=\[1\]: expected a list of 2 numbers"),
        ({"class_names": [1, 2]}, r"class_names=\[1,2\]: expected a list of names"),
        ({"process": {"num_timesteps": 10**9}}, "num_timesteps=1000000000: expected 21 or more"),
        ({"process": {"num_timesteps": "a"}}, r"process\.num_timesteps=a: expected a whole number"),
        ({"process": {"time_scale": []}}, r"process\.time_scale=\[\]: expected a number"),
        ({"defaults": {"batch_size": "a"}}, r"defaults\.batch_size=a: expected a whole number"),
        ({"defaults": {"batch_size": 0}}, r"defaults\.batch_size=0: expected a whole number"),
    ],
    ids=str,
)
def test_values_that_a_config_cannot_have_are_named(
    flat: Path, stated: dict[str, Any], told: str
) -> None:
    flat.with_suffix(".json").write_text(json.dumps({"model": {}, **stated}))
    with pytest.raises(ValueError, match=rf"small\.pt: .*{told}"):
        load(flat)


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"model_channels": 64}, "model_channels=64, and its weights are of model_channels=32"),
        ({"num_res_blocks": 10**9}, "num_res_blocks=1000000000, and"),
        ({"channel_mult": [1] * 1000}, "levels of channel_mult=1000, and .* of channel_mult=2"),
        ({"num_classes": 10**9}, "rows of the label table=1000000000, and"),
    ],
    ids=str,
)
def test_sizes_that_a_unet_does_not_have_cost_nothing(
    tmp_path: Path, stated: dict[str, Any], told: str
) -> None:
    model = {"input_size": 16, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2]}
    model |= {"attention_resolutions": [8], "num_heads": 4, "num_classes": 3}
    network = build({**CONFIG, "model": model}).network
    config = {**CONFIG, "model": {**model, **stated}}
    state = {name: part.contiguous() for name, part in network.state_dict().items()}
    save_file(state, tmp_path / "unet.safetensors", metadata={"sag_dit": json.dumps(config)})
    with pytest.raises(ValueError, match=rf"unet\.safetensors: .*{told}"):
        load(tmp_path / "unet.safetensors")


CONFIG: dict[str, Any] = {"process": {}, "kind": "eps", "x_0_range": [-1, 1]}


class Bytes:
    """Unpickles to as many bytes as are asked for, in a file of a few."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return bytearray, (3 * 10**9,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_makes_bytes_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "bytes.pt"
    torch.save({"ema": {}, "more": Bytes()}, path, _use_new_zipfile_serialization=zipped)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"bytes\.pt: .*a bytearray, made by its length alone"):
        load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    honest, packed = tmp_path / "honest.pt", tmp_path / "packed.pt"
    torch.save({"blocks.0.x": torch.zeros(4_000_000)}, honest)
    with zipfile.ZipFile(honest) as before, zipfile.ZipFile(packed, "w") as after:
        for entry in before.infolist():
            after.writestr(entry.filename, before.read(entry), zipfile.ZIP_DEFLATED)
    assert packed.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"packed\.pt: .* bytes that unpack to 16,0"):
        load(packed)


@pytest.mark.filterwarnings("ignore:.*parse")
@pytest.mark.parametrize("how", ["strides", "views", "meta", "sparse"])
def test_weights_that_are_not_stored_are_refused(flat: Path, how: str) -> None:
    state = torch.load(flat, weights_only=True)
    name, other = "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"
    if how == "strides":
        state[name] = torch.zeros(1).expand(10**6, 10**6)
    elif how == "views":
        shared = torch.zeros(10**6)
        state = {f"{other}.{i}": shared for i in range(1000)} | state
    elif how == "meta":
        state[name] = torch.empty(10**6, 10**6, device="meta")
    else:
        state[name] = torch.sparse_coo_tensor(size=(10**6, 10**6))
    torch.save(state, flat)
    told = "of which .* bytes are stored" if how != "views" else "share .* stored ones"
    with pytest.raises(ValueError, match=rf"small\.pt: .*{told}"):
        load(flat)
