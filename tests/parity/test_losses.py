"""Our training losses equal facebookresearch/DiT's, and every golden notices a wrong turn."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch
from safetensors.torch import load_file
from torch import Tensor

from sag_dit.denoiser import ClassConditional
from sag_dit.process import DDPM, NoiseLevel, Process
from sag_dit.training.objective import MSE, Hybrid, hybrid, squared_error
from tests.parity import fixed as f
from tests.parity import ours
from tests.parity.make_loss_goldens import CASES, GOLDENS, gradients

Outputs = dict[str, Tensor]
CLOSE = 1e-5


def compute(name: str) -> Outputs:
    """What this project computes for one case, under the goldens' keys."""
    case = CASES[name]
    process = DDPM(case.schedule, case.num_timesteps)  # type: ignore[arg-type]
    network = ours.network(case.size)
    denoiser = ClassConditional(network, process, kind=case.kind)  # type: ignore[arg-type]
    weight = case.num_timesteps / 1000 if case.rescaled else 1.0
    learned = f.SIZES[case.size].learn_sigma
    objective = Hybrid(vlb_weight=weight) if learned else MSE()
    level = process.level(torch.tensor(case.times))
    found = objective.losses(denoiser, case.x_0, case.labels, level, case.noise)
    out = {
        f"{name}.loss": found.per_image.detach(),
        f"{name}.mse": found.terms.get("mse", found.per_image).detach(),
        f"{name}.gradient": gradients(found.per_image, network.final_layer.linear.bias),
    }
    if learned:
        out[f"{name}.vb"] = weight * found.terms["vlb"]
    return out


def error(result: Tensor, golden: Tensor) -> Tensor:
    """How far each image's loss or gradient is from the golden, relative to it.

    In single precision the terms of a divergence cancel to 1e-7, which is all that x_0 networks'
    bound has at the noisy end.
    """
    if result.ndim == 2:
        return (result - golden).norm(dim=1) / golden.norm(dim=1)
    return ((result - golden).abs() - 1e-7).clamp(min=0) / golden.abs()


@pytest.fixture(scope="module")
def goldens() -> Outputs:
    return load_file(GOLDENS)


@pytest.mark.parametrize("name", CASES)
def test_losses_agree_with_the_original(name: str, goldens: Outputs) -> None:
    outputs = compute(name)
    assert outputs.keys() == {key for key in goldens if key.split(".")[0] == name}
    errors = {key: float(error(value, goldens[key]).max()) for key, value in outputs.items()}
    # Dividing by the variance of t = 0 magnifies the rounding of gradients.
    far = {k: e for k, e in errors.items() if not e < CLOSE * (5 if "gradient" in k else 1)}
    assert far == {}


def test_every_golden_is_compared_and_small(goldens: Outputs) -> None:
    assert {key.split(".")[0] for key in goldens} == CASES.keys()
    assert GOLDENS.stat().st_size < 20 * 1024
    assert all(0 in case.times for case in CASES.values())


# --- mutations -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Mutation:
    """One wrong turn, and patterns of the goldens that must notice it.

    `at` are the times of which each must tell; with none, any will do.
    """

    name: str
    owner: Any
    attribute: str
    make: Callable[[Any], Any]
    notices: tuple[str, ...]
    at: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name


LEARNED = "(linear|cosine|x_0|short)"
BOUND = (rf"{LEARNED}\.(vb|loss|gradient)",)


def given(**changes: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Call the same function with some arguments, by name, changed."""
    names = ("process", "x_0", "x_t", "level", "believed", "fraction")

    def make(function: Any) -> Any:
        def wrong(*args: Any) -> Any:
            named = dict(zip(names, args, strict=True))
            return function(**{k: changes.get(k, lambda x: x)(v) for k, v in named.items()})

        return wrong

    return make


def tails_cut(nll: Any) -> Any:
    def wrong(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Any:
        inside = x_0.clamp(-0.99, 0.99)
        return nll(inside, mean + inside - x_0, log_variance)

    return wrong


def wider_bins(nll: Any) -> Any:
    # Twice the spread and twice the distance are as much as half the bin.
    return lambda x_0, mean, log_variance: nll(
        x_0, x_0 - 2 * (x_0 - mean), log_variance + 2 * math.log(2)
    )


def later(level: Any) -> Any:
    def wrong(self: DDPM, t: Tensor) -> Any:
        if not isinstance(t, Tensor):
            return level(self, t)
        return replace(level(self, (t + 1).clamp(max=self.num_timesteps - 1)), t=t)

    return wrong


def exchanged(table: Any) -> Any:
    return lambda process: table(process)[[0, 1, 3, 2]]


def neighbours(table: Any) -> Any:
    return lambda process: table(process).roll(1, dims=1)


def own_first_variance(table: Any) -> Any:
    def wrong(process: DDPM) -> Any:
        right = table(process).clone()
        right[2, 0] = right[3, 0]
        return right

    return wrong


def other_target(target: Any) -> Any:
    def wrong(self: Process, x_0: Tensor, eps: Tensor, level: NoiseLevel, kind: str) -> Any:
        return target(self, x_0, eps, level, "x_0" if kind == "eps" else "eps")

    return wrong


def next_time(times: Any) -> Any:
    return lambda self, x_t: times(self, x_t) + 1


def first_channels(square_error: Any) -> Any:
    return lambda output, target: square_error(output[:, :3], target[:, :3])


MUTATIONS = (
    Mutation("mean not detached", Tensor, "detach", lambda _: lambda self: self.clone(),
             (rf"{LEARNED}\.gradient",), (0, 1)),
    Mutation("x_0 clamped", hybrid, "bound", given(believed=lambda x: x.clamp(-1, 1)), BOUND, (1,)),
    Mutation("variance not mapped to [0, 1]", hybrid, "bound", given(fraction=lambda x: 2 * x - 1),
             BOUND, (0, 1)),
    Mutation("nats", hybrid, "bound", lambda bound: lambda *a: bound(*a) * math.log(2), BOUND,
             (0, 1)),
    Mutation("summed over channels", hybrid, "bound", lambda bound: lambda *a: bound(*a) * 4,
             BOUND, (0, 1)),
    Mutation("divergence the wrong way", hybrid, "normal_kl",
             lambda kl: lambda m, v, n, w: kl(n, w, m, v), BOUND, (1,)),
    Mutation("divergence at t = 0 too", hybrid, "per_image",
             lambda f: lambda x, like: f(x & False if x.dtype == torch.bool else x, like), BOUND,
             (0,)),
    Mutation("likelihood everywhere", hybrid, "per_image",
             lambda f: lambda x, like: f(x | True if x.dtype == torch.bool else x, like), BOUND,
             (1,)),
    Mutation("bins half as wide", hybrid, "decoder_nll", wider_bins, BOUND, (0,)),
    Mutation("no tails", hybrid, "decoder_nll", tails_cut, BOUND, (0,)),
    Mutation("the exact normal distribution", hybrid, "normal_cdf", lambda _: torch.special.ndtr,
             (r"(linear|cosine|short)\.(vb|gradient)",)),
    Mutation("bounds of the variance exchanged", hybrid, "posterior_table", exchanged, BOUND,
             (0, 1)),
    Mutation("posterior of the time before", hybrid, "posterior_table", neighbours, BOUND, (0, 1)),
    Mutation("first variance its own", hybrid, "posterior_table", own_first_variance, BOUND, (0,)),
    Mutation("bound not weighted", hybrid.Hybrid, "__post_init__",
             lambda _: lambda self: object.__setattr__(self, "vlb_weight", 1.0),
             (r"short\.(loss|gradient)",), (0, 1)),
    Mutation("level of the next time", DDPM, "level", later, (r".*\.(mse|vb|loss|gradient)",)),
    Mutation("network told the next time", NoiseLevel, "times", next_time,
             (r".*\.(mse|vb|loss|gradient)",)),
    Mutation("another target", Process, "target", other_target, (r".*\.(mse|loss|gradient)",)),
    Mutation("three channels", hybrid, "square_error", first_channels,
             (rf"{LEARNED}\.mse", r"(linear|short|cosine)\.gradient")),
    Mutation("three channels of a plain network", squared_error, "square_error", first_channels,
             (r"plain.*\.(mse|loss|gradient)",)),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_goldens_notice(mutation: Mutation, goldens: Outputs, monkeypatch: MonkeyPatch) -> None:
    wanted = [key for key in goldens if any(re.fullmatch(p, key) for p in mutation.notices)]
    assert wanted
    original = getattr(mutation.owner, mutation.attribute)
    monkeypatch.setattr(mutation.owner, mutation.attribute, mutation.make(original))
    outputs = [compute(name) for name in {key.split(".")[0] for key in wanted}]
    monkeypatch.undo()
    found = {key: value for each in outputs for key, value in each.items()}
    quiet = {}
    for key in wanted:
        times = CASES[key.split(".")[0]].times
        # Three times the widest tolerance, so that no golden fails by rounding alone.
        noticed = (error(found[key], goldens[key]) > 15 * CLOSE).tolist()
        loud = {t for t, yes in zip(times, noticed, strict=True) if yes}
        if not loud or not loud.issuperset(mutation.at):
            quiet[key] = loud
    assert quiet == {}


def test_every_golden_is_guarded(goldens: Outputs) -> None:
    patterns = [pattern for mutation in MUTATIONS for pattern in mutation.notices]
    matched = {key for key in goldens if any(map(partial(re.fullmatch, string=key), patterns))}
    assert matched == set(goldens)
