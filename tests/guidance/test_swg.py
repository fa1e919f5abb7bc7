"""Sliding-window guidance against its authors' code, and written out in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SWG, Autoguidance, GuidedDenoiser, Term, cost_of
from sag_dit.models import DiT
from sag_dit.process import DDPM, NoiseLevel, Process, Step
from sag_dit.sampler import DDIM
from tests.closeness import assert_near
from tests.guidance.every import MODELS, WORSE, batch, guided, small_dit
from tests.guidance.reference import step_at
from tests.guidance.test_unet_methods import small_unet

AUTHORS = {
    False: [
        *(-0.25589, -0.30723, 1.90793, -1.27601, 1.89137, -1.05199, -1.78131, -1.85723),
        *(-0.46198, 0.38307, 4.79236, 0.61984, -3.23774, 2.14803, -2.58467),
    ],
    True: [
        *(-0.28363, -0.30723, 0.79893, -1.27601, 1.39817, -0.9856, -1.78131, -2.34721),
        *(-0.46198, -0.15557, 3.92097, 0.86372, -3.23774, 2.25827, -2.58467),
    ],
}
"""Every 137th number of what ``forward_with_crop`` of HHU-MMBS/swg_bmvc2025_official (2ab1a60,
edm2/diffusion/models.py) says with the weights, inputs and settings below, without M and with."""


def near_500(process: Process) -> tuple[Step, NoiseLevel]:
    grid = process.grid(1000)
    index = [float(level.t) for level in grid].index(500)
    return Step(index, 1000, grid[index], grid[index + 1]), grid[index]


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_that_of_the_authors(masked: bool) -> None:
    denoiser = ClassConditional(small_dit(input_size=16), DDPM())
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    step, _ = near_500(denoiser.process)
    term = SWG(1.2, crop=0.625, crops=2, masked=masked)
    eps = GuidedDenoiser(denoiser, [term])(x, step, torch.tensor([1, 2])).eps
    assert_near(eps.flatten()[::137], torch.tensor(AUTHORS[masked]), scale=eps)


def resized(network: DiT, rows: int, columns: int) -> DiT:
    """The same network at another size, with its positions resized."""
    made = small_dit(input_size=(2 * rows, 2 * columns))
    state = network.state_dict()
    own = state["pos_embed"].reshape(1, *network.grid, -1).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(own, (rows, columns), mode="bicubic")
    made.load_state_dict({**state, "pos_embed": small.flatten(2).mT})
    return made


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("crop", "crops", "width", "starts"), [
    (0.625, 2, 6, [0, 2]),
    (0.5, 3, 4, [0, 2, 4]),
    (0.5, 4, 4, [0, 1, 2, 4]),
])  # fmt: skip
@pytest.mark.parametrize("model", ["eps", "flow"])
def test_it_is_guidance_away_from_the_mean_of_the_crops(
    model: str, crop: float, crops: int, width: int, starts: list[int], masked: bool
) -> None:
    """Crop by crop, pixel by pixel, each crop asked of a network of its size."""
    denoiser, (x, y) = MODELS[model], batch()
    step = step_at(denoiser.process, 4)
    small = resized(denoiser.network, width // 2, width // 2)  # type: ignore[arg-type]
    other = ClassConditional(small, denoiser.process, kind=denoiser.kind)
    said: dict[tuple[int, int], list[Tensor]] = {}
    for top, left in itertools.product(starts, starts):
        v = other(x[..., top : top + width, left : left + width], step.level, y).v
        for i, j in itertools.product(range(width), range(width)):
            said.setdefault((top + i, left + j), []).append(v[..., i, j].double())
    base = guided(denoiser, [], step).v
    expected = torch.zeros_like(base, dtype=torch.float64)
    for (i, j), values in said.items():
        if len(values) > 1 or not masked:
            expected[..., i, j] = base[..., i, j] - torch.stack(values).mean(dim=0)
    assert expected.abs().max() > 0.01 * base.abs().max()
    term = SWG(0.7, crop=crop, crops=crops, masked=masked)
    assert_near(guided(denoiser, [term], step).v - base, 0.7 * expected.float(), scale=base)


def test_it_adds_to_cfg_and_a_weaker_model() -> None:
    denoiser = MODELS["eps"]
    step = step_at(denoiser.process, 4)
    terms: list[Term] = [CFG(1.7), SWG(0.3), Autoguidance(1.5, worse=WORSE["eps"])]
    base = guided(denoiser, [], step).v
    parts = sum(guided(denoiser, [term], step).v - base for term in terms)
    assert_near(guided(denoiser, terms, step).v - base, parts, scale=base)


def test_crops_cost_their_share_of_an_image() -> None:
    # Four windows of 6 x 6 of 8 x 8.
    cost = cost_of(MODELS["eps"], [SWG(0.2)], DDIM(), 4)
    assert cost.rows == (3.25,) * 4 and cost.rounds == (1,) * 4
    large = ClassConditional(small_dit(input_size=32), DDPM())
    assert cost_of(large, [SWG(0.2)], DDIM(), 4).rows[0] == 1 + 4 * 400 / 1024


def test_images_of_its_own_size_keep_their_positions_to_the_bit() -> None:
    network = small_dit()
    assert network.positions(network.grid) is network.pos_embed


def test_windows_follow_a_rectangle_and_the_unet_s_multiples() -> None:
    wide = ClassConditional(small_dit(input_size=(8, 16)), DDPM())
    assert SWG(1.0).windows(wide) == (
        [slice(0, 6), slice(2, 8)],
        [slice(0, 10), slice(6, 16)],
    )
    assert SWG(1.0, crop=0.5).windows(small_unet())[0] == [slice(0, 4), slice(4, 8)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crops": 1}, "crops=1: expected 2 or more"),
        ({"crop": 0.4}, "crop=0.4: expected less than 1, and at least 1 / crops = 0.5"),
        ({"crop": 1.0}, "crop=1.0"),
    ],
)
def test_windows_that_mean_nothing_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SWG(1.0, **settings)  # type: ignore[arg-type]


def test_windows_that_do_nothing_to_this_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"crop=0\.9 of 8 is 8 in multiples of 2, the whole side"):
        GuidedDenoiser(MODELS["eps"], [SWG(1.0, crop=0.9)])
    with pytest.raises(ValueError, match="the windows do not overlap"):
        GuidedDenoiser(MODELS["eps"], [SWG(1.0, crop=0.5, masked=True)])

    class OneSize(DiT):
        any_size = False

    network = small_dit()
    network.__class__ = OneSize
    with pytest.raises(ValueError, match=r"OneSize takes images of one size only.*swg_scale=0"):
        GuidedDenoiser(ClassConditional(network, DDPM()), [SWG(1.0)])
