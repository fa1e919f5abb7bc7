"""Frequency-decoupled guidance: its split, and what it has in common with CFG."""

from __future__ import annotations

import pytest
import torch

from sag_dit.guidance import CFG, FDG, Term
from sag_dit.guidance.fdg import bands
from tests.closeness import assert_near
from tests.guidance.every import MODELS, guided, switched_off
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


def low_pass(n: int) -> torch.Tensor:
    """One side's low pass as a matrix (n, n), n even: blur, halve, double, blur."""
    blur, halve = torch.zeros(n, n).double(), torch.zeros(n // 2, n).double()
    double = torch.zeros(n, n // 2).double()
    for i in range(n):
        for offset, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
            j = i + offset
            # Reflected without repeating the edge: -1 is 1, and n is n - 2.
            j = -j if j < 0 else 2 * (n - 1) - j if j >= n else j
            blur[i, j] += weight / 16
    for i in range(n // 2):
        # The middle of a cell of two pixels is their mean.
        halve[i, 2 * i] = halve[i, 2 * i + 1] = 1 / 2
    for i in range(n):
        # A pixel lies a quarter of a cell from its cell's middle, towards the one beside it.
        beside = i // 2 + (1 if i % 2 else -1)
        double[i, i // 2] += 3 / 4
        double[i, min(max(beside, 0), n // 2 - 1)] += 1 / 4
    return blur @ double @ halve @ blur


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (24, 40), (6, 4)])
def test_the_low_band_is_the_laplacian_pyramid_s(size: tuple[int, int]) -> None:
    """Written out as matrices, in float64.

    The bands were also compared with ``build_laplacian_pyramid`` of kornia 0.9.0, which diffusers'
    ``FrequencyDecoupledGuidance`` calls, on standard normal noise in float64. Where a side is a
    power of two, and both are even, they differ by at most 4.4e-16, and diffusers' guided
    prediction with the scales (10, 5) by 2.1e-14 at values up to 61. Other images are padded by
    kornia at the right and the bottom: there the bands differ, by at most 0.08 and only within six
    pixels of the border, and diffusers' prediction has the padded size.
    """
    x = images(size)
    expected = low_pass(size[0]) @ x @ low_pass(size[1]).T
    assert float((bands(x)[0] - expected).abs().max()) < 1e-14


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
    assert switched_off(term) == FDG(1.0, low=1.0)
    step = step_at(MODELS["eps"].process, 4)
    for each, rows in ((FDG(), [3]), (FDG(2.0), [6]), (FDG(1.0, low=2.0), [6])):
        assert each.off == (rows == [3])
        with counted(MODELS["eps"]) as seen:
            guided(MODELS["eps"], [each], step)
        assert seen == rows
