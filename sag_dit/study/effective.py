"""Effective scales: which scale of CFG does to the predictions what another method does.

Most methods gain what CFG would gain at a larger scale. So a method is fairly compared with CFG at
the scale that it has the effect of, not with CFG at a scale of its own.

Source: GA-Eval (Xie et al. 2026, arXiv 2602.22570), whose measure is :attr:`Effect.along`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sag_dit.checkpoints import Model
from sag_dit.denoiser import Denoiser
from sag_dit.denoiser.base import Condition
from sag_dit.guidance import CFG, GuidedDenoiser
from sag_dit.noise import NoiseSource
from sag_dit.process import Prediction, Step
from sag_dit.sampling import Request, Settings, trajectory
from sag_dit.tensors import Images


@dataclass(frozen=True)
class Effect:
    """What guidance does to the predictions of v, along the trajectories that it makes itself.

    ``along`` is GA-Eval's effective scale: the mean over images and steps of
    <v - v_null, v_cond - v_null> / |v_cond - v_null|^2, which for CFG is its scale w. ``size`` is
    the mean of |v - v_cond|, as a root mean square over pixels, and ``share`` is how much of that
    change points where CFG's does: the mean cosine between v - v_cond and v_cond - v_null, 1 for
    CFG above 1 and 0 for a change that CFG cannot make at any scale.

    A model without a null condition has neither ``along`` nor ``share``: they are NaN.

    Example:
        >>> Effect(along=1.5, size=0.04, share=1.0).along
        1.5
    """

    along: float
    size: float
    share: float


@dataclass
class _Sums:
    """Sums over images and steps; ``rows`` of a batch are images, the others fill it."""

    rows: int = 0
    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def add(self, v: Images, cond: Images, null: Images | None) -> None:
        """Add the predictions of one evaluation."""
        v, cond = (each[: self.rows].flatten(1).double() for each in (v, cond))
        change = v - cond
        size = change.square().mean(1).sqrt()
        along = share = torch.full_like(size, math.nan)
        if null is not None:
            cfg = cond - null[: self.rows].flatten(1).double()
            # At a step where CFG does nothing, neither says anything: CFG 1 is as good as any.
            length = cfg.square().sum(1).clamp(min=1e-30)
            along = 1 + (change * cfg).sum(1) / length
            # No change at all, as outside an interval, points nowhere.
            norm = (change.square().sum(1) * length).sqrt()
            share = (change * cfg).sum(1) / norm.clamp(min=1e-30)
        self.sums += torch.stack([along, size, share], dim=1).sum(0).cpu()
        self.count += self.rows

    def effect(self) -> Effect:
        """Return the means."""
        return Effect(*(self.sums / self.count).tolist())


class _Watched(GuidedDenoiser):
    """A guided denoiser that also asks what it would predict without guidance."""

    def __init__(self, guided: GuidedDenoiser, sums: _Sums) -> None:
        super().__init__(guided.model)
        self._guided, self._sums = guided, sums

    def __call__(
        self, x_t: Images, step: Step, cond: Condition, captures: Sequence[Any] = ()
    ) -> Prediction:
        answer = self._guided(x_t, step, cond, captures)
        plain = super().__call__(x_t, step, cond)
        null = self.model.null(x_t.shape[0])
        unasked = None if null is None else super().__call__(x_t, step, null).v
        self._sums.add(answer.v, plain.v, unasked)
        return answer


@dataclass(frozen=True)
class _Watching(Settings):
    """Settings whose guided denoiser is watched."""

    sums: _Sums = field(default_factory=_Sums)

    def guided(self, denoiser: Denoiser, noise: NoiseSource) -> GuidedDenoiser:
        return _Watched(super().guided(denoiser, noise), self.sums)


def effect(model: Model, settings: Settings, requests: Sequence[Request]) -> Effect:
    """Return what the guidance of ``settings`` does to the predictions for some images.

    The images are drawn, with two further passes an evaluation, and thrown away.

    Raises:
        ValueError: settings that the model cannot be drawn with.

    Example::

        requests = make_requests(100, seed=0, classes=None, class_names=model.class_names)
        effect(model, Settings.of(model, guidance=[SAG(0.5)]), requests).along
    """
    settings.check(model)
    sums = _Sums()
    known = {name: getattr(settings, name) for name in Settings.__dataclass_fields__}
    watching = _Watching(**known, sums=sums)
    with torch.no_grad():
        for start in range(0, len(requests), settings.batch_size):
            batch = requests[start : start + settings.batch_size]
            sums.rows = len(batch)
            for _ in trajectory(model, batch, watching):
                pass
    return sums.effect()


HIGHEST = 50.0
"""The largest scale of CFG that is tried as a match."""
GRID = 20
"""Matched scales of CFG are rounded to 1 / GRID, so that methods share what is drawn."""


@dataclass(eq=False)
class CFGScale:
    """Finds the scale at which CFG alone changes predictions as much as something else does.

    ``settings`` say how CFG is drawn; their guidance is not used. Scales that were tried are
    remembered in ``known``, so that further searches are short.

    Example::

        scale = CFGScale(model, Settings.of(model, steps=20), requests)
        scale.of_size(effect(model, settings, requests).size)
    """

    model: Model
    settings: Settings
    requests: Sequence[Request]
    known: dict[float, float] = field(default_factory=dict)

    def size(self, scale: float) -> float:
        """Return how much CFG of a scale above 1 changes predictions; see :class:`Effect`."""
        if scale not in self.known:
            settings = replace(self.settings, guidance=(CFG(scale),))
            self.known[scale] = effect(self.model, settings, self.requests).size
        return self.known[scale]

    def of_size(self, size: float, tolerance: float = 0.01, tries: int = 12) -> float:
        """Return the scale above 1 at which CFG changes predictions by ``size``.

        The root is found to a relative error of ``tolerance`` in the size; 1 changes nothing, and
        ``HIGHEST`` is returned for what CFG does not reach.
        """
        if not size > 0:
            return 1.0
        # (w - 1) / size varies slowly with w, so the nearest known scale leads close to the root.
        if not self.known:
            self.size(2.0)
        for _ in range(tries):
            scale = min(self.known, key=lambda w: abs(math.log(self.known[w] / size)))
            low = max((w for w, known in self.known.items() if known <= size), default=1.0)
            high = min((w for w, known in self.known.items() if known > size), default=HIGHEST)
            if abs(self.known[scale] / size - 1) <= tolerance or low >= HIGHEST:
                return scale
            guess = min(1 + (scale - 1) * size / self.known[scale], HIGHEST)
            # The middle where the slope leads out of what is known to hold the root.
            self.size(guess if low < guess < high or guess == HIGHEST else (low + high) / 2)
        return scale


def like(settings: Settings, scale: float, passes: float | None = None) -> Settings:
    """Return CFG of a matched scale, drawn as ``settings`` are, or with as many ``passes``.

    Scales below 0 or above ``HIGHEST`` are cut off there.

    Example:
        >>> like(Settings(steps=20), 1.52, passes=60).steps
        30
    """
    scale = round(min(max(scale, 0.0), HIGHEST) * GRID) / GRID
    # At 1 CFG would cost a pass and do nothing.
    terms = () if scale == CFG.neutral else (CFG(scale),)
    steps = settings.steps if passes is None else max(1, round(passes / (1 + len(terms))))
    return replace(settings, guidance=terms, steps=steps)


def matches(
    model: Model, settings: Mapping[str, Settings], requests: Sequence[Request]
) -> dict[str, Settings]:
    """Return CFG as it matches each of the settings that are guided otherwise, by a name.

    It matches the effective scale, at equal steps and at equal passes, and the size of the change;
    see :class:`Effect`. Effects are measured on the images that ``requests`` ask for. A model
    without a null condition has no match.

    Example::

        guided = {"SAG": Settings.of(model, guidance=[SAG(0.5)])}
        matches(model, guided, make_requests(100, 0, None, model.class_names))
    """
    found: dict[str, Settings] = {}
    searches: list[CFGScale] = []
    for name, how in settings.items():
        terms = [term for term in how.guidance if not term.off]
        if all(isinstance(term, CFG) for term in terms) or model.denoiser.null(1) is None:
            continue
        told, plain = effect(model, how, requests), replace(how, guidance=())
        # Settings that are drawn alike share what was tried.
        search = next((each for each in searches if each.settings == plain), None)
        if search is None:
            search = CFGScale(model, plain, requests)
            searches.append(search)
        along, cost = like(plain, told.along), how.cost(model.denoiser)
        equal = like(plain, told.along, cost.passes)
        sized = like(plain, search.of_size(told.size))
        found[f"{_called(along)}, w of {name}"] = along
        # Passes of another kind of network are no passes of CFG's.
        if equal.steps != how.steps and not cost.unlike:
            found[f"{_called(equal)} in {equal.steps} steps, w and passes of {name}"] = equal
        found[f"{_called(sized)}, size of {name}"] = sized
    return found


def _called(settings: Settings) -> str:
    return " ".join(f"CFG {term.scale:g}" for term in settings.guidance) or "unguided"
