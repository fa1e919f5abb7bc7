"""Rows of CFG that match others in their effect: ``evaluate.py matched=100``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sag_dit.cli.keys import Evaluate
from sag_dit.cli.keys.key import Parts
from sag_dit.cli.rows import Configured
from sag_dit.data.requests import make_requests
from sag_dit.guidance import CFG
from sag_dit.sampling import Settings
from sag_dit.study.effective import matches
from sag_dit.study.measurement import Measurement, ToDraw
from sag_dit.study.results import write_json
from sag_dit.untrusted import read_json_as


@dataclass(frozen=True)
class Matches:
    """What was found for the settings of an evaluation: scale and steps of CFG, by a row's name.

    Example:
        >>> Matches({"CFG 1.5, w of SAG 0.5": [1.5, 20]}).found
        {'CFG 1.5, w of SAG 0.5': [1.5, 20]}
    """

    found: Mapping[str, list[float]]


def matched_rows(
    rows: Sequence[Configured], measurements: Sequence[Measurement], config: Evaluate, write: bool
) -> list[Configured]:
    """Return rows of CFG that match those guided otherwise, for each of their trainings and seeds.

    Effects are measured on ``config.matched`` images of the first training, of a seed that no row
    has. What was found before is read from ``config.finished``, and kept there with ``write``.

    Example::

        rows += matched_rows(rows, measurements, config, write=trainer.is_global_zero)
    """
    places = {row.place: number for number, row in reversed([*enumerate(rows)])}
    found: list[Configured] = []
    for place, number in places.items():
        measurement, own = measurements[number], [row for row in rows if row.place == place]
        for name, (scale, steps) in _matches(measurement, own, config, write).items():
            terms: Parts = {
                "cfg": {"_target_": f"{CFG.__module__}.{CFG.__qualname__}", "scale": scale}
            }
            further = len(places) + len({each.place for each in found})
            for row in own:
                how = replace(row.config, guidance=terms, steps=int(steps))
                found.append(Configured("", further, {}, how, title=name))
    return found


def _matches(
    measurement: Measurement, rows: Sequence[Configured], config: Evaluate, write: bool
) -> Mapping[str, list[float]]:
    """Return scale and steps of the matches of one setting, by their names."""
    first, images = rows[0].config, measurement.images
    assert isinstance(images, ToDraw)
    file = Path(config.finished) / f"{measurement.identity}-matched-{config.matched}.json"
    if file.exists():
        return read_json_as(file, Matches).found
    names = images.settings.class_names(images.model)
    seed = max(row.config.seed for row in rows) + 1
    requests = make_requests(config.matched, seed, first.classes, names)
    ways: Mapping[str, Settings] = matches(
        images.model, {measurement.setting.name: images.settings}, requests
    )
    found = {
        name: [float(how.guidance[0].scale if how.guidance else CFG.neutral), float(how.steps)]
        for name, how in ways.items()
    }
    if write:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"found": found})
    return found
