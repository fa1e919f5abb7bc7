"""Every guidance method on the UNet of ADM and IDDPM, with classes and a learned variance."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from benchmarks.methods import classes, setting
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import APG, CFG, ICG, Autoguidance, GuidedDenoiser, SelfGuidance, Term
from sag_dit.models.unet.network import UNet
from sag_dit.process import DDPM, Prediction
from tests.closeness import assert_near
from tests.guidance.every import edits_base, every, guided, switched_off
from tests.guidance.hunter import Asked
from tests.guidance.reference import counted, step_at
from tests.small import filled


def small_unet(seed: int = 0, **options: int | float) -> ClassConditional:
    """A UNet that attends at 4 x 4, none of whose weights is zero."""
    classes: dict[str, int | float] = {"num_classes": 10, "class_dropout_prob": 0.1}
    network = UNet(
        input_size=8,
        in_channels=4,
        model_channels=32,
        num_res_blocks=1,
        channel_mult=(1, 2),
        attention_resolutions=(4,),
        num_head_channels=32,
        **{**classes, **options},  # type: ignore[arg-type]
    )
    filled(network, seed, of_vectors=0.2)
    return ClassConditional(network.eval().requires_grad_(False), DDPM())


UNET = small_unet()
NEEDED: dict[str, str] = {
    "blocks": "stands among convolutions, and token perturbation.*tpg_scale=0",
    "dit": "guides DiT models only.*tsg_scale=1",
    "text": "attention sees a text.*nag_scale=0",
    "cross": "cross-attention to a text.*pladis_scale=0",
    "flow": "guides flow models.*DDPM",
}
"""What a UNet lacks, and how a method that needs it refuses."""
TERMS: dict[str, Term] = {
    name: term for name, term in every("eps").items() if not term.needs & NEEDED.keys()
}
TERMS["autoguidance"] = Autoguidance(1.7, worse=small_unet(9))
REFUSED: dict[str, tuple[Term, str]] = {
    kind.title: (setting(kind, 0.7), NEEDED[need])
    for kind in classes()
    for need in kind.needs & NEEDED.keys()
}


@cache
def plain_at(index: int) -> Prediction:
    """What the UNet says by itself."""
    return guided(UNET, [], step_at(UNET.process, index))


@pytest.mark.parametrize("name", TERMS)
def test_every_method_guides_a_unet(name: str) -> None:
    """It changes v, stays finite, is the same branch by branch, and costs nothing when off."""
    term = TERMS[name]
    # Where nothing lies before or is noisier, some have nothing to say; HiGS rests near the end.
    rests = term.remembers or isinstance(term, SelfGuidance)
    for index in (2, 5) if rests else (0, 9):
        step, plain = step_at(UNET.process, index), plain_at(index)
        with counted(UNET) as rows:
            off = guided(UNET, [switched_off(term)], step)
        assert rows == [3] and torch.equal(off.v, plain.v)
        found = guided(UNET, [term], step)
        assert found.v.isfinite().all()
        size = plain.v.abs().amax()
        change = (found.v - plain.v).abs().flatten(1).amax(dim=1)
        assert (
            (change > 1e-5 * size).all() if Asked.at(UNET, index).acts(term) else not change.any()
        )
        assert found.variance_fraction is not None and plain.variance_fraction is not None
        # The variance is the base's, which some have asked otherwise.
        if not edits_base(term):
            assert_near(found.variance_fraction, plain.variance_fraction)
        apart = guided(UNET, [term], step, max_rows=3).v
        assert_near(apart, found.v, 1e-4)


def test_all_at_once_equal_one_by_one() -> None:
    step = step_at(UNET.process, 4)
    terms = list(TERMS.values())
    with counted(UNET) as rows:
        together = guided(UNET, terms, step).v
    with counted(UNET) as rows_apart:
        apart = guided(UNET, terms, step, max_rows=3).v
    # Several branches share a call.
    assert len(rows) < len(rows_apart) and sum(rows) == sum(rows_apart)
    assert_near(together, apart, 1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_guide_a_unet_is_refused(name: str) -> None:
    term, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        GuidedDenoiser(UNET, [term])


@pytest.mark.parametrize("term", [CFG(1.7), CFG(1.7, rescale=0.7), APG(1.7), ICG(1.7)])
def test_a_unet_without_classes_has_nothing_to_be_guided_away_from(term: Term) -> None:
    """As published for 256 pixels; with classes, ADM has no null class either."""
    with pytest.raises(ValueError, match=f"{type(term).__name__.lower()}_scale=1.7"):
        GuidedDenoiser(small_unet(num_classes=0, class_dropout_prob=0.0), [term])
    if not isinstance(term, ICG):
        with pytest.raises(ValueError, match="no null condition"):
            GuidedDenoiser(small_unet(class_dropout_prob=0.0), [term])
