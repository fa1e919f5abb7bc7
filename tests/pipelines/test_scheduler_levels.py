"""The noise level of each call is the one at which the network is really asked.

The oracle knows the one clean image and, for schedulers without noise of their own, the one noise:
whatever the scheduler, all that the network sees is alpha x_0 + sigma eps at the level named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sag_dit.pipelines import run
from sag_dit.process import NoiseLevel

# diffusers hands tensors to NumPy in ways that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
ZERO_SNR = {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
EXACT: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
    ("DDIMScheduler", {"clip_sample": False, **ZERO_SNR}),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    ("DEISMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, **V}),
    ("DPMSolverMultistepScheduler", FLOW),
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}),
    ("UniPCMultistepScheduler", FLOW),
    ("EulerDiscreteScheduler", {"steps_offset": 1}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True, **V}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("KDPM2DiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
]
NOISY: list[tuple[str, dict[str, Any]]] = [
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("EulerAncestralDiscreteScheduler", V),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("SASolverScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("FlowMatchLCMScheduler", {}),
]

STEPS = 5


def build(name: str, options: dict[str, Any]) -> Any:
    made = getattr(diffusers, name)
    return made(**options) if name.startswith("FlowMatch") else made(**{**SD, **options})


def asked(scheduler: Any, x_0: Tensor, eps: Tensor, start: int = 0) -> Iterator[Any]:
    """Run a scheduler as pipelines do; yield (x, level) of every call of the network."""
    scheduler.set_timesteps(STEPS)
    times = scheduler.timesteps[start:]
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    grid = run.levels(scheduler)
    kind = run.kind_of(scheduler)
    draw = {"generator": torch.Generator().manual_seed(1)}
    if "generator" not in scheduler.step.__code__.co_varnames:
        draw = {}
    state, index = None, None
    for t in times:
        if state is None:
            # What it is to be given for the first level, up to the scale that it takes away.
            scale = scheduler.scale_model_input(torch.ones(1), t) if scaled(scheduler) else 1.0
            index = run.index_of(scheduler, float(t), None)
            state = noised(grid[index], x_0, eps) / scale
        x = scheduler.scale_model_input(state, t) if scaled(scheduler) else state
        index = run.index_of(scheduler, float(t), index)
        level = grid[index]
        yield x, level
        guess = (x - level.alpha * x_0) / level.sigma
        velocity = level.d_alpha * x_0 + level.d_sigma * guess
        output = {"eps": guess, "v": velocity, "x_0": x_0}[kind]
        state = scheduler.step(output, t, state, return_dict=False, **draw)[0]


def scaled(scheduler: Any) -> bool:
    return hasattr(scheduler, "scale_model_input")


def noised(level: NoiseLevel, x_0: Tensor, eps: Tensor) -> Tensor:
    return level.alpha * x_0 + level.sigma * eps


def agrees(name: str, options: dict[str, Any], start: int = 0) -> None:
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, 1, 1, 8, 8)
    seen = 0
    for x, level in asked(build(name, options), x_0, eps, start):
        torch.testing.assert_close(x, noised(level, x_0, eps), rtol=2e-3, atol=2e-3)
        seen += 1
    assert seen >= STEPS - start


@pytest.mark.parametrize(("name", "options"), EXACT)
def test_the_network_is_asked_at_the_level_that_is_named(
    name: str, options: dict[str, Any]
) -> None:
    agrees(name, options)


# diffusers' own history of steps is wrong in PNDM and LMS where it does not start at noise.
STARTING = ("DDIM", "DPMSolverMultistep", "Euler", "Heun", "FlowMatchEuler")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(*each, marks=[] if each[0].startswith(STARTING) else [pytest.mark.slow])
        for each in EXACT
        if not each[0].startswith(("PNDM", "LMS"))
    ],
)
def test_so_it_is_where_an_image_is_changed_from_the_middle_on(
    name: str, options: dict[str, Any]
) -> None:
    agrees(name, options, start=2)


@pytest.mark.parametrize(("name", "options"), NOISY)
def test_fresh_noise_has_the_deviation_that_is_named(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    eps = torch.randn(1, 1, 128, 128)
    x_0 = torch.full_like(eps, 2.0)
    for x, level in asked(build(name, options), x_0, eps):
        assert float(x.mean()) == pytest.approx(2 * level.alpha, abs=0.03)
        assert float(x.std()) == pytest.approx(level.sigma, abs=0.03)


def test_unknown_schedulers_are_refused() -> None:
    made = [diffusers.EDMEulerScheduler(), diffusers.IPNDMScheduler()]
    # The real one cannot be built without a package of Brownian trees.
    made.append(type("DPMSolverSDEScheduler", (diffusers.SchedulerMixin,), {})())
    for scheduler in made:
        name = type(scheduler).__name__
        with pytest.raises(ValueError, match=f"{name}.*expected one of DDIMScheduler"):
            run.check_scheduler(scheduler)
