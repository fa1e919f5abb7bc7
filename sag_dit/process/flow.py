"""The linear interpolant of flow matching and rectified flow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from sag_dit.identity import LATER
from sag_dit.process.base import NoiseLevel, Process
from sag_dit.tensors import Scalar


def shifted(u: float, shift: float) -> float:
    """Move a time in [0, 1] towards noise (shift > 1) or image (< 1); both ends stay.

    logit u' = logit u + log shift, that is u' = s u / (s u + 1 - u).
    Source: Esser et al. 2024 (Stable Diffusion 3), equation 23.
    """
    return shift * u / (shift * u + (1 - u))


@dataclass(frozen=True)
class Flow(Process):
    """The straight line from image to noise, x_t = (1 - u) x_0 + u eps with v = eps - x_0.

    u = t / ``time_scale`` runs from 0, the image, to 1, noise; the network is told t. The steps of
    a grid are even in u, unless ``shift`` moves them towards noise (> 1) or image (< 1). At u = 1
    alpha is 0, and only a network of kind v says something there. For other networks ``start``
    (SiT: 0.999) is where grids and training begin instead. A flow has no variance to learn.

    Source: Lipman et al. 2023; Liu et al. 2023; with t reversed, Ma et al. 2024 (SiT).

    Raises:
        ValueError: ``time_scale`` or ``shift`` is not positive, or ``start`` is not in (0, 1].

    Example:
        >>> [level.t for level in Flow().grid(4)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    time_scale: float = 1.0
    shift: float = 1.0
    start: float = field(default=1.0, metadata=LATER)

    is_flow = True
    usual_kind = "v"
    # Any number of steps is possible on a line; this bound catches a number that was mistyped.
    max_steps = 10_000

    def __post_init__(self) -> None:
        for name, value in (("time_scale", self.time_scale), ("shift", self.shift)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}: expected a finite number above 0; 1 is usual")
        if not 0 < self.start <= 1:
            raise ValueError(f"start={self.start}: expected more than 0 and at most 1, pure noise")

    def level(self, t: float | Tensor) -> NoiseLevel:
        """Return the level of a time from 0 to ``time_scale``, or of one such time per image.

        Raises:
            ValueError: a float is outside this range; tensors are not looked into.
        """
        u: Scalar
        if isinstance(t, Tensor):
            u = (t if t.is_floating_point() else t.float())[:, None, None, None] / self.time_scale
        elif 0 <= t <= self.time_scale:
            t = float(t)
            u = t / self.time_scale
        else:
            raise ValueError(
                f"t={t}: expected a time from 0 (image) to {self.time_scale:g} (noise), the "
                f"process's time_scale"
            )
        return NoiseLevel(t=t, alpha=1 - u, sigma=u, d_alpha=-1.0, d_sigma=1.0)

    def time_at(self, u: Tensor) -> Tensor:
        """Return the times u ``start`` ``time_scale``."""
        return u * (self.start * self.time_scale)

    def grid(self, steps: int) -> tuple[NoiseLevel, ...]:
        """Return ``steps`` levels of decreasing noise from ``start`` on, and the clean level."""
        self.check_steps(steps)
        times = (self.start * shifted((steps - i) / steps, self.shift) for i in range(steps + 1))
        return tuple(self.level(u * self.time_scale) for u in times)

    def check_steps(self, steps: int) -> None:
        """Refuse numbers of steps below 1, and very large ones, which were mistyped."""
        if not 1 <= steps <= self.max_steps:
            raise ValueError(
                f"steps={steps}: expected a whole number from 1 to {self.max_steps}; more steps "
                f"of a flow do not make a better image"
            )
