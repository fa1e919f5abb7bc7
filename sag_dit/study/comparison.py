"""compare: settings of a model drawn, measured and put side by side, as a table and as data."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sag_dit.checkpoints import Model
from sag_dit.data.requests import make_requests
from sag_dit.evaluation.features import FeatureExtractor
from sag_dit.evaluation.scores import Verifier
from sag_dit.guidance import Term
from sag_dit.identity import settings as identity_of
from sag_dit.output.bar import Bar
from sag_dit.sampler import Sampler
from sag_dit.sampling import Pixels, Settings, by_key, drawn, in_our_words
from sag_dit.study.charts import places
from sag_dit.study.effective import matches
from sag_dit.study.measurement import (
    Measurement,
    Measuring,
    Setting,
    ToDraw,
    base_name,
    measurement,
)
from sag_dit.study.results import Metric, Record, Result, combine, compared, flat_row, json_values
from sag_dit.study.setup import Ratio, Setup, Setups, check_metrics, example_of
from sag_dit.study.variance import Components, components, confident

CAPTION = {
    "features",
    "reference",
    "count",
    "steps",
    "sampler",
    "search",
    "model",
    "samples",
    "classes",
}
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
        # In a notebook rich would show the table instead of writing it.
        console = Console(
            file=io.StringIO(), width=100, soft_wrap=True, highlight=False, force_jupyter=False
        )
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
        for line in (self.caption, self.about, *self._about_components()):
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
        lines = [self.caption, self.about, *self._about_components(), self._about_changes()]
        lines += [f"warning: {warning}" for warning in self.warnings()]
        below = "<br>".join(html.escape(line) for line in lines if line)
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
            f"<small>{below}</small>"
        )

    def components(self, metric: str) -> dict[str, Components]:
        """Return how far a metric varies over trainings and over samplings, by setting."""
        return {
            result.name: components(result.runs(metric))
            for result in self.results
            if metric in result.metrics
        }

    def _about_components(self) -> list[str]:
        """Return both parts of the spread of the first setting, a line; nothing of one training."""
        first = self.results[0]
        if first.trainings < 2:
            return []
        told = []
        for name, metric in self.metrics.items():
            if name in first.metrics:
                parts = components(first.runs(name))
                told.append(f"{metric.label} {parts.training:.3g} and {parts.sampling:.3g}")
        return [f"deviation of {first.name} over trainings and over samplings: {'; '.join(told)}"]

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
        trainings = max(result.trainings for result in self.results)
        if trainings > 1:
            return (
                f"against {base} at the same weights and seeds, ± standard error over "
                f"{trainings} trainings; a change of less than {confident(trainings):.1f} of them "
                f"may be gone after another training"
            )
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
    trainings = max(result.trainings for result in results)
    if trainings > 1:
        each = seeds // trainings
        return (
            f"mean ± standard deviation over {trainings} trainings"
            f"{f' of {each} seeds each' * (each > 1)}"
        )
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
    """Return the metrics whose change is larger than two standard errors.

    Of several trainings it has to be outside the 95 % interval of Student's t over them.
    """
    least = confident(result.trainings) if result.trainings > 1 else 2
    return {name for name, (change, error) in result.change.items() if abs(change) > least * error}


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
    # Names in it are the user's: a [x] in them is no markup.
    unbounded = console.options.update(max_width=500, markup=False)
    width = max(console.width, console.measure(table, options=unbounded).maximum)
    alike = Console(
        file=console.file, width=width, highlight=False, markup=False, force_jupyter=False
    )
    alike.print(table)


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
    console.print(table, markup=False)
    if result.deviations:
        console.print("the protocols differ, or may differ, in", markup=False)
        for line in result.deviations:
            console.print(f"  {line}", style="yellow", markup=False)
    else:
        console.print("the protocol is the published one", markup=False)


@in_our_words
def compare(
    model: Model | Sequence[Model],
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
    fdr: Ratio | None = None,
    verifiers: Mapping[str, Verifier] | None = None,
    against: str | None = None,
    repeats: int = 10,
    progress: bool = True,
    matched: int = 0,
) -> Comparison:
    """Draw and measure each setting at the same ``seeds`` seeds, ``seed`` the first of them.

    A setting is a list of guidance terms, drawn with ``steps``, ``sampler`` and ``batch_size``, or
    :class:`~sag_dit.sampling.Settings`, which hold all of these. All start from the same noise and
    have the same classes: those of ``classes`` in turn, all of them where it is None, drawn at
    random where it is ``random``. With several seeds each setting tells what it changes against the
    first, or ``against``; with one seed ± comes from ``repeats`` random halves of the images, 0 for
    none. With ``matched`` images to measure effects on, such as 100, CFG of the same effect stands
    below the settings, for each that is guided otherwise; see :mod:`sag_dit.study.effective`.
    ``features`` (such as inception or dinov2, or a network of your own), ``reference`` and
    ``metrics`` are chosen by the images where they are None. ``verifiers``, functions (images,
    condition) -> a score for each image, are metrics of their names; ``fdr`` says what the metric
    fdr compares. Images are drawn where the model is: move ``model.denoiser`` to a GPU before.

    ``model`` may be several trainings of one: then changes are paired by training as well, their
    error is that over trainings, and the table tells how far numbers vary over trainings and over
    samplings. Matches are those of the first.

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
    _check(settings, seeds=seeds, repeats=repeats, matched=matched)
    check_metrics(metrics, list(verifiers or ()))
    models = [model] if isinstance(model, Model) else [*model]
    check_trainings(models)
    model = models[0]
    device = model.denoiser.device
    for each in models:
        each.codec.to(device)
    setup = Setups(device).setup(
        example_of(model),
        model.class_names,
        features=features,
        reference=reference,
        metrics=metrics,
        fdr=fdr,
        verifiers=verifiers,
    )
    # A measurement for each setting and seed: the same requests, so the same noise and classes.
    rule = "all" if classes is None else classes
    measurements: list[Measurement] = []
    ways: dict[str, Settings] = {}
    for name, chosen in settings.items():
        how = chosen
        if not isinstance(how, Settings):
            how = Settings.of(
                model, sampler=sampler, steps=steps, guidance=how, batch_size=batch_size
            )
        for each in models:
            how.check(each)
        ways[name] = how
    if matched:
        # With a seed of their own: what is matched is not what is measured.
        asked = make_requests(matched, seed + seeds, classes, model.class_names)
        ways |= matches(model, ways, asked)
    for name, how in ways.items():
        setting = Setting(name)
        cost = how.cost(model.denoiser)
        for trained, number in product(models, range(seed, seed + seeds)):
            names = how.class_names(trained)
            requests = make_requests(num_images, number, classes, names)
            request = {"seed": number, "classes": rule if isinstance(rule, str) else list(rule)}
            pixels = identity_of(Pixels.of(trained, how, by_key(how.guidance), request))
            images = ToDraw(trained, how, requests, pixels, cost)
            measurements.append(measurement(setting, images, setup, repeats))
    base_name(measurements, against)
    # Only now anything is drawn.
    records = _measured(measurements, setup, progress)
    return Comparison.of(measurements, records, against)


def check_trainings(models: Sequence[Model]) -> None:
    """Refuse models that are no trainings of one, since their numbers could not be paired.

    Raises:
        ValueError: none, two of the same weights, or two that differ in more than their weights.
    """
    if not models:
        raise ValueError("model=[]: expected a model, or several trainings of one")
    for name in ("class_names", "config"):
        if any(getattr(each, name) != getattr(models[0], name) for each in models):
            raise ValueError(
                f"{', '.join(each.name for each in models)}: their {name} differ; expected "
                f"trainings of one model, which differ in their weights alone"
            )
    if len({each.sha256 for each in models}) < len(models):
        raise ValueError(
            f"{', '.join(each.name for each in models)}: two have the same weights; expected "
            f"several trainings, each once"
        )


def _check(settings: Mapping[str, object], *, seeds: int, repeats: int, matched: int) -> None:
    if not settings:
        raise ValueError("settings={}: expected names with their guidance, such as {'plain': []}")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected a whole number, 1 or more")
    if repeats < 0 or repeats == 1:
        raise ValueError(f"repeats={repeats}: expected 0, or 2 or more")
    if matched < 0:
        raise ValueError(f"matched={matched}: expected 0 (no match), or images, such as 100")


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
