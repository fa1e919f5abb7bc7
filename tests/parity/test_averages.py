"""Power-function averages and those made of snapshots equal NVlabs/edm2's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sag_dit.checkpoints import averages
from sag_dit.checkpoints.averages import Taken, combination, exponent, make_average
from sag_dit.training.averaging import power_average
from tests.parity import make_average_goldens as made

CLOSE = 1e-6


@pytest.fixture(scope="module")
def goldens() -> dict[str, Tensor]:
    return load_file(made.GOLDENS)


def assert_close(found: Tensor, golden: Tensor) -> None:
    """Within a millionth of the largest value."""
    assert float((found - golden).abs().max()) <= CLOSE * float(golden.abs().max())


def tracked(sigma_rel: float) -> dict[int, Tensor]:
    """The averages at the steps of the goldens, as training keeps them."""
    layer = nn.Linear(4, 3, bias=False)
    average = AveragedModel(layer, multi_avg_fn=power_average(sigma_rel))
    found = {}
    for step in range(1, made.STEPS + 1):
        layer.load_state_dict(made.at(step))
        average.update_parameters(layer)
        if step % made.EVERY == 0:
            found[step] = average.module.weight.detach().clone()
    return found


def test_exponents_are_those_of_edm2(goldens: dict[str, Tensor]) -> None:
    np.testing.assert_allclose(exponent(made.WIDTHS), goldens["gamma"].numpy(), rtol=CLOSE)


@pytest.mark.parametrize("sigma_rel", made.TRACKED)
def test_averages_while_training_are_those_of_edm2(
    sigma_rel: float, goldens: dict[str, Tensor]
) -> None:
    for step, found in tracked(sigma_rel).items():
        assert_close(found, goldens[f"tracked.{step}.{sigma_rel}"])


@pytest.mark.parametrize("sigma_rel", made.MADE)
def test_averages_made_afterwards_are_those_of_edm2(
    sigma_rel: float, goldens: dict[str, Tensor], tmp_path: Path
) -> None:
    for width in made.TRACKED:
        for step, weight in tracked(width).items():
            file = averages.snapshot_file(tmp_path, width, step)
            save_file(
                {"weight": weight}, file, averages.snapshot_metadata(Taken(width, step, step), {})
            )
    held = averages.held_by({}, tmp_path, None)
    assert_close(
        make_average(sigma_rel, held, "test").state["weight"], goldens[f"made.{sigma_rel}"]
    )
    times = [s.taken.updates for s in held.snapshots]
    widths = [s.taken.sigma_rel for s in held.snapshots]
    weights = combination(times, widths, made.STEPS, sigma_rel).weights
    golden = goldens["coefficients"][:, made.MADE.index(sigma_rel)]
    assert_close(torch.from_numpy(weights), golden)


@pytest.mark.parametrize("sigma_rel", [0.07, 0.15, 0.2])
def test_an_average_made_afterwards_is_the_one_that_would_have_been_tracked(
    sigma_rel: float, tmp_path: Path
) -> None:
    """Which the goldens alone would not show, were both wrong."""
    for width in made.TRACKED:
        for step, weight in tracked(width).items():
            file = averages.snapshot_file(tmp_path, width, step)
            save_file(
                {"weight": weight}, file, averages.snapshot_metadata(Taken(width, step, step), {})
            )
    found = make_average(sigma_rel, averages.held_by({}, tmp_path, None), "test").state["weight"]
    direct = tracked(sigma_rel)[made.STEPS]
    raw = made.at(made.STEPS)["weight"]
    assert float((found - direct).norm()) < 0.05 * float((raw - direct).norm())
