"""What a sampler's steps bring to the CPU or from it, each of which waits for a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from sag_dit import sampling, tensors
from sag_dit.checkpoints import Model, from_denoiser
from sag_dit.codec import IdentityCodec
from sag_dit.denoiser import ClassConditional
from sag_dit.guidance import CFG, SAG, Term
from sag_dit.sampler import DDIM, Sampler, SampleStep
from sag_dit.sampling import Request, Settings, draw, trajectory
from tests.guidance.every import CELLS, MODELS, every
from tests.mps.device import OnDevice
from tests.mps.test_sampling import SAMPLERS, STEPS, moved, sampler_of

aten = torch.ops.aten
REQUESTS = [Request(index, 0, 3, stream=index) for index in (7, 8)]


class Crossings(TorchDispatchMode):
    """Notes what crosses between the CPU and the device and waits for it.

    Numbers without a dimension come along from the CPU as arguments, and what is queued waits for
    nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        found = [each for each in tree_flatten(made)[0] if isinstance(each, Tensor)]
        there = [isinstance(each, OnDevice) for each in (*given, *found)]
        crosses = any(there) and not all(
            is_there or each.ndim == 0
            for is_there, each in zip(there, (*given, *found), strict=True)
        )
        # A number to compute with, and a mask as an index, which is counted first.
        told = func.overloadpacket is aten._local_scalar_dense and any(there)
        counted = func.overloadpacket is aten.index and any(
            each.dtype is torch.bool for each in given[1:]
        )
        queued = bool((kwargs or {}).get("non_blocking"))
        if told or counted or (crosses and not queued):
            self.seen.append(str(func))
        return made


@pytest.fixture
def queueing(mps: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device, as one to which copies are queued."""
    monkeypatch.setattr(tensors, "QUEUED", {"mps"})
    return mps


def on(device: torch.device, denoiser: ClassConditional) -> Model:
    return from_denoiser(moved(denoiser, device), "small", codec=IdentityCodec())


def crossings(model: Model, terms: Sequence[Term], sampler: Sampler | None = None) -> list[str]:
    """Return what crosses in a run's second and third step."""
    settings = Settings.of(
        model, steps=STEPS, guidance=copy.deepcopy(terms), batch_size=2, sampler=sampler
    )
    steps = trajectory(model, REQUESTS, settings)
    with torch.no_grad():
        next(steps)
        with Crossings() as crossed:
            next(steps)
            next(steps)
    return crossed.seen


def test_what_crosses_is_noticed(queueing: torch.device) -> None:
    here, there = torch.ones(2), torch.ones(2).to(queueing)
    for crossing in (
        lambda: there.cpu(),
        lambda: there.sum().item(),
        lambda: bool(there.sum() > 0),
        lambda: there[there > 0],
        lambda: here.to(queueing),
        lambda: torch.zeros(2, device=queueing).copy_(here),
    ):
        with Crossings() as crossed:
            crossing()
        assert crossed.seen
    with Crossings() as crossed:
        (there + 1) * torch.tensor(2.0)
        here.to(queueing, non_blocking=True)
        torch.full((2,), 3.0, device=queueing)
    assert crossed.seen == []


# Draw noise in diffusers' own code, which copies it.
THEIRS = {"dpmpp_2m_sde", "dpmpp_2m_sde_karras", "euler_ancestral", "kdpm2_ancestral"}


@pytest.mark.parametrize("name", [each for each in SAMPLERS if each not in THEIRS])
def test_no_sampler_waits_at_its_steps(queueing: torch.device, name: str) -> None:
    model = on(queueing, MODELS["flow" if name.endswith("_flow") else "eps"])
    assert crossings(model, [SAG(0.7), CFG(1.5)], sampler_of(name)) == []


# A quantile is computed in float64, which this device leaves to the CPU; CUDA has it.
@pytest.mark.parametrize(
    "name", [name for kind, name in CELLS if kind == "eps" and name != "SAG, two layers"]
)
def test_no_method_waits_at_its_steps(queueing: torch.device, name: str) -> None:
    assert crossings(on(queueing, MODELS["eps"]), [every("eps")[name]]) == []


class Breaking(DDIM):
    """Images of a batch that break: the second at the second step, the first one later."""

    def steps(self, *arguments: Any, **options: Any) -> Iterator[SampleStep]:
        for each in super().steps(*arguments, **options):
            if each.step.index in (1, 3):
                each.x[int(each.step.index == 1)] = float("nan")
            yield each


MESSAGE = r"image 8 became NaN or infinite at step 2 of 6 \(t = \d+\.0\) and is not written"


@pytest.mark.parametrize("look", [None, 3])
def test_what_breaks_is_told_later_in_the_same_words_and_never_decoded(
    queueing: torch.device, look: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = on(queueing, MODELS["eps"])
    monkeypatch.setattr(sampling, "LOOK", look or sampling.LOOK)
    monkeypatch.setattr(IdentityCodec, "decode", None)
    settings = Settings(Breaking(), steps=6, batch_size=4)
    seen: list[int] = []
    with pytest.raises(ValueError, match=MESSAGE):
        draw(model, REQUESTS, settings, watch=lambda each: seen.append(each.step.index))
    # After the last step, or when a look is due.
    assert seen == list(range(6 if look is None else look - 1))


def test_on_the_cpu_it_is_told_at_once() -> None:
    model = from_denoiser(MODELS["eps"], "small", codec=IdentityCodec())
    settings = Settings(Breaking(), steps=6, batch_size=4)
    seen: list[int] = []
    with pytest.raises(ValueError, match=MESSAGE):
        draw(model, REQUESTS, settings, watch=lambda each: seen.append(each.step.index))
    assert seen == [0]
