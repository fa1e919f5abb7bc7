"""What a tap reads does not depend on the kernel that attends."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sag_dit.attention import AttentionTap, Capture
from sag_dit.models import DiT
from tests.gpu.conftest import Stated
from tests.small import filled

pytestmark = pytest.mark.gpu

LEAST = {SDPBackend.FLASH_ATTENTION: (8, 0), SDPBackend.CUDNN_ATTENTION: (9, 0)}
"""The compute capability below which a kernel does not exist."""


@pytest.fixture(scope="module")
def network(device: str) -> DiT:
    """256 tokens, 3 blocks that attend unevenly, heads of 32 channels."""
    made = filled(DiT(32, 2, 4, 128, 3, 4, num_classes=10, learn_sigma=False))
    return made.to(device).eval().requires_grad_(False)


Read = dict[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """What one forward showed: the saliency of all layers, by a tap and by the formula."""

    tapped: Read
    formula: Read
    output: Tensor


def by_formula(qkv: Tensor, heads: int) -> Tensor:
    """saliency_j = mean_k sum_i softmax_j(q_ki . k_kj / sqrt(e)), in float64."""
    query, key, _ = qkv.double().unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attention = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return attention.sum(dim=-2).mean(dim=1)


def seen(network: DiT, backend: SDPBackend, dtype: torch.dtype) -> Seen:
    device = next(network.parameters()).device
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 32, 32, generator=random).to(device)
    t, y = torch.tensor([900, 100], device=device), torch.tensor([1, 10], device=device)
    formula: Read = {}

    def look(name: str, heads: int, *call: Any) -> None:
        formula[name] = by_formula(call[-1], heads)

    with ExitStack() as stack:
        for name in network.layers:
            attn = network.get_submodule(name)
            handle = attn.qkv.register_forward_hook(partial(look, name, attn.num_heads))
            stack.callback(handle.remove)
        # A kernel that cannot serve is an error here: nothing else may take its place.
        stack.enter_context(sdpa_kernel(backend))
        stack.enter_context(torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
        captures = [Capture(layer) for layer in network.layers.values()]
        tap = stack.enter_context(AttentionTap(network, captures))
        output = network(x, t, y)
    return Seen(dict(tap.captured), formula, output.float())


def apart(left: Read, right: Read) -> float:
    """Return the greatest relative difference."""
    return max(float((left[name].double() / right[name] - 1).abs().max()) for name in left)


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
def test_saliency_does_not_depend_on_the_kernel(
    device: str,
    stated: Stated,
    network: DiT,
    dtype: torch.dtype,
    backend: SDPBackend,
    bound: float,
) -> None:
    """Not at all given a layer's queries and keys; rounding reaches those of later layers."""
    if device == "cpu":
        backend = SDPBackend.FLASH_ATTENTION  # The only one there beside the plain formula.
    elif torch.cuda.get_device_capability() < LEAST.get(backend, (0, 0)):
        pytest.skip(f"{backend.name} needs a newer device")
    plain, other = seen(network, SDPBackend.MATH, dtype), seen(network, backend, dtype)
    kind = f"{backend.name} in {dtype}".replace("torch.", "")
    own = apart(other.tapped, other.formula)
    stated(f"{kind}: greatest relative difference of saliency from float64", own, 1e-4)
    first, *later = network.layers
    assert torch.equal(other.tapped[first], plain.tapped[first])
    saliency = apart(other.tapped, plain.tapped)
    stated(f"{kind}: greatest relative difference of saliency from MATH", saliency, bound)
    flipped = [
        float(((other.tapped[name] > 1) != (plain.tapped[name] > 1)).float().mean())
        for name in later
    ]
    stated(
        f"{kind}: share of SAG's mask that differs from MATH", max(flipped), max(bound / 2, 0.01)
    )
    outputs = float((other.output - plain.output).abs().max() / plain.output.abs().max())
    stated(f"{kind}: greatest difference of the output from MATH / its greatest", outputs, bound)
    for name in later:
        assert plain.tapped[name].std() > 0.01, "even attention would agree whatever happens"


def test_saliency_beside_tf32(device: str, stated: Stated, network: DiT) -> None:
    """Its own product is then rounded as well."""
    torch.set_float32_matmul_precision("high")
    read = seen(network, SDPBackend.MATH, torch.float32)
    own = apart(read.tapped, read.formula)
    stated("TF32: greatest relative difference of saliency from float64", own, 0.02)
