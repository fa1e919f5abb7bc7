"""Frequency-decoupled guidance: its split, and what it has in common with CFG."""

from __future__ import annotations

import pytest
import torch

from sag_dit.guidance import CFG, FDG, Term
from sag_dit.guidance.fdg import bands
from tests.closeness import assert_near
from tests.guidance.every import MODELS, guided
from tests.guidance.reference import counted, step_at

SIZES = [(8, 8), (9, 12), (7, 5), (2, 4), (1, 1)]


def images(size: tuple[int, int]) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, *size, generator=random, dtype=torch.float64)


def shift(model: str, term: Term, index: int = 4) -> torch.Tensor:
    """What a term adds to v, in float64."""
    step = step_at(MODELS[model].process, index)
    plain = guided(MODELS[model], [], step).v
    return guided(MODELS[model], [term], step).v.double() - plain.double()


@pytest.mark.parametrize("size", SIZES)
def test_the_bands_add_up_to_the_image(size: tuple[int, int]) -> None:
    x = images(size)
    low, high = bands(x)
    assert low.shape == high.shape == x.shape
    assert_near(low + high, x, 1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_an_even_image_is_all_low(size: tuple[int, int]) -> None:
    x = images((1, 1)).expand(3, 4, *size)
    low, high = bands(x)
    assert_near(low, x, 1e-12)
    assert float(high.abs().max()) < 1e-12


def test_the_finest_wave_is_all_high() -> None:
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1.0
    low, high = bands(board.double().expand(1, 1, 8, 8))
    assert float(low.abs().max()) < 1e-12
    assert_near(high[0, 0], board.double(), 1e-12)


def test_a_slow_wave_is_mostly_low() -> None:
    wave = torch.cos(torch.arange(32).double() * (2 * torch.pi / 32))
    low, high = bands(wave.expand(1, 1, 32, 32))
    assert float(high.square().mean()) < 0.01 * float(low.square().mean())


@pytest.mark.parametrize("model", MODELS)
def test_equal_scales_are_cfg(model: str) -> None:
    assert_near(shift(model, FDG(2.5, low=2.5)), shift(model, CFG(2.5)), 1e-4)


@pytest.mark.parametrize("model", ["eps", "flow"])
def test_each_scale_weighs_its_band_of_the_update(model: str) -> None:
    low, high = bands(shift(model, CFG(2.0)))
    assert_near(shift(model, FDG(3.0, low=1.5)), 0.5 * low + 2.0 * high, 1e-4)


def test_only_the_low_band_changes_the_mean() -> None:
    """High frequencies have next to none, whatever the scale; low ones have all of CFG's."""

    def mean(term: Term) -> torch.Tensor:
        return shift("eps", term).mean(dim=(2, 3))

    whole = mean(CFG(2.0))
    size = float(shift("eps", CFG(2.0)).abs().mean())
    assert float((mean(FDG(1.0, low=2.0)) - whole).abs().max()) < 0.1 * size
    assert float(mean(FDG(2.0)).abs().max()) < 0.1 * size
    assert float(whole.abs().max()) > 0.2 * size


def test_it_is_off_where_both_scales_are_1() -> None:
    term = FDG(2.0, low=3.0)
    assert term.switched_off() == FDG(1.0, low=1.0)
    step = step_at(MODELS["eps"].process, 4)
    for each, rows in ((FDG(), [3]), (FDG(2.0), [6]), (FDG(1.0, low=2.0), [6])):
        assert each.off == (rows == [3])
        with counted(MODELS["eps"]) as seen:
            guided(MODELS["eps"], [each], step)
        assert seen == rows
