"""Branches that differ from a block on share the blocks before it, and the answer is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sag_dit.attention import InputEdit, OutputEdit
from sag_dit.cli.evaluate import costs
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import (
    CFG,
    PAG,
    SAG,
    SEG,
    SLG,
    TPG,
    TSG,
    GuidedDenoiser,
    Question,
    Term,
    cost_of,
)
from sag_dit.guidance.slg import Skip
from sag_dit.guidance.term import Asking
from sag_dit.guidance.tpg import Shuffle
from sag_dit.identity import settings as identity_of
from sag_dit.models import DiT
from sag_dit.process import DDPM, Prediction
from sag_dit.sampler import DDIM
from sag_dit.sampling import Pixels, Settings
from sag_dit.study.measurement import ToDraw
from tests.closeness import assert_near
from tests.guidance.every import NOISE, batch, small_dit
from tests.guidance.reference import step_at
from tests.guidance.test_unet_methods import small_unet

DEPTH, IMAGES = 6, 3
WITHIN = 1e-9
"""Of float64, in which rounding hides nothing."""
ORDER = torch.arange(16).flip(0).expand(IMAGES, 16)


def exact(network: DiT) -> ClassConditional:
    return ClassConditional(network.double(), DDPM())


@pytest.fixture(scope="module")
def model() -> ClassConditional:
    return exact(small_dit(depth=DEPTH, learn_sigma=True))


@contextmanager
def rows_of_blocks(model: ClassConditional) -> Iterator[list[list[int]]]:
    """The rows that each block is given, for every forward pass."""
    calls: list[list[int]] = []

    def count(block: int, args: tuple[Tensor, ...]) -> None:
        if block == 0:
            calls.append([])
        calls[-1].append(len(args[0]))

    handles = [
        block.register_forward_pre_hook(lambda _, args, i=i: count(i, args))
        for i, block in enumerate(model.network.blocks)
    ]
    yield calls
    for handle in handles:
        handle.remove()


def asked(model: ClassConditional, terms: Sequence[Term], **options: Any) -> Prediction:
    x, labels = batch(IMAGES)
    captures = options.pop("captures", ())
    guided = GuidedDenoiser(model, terms, noise=NOISE, **options)
    return guided(x.double(), step_at(model.process, 4), labels, captures)


def assert_same(found: Prediction, expected: Prediction) -> None:
    assert_near(found.v, expected.v, WITHIN)
    assert found.variance_fraction is not None and expected.variance_fraction is not None
    assert_near(found.variance_fraction, expected.variance_fraction, WITHIN)
    assert found.attention.keys() == expected.attention.keys()
    for name, seen in found.attention.items():
        assert_near(seen, expected.attention[name])  # Read in float32.


@dataclass(frozen=True)
class Read(Term):
    """Guides away from a skipped block, asked before the base; reads one layer of both."""

    block: int = 3
    layer: int = 1

    def contribution(self, ask: Question) -> Asking:
        layer = f"blocks.{self.layer}"
        worse = ask.base.edited(Skip(f"blocks.{self.block}"))
        bad, good = yield worse.capturing(layer), ask.base.capturing(layer)
        seen = [each.attention[f"{layer}.attn"].mean(1) for each in (bad, good)]
        weight = 1 + (seen[0] - 2 * seen[1])[:, None, None, None]
        return self.scale * weight * (good.v - bad.v)


@dataclass(frozen=True)
class Doubled(OutputEdit):
    def edit_output(self, x: Tensor, output: Tensor) -> Tensor:
        return 2 * output


@dataclass(frozen=True)
class Halved(InputEdit):
    def edit_input(self, x: Tensor) -> Tensor:
        return x / 2


@dataclass(frozen=True)
class Edited(Term):
    """Guides away from edits of modules, on top of others that both branches have."""

    bad: tuple[Any, ...] = ()
    both: tuple[Any, ...] = ()

    def contribution(self, ask: Question) -> Asking:
        common = ask.base.edited(*self.both) if self.both else ask.base
        good, bad = yield common, common.edited(*self.bad)
        return self.scale * (good.v - bad.v)


CASES: dict[str, tuple[list[Term], list[list[int]]]] = {
    # The middle of six blocks is number 2.
    "PAG": ([PAG(0.7)], [[1, 1, 2, 2, 2, 2]]),
    "SEG": ([SEG(0.7, layers=3)], [[1, 1, 1, 2, 2, 2]]),
    "SEG, finite": ([SEG(0.7, layers=1, blur_sigma=0.8)], [[1, 2, 2, 2, 2, 2]]),
    "SLG": ([SLG(0.7, layers=[4, 2])], [[1, 1, 2, 2, 2, 2]]),
    "TPG": ([TPG(0.7, layers=5)], [[1, 1, 1, 1, 1, 2]]),
    "PAG of the null branch": (
        [CFG(2.0), PAG(0.7, branch="null", layers=4)],
        [[2, 2, 2, 2, 3, 3]],
    ),
    # Both perturb block 2, so they part where the second one goes on to block 5.
    "one of another": (
        [PAG(0.7, layers=2), PAG(0.4, layers=[2, 5]), PAG(0.4, layers=[2, 5, 4])],
        [[1, 1, 2, 2, 3, 4]],
    ),
    "beside a second round": (
        [SAG(0.5, layer=1), PAG(0.7), CFG(2.0)],
        [[2, 2, 3, 3, 3, 3], [1] * 6],
    ),
    "several at once": (
        [SLG(0.3, layers=4), CFG(1.5), PAG(0.7), SEG(0.5, layers=4), TPG(0.2, layers=1), TSG(1.5)],
        [[3, 4, 5, 5, 7, 7]],
    ),
    "the worse one first": ([Read(0.7)], [[1, 1, 1, 2, 2, 2]]),
    "reading behind": ([Read(0.7, layer=4)], [[1, 1, 1, 2, 2, 2]]),
    "reading in the block": ([Read(0.7, layer=3)], [[1, 1, 1, 2, 2, 2]]),
    # What is no part of a block is on no side of one, so nothing is shared with it.
    "from the first block on": ([SLG(0.7, layers=0)], [[2] * 6]),
    "the time embedding": ([TSG(1.7)], [[2] * 6]),
    "outside, before": ([Edited(0.7, (Doubled("x_embedder"),))], [[2] * 6]),
    "outside, behind": ([Edited(0.7, (Halved("final_layer"),))], [[2] * 6]),
    "outside in both": (
        [Edited(0.7, (Skip("blocks.4"),), (Doubled("t_embedder"),))],
        [[3] * 6],
    ),
    "an edit that both have": (
        [Edited(0.7, (Skip("blocks.4"),), (Doubled("blocks.1.mlp"),))],
        [[1, 2, 2, 2, 3, 3]],
    ),
    # An edit that fits three images fails where it is given the rows of none.
    "an order that both have": (
        [Edited(0.7, (Skip("blocks.4"),), (Shuffle("blocks.1", ORDER),))],
        [[1, 2, 2, 2, 3, 3]],
    ),
    "one module twice": (
        [Edited(0.7, (Doubled("blocks.3.mlp"),), (Doubled("blocks.3.mlp"),))],
        [[1, 1, 1, 3, 3, 3]],
    ),
    "no method": ([], [[1] * 6]),
}


@pytest.mark.parametrize("name", CASES)
def test_fewer_rows_run_and_the_answer_is_the_same(model: ClassConditional, name: str) -> None:
    terms, expected = CASES[name]
    captures = [("blocks.0.attn", "saliency"), ("blocks.5.attn", "map")]
    apart = asked(model, terms, captures=captures)
    with rows_of_blocks(model) as rows:
        shared = asked(model, terms, captures=captures, share_prefixes=True)
    assert rows == [[each * IMAGES for each in call] for call in expected]
    assert_same(shared, apart)
    # The cost is what the blocks have counted. At the last step, t = 0, TSG rests.
    cost = cost_of(model, terms, DDIM(), 3, share_prefixes=True)
    assert cost.rows[:2] == pytest.approx([sum(map(sum, expected)) / DEPTH] * 2)
    assert cost.rounds == (len(expected),) * 3


ALL = CASES["several at once"][0]


@pytest.mark.parametrize(
    ("max_rows", "expected"),
    [
        (3, [[1] * 6] * 7),
        # Those of one condition are put together: the null branch comes last.
        (6, [[1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 2, 2], [2] * 6, [1] * 6]),
        (20, None),
        (21, [[3, 4, 5, 5, 7, 7]]),
    ],
)
def test_within_a_bound_of_rows(
    model: ClassConditional, max_rows: int, expected: list[list[int]] | None
) -> None:
    with rows_of_blocks(model) as rows:
        shared = asked(model, ALL, max_rows=max_rows, share_prefixes=True)
    assert max(map(max, rows)) <= max_rows
    assert_same(shared, asked(model, ALL))
    if expected is not None:
        assert sorted(rows) == sorted([each * IMAGES for each in call] for call in expected)
    cost = cost_of(model, ALL, DDIM(), 1, max_rows=max_rows // IMAGES, share_prefixes=True)
    assert cost.rows[0] == pytest.approx(sum(map(sum, rows)) / DEPTH / IMAGES)


def test_beside_compiled_blocks(model: ClassConditional) -> None:
    torch._dynamo.reset()
    compiled = exact(small_dit(depth=DEPTH, learn_sigma=True))
    for block in compiled.network.blocks:
        block.compile(fullgraph=True, backend="eager")
    terms = [CFG(2.0), PAG(0.7), SLG(0.3, layers=4)]
    for _ in range(2):
        assert_same(asked(compiled, terms, share_prefixes=True), asked(model, terms))
    assert_same(asked(compiled, terms), asked(model, terms))


def test_what_is_held_between_is_not_paid(model: ClassConditional) -> None:
    cost = cost_of(model, [PAG(0.7, every=2)], DDIM(), 4, share_prefixes=True)
    assert cost.rows == pytest.approx([1 + 4 / 6, 1, 1 + 4 / 6, 1])
    assert str(cost).startswith("1.33 x unguided, 5.3 passes")


class Unforked(DiT):
    """A network of somebody who has written the forward pass anew."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, y)


def test_other_networks_evaluate_whole_rows() -> None:
    own = Unforked(8, hidden_size=16, depth=3, num_heads=2, num_classes=10, learn_sigma=False)
    for model in (small_unet(), ClassConditional(own.eval().requires_grad_(False), DDPM())):
        x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        step, labels = step_at(model.process, 4), torch.tensor([1, 2])
        term = PAG(0.7, layers=-1)
        shared = GuidedDenoiser(model, [term], share_prefixes=True)(x, step, labels)
        assert torch.equal(shared.v, GuidedDenoiser(model, [term])(x, step, labels).v)
        told = Settings(DDIM(), 3, (term,), share_prefixes=True).unshared(model)
        assert told is not None and f"a {type(model.network).__name__} is no chain" in told


@pytest.mark.parametrize(
    ("terms", "options", "told"),
    [
        ((PAG(0.7),), {}, None),
        ((PAG(0.7),), {"batch_size": 4, "max_rows": 8}, None),
        ((PAG(0.7),), {"batch_size": 4, "max_rows": 7}, "max_rows=7 parts the rows"),
        ((SAG(0.7), CFG(2.0)), {}, "no method that is on changes the network"),
        ((PAG(0.7, layers=0),), {}, "no method that is on changes the network"),
    ],
)
def test_where_nothing_is_saved_a_sentence_says_why(
    model: ClassConditional, terms: tuple[Term, ...], options: dict[str, Any], told: str | None
) -> None:
    found = Settings(DDIM(), 3, terms, share_prefixes=True, **options).unshared(model)
    assert found is None if told is None else found is not None and told in found
    assert Settings(DDIM(), 3, terms, **options).unshared(model) is None


def test_a_table_says_it_only_where_no_row_of_it_saves_anything(model: ClassConditional) -> None:
    def told(*terms: Term) -> list[str]:
        rows: list[Any] = []
        for term in terms:
            how = Settings(DDIM(), 3, (term,), share_prefixes=True)
            one: Any = SimpleNamespace(denoiser=model)
            images = ToDraw(one, how, (), {}, how.cost(model))
            rows.append(SimpleNamespace(images=images, setting=SimpleNamespace(name=str(term))))
        return [line for line in costs(rows) if "share_prefixes" in line]

    assert told(PAG(0.7), CFG(2.0)) == []
    (line,) = told(SAG(0.7), CFG(2.0))
    assert line.startswith("share_prefixes=true saves nothing here: no method that is on")


def test_a_run_is_named_by_it_only_where_it_is_on() -> None:
    stated: dict[str, Any] = dict.fromkeys(
        ("model", "weights_sha256", "network", "codec", "sampler", "steps", "guidance", "request"),
        "any",
    )
    stated |= {"batch_size": 1, "max_rows": None, "precision": "any"}
    assert identity_of(Pixels(**stated)) == stated
    on = identity_of(Pixels(**stated, share_prefixes=True))
    assert on == stated | {"share_prefixes": True}
