"""CFG++ within diffusers' pipelines: the scheduler's one prediction lands where CFG++ leads."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from sag_dit.guidance import CFG, CFGpp
from sag_dit.pipelines import guide
from tests.closeness import assert_near
from tests.pipelines import tiny
from tests.pipelines.test_traces import network_of
from tests.pipelines.tiny import draw

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
LAMBDA, STEPS = 0.6, 4
CALL = {"num_inference_steps": STEPS, "guidance_scale": 2.0}


def by_hand(pipe: Any, family: str) -> Tensor:
    """The pipeline's own loop, whose scheduler takes the step of algorithm 2 in float64.

    It looks at what the network said of the null prompt and of the prompt, not at what the
    pipeline makes of them.
    """
    scheduler, rows = pipe.scheduler, list[Tensor]()

    def read(module: nn.Module, args: Any, output: Any) -> None:
        rows[:] = output[0].double().chunk(2)

    def step(output: Tensor, t: Any, x: Tensor, **options: Any) -> tuple[Tensor]:
        null, cond = rows
        mixed, x = null + LAMBDA * (cond - null), x.double()
        if family == "sd":
            before = int(t) - 1000 // STEPS
            end = scheduler.final_alpha_cumprod if before < 0 else scheduler.alphas_cumprod[before]
            now, after = scheduler.alphas_cumprod[int(t)].double(), end.double()
            x_0 = (x - (1 - now).sqrt() * mixed) / now.sqrt()
            return ((after.sqrt() * x_0 + (1 - after).sqrt() * null).float(),)
        i = scheduler.timesteps.tolist().index(float(t))
        u, v = scheduler.sigmas[i].item(), scheduler.sigmas[i + 1].item()
        return (((1 - v) * (x - u * mixed) + v * (x + (1 - u) * null)).float(),)

    handle = network_of(pipe).register_forward_hook(read)
    scheduler.step = step
    try:
        return draw(pipe, family, **CALL)
    finally:
        handle.remove()
        del scheduler.step


@pytest.mark.parametrize("family", ["sd", "sd3"], indirect=True)
def test_a_call_is_algorithm_2(pipe: Any, family: str) -> None:
    """DDIM as Stable Diffusion has it, whose last step ends at a little noise; and a flow."""
    with guide(pipe, CFGpp(LAMBDA)):
        found = draw(pipe, family, **CALL)
    assert_near(found, by_hand(pipe, family), 1e-4)
    with guide(pipe, CFG(LAMBDA)):
        plain = draw(pipe, family, **CALL)
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()


def refusing(scheduler: Any, told: str, **call: Any) -> None:
    """A pipeline with this scheduler refuses CFG++, guides with CFG, and draws without CFG++."""
    pipe = tiny.sd()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    with guide(pipe, CFGpp(LAMBDA)), pytest.raises(ValueError, match=told):
        draw(pipe, "sd", **CALL, **call)
    with guide(pipe, CFG(2.0), CFGpp(0.0)):
        assert draw(pipe, "sd", **CALL, **call).isfinite().all()


def test_schedulers_that_cannot_do_it_are_refused_by_name() -> None:
    for kind in ("PNDMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"):
        scheduler = getattr(diffusers, kind).from_config(tiny.ddim().config)
        refusing(scheduler, f"scheduler {kind}.*CFG.. does; use DDIMScheduler")
    for option in ("clip_sample", "thresholding"):
        scheduler = diffusers.DDIMScheduler.from_config(tiny.ddim().config, **{option: True})
        refusing(scheduler, f"DDIMScheduler with {option}=True.*set {option}=False")
    refusing(tiny.ddim(), r"eta=0.5.*set eta=0", eta=0.5)


def test_a_flow_that_draws_noise_is_refused() -> None:
    pipe = tiny.sd3()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    told = "stochastic_sampling=True"
    with guide(pipe, CFGpp(LAMBDA)), pytest.raises(ValueError, match=told):
        draw(pipe, "sd3", **CALL)


def test_with_ddim_pixart_is_guided_too() -> None:
    pipe = tiny.pixart()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    with guide(pipe, CFGpp(LAMBDA)):
        found = draw(pipe, "pixart", **CALL)
    assert found.isfinite().all()
    assert not torch.equal(found, draw(pipe, "pixart", **CALL))
