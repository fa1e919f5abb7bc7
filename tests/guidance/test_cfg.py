"""Classifier-free guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, GuidedDenoiser
from sag_dit.process import DDPM
from tests.closeness import assert_near
from tests.conftest import MakeDiT
from tests.guidance.reference import Straight, step_at


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([1, 2, 3])


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 7.5])
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_cfg_is_null_plus_w_times_the_difference(
    denoiser: ClassConditional, batch: tuple[Tensor, Tensor], scale: float, channels: int | None
) -> None:
    x, y = batch
    step = step_at(denoiser.process, 4)
    straight = Straight(denoiser.network, denoiser.process)
    cond = straight.eps(x, step.level.t, y)  # type: ignore[arg-type]
    null = straight.eps(x, step.level.t, torch.full_like(y, 10))  # type: ignore[arg-type]
    expected = null + scale * (cond - null)
    if channels is not None:
        # The published sampler leaves the other channels to the condition alone.
        expected[:, channels:] = cond[:, channels:]
    guided = GuidedDenoiser(denoiser, [CFG(scale, channels=channels)])(x, step, y)
    assert_near(guided.eps, expected)


def test_scale_0_is_the_unconditional_model(
    denoiser: ClassConditional, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    step = step_at(denoiser.process, 4)
    guided = GuidedDenoiser(denoiser, [CFG(0.0)])(x, step, y)
    null = denoiser(x, step.level, torch.full_like(y, 10))
    assert_near(guided.v, null.v)


def test_what_the_model_lacks_is_refused(denoiser: ClassConditional, make_dit: MakeDiT) -> None:
    with pytest.raises(ValueError, match="channels=0: expected 1 or more"):
        CFG(2.0, channels=0)
    with pytest.raises(ValueError, match="channels=5: the model has 4 channels"):
        GuidedDenoiser(denoiser, [CFG(2.0, channels=5)])
    without = ClassConditional(make_dit(class_dropout_prob=0.0), DDPM())
    with pytest.raises(ValueError, match=r"cfg_scale=2.0.*set cfg_scale=1"):
        GuidedDenoiser(without, [CFG(2.0)])


def test_scale_1_asks_nothing_of_a_model_without_null(make_dit: MakeDiT) -> None:
    model = ClassConditional(make_dit(class_dropout_prob=0.0), DDPM())
    assert GuidedDenoiser(model, [CFG(1.0)]).terms == ()
