"""What a study of ``tune.py`` leaves: presets, charts of the front, and a card."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sag_dit.cli.keys import Evaluate
from sag_dit.cli.values import make_terms
from sag_dit.files import atomic
from sag_dit.methods import guidance_defaults, scales

if TYPE_CHECKING:
    from sag_dit.study.charts import Chart
    from sag_dit.study.comparison import Comparison
    from sag_dit.study.tuning import Point

GREY = 6
"""The colour of candidates in a chart."""


@dataclass(frozen=True, eq=False)
class Told:
    """A confirmed comparison, the metric that was made better, and by row its cost and preset.

    The first of the ``presets`` is the winner's.

    Example::

        Told(comparison, "fid", {"unguided": 1.0, "SAG 0.5": 2.0}, presets={"SAG 0.5": "mine"})
    """

    comparison: Comparison
    quality: str
    costs: Mapping[str, float]
    presets: Mapping[str, str]

    @property
    def unclear(self) -> str:
        """A sentence where the winner is not clearly better than no guidance, else nothing."""
        from sag_dit.study.comparison import clear_changes

        winner = self.comparison[next(iter(self.presets))]
        change, metric = winner.change.get(self.quality), self.comparison.metrics[self.quality]
        better = change is not None and (change[0] > 0) == bool(metric.higher)
        if better and self.quality in clear_changes(winner):
            return ""
        return (
            f"{winner.name} is not clearly better than no guidance: its change is less than two "
            f"standard errors; a larger budget tells more"
        )


def unlike_defaults(name: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method that are not at their defaults.

    Example:
        >>> unlike_defaults("sag", {"layer": "blocks.3", "threshold": 1.0})
        {'layer': 'blocks.3'}
    """
    default = guidance_defaults().get(name, {})
    return {key: value for key, value in node.items() if value != default.get(key)}


def write_preset(folder: Path, name: str, config: Evaluate, use: str) -> None:
    """Write the guidance and the steps of a configuration as ``guidance/NAME.yaml`` in a folder.

    Every scale is stated, so that the settings that a bundled model comes with add nothing.
    """
    terms, known = make_terms(config.guidance), scales()
    guidance = {}
    for key, node in config.guidance.items():
        if node is None or terms[key].off:
            continue
        settings = unlike_defaults(key, node)
        if f"{key}_scale" in known:
            settings.pop("scale", None)
        if settings:
            guidance[key] = settings
    values = {
        "defaults": ["default@guidance", "_self_"],
        **{key: getattr(config, key) for key in known},
        "steps": config.steps,
        "guidance": guidance,
    }
    file = folder / "guidance" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic(file) as temporary:
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        temporary.write_text(f"# @package _global_\n# {use}\n{text}", encoding="utf-8")


def front_charts(
    told: Told, tried: Mapping[int, Point], higher: bool | None, num_images: int
) -> list[Chart]:
    """Return the metric against the cost: of what was confirmed, and of all that was tried."""
    from sag_dit.study.charts import NO_ROW, Chart, Point, Series

    metric, across = told.comparison.metrics[told.quality], "passes, relative to unguided"
    confirmed = []
    for place, result in enumerate(told.comparison):
        value, spread = result.metrics[told.quality], result.spread.get(told.quality, 0.0)
        if math.isfinite(value):
            point = Point(place, told.costs[result.name], value, 0.0, spread, result.name)
            confirmed.append(Series(result.name, place, (point,)))
    # Each candidate by itself, since no line joins them.
    sign = -1 if higher else 1
    searched = []
    for number, (value, cost) in tried.items():
        point = Point(NO_ROW, cost, sign * value, 0.0, 0.0, f"candidate {number}")
        searched.append(Series("", GREY, (point,)))
    title = f"Tried, {num_images:,} images: {metric.title}"
    return [
        Chart("cost", f"Confirmed: {metric.title}", across, metric.title, tuple(confirmed)),
        Chart("cost", title, across, metric.title, tuple(searched)),
    ]


def card(
    told: Told,
    name: str,
    model: str,
    command: str,
    use: Callable[[str], str],
    about: Sequence[str],
) -> str:
    """Return in Markdown what won, how it is used, and what was searched."""
    from sag_dit.study.comparison import changes

    # The table: each row's cost, its metric on the images that confirm, and its change.
    comparison, quality = told.comparison, told.quality
    metric = comparison.metrics[quality]
    lines = [
        f"| setting | cost, x unguided | {metric.title} | change against unguided | preset |",
        "|---|---|---|---|---|",
    ]
    for result in comparison:
        cells = (
            result.name,
            f"{told.costs[result.name]:.2f}",
            f"{result.metrics[quality]:.4g} ± {result.spread.get(quality, math.nan):.2g}",
            changes(result, comparison.metrics).get(quality, ""),
            told.presets.get(result.name, ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    facts = comparison.results[0].facts
    return "\n".join(
        [
            f"# {name}: guidance for {model}",
            "",
            f"Found by `{command}`.",
            "",
            *lines,
            "",
            f"± is the standard deviation over seeds of {facts['count']:,} images. A change is",
            "the mean over the same seeds with its standard error; below two of them it may be",
            "chance. The first preset is the best on the images of the search. These numbers are",
            "of other images and seeds, and had no part in the choice.",
            *(["", f"{told.unclear}."] if told.unclear else []),
            "",
            "## Use",
            "",
            *(f"    {use(preset)}" for preset in told.presets.values()),
            "",
            "## What was searched",
            "",
            *(f"- {line}" for line in about),
            "",
        ]
    )
