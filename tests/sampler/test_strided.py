"""DDIM on a whole stride of times, as guided-diffusion's ddim25."""

from __future__ import annotations

import pytest
import torch

from sag_dit.process import DDPM, Flow
from sag_dit.sampler import DDIM, StridedDDIM
from tests.sampler.oracle import Gaussian, Recorder, run, start

DATA = Gaussian()


@pytest.mark.parametrize(
    ("steps", "times"),
    [(25, range(960, -1, -40)), (3, (668, 334, 0)), (1000, range(999, -1, -1)), (1, (0,))],
)
def test_times_are_whole_strides_from_zero(steps: int, times: range) -> None:
    denoise = Recorder(DATA.predict)
    taken = run(StridedDDIM(), denoise, start(2), DDPM(), steps)
    assert [asked.level.t for _, asked in denoise.asked] == list(times)
    assert taken[-1].step.next.sigma == 0


def test_its_steps_are_those_of_ddim() -> None:
    """Where the two grids agree, so do the images."""
    process = DDPM(num_timesteps=100)
    for eta in (0.0, 0.5):
        ours = run(StridedDDIM(eta), Recorder(DATA.predict), start(), process, 100)
        theirs = run(DDIM(eta), Recorder(DATA.predict), start(), process, 100)
        assert torch.equal(ours[-1].x, theirs[-1].x)


def test_impossible_steps_and_processes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"steps=999: no whole stride visits so many of 1000"):
        StridedDDIM().check(DDPM(), 999)
    with pytest.raises(ValueError, match=r"process is Flow"):
        StridedDDIM().check(Flow(), 10)
