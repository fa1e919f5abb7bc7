"""An image depends on its own request only: not on its neighbours, its place or the batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG, GuidedDenoiser, Term
from sag_dit.noise import START, NoiseSource
from sag_dit.sampler import DDIM, Ancestral, Sampler
from tests.closeness import assert_near, places_are_alike

Asked = tuple[int, int, int]
"""Seed, index and label of one image."""

TERMS: list[list[Term]] = [[], [CFG(2.0)], [SAG(1.0)], [CFG(2.0), SAG(0.5)]]


def drawn(
    model: ClassConditional, sampler: Sampler, terms: list[Term], asked: list[Asked]
) -> dict[Asked, Tensor]:
    """The images of one batch."""
    seeds, indices, labels = zip(*asked, strict=True)
    noise = NoiseSource(seeds, indices)
    guided = GuidedDenoiser(model, terms, noise=noise)
    x = noise.normal(START, model.latent_shape)
    y = torch.tensor(labels)
    for each in sampler.steps(
        lambda x_t, step: guided(x_t, step, y), x, model.process, 4, noise, model.x_0_range
    ):
        x = each.x
    assert x.isfinite().all()
    return dict(zip(asked, x, strict=True))


@pytest.mark.parametrize(
    "terms", TERMS, ids=lambda terms: "+".join(type(t).__name__ for t in terms)
)
@pytest.mark.parametrize("sampler", [DDIM(), DDIM(eta=1.0), Ancestral()], ids=str)
def test_place_and_neighbours_change_no_bit(
    denoiser: ClassConditional, sampler: Sampler, terms: list[Term]
) -> None:
    """Where the processor has it that a place changes bits, these are the last ones."""
    first = drawn(denoiser, sampler, terms, [(0, 0, 1), (0, 1, 2), (0, 2, 3), (7, 3, 4)])
    other = drawn(denoiser, sampler, terms, [(9, 9, 9), (7, 3, 4), (0, 0, 1), (0, 1, 5)])
    x, y = torch.ones(1, *denoiser.latent_shape).cumsum(-1).sin(), torch.tensor([1])
    alike = all(
        places_are_alike(denoiser.network, x, torch.tensor([500]), y, rows=rows) for rows in (4, 8)
    )
    for asked in ((0, 0, 1), (7, 3, 4)):
        assert_near(first[asked], other[asked])
        assert torch.equal(first[asked], other[asked]) or not alike
    beside = drawn(denoiser, sampler, terms, [(0, 0, 1), (9, 9, 9), (0, 1, 5), (7, 3, 4)])
    for asked in ((0, 0, 1), (7, 3, 4)):
        assert torch.equal(first[asked], beside[asked])
    assert not torch.equal(first[0, 1, 2], other[0, 1, 5])


@pytest.mark.parametrize("terms", TERMS[:2], ids=["plain", "CFG"])
def test_batch_size_changes_rounding_only(denoiser: ClassConditional, terms: list[Term]) -> None:
    asked = [(0, i, i) for i in range(6)]
    together = drawn(denoiser, DDIM(), terms, asked)
    for size in (1, 4):
        for start in range(0, 6, size):
            apart = drawn(denoiser, DDIM(), terms, asked[start : start + size])
            for key, image in apart.items():
                assert_near(image, together[key])


def test_guidance_changes_the_image_and_nothing_global(denoiser: ClassConditional) -> None:
    """An unguided run after a guided one draws the very same as before it."""
    asked = [(0, 0, 1), (0, 1, 2)]
    state = torch.get_rng_state()
    before = drawn(denoiser, Ancestral(), [], asked)
    guided = drawn(denoiser, Ancestral(), [CFG(2.0), SAG(1.0)], asked)
    after = drawn(denoiser, Ancestral(), [], asked)
    for key in asked:
        assert torch.equal(before[key], after[key])
        assert (before[key] - guided[key]).abs().max() > 1e-2
    assert torch.equal(state, torch.get_rng_state())
