"""Further averages of a training run, and averages of any length made of them after training.

A power-function average over t updates weighs the weights after update s by

    p(s) = (gamma + 1) s^gamma / t^(gamma + 1),   0 <= s <= t,

so that its width grows with the run. It is named by ``sigma_rel``, the standard deviation of p
divided by t. Snapshots of two such averages, kept on the way, tell any other one: the combination
of them whose profile is nearest to the wanted one.

Source: Karras et al. 2024 (arXiv 2312.02696), section 3 and appendix C.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sag_dit.bounds import Bounds, Natural, checked
from sag_dit.checkpoints import files
from sag_dit.models.family import State
from sag_dit.untrusted import parse_json

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]

WIDEST = 12**-0.5
"""The sigma_rel of the mean of all weights; an average's number from here on is a decay."""
FOLDER = "averages"
"""Where a run keeps its snapshots."""
SNAPSHOTS = "step-*-sigma_rel-*.safetensors"
SAID = "average"
"""Where the config in a snapshot's file says of what average it is, and when it was taken."""
FURTHER = "further."
"""Where a DiffusionModule keeps its further averages."""
MODULE = ".module."
UPDATES = ".n_averaged"
ROUGH = 0.05
"""From this share on, a profile that the snapshots do not give is told."""


def exponent(sigma_rel: ArrayLike) -> Floats:
    """Return gamma of a power-function average: the root of (g + 2)^2 (g + 3) = (g + 1) / sigma^2.

    Raises:
        ValueError: it is not between 0 and 0.2887.

    Source: Karras et al. 2024, equation 126 and algorithm 2.

    Example:
        >>> round(float(exponent(0.1)), 4)
        6.9372
    """
    widths = np.asarray(sigma_rel, dtype=np.float64)
    if not ((widths > 0) & (widths < WIDEST)).all():
        raise ValueError(
            f"sigma_rel={widths.tolist()}: expected more than 0 and less than {WIDEST:.4f}"
        )
    cubics = ([1, 7, 16 - each, 12 - each] for each in widths.ravel() ** -2)
    roots = [np.roots(cubic).real.max() for cubic in cubics]
    return np.reshape(roots, widths.shape)


def kept_of_average(sigma_rel: float, update: float) -> float:
    """Return what a power-function average keeps of itself at an update: (1 - 1/t)^(gamma + 1).

    ``update`` counts from 1; the first keeps nothing.

    Source: Karras et al. 2024, equation 127.

    Example:
        >>> kept_of_average(0.1, 1)
        0.0
    """
    return float((1 - 1 / update) ** (exponent(sigma_rel) + 1))


def overlap(times: Floats, gammas: Floats, other_times: Floats, other_gammas: Floats) -> Floats:
    """Return the inner products of profiles, the integral of p q over all times.

    (a + 1)(b + 1) / ((a + b + 1) max(t, u)) times (t/u)^b where t < u, else (u/t)^a.

    Source: Karras et al. 2024, equation 151.

    Example:
        >>> overlap(np.array([2.0]), np.array([0.0]), np.array([2.0]), np.array([0.0]))
        array([0.5])
    """
    power = np.where(times < other_times, other_gammas, -gammas)
    scale = (gammas + 1) * (other_gammas + 1) * (times / other_times) ** power
    return np.asarray(scale / ((gammas + other_gammas + 1) * np.maximum(times, other_times)))


class Combination(NamedTuple):
    """Which snapshots make an average.

    Attributes:
        weights: of each snapshot; their sum is 1.
        missing: ||p - q||^2 / ||p||^2 of the wanted profile p and the one that they give.

    Example:
        >>> combination([100, 100], [0.05, 0.1], 100, 0.1).weights.round(6).tolist()
        [0.0, 1.0]
    """

    weights: Floats
    missing: float


def combination(
    times: Sequence[float], sigma_rels: Sequence[float], time: float, sigma_rel: float
) -> Combination:
    """Return the combination of snapshots whose profile is nearest to a wanted one.

    ``times`` are the updates that each snapshot has seen, and ``sigma_rels`` what is averaged in
    it; ``time`` and ``sigma_rel`` are those of the wanted average.

    Raises:
        ValueError: a sigma_rel is out of its range.

    Source: Karras et al. 2024, algorithm 3.

    Example:
        >>> combination([50, 100] * 2, [0.05, 0.05, 0.1, 0.1], 100, 0.07).missing < 0.01
        True
    """
    t, gammas = np.asarray(times, dtype=np.float64), exponent(sigma_rels)
    wanted_t, wanted_gamma = np.asarray(time, dtype=np.float64), exponent(sigma_rel)
    among = overlap(t[:, None], gammas[:, None], t[None], gammas[None])
    towards = overlap(t, gammas, wanted_t, wanted_gamma)
    weights = np.linalg.solve(among, towards)
    weights = weights / weights.sum()
    whole = float(overlap(wanted_t, wanted_gamma, wanted_t, wanted_gamma))
    missing = whole - 2 * weights @ towards + weights @ among @ weights
    return Combination(weights, max(0.0, float(missing) / whole))


@dataclass(frozen=True)
class Taken:
    """What a snapshot says of itself.

    Example:
        >>> Taken(0.05, step=1000, updates=1000).step
        1000
    """

    sigma_rel: Annotated[float, Bounds(least=0, below=WIDEST)]
    step: Natural
    updates: Natural


class Snapshot(NamedTuple):
    """A snapshot of a power-function average and its file.

    Example::

        for snapshot in snapshots_in(Path("outputs/train/RUN/averages")):
            print(snapshot.file, snapshot.taken.sigma_rel)
    """

    file: Path
    taken: Taken


def snapshot_file(folder: Path, sigma_rel: float, step: int) -> Path:
    """Return where a run keeps a snapshot.

    Example:
        >>> snapshot_file(Path("averages"), 0.05, 1000).name
        'step-00001000-sigma_rel-0.05.safetensors'
    """
    return folder / f"step-{step:08d}-sigma_rel-{sigma_rel!r}.safetensors"


def step_of(file: Path) -> int:
    """Return at which step a file was written, by its name.

    Example:
        >>> step_of(Path("step-00001000.ckpt"))
        1000
    """
    return int(file.name.split("-")[1].partition(".")[0])


def snapshots_in(folder: Path) -> list[Snapshot]:
    """Return the snapshots in a folder, in the order of their steps.

    Raises:
        ValueError: one cannot be read, or does not say what it is.
    """
    found = []
    for file in sorted(folder.glob(SNAPSHOTS)):
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                text = (opened.metadata() or {}).get(files.METADATA_KEY, "{}")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read ({error}); delete it") from None
        config = parse_json(text, str(file))
        said = config.get(SAID) if isinstance(config, Mapping) else None
        found.append(Snapshot(file, checked(said, Taken, str(file), prefix=f"{SAID}.")))
    return found


def place(average: float) -> str:
    """Return the name of a further average's place in a module; see :data:`FURTHER`.

    Example:
        >>> place(0.9999)
        '0_9999'
    """
    return repr(float(average)).replace(".", "_")


def averages_in(state: Mapping[str, Any]) -> dict[float, str]:
    """Return the further averages in the state of a DiffusionModule, and what their names begin by.

    Example:
        >>> averages_in({"further.0_05.n_averaged": 3})
        {0.05: 'further.0_05'}
    """
    found = {}
    for name in state:
        held = re.fullmatch(rf"({re.escape(FURTHER)}(\d+_\d+)){re.escape(UPDATES)}", name)
        if held:
            found[float(held[2].replace("_", "."))] = held[1]
    return found


def network_of(state: State, start: str) -> dict[str, Tensor]:
    """Return the weights of the network that is averaged in a module's state."""
    inside = f"{start}{MODULE}"
    kept = {name.removeprefix(inside): each for name, each in state.items() if inside in name[:99]}
    return files.unwrapped({f"denoiser.{name}": each for name, each in kept.items()})


class Held(NamedTuple):
    """What a run holds to make averages of.

    Attributes:
        networks: weights by sigma_rel or decay, as the newest checkpoint has them.
        updates: that each of these has seen.
        snapshots: of power-function averages, from before.

    Example::

        held = held_by(checkpoint, value["state_dict"], Path("outputs/train/RUN/averages"))
    """

    networks: Mapping[float, State]
    updates: Mapping[float, int]
    snapshots: Sequence[Snapshot]


def held_by(state: State, folder: Path, step: int | None) -> Held:
    """Return the averages in a module's state and the snapshots in a folder up to a step.

    With an empty state the newest snapshots take its place.
    """
    found = averages_in(state)
    networks = {average: network_of(state, start) for average, start in found.items()}
    updates = {average: int(state[start + UPDATES]) for average, start in found.items()}
    snapshots = [s for s in snapshots_in(folder) if step is None or s.taken.step <= step]
    return Held(networks, updates, snapshots)


class Made(NamedTuple):
    """An average that was looked up or made.

    Example::

        made = make_average(0.15, held, "ckpt=RUN")
        network.load_state_dict(made.state)
    """

    state: dict[str, Tensor]
    files: tuple[Path, ...]


def make_average(average: float, held: Held, where: str) -> Made:
    """Return a decay's average as it is held, or make a power-function average of what is held.

    The combination is summed up in float64, one tensor at a time.

    Raises:
        ValueError: there is no such average, or nothing to make it of; what there is, is named.
    """
    # What is held is taken as it is.
    if average in held.networks:
        return Made(dict(held.networks[average]), ())
    if average >= WIDEST or not (held.snapshots or any(s < WIDEST for s in held.networks)):
        raise ValueError(_none(average, held, where))
    # All of one series: averages that began with the run, or at the same step of it.
    now = {s: n for s, n in held.updates.items() if s < WIDEST and n > 0}
    if not now:
        now = {s.taken.sigma_rel: s.taken.updates for s in held.snapshots}
    time = max(now.values(), default=0)
    series = {s for s, n in now.items() if n == time}
    points: dict[tuple[float, int], Path | None] = {
        (s.taken.sigma_rel, s.taken.updates): s.file
        for s in held.snapshots
        if s.taken.sigma_rel in series and 0 < s.taken.updates <= time
    }
    points |= {(s, time): None for s in series if s in held.networks}
    if not points:
        raise ValueError(_none(average, held, where))
    found = combination([n for _, n in points], [s for s, _ in points], time, average)
    if found.missing > ROUGH:
        log.warning(
            "%s: ema=%s is told only roughly by what the run kept (%.0f %% of its profile is "
            "missing); smaller every_n_steps.snapshot, or a sigma_rel on its other side among "
            "ema.further.sigma_rel, would tell it better",
            where,
            average,
            100 * found.missing,
        )
    # Summed up tensor by tensor, so that no two networks are in memory.
    with ExitStack() as opened:
        parts: list[Any] = [
            held.networks[s] if file is None else opened.enter_context(_opened(file))
            for (s, _), file in points.items()
        ]
        state = _combined(parts, found.weights)
    return Made(state, tuple(file for file in points.values() if file is not None))


def _opened(file: Path) -> Any:
    return safe_open(file, framework="pt", device="cpu")


def _tensor(part: Any, name: str) -> Tensor:
    found: Tensor = part[name] if isinstance(part, Mapping) else part.get_tensor(name)
    return found


def _combined(parts: Sequence[Any], weights: Floats) -> dict[str, Tensor]:
    """Return sum_i w_i W_i of every tensor; what is no float is the last one's."""
    state = {}
    for name in parts[-1].keys():  # noqa: SIM118
        newest = _tensor(parts[-1], name)
        if newest.is_floating_point():
            total = torch.zeros(newest.shape, dtype=torch.float64)
            for part, weight in zip(parts, weights.tolist(), strict=True):
                total.add_(_tensor(part, name), alpha=weight)
            newest = total.float()
        state[name] = newest
    return state


def _none(average: float, held: Held, where: str) -> str:
    widths = {s.taken.sigma_rel for s in held.snapshots} | set(held.networks)
    there = _listed(sorted(widths)) or "none"
    kind = "a decay" if average >= WIDEST else "a sigma_rel"
    return (
        f"ema={average}: {where} has no such average, {kind}; the further averages there are: "
        f"{there}. Those of a run are named by ema.further, when it is trained; ema=true is its "
        f"main one"
    )


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(map(str, numbers))


def told(average: float) -> str:
    """Return what an average's number means, in words.

    Example:
        >>> told(0.05)
        'power function, sigma_rel 0.05'
    """
    return f"decay {average}" if average >= WIDEST else f"power function, sigma_rel {average}"


def snapshot_metadata(taken: Taken, description: Mapping[str, Any]) -> dict[str, str]:
    """Return what a snapshot's file says of itself: its model's config, and what it is of it."""
    # In one entry, since safetensors puts several in any order.
    return {files.METADATA_KEY: json.dumps({**description, SAID: vars(taken)})}
