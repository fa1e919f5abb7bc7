"""AttentionTap edits named modules for chosen rows, and no others."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sag_dit.attention import (
    AttentionTap,
    Capture,
    Edit,
    OutputEdit,
    saliency,
)
from sag_dit.models import DiT
from tests.attention.looking import (
    LAYERS,
    Identity,
    Inputs,
    Reverse,
    Same,
    Scale,
    ScaledQueries,
    Skip,
    queries_and_keys,
    traces,
)
from tests.closeness import assert_near

EDITS = [
    Identity("blocks.1.attn"),
    ScaledQueries("blocks.0.attn", by=0.0),
    Skip("blocks.1"),
    Scale("t_embedder", by=3.0),
    Scale("blocks.2.mlp", by=0.0),
    Reverse("blocks.1"),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{type(edit).__name__} {edit.module}")
@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 3), slice(3, 4)], ids=str)
def test_edits_change_their_rows_and_no_others(
    tiny_dit: DiT, inputs: Inputs, edit: Edit, rows: slice
) -> None:
    plain = tiny_dit(*inputs)
    with AttentionTap(tiny_dit, edits=[(edit, slice(0, 4))]):
        everywhere = tiny_dit(*inputs)
    with AttentionTap(tiny_dit, edits=[(edit, rows)]):
        edited = tiny_dit(*inputs)
    chosen = torch.zeros(4, dtype=torch.bool)
    chosen[rows] = True
    assert torch.equal(edited[~chosen], plain[~chosen])
    assert_near(edited[chosen], everywhere[chosen])
    assert ((everywhere - plain).abs().flatten(1).amax(1) > 1e-3).all()
    assert traces(tiny_dit) == []


def test_identity_attention_is_a_linear_map_of_the_values(tiny_dit: DiT, inputs: Inputs) -> None:
    """With every token looking at itself, attention's output is proj(value)."""
    seen: dict[str, Tensor] = {}
    attn = tiny_dit.blocks[1].attn
    handle = attn.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    with AttentionTap(tiny_dit, edits=[(Identity("blocks.1.attn"), slice(0, 4))]):
        tiny_dit(*inputs)
    handle.remove()
    value = attn.qkv(seen["x"])[..., 2 * 48 :]
    assert_near(seen["out"], attn.proj(value))


def test_skipping_a_block_equals_a_network_without_it(tiny_dit: DiT, inputs: Inputs) -> None:
    with AttentionTap(tiny_dit, edits=[(Skip("blocks.1"), slice(0, 4))]):
        skipped = tiny_dit(*inputs)
    del tiny_dit.blocks[1]
    assert_near(skipped, tiny_dit(*inputs))


def test_an_edit_that_attends_as_before_changes_nothing(tiny_dit: DiT, inputs: Inputs) -> None:
    plain = tiny_dit(*inputs)
    with AttentionTap(tiny_dit, edits=[(Same("blocks.1.attn"), slice(1, 3))]):
        assert_near(tiny_dit(*inputs), plain)


def test_captures_see_what_was_before_the_edit_of_the_same_layer(
    tiny_dit: DiT, inputs: Inputs
) -> None:
    query, key = queries_and_keys(tiny_dit, inputs, 1)
    edits = [(Identity("blocks.1.attn"), slice(2, 4))]
    with AttentionTap(tiny_dit, [Capture(LAYERS[1]), Capture(LAYERS[2])], edits) as tap:
        tiny_dit(*inputs)
    assert_near(tap.captured["blocks.1.attn"], saliency(query, key))
    later, _ = queries_and_keys(tiny_dit, inputs, 2)
    assert tap.captured["blocks.2.attn"].shape == (4, 16) and later.shape[0] == 4


def test_edits_of_several_rows_and_modules_at_once(tiny_dit: DiT, inputs: Inputs) -> None:
    """Each row of one batch may be perturbed in its own way."""
    edits: list[tuple[Edit, slice]] = [
        (Identity("blocks.1.attn"), slice(1, 2)),
        (ScaledQueries("blocks.1.attn", by=0.0), slice(2, 3)),
        (Skip("blocks.0"), slice(3, 4)),
    ]
    with AttentionTap(tiny_dit, edits=edits):
        together = tiny_dit(*inputs)
    plain = tiny_dit(*inputs)
    assert torch.equal(together[0], plain[0])
    for edit, rows in edits:
        with AttentionTap(tiny_dit, edits=[(edit, rows)]):
            assert_near(together[rows], tiny_dit(*inputs)[rows])


@pytest.mark.parametrize(
    "edits",
    [
        (ScaledQueries("blocks.1.attn", by=0.5), ScaledQueries("blocks.1.attn", by=3.0)),
        (Scale("blocks.1.mlp", by=0.5), Scale("blocks.1.mlp", by=3.0)),
    ],
    ids=["attention", "output"],
)
def test_two_edits_of_the_same_module_and_rows_both_act(
    tiny_dit: DiT, inputs: Inputs, edits: tuple[Edit, Edit]
) -> None:
    """Halving and tripling is one and a half times; dropping one of them silently is not."""
    product = type(edits[0])(edits[0].module, by=1.5)  # type: ignore[call-arg]
    with AttentionTap(tiny_dit, edits=[(edit, slice(0, 2)) for edit in edits]):
        both = tiny_dit(*inputs)
    with AttentionTap(tiny_dit, edits=[(product, slice(0, 2))]):
        assert_near(both, tiny_dit(*inputs))


@dataclass(frozen=True)
class Wrong(OutputEdit):
    """Puts out something of another shape or type than the module."""

    how: str

    def edit_output(self, x: Tensor, output: Tensor) -> Tensor:
        return output[:1] if self.how == "rows" else output.double()


def test_an_edit_in_another_type_leaves_the_type_of_the_others(
    tiny_dit: DiT, inputs: Inputs
) -> None:
    """Perturbations compute in float32; the rest of a half-precision batch must not follow."""
    with AttentionTap(tiny_dit, edits=[(Wrong("blocks.1", "type"), slice(0, 2))]):
        out = tiny_dit(*inputs)
    assert out.dtype == torch.float32
    assert torch.equal(out[2:], tiny_dit(*inputs)[2:])


def test_an_edit_that_loses_rows_is_refused(tiny_dit: DiT, inputs: Inputs) -> None:
    """Rows that close ranks would hand an image the prediction of its neighbour."""
    with (
        pytest.raises(ValueError, match=r"blocks\.1"),
        AttentionTap(tiny_dit, edits=[(Wrong("blocks.1", "rows"), slice(0, 2))]),
    ):
        tiny_dit(*inputs)
