"""compare: settings of a model drawn, measured and put side by side, as a table and as data."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sag_dit.checkpoints import Model
from sag_dit.data.requests import make_requests
from sag_dit.evaluation.features import FeatureExtractor
from sag_dit.guidance import Term, cost_of
from sag_dit.identity import settings as identity_of
from sag_dit.sampler import Sampler
from sag_dit.sampling import Pixels, Settings, drawn
from sag_dit.study.charts import places
from sag_dit.study.measurement import (
    Measurement,
    Measuring,
    Setting,
    ToDraw,
    base_name,
    measurement,
)
from sag_dit.study.results import Metric, Record, Result, combine, compared, flat_row, json_values
from sag_dit.study.setup import Setup, Setups, check_metrics, example_of
from sag_dit.training.predicting import Bar

CAPTION = {"features", "reference", "count", "steps", "sampler", "model", "samples", "classes"}
"""Facts that the table's caption tells where they are common to all results."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of several settings, each with what it changes against one of them.

    ``metrics`` says how the columns are called, ``about`` what stands behind ±. It prints as a
    table, shows itself as one in Jupyter, and gives rows to ``pandas.DataFrame``.

    Example::

        comparison = sag_dit.study.compare(model, {"unguided": [], "SAG": [SAG(0.5)]}, seeds=3)
        print(comparison)
        comparison["SAG"].metrics["fid"], comparison["SAG"].change["fid"]
        pandas.DataFrame(comparison.rows())
    """

    results: Sequence[Result]
    metrics: Mapping[str, Metric]
    about: str = ""

    @classmethod
    def of(
        cls,
        measurements: Sequence[Measurement],
        records: Mapping[str, Record],
        against: str | None = None,
    ) -> Comparison:
        """Put the records of measurements, by identity, together by setting.

        Raises:
            ValueError: there is no setting called ``against``.
        """
        metrics: dict[str, Metric] = {}
        for each in measurements:
            metrics |= each.setup.labels()
        own: dict[Any, list[Measurement]] = {}
        for each in measurements:
            own.setdefault(each.setting, []).append(each)
        results = [_result(group, records) for group in own.values()]
        about = _about(results, measurements[0].repeats)
        return cls(compared(results, base_name(measurements, against)), metrics, about)

    def __iter__(self) -> Iterator[Result]:
        """Go through the results in the order of the table."""
        return iter(self.results)

    def __len__(self) -> int:
        """Return how many results there are."""
        return len(self.results)

    def __getitem__(self, name: str) -> Result:
        """Return the result of a setting by its name."""
        for result in self.results:
            if result.name == name:
                return result
        names = ", ".join(repr(result.name) for result in self.results)
        raise KeyError(f"{name!r}: expected the name of a setting, one of {names}")

    @property
    def caption(self) -> str:
        """The main facts that all results share, in one line."""
        told = []
        facts = [result.facts for result in self.results]
        for key in facts[0]:
            values = {str(each.get(key)) for each in facts}
            if key in CAPTION and len(values) == 1:
                value = facts[0][key]
                told.append(f"{value:,} images" if key == "count" else f"{key} {value}")
        return ", ".join(told)

    def rows(self) -> list[dict[str, Any]]:
        """Return a flat row for each setting: numbers, ±, changes, and all facts."""
        return [flat_row(result, self.metrics) for result in self.results]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values, as ``results.json`` holds it."""
        rows = []
        for result in self.results:
            row = asdict(result)
            deviations = row.pop("deviations")
            if result.expected is not None:
                row["expected"]["differences"] = {
                    name: difference
                    for name, (*_, difference) in result.expected.differences(
                        result.metrics
                    ).items()
                }
                row["expected"]["deviations"] = deviations
            rows.append(row)
        labels = {name: metric.label for name, metric in self.metrics.items()}
        values: dict[str, Any] = json_values(
            {"metrics": labels, "spread": self.about, "results": rows}
        )
        return values

    def __str__(self) -> str:
        """Return the table as text."""
        console = Console(file=io.StringIO(), width=100, soft_wrap=True, highlight=False)
        self.show(console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    __repr__ = __str__

    def show(self, console: Console) -> None:
        """Print the table, what it rests on, and the published numbers beside it."""
        table = _table("setting", self._titles())
        for result in self.results:
            table.add_row(result.name, *self._cells(result))
        _print_whole(console, table)
        for line in (self.caption, self.about):
            if line:
                console.print(line, style="dim", markup=False)
        if any(result.change for result in self.results):
            self._show_changes(console)
        for warning in self.warnings():
            console.print(f"warning: {warning}", style="yellow", markup=False)
        for result in self.results:
            _show_expected(console, result, self.metrics)

    def _repr_html_(self) -> str:
        """Return the table for a notebook: a row of what each setting changes below its own."""
        head = "".join(f"<th>{html.escape(each)}</th>" for each in ("setting", *self._titles()))
        body = []
        for result in self.results:
            cells = "".join(f"<td>{each}</td>" for each in self._cells(result))
            body.append(f"<tr><th>{html.escape(result.name)}</th>{cells}</tr>")
            if result.change:
                texts, clear = changes(result, self.metrics), clear_changes(result)
                told = "".join(
                    f"<td>{f'<b>{texts[name]}</b>' if name in clear else texts.get(name, '')}</td>"
                    for name in self.metrics
                )
                body.append(f"<tr><td>against {html.escape(result.against or '')}</td>{told}</tr>")
        lines = [self.caption, self.about, self._about_changes()]
        lines += [f"warning: {warning}" for warning in self.warnings()]
        below = "<br>".join(html.escape(line) for line in lines if line)
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
            f"<small>{below}</small>"
        )

    def warnings(self) -> list[str]:
        """Return what makes some of the numbers less than comparable, a sentence each."""
        return list(dict.fromkeys(text for result in self.results for text in result.warnings))

    def _titles(self) -> list[str]:
        return [metric.title for metric in self.metrics.values()]

    def _cells(self, result: Result) -> list[str]:
        return [_number_text(result, name, places(self.results, name)) for name in self.metrics]

    def _about_changes(self) -> str:
        base = next((result.against for result in self.results if result.change), None)
        if base is None:
            return ""
        return (
            f"against {base} at the same seeds, ± standard error; a change of less than two "
            f"standard errors may be chance"
        )

    def _show_changes(self, console: Console) -> None:
        table = _table("change", self._titles())
        for result in self.results:
            texts, clear = changes(result, self.metrics), clear_changes(result)
            cells = (
                Text(texts.get(name, ""), style="" if name in clear else "dim")
                for name in self.metrics
            )
            if texts:
                table.add_row(result.name, *cells)
        console.print()
        _print_whole(console, table)
        console.print(self._about_changes(), style="dim", markup=False)


def _result(measurements: Sequence[Measurement], records: Mapping[str, Record]) -> Result:
    """Put the records of one setting together."""
    setting = measurements[0].setting
    named = {}
    for each in measurements:
        record = records[each.identity].of(each.setup.metrics)
        # What was measured before may lack facts that are told today.
        named[each.identity] = replace(record, facts={**each.facts, **record.facts})
    result = combine(setting.name, setting.axes, named)
    # What is known of the images themselves, whenever they were measured.
    notes = (note for each in measurements for note in each.notes)
    result = replace(result, warnings=list(dict.fromkeys((*result.warnings, *notes))))
    if setting.expected is None:
        return result
    told = [*setting.expected.deviations(result.facts), *setting.otherwise]
    return replace(result, expected=setting.expected, deviations=told)


def _about(results: Sequence[Result], repeats: int) -> str:
    seeds = max(len(result.seeds) for result in results)
    if seeds > 1:
        return f"mean ± standard deviation over {seeds} seeds"
    if any(result.spread for result in results):
        return f"± standard error, from {repeats} random halves of the images"
    return ""


def _table(first: str, titles: Iterable[str]) -> Table:
    """Return an empty table: a column of names, and columns of numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _number_text(result: Result, name: str, decimals: int) -> str:
    if name not in result.metrics:
        return "–"
    text = f"{result.metrics[name]:.{decimals}f}"
    return f"{text} ± {result.spread[name]:.{decimals}f}" if name in result.spread else text


def clear_changes(result: Result) -> set[str]:
    """Return the metrics whose change is larger than two standard errors."""
    return {name for name, (change, error) in result.change.items() if abs(change) > 2 * error}


def changes(result: Result, metrics: Mapping[str, Metric]) -> dict[str, str]:
    """Return what a setting changes, as one reads it; nothing of a metric that it lacks."""
    texts = {}
    for name in filter(result.change.__contains__, metrics):
        difference, error = result.change[name]
        decimals = max(0, min(6, 1 - math.floor(math.log10(error)))) if error > 0 else 4
        texts[name] = f"{difference:+.{decimals}f} ± {error:.{decimals}f}"
    return texts


def _print_whole(console: Console, table: Table) -> None:
    """Print a table that is never squeezed: where the terminal is narrower its lines go on."""
    width = console.measure(table, options=console.options.update(max_width=500)).maximum
    Console(file=console.file, width=max(console.width, width), highlight=False).print(table)


def _show_expected(console: Console, result: Result, metrics: Mapping[str, Metric]) -> None:
    expected = result.expected
    if expected is None:
        return
    console.print(f"\n{result.name} beside {expected.source}", style="bold", markup=False)
    table = _table("", ("published", "here", "difference"))
    for name, (published, measured, difference) in expected.differences(result.metrics).items():
        decimals = 2 if abs(published) >= 1 else 4
        numbers = (f"{published:g}", f"{measured:.{decimals}f}", f"{difference:+.{decimals}f}")
        table.add_row(metrics[name].label, *numbers)
    console.print(table)
    if result.deviations:
        console.print("the protocols differ, or may differ, in", markup=False)
        for line in result.deviations:
            console.print(f"  {line}", style="yellow", markup=False)
    else:
        console.print("the protocol is the published one", markup=False)


def compare(
    model: Model,
    settings: Mapping[str, Sequence[Term] | Settings],
    *,
    seeds: int = 1,
    seed: int = 0,
    num_images: int = 300,
    classes: Sequence[int | str] | str | None = None,
    steps: int = 50,
    sampler: Sampler | None = None,
    batch_size: int | None = None,
    features: FeatureExtractor | str | None = None,
    reference: str | None = None,
    metrics: Sequence[str] | None = None,
    against: str | None = None,
    repeats: int = 10,
    progress: bool = True,
) -> Comparison:
    """Draw and measure each setting at the same ``seeds`` seeds, ``seed`` the first of them.

    A setting is a list of guidance terms, drawn with ``steps``, ``sampler`` and ``batch_size``, or
    :class:`~sag_dit.sampling.Settings`, which hold all of these. All start from the same noise and
    have the same classes: those of ``classes`` in turn, all of them where it is None, drawn at
    random where it is ``random``. With several seeds each setting tells what it changes against the
    first, or ``against``; with one seed ± comes from ``repeats`` random halves of the images, 0 for
    none. ``features`` (inception, dinov2, digits, patches or a network of your own), ``reference``
    and ``metrics`` are chosen by the images where they are None. Images are drawn where the model
    is: move ``model.denoiser`` to a GPU before.

    The numbers are those of ``evaluate.py`` with the same settings and seeds.

    Raises:
        ValueError: a value that cannot be meant, a setting that the model cannot be drawn with, or
            a reference or weights that are not here; nothing is drawn before.

    Example::

        model = sag_dit.load("digits")
        settings = {"unguided": [], "SAG": [SAG(0.5)], "SAG + CFG": [SAG(0.5), CFG(1.5)]}
        sag_dit.study.compare(model, settings, seeds=3)
    """
    # Everything is checked and put together before the first image is drawn.
    _check(settings, seeds=seeds, repeats=repeats)
    check_metrics(metrics)
    device = model.denoiser.device
    model.codec.to(device)
    setup = Setups(device).setup(
        example_of(model),
        model.class_names,
        features=features,
        reference=reference,
        metrics=metrics,
    )
    # A measurement for each setting and seed: the same requests, so the same noise and classes.
    rule = "all" if classes is None else classes
    measurements: list[Measurement] = []
    for name, chosen in settings.items():
        how = chosen
        if not isinstance(how, Settings):
            how = Settings.of(
                model, sampler=sampler, steps=steps, guidance=how, batch_size=batch_size
            )
        how.check(model)
        setting = Setting(name)
        cost = cost_of(model.denoiser, how.guidance, how.sampler, how.steps)
        for number in range(seed, seed + seeds):
            names = how.class_names(model)
            requests = make_requests(num_images, number, classes, names)
            request = {"seed": number, "classes": rule if isinstance(rule, str) else list(rule)}
            pixels = identity_of(Pixels.of(model, how, _by_key(how.guidance), request))
            images = ToDraw(model, how, requests, pixels, cost)
            measurements.append(measurement(setting, images, setup, repeats))
    base_name(measurements, against)
    # Only now anything is drawn.
    records = _measured(measurements, setup, progress)
    return Comparison.of(measurements, records, against)


def _check(settings: Mapping[str, object], *, seeds: int, repeats: int) -> None:
    if not settings:
        raise ValueError("settings={}: expected names with their guidance, such as {'plain': []}")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected a whole number, 1 or more")
    if repeats < 0 or repeats == 1:
        raise ValueError(f"repeats={repeats}: expected 0, or 2 or more")


def _by_key(guidance: Sequence[Term]) -> dict[str, Term]:
    """Return terms by their keys; of several with one key the later ones are numbered."""
    named: dict[str, Term] = {}
    for term in guidance:
        key = getattr(type(term), "key", type(term).__name__)
        count = sum(type(each) is type(term) for each in named.values())
        named[f"{key}_{count + 1}" if count else key] = term
    return named


def _measured(
    measurements: Sequence[Measurement], setup: Setup, progress: bool
) -> dict[str, Record]:
    """Draw and measure each set once, though two settings may come to the same images."""
    records: dict[str, Record] = {}
    bar = Bar()
    try:
        for number, each in enumerate(measurements, start=1):
            if each.identity in records:
                continue
            images = each.images
            assert isinstance(images, ToDraw)
            measuring = Measuring(each, images.model.denoiser.device)
            if progress:
                text = f"{each.setting.name} ({number} of {len(measurements)})"
                bar.begin(text, each.count)
            # Rows of the next batch, which the bar moves by while it is drawn.
            size = images.settings.batch_size
            bar.begin_batch(min(size, each.count))
            for batch in drawn(images.model, images.requests, images.settings, watch=bar.step):
                measuring(batch)
                bar.end_batch()
            records[each.identity] = measuring.record()
    finally:
        bar.stop()
    return records
