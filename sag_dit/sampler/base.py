"""The contract of samplers.

A sampler is an iterator of steps, so progress, previews and maps stay with the caller. It calls
``denoise(x_t, step)`` and never sees conditions or guidance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

from sag_dit.identity import name_of, without_later
from sag_dit.noise import NoiseSource
from sag_dit.process import DDPM, Prediction, Process, Step
from sag_dit.tensors import Images

Denoise = Callable[[Images, Step], Prediction]
"""(x_t, step) -> guided prediction at x_t."""


@dataclass(frozen=True)
class SampleStep:
    """One finished step: ``x`` is the state after it, ``prediction`` its prediction, unclamped.

    Example::

        for each in sampler.steps(denoise, x, process, 50, noise):
            print(each.step.index, each.prediction.x_0.std())
    """

    step: Step
    x: Images
    prediction: Prediction


class Sampler(ABC):
    """Solves the reverse process on a grid of a given number of steps.

    Example::

        @dataclass(frozen=True)
        class Euler(Sampler):
            def steps(self, denoise, x, process, num_steps, noise, x_0_range=None):
                for step in steps_of(process, num_steps):
                    prediction = denoise(x, step)
                    clean = prediction.clamped(x_0_range)
                    x = step.next.alpha * clean.x_0 + step.next.sigma * clean.eps
                    yield SampleStep(step, x, prediction)
    """

    key: ClassVar[str]
    """What the identity of a run calls the sampler, wherever its code lies: no other one's key."""
    former: ClassVar[tuple[str, ...]]
    """What runs called it before it had a key; a sampler that is new has none."""
    renoises: ClassVar[bool] = False
    """Whether each step starts at ``x_t`` of the clamped prediction and uses no other prediction,
    so that its noise may be another prediction's than its x_0 (CFG++)."""

    @property
    def steerable(self) -> bool:
        """Whether a search may exchange images between two steps, in place in ``SampleStep.x``.

        It may where a step begins from this x and nothing else of the step before, and draws noise
        of its own, so that two copies of an image part.
        """
        return False

    def identity(self) -> dict[str, Any]:
        """Return the sampler as plain values, everything that its steps depend on."""
        kind: Any = type(self)
        if not is_dataclass(kind):
            raise ValueError(
                f"{kind.__name__} is no dataclass: write @dataclass(frozen=True) above it, so that "
                f"a folder of images can be told by the sampler's options"
            )
        options = {each.name: getattr(self, each.name) for each in fields(kind)}
        return {"name": name_of(kind), **without_later(options, kind)}

    def check(self, process: Process, num_steps: int) -> None:
        """Refuse a process or a number of steps this sampler cannot take, before anything is drawn.

        Raises:
            ValueError: what is impossible, and the remedy.
        """
        process.check_steps(num_steps)

    @abstractmethod
    def steps(
        self,
        denoise: Denoise,
        x: Images,
        process: Process,
        num_steps: int,
        noise: NoiseSource,
        x_0_range: tuple[float, float] | None = None,
    ) -> Iterator[SampleStep]:
        """Yield the steps from noise ``x`` (unit variance, b c h w) to the clean image.

        ``x_0_range`` clamps the clean image that is predicted at each step. ``noise`` supplies the
        randomness of each image and step.

        Raises:
            ValueError: ``num_steps`` is not possible on this process, or the process is of a kind
                this sampler does not solve.
        """


def steps_of(process: Process, num_steps: int) -> Iterator[Step]:
    """Yield the process's grid of ``num_steps`` steps.

    Example:
        >>> [step.index for step in steps_of(DDPM(), 3)]
        [0, 1, 2]
    """
    grid = process.grid(num_steps)
    for index in range(num_steps):
        yield Step(index, num_steps, grid[index], grid[index + 1])


def require_ddpm(process: Process, sampler: str) -> None:
    """Refuse a process that is not variance preserving.

    Example:
        >>> from sag_dit.process import Flow
        >>> require_ddpm(DDPM(), "ddim")
        >>> try:
        ...     require_ddpm(Flow(), "ddim")
        ... except ValueError as error:
        ...     print(str(error).partition(",")[0])
        sampler=ddim: solves variance-preserving models only
    """
    if not isinstance(process, DDPM):
        raise ValueError(
            f"sampler={sampler}: solves variance-preserving models only, and this model's process "
            f"is {type(process).__name__}; use sampler=euler_flow or sampler=heun_flow"
        )
