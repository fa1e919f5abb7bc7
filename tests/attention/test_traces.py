"""Nothing is left behind by a tap, whatever happens, and what cannot be tapped is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from sag_dit.attention import (
    AttentionEdit,
    AttentionLayer,
    AttentionTap,
    Capture,
    Edit,
)
from sag_dit.attention.edits import Attend
from sag_dit.models import DiT
from tests.attention.looking import (
    LAYERS,
    Identity,
    Inputs,
    Reverse,
    Same,
    Skip,
    small_unet,
    traces,
)


class Boom(Exception):
    """Raised on purpose."""


@dataclass(frozen=True)
class Raise(AttentionEdit):
    def edit_attention(self, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        raise Boom


def everything() -> tuple[list[Capture], list[tuple[Edit, slice]]]:
    edits: Sequence[Edit] = (Same("blocks.0.attn"), Skip("blocks.1"), Reverse("blocks.2"))
    return [Capture(layer) for layer in LAYERS], [(edit, slice(0, 2)) for edit in edits]


def test_nothing_is_left_after_a_clean_run(tiny_dit: DiT, inputs: Inputs) -> None:
    with AttentionTap(tiny_dit, *everything()):
        assert traces(tiny_dit) != []
        tiny_dit(*inputs)
    assert traces(tiny_dit) == []


@pytest.mark.parametrize("where", ["attention", "inside", "behind", "context"])
def test_nothing_is_left_after_an_exception(
    tiny_dit: DiT, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Raised by an edit, within a tapped module, in a module behind it, or by the caller."""

    def boom(*_: object) -> Tensor:
        raise Boom

    tiny_dit.compile_blocks()
    compiled = [block._compiled_call_impl for block in tiny_dit.blocks]
    captures, edits = everything()
    if where == "attention":
        edits.append((Raise("blocks.1.attn"), slice(0, 1)))
    elif where == "inside":
        monkeypatch.setattr(tiny_dit.blocks[1].attn.proj, "forward", boom)
    elif where == "behind":
        monkeypatch.setattr(tiny_dit.final_layer, "forward", boom)
    tap = AttentionTap(tiny_dit, captures, edits)
    with pytest.raises(Boom), tap:
        tiny_dit(*inputs)
        raise Boom
    assert traces(tiny_dit) == []
    assert [block._compiled_call_impl for block in tiny_dit.blocks] == compiled
    assert None not in compiled


def test_nothing_is_left_when_entering_fails(
    tiny_dit: DiT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last hook cannot be placed: those before it, and the compiled calls, come back."""

    def boom(*_: object, **__: object) -> None:
        raise Boom

    tiny_dit.compile_blocks()
    compiled = [block._compiled_call_impl for block in tiny_dit.blocks]
    monkeypatch.setattr(tiny_dit.final_layer, "register_forward_hook", boom)
    captures, edits = everything()
    with (
        pytest.raises(Boom),
        AttentionTap(tiny_dit, captures, [*edits, (Skip("final_layer"), slice(0, 1))]),
    ):
        pytest.fail("entered")
    assert traces(tiny_dit) == []
    assert [block._compiled_call_impl for block in tiny_dit.blocks] == compiled


def test_a_handled_exception_does_not_disturb_the_next_forward(
    tiny_dit: DiT, inputs: Inputs
) -> None:
    plain = tiny_dit(*inputs)
    with pytest.raises(Boom), AttentionTap(tiny_dit, edits=[(Raise("blocks.1.attn"), slice(0, 1))]):
        tiny_dit(*inputs)
    with AttentionTap(tiny_dit, [Capture(LAYERS[1])]) as tap:
        assert torch.equal(tiny_dit(*inputs), plain)
    assert set(tap.captured) == {"blocks.1.attn"}


def test_attention_is_not_watched_beyond_a_module_that_raised(
    tiny_dit: DiT, inputs: Inputs
) -> None:
    """Also within the context: what the caller does after catching is its own."""
    with AttentionTap(tiny_dit, edits=[(Raise("blocks.1.attn"), slice(0, 1))]):
        with pytest.raises(Boom):
            tiny_dit(*inputs)
        assert _get_current_function_mode_stack() == []


def test_nothing_is_left_after_an_interruption(
    tiny_dit: DiT, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control-C is no Exception, and PyTorch runs no hook for it."""

    def interrupt(*_: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_dit.blocks[1].attn.proj, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt), AttentionTap(tiny_dit, *everything()):
        tiny_dit(*inputs)
    assert traces(tiny_dit) == []


def test_hooks_of_others_stay(tiny_dit: DiT, inputs: Inputs) -> None:
    seen: list[int] = []
    handle = tiny_dit.blocks[1].attn.register_forward_hook(lambda *_: seen.append(1))
    with AttentionTap(tiny_dit, [Capture(LAYERS[1])]):
        tiny_dit(*inputs)
    tiny_dit(*inputs)
    assert len(seen) == 2
    handle.remove()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["capture", "edit"])
def test_an_unknown_layer_is_refused_and_those_that_attend_are_listed(
    tiny_dit: DiT, what: str
) -> None:
    captures = [Capture(AttentionLayer("blocks.7.attn", (4, 4)))] if what == "capture" else []
    edits: list[tuple[Edit, slice]] = [(Skip("blocks.7.attn"), slice(0, 1))] * (what == "edit")
    expected = (
        r"'blocks.7.attn' does not exist in DiT.*"
        r" blocks.0.attn, blocks.1.attn, blocks.2.attn$"
    )
    with pytest.raises(ValueError, match=expected):
        AttentionTap(tiny_dit, captures, edits)


def test_attention_layers_of_a_foreign_network_are_listed_too() -> None:
    with pytest.raises(ValueError, match=r"UNet2DModel.*mid_block\.attentions\.0"):
        AttentionTap(small_unet(), [Capture(LAYERS[0])])


def test_a_layer_that_does_not_fuse_its_attention_is_refused(tiny_dit: DiT, inputs: Inputs) -> None:
    """timm computes the softmax by itself then, and the tap would see nothing, silently."""
    attention = timm.layers.Attention(tiny_dit.pos_embed.shape[-1], num_heads=2)
    attention.fused_attn = False
    tiny_dit.blocks[1].attn = attention
    expected = r"blocks\.1\.attn.*seen in blocks\.0\.attn.*fused"
    with (
        pytest.raises(ValueError, match=expected),
        AttentionTap(tiny_dit, [Capture(LAYERS[0]), Capture(LAYERS[1])]),
    ):
        tiny_dit(*inputs)
    assert traces(tiny_dit) == []
    with (
        pytest.raises(ValueError, match=r"blocks\.1\.attn"),
        AttentionTap(tiny_dit, edits=[(Identity("blocks.1.attn"), slice(0, 1))]),
    ):
        tiny_dit(*inputs)


@pytest.mark.parametrize("module", ["blocks.0.mlp", "x_embedder"])
def test_a_module_without_attention_is_refused(tiny_dit: DiT, inputs: Inputs, module: str) -> None:
    with (
        pytest.raises(ValueError, match=f"{module}.*no call of fused attention"),
        AttentionTap(tiny_dit, [Capture(AttentionLayer(module, (4, 4)))]),
    ):
        tiny_dit(*inputs)


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_causal_attention_is_refused() -> None:
    network = nn.Sequential(Causal())
    with (
        pytest.raises(ValueError, match=r"'0' attends causally"),
        AttentionTap(network, [Capture(AttentionLayer("0", (2, 2)))]),
    ):
        network(torch.randn(1, 2, 4, 8))
    assert traces(network) == []


class Twice(nn.Module):
    """A block with self-attention and attention to something else, as text-to-image models have."""

    def forward(self, x: Tensor) -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(attend(x, x, x), x[..., :3, :], x[..., :3, :])


def test_a_module_that_attends_twice_is_refused() -> None:
    """Which of the two calls was meant cannot be known, and the last is not it here."""
    network = nn.Sequential(Twice())
    with (
        pytest.raises(ValueError, match="'0'"),
        AttentionTap(network, [Capture(AttentionLayer("0", (2, 2)))]),
    ):
        network(torch.randn(1, 2, 4, 8))
