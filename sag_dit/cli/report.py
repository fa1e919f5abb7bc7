"""The results of an evaluation: table, JSON, CSV, page, curves, and a logger's summary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sag_dit.cli.composing import make
from sag_dit.cli.jobs import Job, base_name
from sag_dit.cli.keys.evaluating import Evaluate
from sag_dit.cli.measuring import shot
from sag_dit.cli.published import deviations, expected_of
from sag_dit.cli.records import Record, Result, combine, compared, flat_facts, write_results
from sag_dit.output.charts import Chart, Metric, Row, charts, places
from sag_dit.output.curves import write_curves
from sag_dit.output.folder import read_png
from sag_dit.output.plots import write_plots

SHORT = {"features", "reference", "count", "steps", "sampler", "model", "samples", "classes"}
"""Facts that the table's caption tells where they are common to all rows."""


def report(
    config: Evaluate,
    jobs: Sequence[Job],
    records: Mapping[str, Record],
    out: Path,
    finished: Path,
    *,
    swept: bool,
) -> None:
    """Show and write everything; the last line on the terminal names the page."""
    results = compared(_results(jobs, records), base_name(jobs, config.against))
    metrics: dict[str, Metric] = {}
    for job in jobs:
        metrics |= job.instruments.labels()
    about = _spread_text(config, results)
    as_json, _ = write_results(out, results, metrics, about)
    rows = [
        Row(
            result.name,
            result.axes,
            result.metrics,
            result.spread,
            _shots(finished, result, config.gallery.num),
            _change_notes(result, metrics),
        )
        for result in results
    ]
    show(results, rows, metrics, about)
    drawn = charts(rows, metrics) if len(rows) > 1 else []
    caption = common(results)
    if swept and config.plots:
        for file in write_plots(out, drawn, f"{caption}; {about}" if about else caption):
            print(f"curves: {file}")
    page = _page(out, rows, metrics, drawn, results, caption, about)
    _log(config, results)
    print(f"results: {as_json}")
    print(f"page: {page.resolve()}")


def _results(jobs: Sequence[Job], records: Mapping[str, Record]) -> list[Result]:
    results = []
    for place in dict.fromkeys(job.row.place for job in jobs):
        own = [job for job in jobs if job.row.place == place]
        first = own[0]
        named = {}
        for job in own:
            record = records[job.identity].of(job.instruments.metrics)
            # What was measured before may lack facts that are told today.
            named[job.identity] = replace(record, facts={**job.facts, **record.facts})
        result = combine(first.name, first.row.axes, named)
        expected = expected_of(first.row.config)
        if expected is not None:
            told = deviations(first.row.config, expected, result.facts)
            result = replace(result, expected=expected, deviations=told)
        results.append(result)
    return results


def _spread_text(config: Evaluate, results: Sequence[Result]) -> str:
    seeds = max(len(result.seeds) for result in results)
    if seeds > 1:
        return f"mean ± standard deviation over {seeds} seeds"
    if any(result.spread for result in results):
        return f"± standard error, from {config.confidence.repeats} random halves of the images"
    return ""


def common(results: Sequence[Result]) -> str:
    """Return in one line the main facts that all results share."""
    told = []
    facts = [result.facts for result in results]
    for key in facts[0]:
        values = {str(each.get(key)) for each in facts}
        if key in SHORT and len(values) == 1:
            value = facts[0][key]
            told.append(f"{value:,} images" if key == "count" else f"{key} {value}")
    return ", ".join(told)


def show(
    results: Sequence[Result], rows: Sequence[Row], metrics: Mapping[str, Metric], about: str
) -> None:
    """Print the table, what it rests on, and the published numbers beside it."""
    console = Console(soft_wrap=True, highlight=False)
    table = _table("setting", (metric.title for metric in metrics.values()))
    for row in rows:
        table.add_row(row.name, *(_cell(row, name, places(rows, name)) for name in metrics))
    _print_whole(console, table)
    for line in (common(results), about):
        if line:
            console.print(line, style="dim", markup=False)
    if any(result.change for result in results):
        _show_changes(console, results, metrics)
    for warning in dict.fromkeys(text for result in results for text in result.warnings):
        console.print(f"warning: {warning}", style="yellow", markup=False)
    for result in results:
        if result.expected is not None:
            _show_expected(console, result, metrics)


def _table(first: str, titles: Iterable[str]) -> Table:
    """Return an empty table: a column of names, and columns of numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _cell(row: Row, name: str, decimals: int) -> str:
    if name not in row.metrics:
        return "–"
    text = f"{row.metrics[name]:.{decimals}f}"
    return f"{text} ± {row.spread[name]:.{decimals}f}" if name in row.spread else text


def _changes(result: Result, metrics: Mapping[str, Metric]) -> dict[str, str]:
    """Return what a setting changes, as one reads it; nothing of a metric that it lacks."""
    texts = {}
    for name in metrics.keys() & result.change.keys():
        difference, error = result.change[name]
        decimals = max(0, min(6, 1 - math.floor(math.log10(error)))) if error > 0 else 4
        texts[name] = f"{difference:+.{decimals}f} ± {error:.{decimals}f}"
    return texts


def _change_notes(result: Result, metrics: Mapping[str, Metric]) -> list[str]:
    texts = _changes(result, metrics)
    told = ", ".join(f"{metrics[name].label} {texts[name]}" for name in metrics if name in texts)
    return [f"against {result.against}: {told}"] if told else []


def _print_whole(console: Console, table: Table) -> None:
    """Print a table that is never squeezed: where the terminal is narrower its lines go on."""
    width = console.measure(table, options=console.options.update(max_width=500)).maximum
    Console(width=max(console.width, width), highlight=False).print(table)


def _show_changes(
    console: Console, results: Sequence[Result], metrics: Mapping[str, Metric]
) -> None:
    table = _table("change", (metric.title for metric in metrics.values()))
    for result in results:
        texts = _changes(result, metrics)
        clear = {name for name, (d, error) in result.change.items() if abs(d) > 2 * error}
        cells = (
            Text(texts.get(name, ""), style="" if name in clear else "dim") for name in metrics
        )
        if texts:
            table.add_row(result.name, *cells)
    against = next(result.against for result in results if result.change)
    console.print()
    _print_whole(console, table)
    console.print(
        f"against {against} at the same seeds, ± standard error; within two of them it is none",
        style="dim",
        markup=False,
    )


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


def _shots(finished: Path, result: Result, num: int) -> list[Any]:
    folder = finished / result.identities[0]
    files = [shot(folder, index) for index in range(num)]
    return [read_png(file) for file in files if file.exists()]


def _page(
    out: Path,
    rows: Sequence[Row],
    metrics: Mapping[str, Metric],
    drawn: Sequence[Chart],
    results: Sequence[Result],
    caption: str,
    about: str,
) -> Path:
    facts = results[0].facts
    what = str(facts.get("model") or facts.get("samples"))
    count = f"{len(rows)} settings" if len(rows) > 1 else rows[0].name
    same = "Every setting starts from the same noise. " if "model" in facts else ""
    shared = {
        key: value
        for key, value in flat_facts(facts)
        if all(dict(flat_facts(each.facts)).get(key) == value for each in results)
    }
    notes = [text for result in results for text in result.warnings]
    for result in results:
        if result.expected is not None:
            notes += _expected_notes(result, metrics)
    return write_curves(
        out,
        rows,
        metrics,
        drawn,
        title=f"{what}: {count}",
        lead=f"{same}{caption[:1].upper()}{caption[1:]}.",
        spread=f"{about[:1].upper()}{about[1:]}." if about else "",
        notes=list(dict.fromkeys(notes)),
        settings=shared,
    )


def _expected_notes(result: Result, metrics: Mapping[str, Metric]) -> list[str]:
    expected = result.expected
    if expected is None:
        return []
    numbers = [
        f"{metrics[name].label} {published:g} (here {difference:+.4g})"
        for name, (published, _, difference) in expected.differences(result.metrics).items()
    ]
    told = "; ".join(result.deviations)
    rest = f"; the protocols differ, or may differ, in {told}" if told else ""
    return [f"{result.name}: {expected.source} has {', '.join(numbers)}{rest}."]


def _log(config: Evaluate, results: Sequence[Result]) -> None:
    """Give the numbers to the logger: as Weights & Biases' summary, else as metrics."""
    logger = make(config.logger, "logger") if config.logger else None
    if logger is None:
        return
    from lightning.pytorch.loggers import WandbLogger

    numbers = {
        f"{result.name}/{name}" if len(results) > 1 else name: value
        for result in results
        for name, value in result.metrics.items()
    }
    if isinstance(logger, WandbLogger):
        import wandb

        logger.experiment.summary.update(numbers)
        names = list(results[0].metrics)
        columns: list[str | int] = ["setting", *names, *(f"{name}_spread" for name in names)]
        data = [
            [
                result.name,
                *(result.metrics.get(name) for name in names),
                *(result.spread.get(name) for name in names),
            ]
            for result in results
        ]
        logger.experiment.log({"results": wandb.Table(columns=columns, data=data)})
        logger.experiment.config.update({"results": [dict(r.facts) for r in results]})
    else:
        logger.log_metrics(numbers)
    logger.finalize("success")
