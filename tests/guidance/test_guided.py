"""GuidedDenoiser: what is asked, and what comes of it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

import pytest
import torch
from torch import Tensor

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG, BlurGuidance, GuidedDenoiser, Question, Term
from sag_dit.guidance.term import Asking
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM
from tests.closeness import assert_near
from tests.conftest import MakeDiT
from tests.guidance.reference import counted, step_at

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def batch() -> Batch:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([1, 2, 3])


# --- sums -----------------------------------------------------------------------------------------


def test_sums_commute_and_add_up(denoiser: ClassConditional, batch: Batch) -> None:
    """Apart from SAG's choice of a branch beside CFG, terms know nothing of one another."""
    step = step_at(denoiser.process, 4)
    terms: list[Term] = [CFG(2.0), SAG(0.7, branch="cond"), BlurGuidance(0.3, branch="cond")]

    def added(*chosen: Term) -> Tensor:
        plain = GuidedDenoiser(denoiser)(batch[0], step, batch[1]).v
        return GuidedDenoiser(denoiser, chosen)(batch[0], step, batch[1]).v - plain

    whole = added(*terms)
    assert_near(whole, added(*reversed(terms)))
    parts = torch.stack([added(term) for term in terms]).sum(dim=0)
    assert_near(whole, parts)


def test_contributions_are_linear_in_the_scale(denoiser: ClassConditional, batch: Batch) -> None:
    step = step_at(denoiser.process, 4)
    plain = GuidedDenoiser(denoiser)(batch[0], step, batch[1]).v
    once, thrice = (
        GuidedDenoiser(denoiser, [SAG(scale)])(batch[0], step, batch[1]).v - plain
        for scale in (0.5, 1.5)
    )
    assert_near(3 * once, thrice, scale=plain)


def test_a_sum_of_nothing_is_the_model(denoiser: ClassConditional, batch: Batch) -> None:
    step = step_at(denoiser.process, 4)
    guided = GuidedDenoiser(denoiser)(batch[0], step, batch[1])
    plain = denoiser(batch[0], step.level, batch[1])
    assert torch.equal(guided.v, plain.v)
    assert guided.x_t is batch[0] and guided.level == step.level


# --- what else is answered ------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [[CFG(4.0)], [SAG(1.0)], [CFG(4.0), SAG(1.0, branch="null")]])
def test_variance_is_that_of_the_clean_base(
    denoiser: ClassConditional, batch: Batch, terms: list[Term]
) -> None:
    step = step_at(denoiser.process, 4)
    plain = denoiser(batch[0], step.level, batch[1]).variance_fraction
    null = denoiser(batch[0], step.level, torch.full_like(batch[1], 10)).variance_fraction
    guided = GuidedDenoiser(denoiser, terms)(batch[0], step, batch[1]).variance_fraction
    assert plain is not None and null is not None and guided is not None
    assert_near(guided, plain)
    assert (null - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("terms", "label"),
    [([SAG(1.0)], 1), ([CFG(2.0), SAG(1.0)], 10), ([CFG(2.0), SAG(1.0, branch="cond")], 1)],
)
def test_attention_is_what_sag_has_seen(
    denoiser: ClassConditional, batch: Batch, terms: list[Term], label: int
) -> None:
    """The saliency of the branch that was degraded, whatever is captured of the base besides."""
    x, step = batch[0], step_at(denoiser.process, 4)
    y = torch.ones_like(batch[1])
    name, read = "blocks.1.attn", [("blocks.1", "saliency")]
    given, degraded = (
        GuidedDenoiser(denoiser)(x, step, torch.full_like(y, each), read).attention[f"base/{name}"]
        for each in (1, label)
    )
    alone = GuidedDenoiser(denoiser, terms)(x, step, y)
    beside = GuidedDenoiser(denoiser, terms)(x, step, y, read)
    assert set(alone.attention) == {name}
    assert set(beside.attention) == {name, f"base/{name}"}
    assert_near(alone.attention[name], degraded)
    assert_near(beside.attention[name], degraded)
    assert_near(beside.attention[f"base/{name}"], given)
    assert torch.equal(beside.v, alone.v)


def test_of_two_terms_that_read_a_layer_the_first_counts(
    denoiser: ClassConditional, batch: Batch
) -> None:
    step = step_at(denoiser.process, 4)
    terms = [SAG(0.5, branch="cond"), SAG(0.5, branch="null")]
    alone, both, turned = (
        GuidedDenoiser(denoiser, chosen)(batch[0], step, batch[1]).attention["blocks.1.attn"]
        for chosen in (terms[:1], terms, terms[::-1])
    )
    assert_near(both, alone)
    assert (turned - alone).abs().max() > 1e-2


def test_layers_may_be_captured_without_any_term(denoiser: ClassConditional, batch: Batch) -> None:
    step = step_at(denoiser.process, 4)
    with counted(denoiser) as rows:
        read = [("blocks.0", "saliency"), ("auto", "saliency")]
        seen = GuidedDenoiser(denoiser, [SAG(1.0)])(batch[0], step, batch[1], read).attention
    assert rows == [3, 3]
    assert set(seen) == {"base/blocks.0.attn", "base/blocks.1.attn", "blocks.1.attn"}


# --- mistakes in a term ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistaken(Term):
    """A method with a mistake that anybody writing one will make."""

    _: KW_ONLY
    what: str

    def contribution(self, ask: Question) -> Asking:
        if self.what == "asks nothing":
            () = yield ()
            return torch.ones_like(ask.base.x_t)
        (base,) = yield (ask.base,)
        if self.what == "returns nothing":
            return None  # type: ignore[return-value]
        return base.v[:1, :, :1]


@pytest.mark.parametrize("what", ["returns nothing", "returns another shape"])
def test_a_term_that_returns_no_contribution_is_refused(
    denoiser: ClassConditional, batch: Batch, what: str
) -> None:
    """Silent no-ops are the commonest bug of guidance."""
    with pytest.raises((ValueError, TypeError), match="Mistaken"):
        GuidedDenoiser(denoiser, [Mistaken(what=what)])(
            batch[0], step_at(denoiser.process, 4), batch[1]
        )


def test_a_round_without_questions_is_no_end(denoiser: ClassConditional, batch: Batch) -> None:
    step = step_at(denoiser.process, 4)
    plain = GuidedDenoiser(denoiser)(batch[0], step, batch[1])
    guided = GuidedDenoiser(denoiser, [Mistaken(what="asks nothing")])(batch[0], step, batch[1])
    assert_near(guided.v, plain.v + 1)


def test_noise_of_the_run_reaches_the_terms(denoiser: ClassConditional, batch: Batch) -> None:
    @dataclass(frozen=True)
    class Noisy(Term):
        def contribution(self, ask: Question) -> Asking:
            assert ask.noise is not None
            return ask.noise.normal(ask.step.index, ask.base.x_t.shape[1:], purpose=7)
            yield ()

    source = NoiseSource([0, 0, 0], [4, 5, 6])
    step = step_at(denoiser.process, 4)
    plain = GuidedDenoiser(denoiser)(batch[0], step, batch[1])
    guided = GuidedDenoiser(denoiser, [Noisy()], noise=source)(batch[0], step, batch[1])
    expected = source.normal(4, (4, 8, 8), purpose=7)
    assert_near(guided.v, plain.v + expected)


def test_a_worse_model_is_asked_in_its_own_batch(
    denoiser: ClassConditional, make_dit: MakeDiT, batch: Batch
) -> None:
    """Autoguidance beside CFG and SAG: each model has its batches, questions do not mix."""
    worse = ClassConditional(make_dit(seed=9, depth=1), DDPM())

    @dataclass(frozen=True)
    class Autoguidance(Term):
        def contribution(self, ask: Question) -> Asking:
            good, bad = yield ask.base, replace(ask.base, model=worse)
            return good.v - bad.v

    step = step_at(denoiser.process, 4)
    base, bad = (model(batch[0], step.level, batch[1]).v for model in (denoiser, worse))
    with counted(denoiser) as rows, counted(worse) as worse_rows:
        alone = GuidedDenoiser(denoiser, [Autoguidance()])(batch[0], step, batch[1])
    assert_near(alone.v, 2 * base - bad)
    assert (rows, worse_rows) == ([3], [3])
    with counted(denoiser) as rows, counted(worse) as worse_rows:
        terms = [Autoguidance(), CFG(2.0), SAG(1.0)]
        together = GuidedDenoiser(denoiser, terms)(batch[0], step, batch[1])
    assert (rows, worse_rows) == ([6, 3], [3])
    apart = GuidedDenoiser(denoiser, terms[1:])(batch[0], step, batch[1])
    assert_near(together.v, apart.v + base - bad)
