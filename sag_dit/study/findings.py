"""Findings: what the cells of a study say, family by family, as numbers and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sag_dit.evaluation.suite import metric_kind
from sag_dit.messages import counted
from sag_dit.output.folder import read_png
from sag_dit.study.charts import Chart, Point, Series
from sag_dit.study.field import SHOWN, Row
from sag_dit.study.measurement import shot
from sag_dit.study.pareto import Front, front
from sag_dit.study.report import write_curves
from sag_dit.study.results import Metric, Result
from sag_dit.study.variance import (
    Components,
    Difference,
    Runs,
    components,
    difference,
    holm,
    overall,
)

UNGUIDED = "unguided"
PRICES = (1.0, 1.5, 2.0, 3.0)
"""Passes a step, up to which the best method is named."""
ROLES = {
    "unguided": "unguided",
    "along": "CFG of the same effective scale, as many steps",
    "passes": "CFG of the same effective scale, as many passes",
    "size": "CFG that changes predictions as much, as many steps",
}
"""What a method is compared with."""


@dataclass(frozen=True, eq=False)
class Findings:
    """The cells of one family of models.

    Example::

        for each in findings(read_rows(Path("outputs/study"))):
            print(each.family, each.methods)
            pandas.DataFrame(each.table())
    """

    family: str
    rows: Sequence[Row]

    @property
    def methods(self) -> list[str]:
        """The rows of the table that were measured, the unguided model first, then by FD."""
        names = {row.method for row in self._reported() if row.role == "method"}
        return sorted(names, key=lambda name: (name != UNGUIDED, overall(self.runs(name))[0]))

    @property
    def missing(self) -> dict[str, str]:
        """Why a method has no number, or cannot be compared with CFG, by method and training."""
        return {
            f"{row.method}, training {row.training}": row.missing
            for row in self.rows
            if row.missing
        }

    @property
    def trainings(self) -> list[int]:
        """The training seeds that anything was measured of."""
        return sorted({row.training for row in self._reported()})

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics that were measured, as tables call them."""
        names = dict.fromkeys(name for row in self._reported() for name in row.metrics)
        kinds = {name: metric_kind(name) for name in names}
        return {name: Metric(kind.label, kind.higher_is_better) for name, kind in kinds.items()}

    def cells(self, method: str, role: str = "method") -> list[Row]:
        """Return the cells of a row on the report split."""
        return [row for row in self._reported() if (row.method, row.role) == (method, role)]

    def runs(self, method: str, metric: str = "fid", role: str = "method") -> Runs:
        """Return a metric of a row by training and sampling seed."""
        found: dict[int, dict[int, float]] = {}
        for row in self.cells(method, role):
            value = row.metrics.get(metric)
            if value is not None:
                found.setdefault(row.training, {})[row.seed] = value
        return found

    def prices(self, method: str) -> Runs:
        """Return the passes a step of a row, by training and sampling seed.

        A pass of another kind of network, such as a classifier, counts as one.
        """
        steps = self.cells(UNGUIDED)[0].steps if self.cells(UNGUIDED) else 1
        found: dict[int, dict[int, float]] = {}
        for row in self.cells(method):
            found.setdefault(row.training, {})[row.seed] = (row.passes + row.others) / steps
        return found

    def change(
        self, method: str, against: str = UNGUIDED, metric: str = "fid"
    ) -> Difference | None:
        """Return what a method changes against one of ``ROLES``; None where that is not there.

        Where the match is the unguided model itself, as for a method that has no part along CFG,
        it is compared with that.
        """
        role = "method" if against == UNGUIDED else against
        base = self.runs(UNGUIDED if against == UNGUIDED else method, metric, role)
        return difference(self.runs(method, metric), base)

    def survivors(self, against: str = UNGUIDED, metric: str = "fid") -> dict[str, float]:
        """Return the chances p of the methods' changes, with Holm's allowance for their number."""
        found = {name: self.change(name, against, metric) for name in self.methods[1:]}
        return holm({name: each.p for name, each in found.items() if each and each.trainings > 1})

    def effect(self, method: str, name: str) -> float | None:
        """Return the mean over trainings of a part of a method's effect, None if not measured."""
        values = [
            row.effect[name]
            for row in self.rows
            if row.part == "effect" and row.method == method and row.effect.get(name) is not None
        ]
        return fmean(value for value in values if value is not None) if values else None

    def components(self, method: str, metric: str = "fid") -> Components:
        """Return how far a row's number varies over trainings and over samplings."""
        return components(self.runs(method, metric))

    def typical(self, metric: str = "fid") -> Components:
        """Return the median over all rows of both components."""
        found = [self.components(name, metric) for name in self.methods]
        told = []
        for values in ([each.training for each in found], [each.sampling for each in found]):
            known = [value for value in values if math.isfinite(value)]
            told.append(median(known) if known else math.nan)
        return Components(*told)

    def whole(self) -> list[str]:
        """Return the methods that were measured at all seeds that the unguided model was."""
        seeds = {i: {*runs} for i, runs in self.runs(UNGUIDED).items()}
        return [
            name
            for name in self.methods
            if all(seeds[i] <= {*self.runs(name).get(i, {})} for i in seeds)
        ]

    def front(
        self,
        second: str,
        names: Sequence[str] | None = None,
        corner: tuple[float, float] | None = None,
    ) -> Front:
        """Return the front of FD against ``price``, or another metric.

        It is that of the methods of :meth:`whole`, or of some of them, with the area up to
        ``corner``; of a metric of which more is better less of its negative is.
        """
        rows = [*(self.whole() if names is None else names)]
        sign = 1.0
        if second != "price" and self.metrics[second].higher:
            sign = -1.0

        def other(name: str) -> Runs:
            runs = self.prices(name) if second == "price" else self.runs(name, second)
            return {i: {j: sign * value for j, value in each.items()} for i, each in runs.items()}

        runs = {name: self.runs(name) for name in rows}
        return front(runs, {name: other(name) for name in rows}, corner)

    def best_at(self, price: float) -> str | None:
        """Return the method of least FD that costs no more passes a step than ``price``."""
        affordable = [
            name for name in self.whole() if overall(self.prices(name))[0] <= price + 0.01
        ]
        return min(affordable, key=lambda name: overall(self.runs(name))[0], default=None)

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each method: its setting, its price, numbers, and all changes of FD."""
        holms = {against: self.survivors(against) for against in ROLES}
        table = []
        for name in self.methods:
            first = self.cells(name)[0]
            row: dict[str, Any] = {
                "method": name,
                "guidance": first.guidance,
                "sampler": first.sampler,
                "steps": first.steps,
                "passes": first.passes,
                "others": first.others,
                "trainings": len(self.runs(name)),
                "seeds": max(map(len, self.runs(name).values())),
            }
            for metric in self.metrics:
                runs = self.runs(name, metric)
                if runs:
                    row[metric], row[f"{metric}_error"] = overall(runs)
            for part in ("along", "share", "size", "cfg_size"):
                row[part] = self.effect(name, part)
            for against in ROLES:
                change = None if name == UNGUIDED else self.change(name, against)
                if change is not None:
                    row[f"against_{against}"] = change
                    row[f"holm_{against}"] = holms[against].get(name)
            table.append(row)
        return table

    def answers(self) -> list[str]:
        """Return a sentence for each price at which another method becomes the best."""
        told: dict[str, str] = {}
        for price in PRICES:
            name = self.best_at(price)
            if name is None or name in told:
                continue
            mean, error = overall(self.runs(name))
            passes = overall(self.prices(name))[0]
            sure = f" ± {error:.2f}" if math.isfinite(error) else ""
            told[name] = (
                f"Up to {price:g} pass{'es' * (price > 1)} a step: {name} "
                f"({self.cells(name)[0].guidance}), FD {mean:.2f}{sure} at {passes:.3g}."
            )
        return list(told.values())

    def _reported(self) -> list[Row]:
        return [row for row in self.rows if row.part == "report" and not row.missing]


def findings(rows: Sequence[Row]) -> list[Findings]:
    """Return the findings of each family that has an unguided number, in the order of their names.

    Example::

        findings(read_rows(Path("outputs/study")))[0].answers()
    """
    families = sorted({row.family for row in rows})
    found = [Findings(name, [row for row in rows if row.family == name]) for name in families]
    return [each for each in found if each.cells(UNGUIDED)]


def price_charts(found: Findings) -> list[Chart]:
    """Return FD against the price and against recall, with the front of each as a line."""
    names = found.methods
    made = []
    for second, title in (("price", "passes of the network a step"), ("recall", "recall ↑")):
        if second != "price" and second not in found.metrics:
            continue
        points = {name: _point(found, place, name, second) for place, name in enumerate(names)}
        on_front = found.front(second).rows if found.whole() else ()
        line = tuple(points[name] for name in on_front if name in points)
        series = [Series("the front", 1, tuple(sorted(line, key=lambda point: point.x)))]
        rest = [points[name] for name in names if name not in on_front]
        series += [Series("others" if not k else "", 0, (point,)) for k, point in enumerate(rest)]
        label = "price" if second == "price" else "recall"
        made.append(
            Chart("trade_off", f"FD against {label}", title, "FD ↓", tuple(series), "methods")
        )
    return made


def _point(found: Findings, place: int, name: str, second: str) -> Point:
    y, dy = overall(found.runs(name))
    x, dx = overall(found.prices(name) if second == "price" else found.runs(name, second))
    return Point(place, x, y, _or_0(dx) if second != "price" else 0.0, _or_0(dy), name)


def _or_0(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def write_page(found: Findings, study: Path, out: Path) -> Path:
    """Write a page that answers which method is best at which price, and return its path.

    It shows the first images of each method, drawn from the same noise by the first training.
    ``study`` is the study's folder, ``out`` the page's.
    """
    out.mkdir(parents=True, exist_ok=True)
    metrics = {"price": Metric("passes a step", None), **found.metrics}
    # For each method its numbers, its first images and what it was set to.
    results, images, remarks = [], [], []
    for name in found.methods:
        numbers = {key: overall(found.runs(name, key)) for key in found.metrics}
        numbers["price"] = overall(found.prices(name))
        first = found.cells(name)[0]
        results.append(
            Result(
                name,
                {},
                {key: mean for key, (mean, _) in numbers.items()},
                {k: e for k, (_, e) in numbers.items() if math.isfinite(e) and k != "price"},
            )
        )
        files = [shot(study / "records" / first.identity, place) for place in range(SHOWN)]
        images.append([read_png(file) for file in files if file.exists()])
        remarks.append([first.guidance, *_changes(found, name)])
    # What all have in common, and the page.
    first = found.cells(UNGUIDED)[0]
    trainings = counted(len(found.trainings), "training")
    return write_curves(
        out,
        results,
        metrics,
        price_charts(found),
        images=images,
        remarks=remarks,
        title=f"{found.family}: which method at which price?",
        lead=(
            f"{first.images} images of each cell in {first.steps} steps of {first.sampler}, from "
            f"the same noise; means over {trainings}."
        ),
        spread="± is the standard error over trainings, or over seeds where there is one training.",
        notes=[*found.answers(), *(f"{k}: not measured: {v}" for k, v in found.missing.items())],
        settings={"trainings": found.trainings, "sampler": first.sampler, "steps": first.steps},
    )


def _changes(found: Findings, name: str) -> list[str]:
    told = []
    for against, words in ROLES.items():
        change = None if name == UNGUIDED else found.change(name, against)
        if change is not None:
            error = f" ± {change.error:.2f}" if math.isfinite(change.error) else ""
            mark = ", survives retraining" if change.survives else ""
            told.append(f"FD {change.mean:+.2f}{error} against {words}{mark}")
    return told
