"""Euler-Maruyama on a flow's SDE: its marginals, its grid, its steps and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sag_dit.process import DDPM, Flow, NoiseLevel
from sag_dit.sampler import EulerFlow, EulerMaruyama
from tests.sampler.oracle import Gaussian, Recorder, noise_of, run, start

DATA = Gaussian()
FORMS = ("sigma", "constant", "decreasing", "increasing_decreasing", "sbdm")


def process_for(form: str) -> Flow:
    return Flow(start=0.999) if form == "sbdm" else Flow()


@pytest.mark.parametrize("form", FORMS)
def test_every_diffusion_ends_at_the_data(form: str) -> None:
    x = torch.randn(4000, 1, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.Generator().manual_seed(1)

    class Quick:
        """Random numbers of one generator, for as many images as these."""

        def like(self, x: torch.Tensor, step: int) -> torch.Tensor:
            return torch.randn(x.shape, generator=noise, dtype=x.dtype)

    # Wide enough for the constant diffusion, which does not fade where the data's own spread shows.
    data = Gaussian(std=(0.5, 0.4, 0.6, 0.8))
    solver = EulerMaruyama(diffusion=form, last_step=0.005)  # type: ignore[arg-type]
    *_, last = solver.steps(
        Recorder(data.predict),
        x,
        process_for(form),
        150,
        Quick(),  # type: ignore[arg-type]
    )
    columns = last.x[:, 0, 0]
    torch.testing.assert_close(columns.mean(0), torch.tensor(data.mean).double(), rtol=0, atol=0.06)
    torch.testing.assert_close(columns.std(0), torch.tensor(data.std).double(), rtol=0.08, atol=0)


def test_without_diffusion_it_is_euler_on_the_same_grid() -> None:
    x = start()
    solver = EulerMaruyama(norm=0.0, last_step=0.25)
    ours = run(solver, Recorder(DATA.predict), x, Flow(), 4)
    euler = run(EulerFlow(), Recorder(DATA.predict), x, Flow(), 4)
    for one, other in zip(ours, euler, strict=True):
        torch.testing.assert_close(one.x, other.x)


def test_a_step_is_the_paper_s() -> None:
    x, x_0_range = start(), (-0.5, 0.5)
    denoise = Recorder(DATA.predict)
    solver = EulerMaruyama(diffusion="constant", norm=0.7)
    steps = run(solver, denoise, x, Flow(), 3, x_0_range)
    times = [float(asked.level.t) for _, asked in denoise.asked]
    assert times == pytest.approx([1.0, 0.52, 0.04])
    for i, (step, (x_t, asked)) in enumerate(zip(steps, denoise.asked, strict=True)):
        u, after = asked.level.sigma, asked.next.sigma
        said = DATA.predict(x_t, asked.level).clamped(x_0_range)
        # The reverse SDE: drift -v + w score towards the image, and noise of variance 2 w h.
        drift = -said.v + 0.7 * (-said.eps / u)
        expected = x_t + (u - after) * drift
        if i < 2:
            expected = expected + math.sqrt(1.4 * (u - after)) * noise_of(len(x)).like(x, i)
        torch.testing.assert_close(step.x, expected)
    assert asked.next.t == 0


def test_one_step_and_a_shift() -> None:
    (only,) = run(EulerMaruyama(), Recorder(DATA.predict), start(), Flow(), 1)
    assert (only.step.level.t, only.step.next.t) == (1.0, 0.0)
    times = [float(level.t) for level in EulerMaruyama(shift=3.0).grid(Flow(), 3)]
    shifted = [3 * u / (1 + 2 * u) for u in (1, 0.52, 0.04)]
    assert times == pytest.approx([*shifted, 0.0])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"diffusion": "linear"}, "diffusion='linear': expected sigma, constant"),
        ({"norm": -1.0}, "norm=-1.0: expected 0"),
        ({"last_step": 0.0}, "last_step=0.0: expected between 0 and 1"),
        ({"shift": -1.0}, "shift=-1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EulerMaruyama(**settings)


def test_processes_that_it_does_not_solve_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampler=sde_flow: .*process is DDPM"):
        EulerMaruyama().check(DDPM(), 10)
    with pytest.raises(ValueError, match=r"'sbdm' is infinite at pure noise"):
        EulerMaruyama(diffusion="sbdm").check(Flow(), 10)
    with pytest.raises(ValueError, match=r"last_step=0.5: expected less than 0.4"):
        EulerMaruyama(last_step=0.5).check(Flow(start=0.4), 10)


def test_a_flow_may_start_below_pure_noise() -> None:
    process = Flow(start=0.9)
    assert [level.t for level in process.grid(3)] == pytest.approx([0.9, 0.6, 0.3, 0.0])
    assert float(process.time_at(torch.tensor(1.0))) == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"start=0.0: expected more than 0"):
        Flow(start=0.0)


@pytest.mark.parametrize("process", [DDPM(), Flow()], ids=str)
def test_a_score_is_read_as_the_noise_that_it_is(process: DDPM | Flow) -> None:
    x_t, eps = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    level: NoiseLevel = process.level(0.6 if isinstance(process, Flow) else 400)
    by_eps = process.predict(x_t, level, eps, "eps")
    by_score = process.predict(x_t, level, -eps / level.sigma, "score")
    torch.testing.assert_close(by_score.v, by_eps.v)
    target = process.target(x_t, eps, level, "score")
    torch.testing.assert_close(target, -eps / level.sigma)
