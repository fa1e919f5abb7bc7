"""What a tap reads does not depend on the kernel that attends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sag_dit.attention import AttentionTap, Capture
from sag_dit.models import DiT
from tests.gpu.conftest import Stated

pytestmark = pytest.mark.gpu

LEAST = {SDPBackend.FLASH_ATTENTION: (8, 0), SDPBackend.CUDNN_ATTENTION: (9, 0)}
"""The compute capability below which a kernel does not exist."""


@pytest.fixture(scope="module")
def network(device: str) -> DiT:
    """256 tokens, 3 blocks that attend unevenly, heads of 32 channels."""
    made = DiT(32, 2, 4, 128, 3, 4, num_classes=10, learn_sigma=False)
    random = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if name != "pos_embed":
            spread = 0.1 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) * spread)
    return made.to(device).eval().requires_grad_(False)


def seen(network: DiT, backend: SDPBackend, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Read all layers and return their saliency beside the network's output."""
    device = next(network.parameters()).device
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 32, 32, generator=random).to(device)
    t, y = torch.tensor([900, 100], device=device), torch.tensor([1, 10], device=device)
    captures = [Capture(layer) for layer in network.layers.values()]
    # A kernel that cannot serve is an error here: nothing else may take its place.
    with (
        sdpa_kernel(backend),
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        AttentionTap(network, captures) as tap,
    ):
        output = network(x, t, y)
    return dict(tap.captured), output.float()


@pytest.mark.parametrize(
    ("dtype", "backend", "bound"),
    [
        (torch.float32, SDPBackend.EFFICIENT_ATTENTION, 1e-3),
        (torch.bfloat16, SDPBackend.EFFICIENT_ATTENTION, 0.2),
        (torch.bfloat16, SDPBackend.FLASH_ATTENTION, 0.2),
        (torch.bfloat16, SDPBackend.CUDNN_ATTENTION, 0.2),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_saliency_is_that_of_the_plain_formula(
    device: str,
    stated: Stated,
    network: DiT,
    dtype: torch.dtype,
    backend: SDPBackend,
    bound: float,
) -> None:
    """Of the first layer bit for bit, later ones see what the kernel rounded before them."""
    if device == "cpu":
        backend = SDPBackend.FLASH_ATTENTION  # The only one there beside the plain formula.
    elif torch.cuda.get_device_capability() < LEAST.get(backend, (0, 0)):
        pytest.skip(f"{backend.name} needs a newer device")
    expected, output = seen(network, SDPBackend.MATH, dtype)
    read, other = seen(network, backend, dtype)
    first, *later = network.layers
    assert torch.equal(read[first], expected[first])
    apart = [float((read[name] / expected[name] - 1).abs().max()) for name in later]
    kind = f"{backend.name} in {dtype}".replace("torch.", "")
    stated(f"{kind}: greatest relative difference of saliency from MATH", max(apart), bound)
    scale = float(output.abs().max())
    outputs = float((other - output).abs().max()) / scale
    stated(f"{kind}: greatest difference of the output from MATH / its greatest", outputs, bound)
    flipped = [float(((read[name] > 1) != (expected[name] > 1)).float().mean()) for name in later]
    stated(
        f"{kind}: share of SAG's mask that differs from MATH", max(flipped), max(bound / 2, 0.01)
    )
    for name in later:
        assert expected[name].std() > 0.01, "even attention would agree whatever happens"
