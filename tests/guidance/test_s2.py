"""S^2-Guidance: blocks drawn anew for each image at each step."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import S2, GuidedDenoiser
from sag_dit.models import DiT
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM
from tests.closeness import assert_near
from tests.guidance.reference import step_at
from tests.small import dit

NETWORK = dit(depth=5)
MODEL = ClassConditional(NETWORK, DDPM())
NOISE = NoiseSource([0, 0, 7], [4, 5, 6])
X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([1, 2, 3])


def without(blocks: set[int]) -> ClassConditional:
    """The model without some of its blocks."""
    network: DiT = deepcopy(NETWORK)
    network.blocks = nn.ModuleList(b for i, b in enumerate(NETWORK.blocks) if i not in blocks)
    return ClassConditional(network, DDPM())


def dropped(index: int, count: int) -> list[set[int]]:
    """The blocks that each image skips at a step: those of its smallest numbers."""
    numbers = NOISE.normal(index + 1, (5,), purpose=20)
    return [set(row.argsort()[:count].tolist()) for row in numbers]


def added(index: int, term: S2, noise: NoiseSource = NOISE, rows: slice = slice(None)) -> Tensor:
    step, x, y = step_at(MODEL.process, index), X[rows], Y[rows]
    return GuidedDenoiser(MODEL, [term], noise=noise)(x, step, y).v - MODEL(x, step.level, y).v


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.4, 2), (1.0, 5)])
def test_each_image_is_led_away_from_what_its_own_blocks_leave(share: float, count: int) -> None:
    for index in (3, 4):
        level, chosen = step_at(MODEL.process, index).level, dropped(index, count)
        good = MODEL(X, level, Y).v
        worse = [
            without(blocks)(X[i : i + 1], level, Y[i : i + 1]).v for i, blocks in enumerate(chosen)
        ]
        expected = 0.7 * (good - torch.cat(worse))
        assert (expected.abs().flatten(1).amax(1) > 1e-3 * good.abs().max()).all()
        assert_near(added(index, S2(0.7, share=share)), expected, scale=good)


def test_steps_and_images_draw_blocks_of_their_own() -> None:
    drawn = [tuple(sorted(blocks)) for index in range(10) for blocks in dropped(index, 1)]
    assert {*drawn} == {(i,) for i in range(5)}
    assert len({tuple(drawn[i::3]) for i in range(3)}) == 3


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    together = added(4, S2(0.7, share=0.4))
    for i in range(3):
        alone = NoiseSource([NOISE.seeds[i]], [NOISE.indices[i]])
        assert_near(added(4, S2(0.7, share=0.4), alone, slice(i, i + 1)), together[i : i + 1])


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_that_means_nothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"share={share}: expected more than 0, at most 1"):
        S2(1.0, share=share)
