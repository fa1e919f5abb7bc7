"""The layers of a DiT block are timm's: same names, same initial values, same numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import timm.layers
import torch
from torch import nn

from sag_dit.models.dit.layers import Mlp, PatchEmbed, SelfAttention
from sag_dit.models.unfilled import unfilled

TANH = partial(nn.GELU, approximate="tanh")
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "patches": (
        lambda: PatchEmbed(2, 4, 24),
        lambda: timm.layers.PatchEmbed((8, 12), 2, 4, 24),
        (3, 4, 8, 12),
    ),
    "attention": (
        lambda: SelfAttention(24, num_heads=3),
        lambda: timm.layers.Attention(24, num_heads=3, qkv_bias=True),
        (3, 20, 24),
    ),
    "mlp": (
        lambda: Mlp(24, 50),
        lambda: timm.layers.Mlp(24, 50, act_layer=TANH),  # type: ignore[arg-type]
        (3, 20, 24),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_timms(name: str, dtype: torch.dtype) -> None:
    own, timms, shape = LAYERS[name]
    torch.manual_seed(0)
    ours = own()
    torch.manual_seed(0)
    theirs = timms()
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    # Forwards, and the gradients of the input and of every weight.
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x, y = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    a, b = ours(x), theirs(y)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_what_is_unfilled_has_no_memory_and_draws_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with unfilled():
        layer = nn.Sequential(nn.Embedding(10**9, 10**6), nn.Linear(10**6, 10**9))
        nn.init.normal_(tensor=layer[1].weight)
    assert {each.device.type for each in layer.parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)
    assert nn.Linear(2, 2).weight.abs().sum() > 0
