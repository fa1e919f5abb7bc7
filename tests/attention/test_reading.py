"""AttentionTap reads named modules for chosen rows, exactly, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sag_dit.attention import (
    AttentionLayer,
    AttentionTap,
    Capture,
    attention_map,
    capture_key,
    saliency,
)
from sag_dit.models import DiT
from tests.attention.looking import (
    LAYERS,
    Identity,
    Inputs,
    Same,
    queries_and_keys,
    small_unet,
    traces,
)
from tests.closeness import assert_near
from tests.conftest import MakeDiT


@pytest.mark.parametrize("index", [0, 2])
def test_saliency_and_map_are_those_of_an_explicit_softmax(
    tiny_dit: DiT, inputs: Inputs, index: int
) -> None:
    query, key = queries_and_keys(tiny_dit, inputs, index)
    expected = (query.double() @ key.double().mT / 12**0.5).softmax(-1)
    layer = LAYERS[index]
    with AttentionTap(tiny_dit, [Capture(layer), Capture(layer, kind="map")]) as tap:
        tiny_dit(*inputs)
    assert set(tap.captured) == {layer.name, f"{layer.name}:map"}
    received = expected.mean(1).sum(1)
    torch.testing.assert_close(tap.captured[layer.name].double(), received, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        tap.captured[f"{layer.name}:map"].double(), expected, rtol=1e-4, atol=1e-5
    )
    # Uneven enough for a mask to mean something, and for a wrong axis to show.
    assert received.std() > 0.1
    assert (expected.mean(1).sum(2) - received).abs().max() > 0.1


def test_rows_and_keys_of_captures(tiny_dit: DiT, inputs: Inputs) -> None:
    captures = [
        Capture(LAYERS[1], rows=slice(1, 3)),
        Capture(LAYERS[1], rows=slice(3, 4), kind="map", key="last"),
        Capture(LAYERS[0]),
    ]
    with AttentionTap(tiny_dit, captures) as tap:
        tiny_dit(*inputs)
    query, key = queries_and_keys(tiny_dit, inputs, 1)
    assert set(tap.captured) == {"blocks.1.attn", "last", "blocks.0.attn"}
    assert_near(tap.captured["blocks.1.attn"], saliency(query, key)[1:3])
    assert_near(tap.captured["last"], attention_map(query, key)[3:])
    assert tap.captured["blocks.0.attn"].shape == (4, 16)
    assert capture_key("blocks.1.attn", "map") == "blocks.1.attn:map"


def test_tokens_of_the_layer_are_used(tiny_dit: DiT, inputs: Inputs) -> None:
    layer = AttentionLayer("blocks.1.attn", (3, 4), tokens=slice(4, 16))
    with AttentionTap(tiny_dit, [Capture(layer)]) as tap:
        tiny_dit(*inputs)
    query, key = queries_and_keys(tiny_dit, inputs, 1)
    expected = saliency(query, key, tokens=slice(4, 16))
    assert_near(tap.captured["blocks.1.attn"], expected)
    assert expected.shape == (4, 12)


def test_capturing_changes_no_bit_of_the_output(tiny_dit: DiT, inputs: Inputs) -> None:
    plain = tiny_dit(*inputs)
    captures = [Capture(layer, kind=kind) for layer in LAYERS for kind in ("saliency", "map")]  # type: ignore[arg-type]
    with AttentionTap(tiny_dit, captures):
        assert torch.equal(tiny_dit(*inputs), plain)
    assert torch.equal(tiny_dit(*inputs), plain)


def test_gradients_pass_and_what_is_read_carries_none(make_dit: MakeDiT, inputs: Inputs) -> None:
    network = make_dit()
    x = inputs[0].requires_grad_()
    plain = torch.autograd.grad(network(x, *inputs[1:]).sum(), x)[0]
    with AttentionTap(network, [Capture(LAYERS[1])], [(Same("blocks.0.attn"), slice(1, 3))]) as tap:
        tapped = torch.autograd.grad(network(x, *inputs[1:]).sum(), x)[0]
    assert_near(tapped, plain)
    assert not tap.captured["blocks.1.attn"].requires_grad


def test_reads_a_diffusers_unet(inputs: Inputs) -> None:
    """The same mechanism, on a network whose attention none of ours knows."""
    network = small_unet()
    images, t = inputs[0][:, :3], inputs[1]
    plain = network(images, t).sample
    layer = AttentionLayer("mid_block.attentions.0", (4, 4))
    with AttentionTap(network, [Capture(layer)]) as tap:
        assert torch.equal(network(images, t).sample, plain)
    seen = tap.captured[layer.name]
    assert seen.shape == (4, 16) and seen.std() > 1e-3
    torch.testing.assert_close(seen.mean(1), torch.ones(4))
    with AttentionTap(network, edits=[(Identity(layer.name), slice(2, 4))]):
        edited = network(images, t).sample
    assert torch.equal(edited[:2], plain[:2])
    assert (edited[2:] - plain[2:]).abs().max() > 1e-5
    assert traces(network) == []


class Masked(nn.Module):
    """Self-attention that adds a mask per image."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(x, x, x, attn_mask=self.mask, scale=0.5)


@pytest.mark.parametrize("shape", [(4, 4), (3, 1, 4, 4), (3, 2, 1, 4)], ids=str)
def test_mask_and_scale_of_the_call_are_read_and_kept(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    network = nn.Sequential(Masked(torch.randn(shape, generator=random)))
    x = torch.randn(3, 2, 4, 8, generator=random)
    plain = network(x)
    rows = slice(1, 3)
    edits = [(Same("0"), rows)]
    with AttentionTap(network, [Capture(AttentionLayer("0", (2, 2)), rows)], edits) as tap:
        assert_near(network(x), plain)
    mask = network[0].mask.expand(3, 2, 4, 4)
    expected = (x @ x.mT * 0.5 + mask).softmax(-1).mean(1).sum(1)[rows]
    assert_near(tap.captured["0"], expected)


def test_a_tap_looks_at_no_other_modules(
    tiny_dit: DiT, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk through all modules would cost more than all else that a tap does."""

    walked: list[nn.Module] = []
    walk = nn.Module.named_modules

    def seen(module: nn.Module, *args: Any, **known: Any) -> Iterator[tuple[str, nn.Module]]:
        walked.append(module)
        return walk(module, *args, **known)

    monkeypatch.setattr(nn.Module, "named_modules", seen)
    edits = [(Same("blocks.1"), slice(0, 1))]
    with AttentionTap(tiny_dit, [Capture(LAYERS[2])], edits) as tap:
        tiny_dit(*inputs)
    assert set(tap.captured) == {"blocks.2.attn"}
    assert tiny_dit not in walked


def test_a_network_that_has_changed_since_is_read_as_it_is(
    make_dit: MakeDiT, inputs: Inputs
) -> None:
    network, other = make_dit(), make_dit(seed=5)

    def seen(of: DiT) -> Tensor:
        with AttentionTap(of, [Capture(LAYERS[0])]) as tap:
            of(*inputs)
        return tap.captured["blocks.0.attn"]

    before = seen(network)
    network.blocks[0] = nn.Sequential(network.blocks[0])  # The name now leads nowhere.
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn' does not exist"):
        seen(network)
    network.blocks[0] = other.blocks[0]
    after = seen(network)
    expected = make_dit()
    expected.blocks[0] = other.blocks[0]
    assert torch.equal(after, seen(expected)) and not torch.equal(after, before)
