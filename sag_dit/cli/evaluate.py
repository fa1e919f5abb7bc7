"""``evaluate.py``: FID and its companions of images on disk, or of a model while it draws."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sag_dit.cli.app import alone_in, launch, leaving_when_told, quiet_lightning, settings_of
from sag_dit.cli.composing import make, placed
from sag_dit.cli.keys import Evaluate
from sag_dit.cli.keys.key import to_dict
from sag_dit.cli.presets import with_presets
from sag_dit.cli.rows import Configured, make_rows
from sag_dit.cli.speed import emulated, speed_told
from sag_dit.cli.sweep import Choice
from sag_dit.cli.trainer_flags import check_drawing
from sag_dit.cli.values import check_logger, own_sampler

if TYPE_CHECKING:
    from sag_dit.study.comparison import Comparison
    from sag_dit.study.measurement import Measurement
    from sag_dit.study.results import Record


def check_rows(config: Evaluate, rows: Sequence[Configured]) -> None:
    """Refuse what cannot be meant, before anything is loaded.

    Raises:
        ValueError: the value, what was expected, and the remedy.
    """
    from sag_dit.cli.published import expected_of, experiment_of
    from sag_dit.study.setup import check_metrics

    check_logger(config.logger)
    check_drawing(config.trainer)
    for row in rows:
        check_metrics(row.config.metrics, list(row.config.verifiers or ()))
        if row.config.trainer != config.trainer:
            raise ValueError("-m: the trainer cannot differ between settings; run them one by one")
        expected = expected_of(row.config)
        if expected is not None:
            experiment_of(expected)
        if row.config.keep and row.source is not None:
            raise ValueError("keep=true: images on disk are kept already; leave it out")


def run_evaluate(config: Evaluate, choices: Sequence[Choice] | None = None) -> None:
    """Measure what has not been measured yet; rank 0 then writes and shows all results."""
    rows = make_rows(config, choices)
    quiet_lightning()
    import torch

    from sag_dit.cli.matching import matched_rows
    from sag_dit.cli.measurements import Loaded, make_measurements
    from sag_dit.cli.stopping import LeaveWhenTold, ending_together
    from sag_dit.profiling import profiling
    from sag_dit.study.comparison import Comparison
    from sag_dit.study.measurement import ToDraw, base_name, measure
    from sag_dit.study.results import read_record
    from sag_dit.training.predicting import Predictor
    from sag_dit.training.timing import settle
    from sag_dit.training.timing import told as timing

    # Everything is checked and put together on every rank before anything is drawn.
    check_rows(config, rows)
    finished = Path(config.finished)
    predictor = Predictor(partial(make, config.trainer, "trainer"), finished, [LeaveWhenTold()])
    trainer = predictor.trainer
    device = trainer.strategy.root_device
    loaded = Loaded(device)
    measurements = make_measurements(rows, device, loaded)
    if config.matched:
        rows += matched_rows(rows, measurements, config, write=trainer.is_global_zero)
        measurements = make_measurements(rows, device, loaded)
    base_name(measurements, config.against)
    # Known before any rank writes, so that all ranks measure the same.
    known = {each.identity: read_record(finished, each.identity) for each in measurements}
    pending = _pending(measurements, known)
    images = {place: measurements[place].images for place in pending}
    to_draw = {place: each for place, each in images.items() if isinstance(each, ToDraw)}
    if trainer.is_global_zero:
        told = [speed_told(rows[place].config, each.model) for place, each in to_draw.items()]
        told += [emulated(rows[place].config, device) for place in to_draw]
        lines = costs([measurements[place] for place in pending], trainer.world_size)
        for line in (*lines, *dict.fromkeys(told)):
            if line:
                print(line)
    asked = profiling(partial(settle, device)) if config.profile else nullcontext()
    with ending_together(trainer), asked as profile:
        for number, place in enumerate(pending, start=1):
            each, own = measurements[place], rows[place].config
            _claim(each, own)
            torch.set_float32_matmul_precision(own.matmul)
            text = f"{each.setting.name} ({number} of {len(pending)})"
            so_far, num = known[each.identity], own.gallery.num
            with alone_in(each.kept_in) if each.kept_in else nullcontext():
                known[each.identity] = measure(
                    predictor, each, finished, text=text, known=so_far, num=num
                )
    if profile is not None and trainer.is_global_zero:
        print(*timing(profile, None, device), sep="\n")
    # Rank 0 puts the seeds of each setting together, shows the table and writes the page.
    if trainer.is_global_zero:
        records = {key: record for key, record in known.items() if record is not None}
        comparison = Comparison.of(measurements, records, config.against)
        out = Path(config.out or f"outputs/evaluate/{_name(measurements)}")
        _report(placed(config, out), comparison, out, swept=choices is not None)


def _pending(
    measurements: Sequence[Measurement], records: Mapping[str, Record | None]
) -> list[int]:
    """Return the places of what is to be measured; of one identity each metric once."""
    found = []
    asked: dict[str, set[str]] = {}
    for place, each in enumerate(measurements):
        earlier = asked.setdefault(each.identity, set())
        lacking = [name for name in each.lacking(records[each.identity]) if name not in earlier]
        if lacking:
            found.append(place)
        earlier.update(lacking)
    return found


def costs(measurements: Sequence[Measurement], ranks: int = 1) -> list[str]:
    """Return what drawing takes, a line for all settings that cost the same, and for padding."""
    from sag_dit.guidance.cost import Batches
    from sag_dit.study.measurement import ToDraw

    names: dict[str, list[str]] = {}
    padding: dict[str, None] = {}
    useless: list[str | None] = []
    for each in measurements:
        if isinstance(each.images, ToDraw):
            own = names.setdefault(str(each.images.cost), [])
            own += [each.setting.name] * (each.setting.name not in own)
            size = each.images.settings.batch_size
            padding[Batches(len(each.images.requests), size, ranks).padding()] = None
            useless.append(each.images.settings.useless(each.images.model.denoiser))
    lines = [f"cost of {', '.join(own)}: {cost}" for cost, own in names.items()]
    if len(names) == 1:
        lines = [f"cost: {cost}" for cost in names]
    lines += [f"      {told}" for told in padding if told]
    # Some settings, such as no guidance, have nothing to share beside others that have.
    return lines + ([str(useless[0])] if useless and all(useless) else [])


def _claim(measurement: Measurement, config: Evaluate) -> None:
    """Make the folder of kept images belong to what is drawn into it."""
    from sag_dit.study.measurement import ToDraw

    images = measurement.images
    if isinstance(images, ToDraw) and images.folder is not None:
        sampler = own_sampler(config.sampler, images.model.denoiser.process)
        config = placed(replace(config, sampler=sampler), images.folder.path)
        images.folder.claim(images.pixels, to_dict(config))


def _name(measurements: Sequence[Measurement]) -> str:
    from sag_dit.checkpoints.model import plain_name

    digest = hashlib.sha256("".join(each.identity for each in measurements).encode()).hexdigest()
    facts = measurements[0].facts
    return plain_name(f"{facts.get('model', facts.get('samples'))}-{digest[:8]}")


def _report(config: Evaluate, comparison: Comparison, out: Path, *, swept: bool) -> None:
    """Show and write everything; the last line on the terminal names the page."""
    from rich.console import Console

    from sag_dit.study.report import log, report

    comparison.show(Console(soft_wrap=True, highlight=False))
    if (out / "results.json").exists() and not os.access(out, os.W_OK):
        print(f"results: {out / 'results.json'}")
        return
    finished, plots = Path(config.finished), swept and config.plots
    page = report(comparison, out, finished, num=config.gallery.num, plots=plots)
    if config.logger:
        log(make(config.logger, "logger"), comparison.results)
    print(f"results: {out / 'results.json'}")
    print(f"page: {page.resolve()}")


def start(arguments: Sequence[str], entry: Sequence[str] = ()) -> None:
    """Run ``evaluate.py`` with the user's arguments."""
    choices = settings_of("evaluate", arguments)

    def job(config: Evaluate) -> None:
        # Other ranks are started with the arguments as the user wrote them.
        sys.argv[1:] = [*entry, *arguments]
        run_evaluate(config, choices)

    launch("evaluate", job, arguments if choices is None else choices[0].arguments, entry)


@leaving_when_told()
def start_with_presets(arguments: Sequence[str] | None = None, entry: Sequence[str] = ()) -> None:
    """Run ``evaluate.py``, with the arguments of the command line unless others are given."""
    start(with_presets("evaluate", sys.argv[1:] if arguments is None else arguments), entry)


main = start_with_presets
