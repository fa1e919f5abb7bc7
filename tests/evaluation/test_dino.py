"""DINOv2's class token with random weights: resize, positions, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from sag_dit.evaluation.dino import DINOv2, resized, shrunk
from tests.evaluation.making import pixels

SMALL = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def network() -> DINOv2:
    torch.manual_seed(0)
    return DINOv2(SMALL, pretrained=False)


def test_class_token_of_images(network: DINOv2) -> None:
    found = network(pixels(2, 0, (3, 20, 20)))
    assert found.pool.shape == (2, 384)
    assert found.spatial is None and found.logits is None
    assert network.protocol["resize"].startswith("224 x 224, bicubic, antialiased")
    assert torch.equal(network(pixels(1, 0)).pool, network(pixels(1, 0).expand(-1, 3, -1, -1)).pool)


@pytest.mark.parametrize("side", [40, 256, 500])
def test_resize_is_pillows(side: int) -> None:
    image = pixels(1, 0, (3, side, side))
    pillow = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    expected = np.asarray(pillow.resize((224, 224), Image.Resampling.BICUBIC), np.float32)
    found = resized(image)[0].permute(1, 2, 0).numpy()
    # Pillow computes in fixed point, so that a rare value falls on the other side of a half.
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.01


def test_positions_are_scaled_as_dinov2_does() -> None:
    """Bicubic with a = -0.75 at (i + 1/2) * 37 / 16.1 - 1/2, edges repeated, no antialiasing."""
    random = np.random.Generator(np.random.Philox(key=[1, 0]))
    square = random.standard_normal((37, 37, 2))
    positions = np.concatenate([np.full((1, 2), 7.0), square.reshape(-1, 2)])
    found = shrunk(torch.from_numpy(positions)[None], 16, 1)[0]
    assert found.shape == (1 + 16 * 16, 2)
    assert (found[0] == 7).all()

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    weights = np.zeros((16, 37))
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, min(max(j, 0), 36)] += kernel(place - j)
    expected = np.einsum("ia,jb,abc->ijc", weights, weights, square).reshape(-1, 2)
    np.testing.assert_allclose(found[1:].numpy(), expected, atol=1e-6)


@pytest.mark.slow
def test_weights_by_path_are_timms(tmp_path: Path, network: DINOv2) -> None:
    torch.manual_seed(1)
    published = timm.create_model(SMALL, num_classes=0)
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    torch.save(published.state_dict(), tmp_path / "model.pth")
    one, other = (DINOv2(SMALL, tmp_path / name) for name in ("model.safetensors", "model.pth"))
    assert one.protocol == other.protocol
    assert one.protocol["weights"] != network.protocol["weights"]
    images = pixels(1, 0, (3, 16, 16))
    assert torch.equal(one(images).pool, other(images).pool)
    assert not torch.equal(one(images).pool, network(images).pool)


def test_other_models_and_weights_are_refused(tmp_path: Path, network: DINOv2) -> None:
    with pytest.raises(ValueError, match="expected a DINOv2 of timm without registers"):
        DINOv2("resnet18", pretrained=False)
    with pytest.raises(ValueError, match="expected a DINOv2 of timm without registers"):
        DINOv2("vit_small_patch14_reg4_dinov2.lvd142m", pretrained=False)
    with pytest.raises(ValueError, match="timm cannot make it"):
        DINOv2("vit_giant_dinov2_of_nobody", pretrained=False)
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="in timm's layout"):
        DINOv2(SMALL, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected uint8"):
        network(torch.zeros(1, 3, 8, 8))
