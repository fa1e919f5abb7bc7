"""``evaluate.py``: FID and its companions of images on disk, or of a model while it draws."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.errors import HydraException

from sag_dit.cli.app import fail, launch, quiet_lightning
from sag_dit.cli.composing import make, placed
from sag_dit.cli.keys.evaluating import Evaluate
from sag_dit.cli.keys.key import plain
from sag_dit.cli.presets import with_presets
from sag_dit.cli.rows import Row, make_rows
from sag_dit.cli.sweep import Choice, expand
from sag_dit.cli.values import check_logger

if TYPE_CHECKING:
    from sag_dit.cli.jobs import Job
    from sag_dit.cli.measuring import Measure
    from sag_dit.cli.records import Record
    from sag_dit.evaluation.suite import Suite
    from sag_dit.training.predicting import Predictor

READ = 64
"""Images read from disk at once."""


def check(config: Evaluate, rows: Sequence[Row]) -> None:
    """Refuse what cannot be meant, before anything is loaded.

    Raises:
        ValueError: the value, what was expected, and the remedy.
    """
    from sag_dit.cli.instruments import check_metrics
    from sag_dit.cli.published import expected_of, experiment_of

    check_logger(config.logger)
    for row in rows:
        check_metrics(row.config.metrics)
        if row.config.trainer != config.trainer:
            raise ValueError("-m: the trainer cannot differ between settings; run them one by one")
        expected = expected_of(row.config)
        if expected is not None:
            experiment_of(expected)
        if row.config.keep and row.source is not None:
            raise ValueError("keep=true: images on disk are kept already; leave it out")


def run(config: Evaluate, choices: Sequence[Choice] | None = None) -> None:
    """Measure what has not been measured yet; rank 0 then writes and shows all results."""
    rows = make_rows(config, choices)
    quiet_lightning()
    from sag_dit.cli.jobs import base_name, make_jobs
    from sag_dit.cli.records import read_record
    from sag_dit.cli.report import report
    from sag_dit.cli.stopping import LeaveWhenTold, ending_together
    from sag_dit.training.predicting import Predictor

    check(config, rows)
    trained = partial(make, config.trainer, "trainer")
    predictor = Predictor(trained, Path(config.finished), [LeaveWhenTold()])
    trainer = predictor.trainer
    jobs = make_jobs(rows, trainer.strategy.root_device)
    base_name(jobs, config.against)
    finished = Path(config.finished)
    # Known before any rank writes, so that all ranks measure the same.
    records = {job.identity: read_record(finished, job.identity) for job in jobs}
    pending = _pending(jobs, records)
    if trainer.is_global_zero:
        for line in costs(pending):
            print(line)
    with ending_together(trainer):
        for number, job in enumerate(pending, start=1):
            text = f"{job.name} ({number} of {len(pending)})"
            so_far = records[job.identity]
            records[job.identity] = measured(predictor, job, text, finished, so_far)
    if trainer.is_global_zero:
        known = {key: record for key, record in records.items() if record is not None}
        out = Path(config.out or f"outputs/evaluate/{_name(jobs)}")
        report(placed(config, out), jobs, known, out, finished, swept=choices is not None)


def _pending(jobs: Sequence[Job], records: Mapping[str, Record | None]) -> list[Job]:
    """Return what is still to be measured; of settings of one identity each metric once."""
    found = []
    asked: dict[str, set[str]] = {}
    for job in jobs:
        earlier = asked.setdefault(job.identity, set())
        lacking = [name for name in job.lacking(records[job.identity]) if name not in earlier]
        if lacking:
            found.append(job)
        earlier.update(lacking)
    return found


def costs(jobs: Sequence[Job]) -> list[str]:
    """Return what drawing takes, a line for all settings that cost the same."""
    names: dict[str, list[str]] = {}
    for job in jobs:
        if job.cost is not None and job.name not in names.setdefault(str(job.cost), []):
            names[str(job.cost)].append(job.name)
    if len(names) == 1:
        return [f"cost: {cost}" for cost in names]
    return [f"cost of {', '.join(own)}: {cost}" for cost, own in names.items()]


def _name(jobs: Sequence[Job]) -> str:
    digest = hashlib.sha256("".join(job.identity for job in jobs).encode()).hexdigest()[:8]
    first = jobs[0]
    name = str(first.facts["samples"] if first.plan is None else first.facts["model"])
    return re.sub(r"[^\w.+-]+", "-", f"{name}-{digest}")


def measured(
    predictor: Predictor, job: Job, text: str, finished: Path, known: Record | None = None
) -> Record:
    """Draw or read one set of images on all ranks, and keep its numbers.

    Of metrics some may be ``known``, which is then completed with the others.
    """
    from sag_dit.cli.measuring import Measure
    from sag_dit.cli.records import Record, write_record

    config, trainer = job.row.config, predictor.trainer
    since = time.monotonic()
    repeats = config.confidence.repeats
    lacking = replace(job.instruments, metrics=job.lacking(known))
    suite = lacking.suite(job.count, job.period, repeats > 0)
    suite.to(trainer.strategy.root_device)
    measure = Measure(suite, finished / job.identity, 0 if known else config.gallery.num)
    _see(predictor, job, text, measure)
    # Every rank takes part in these, in this order.
    metrics = suite.compute()
    warnings = suite.warnings()
    spread = _spread(suite, repeats, warnings)
    record = Record(metrics, spread, dict(job.facts), warnings, time.monotonic() - since)
    record = known.completed(record) if known else record
    if trainer.is_global_zero:
        if job.plan is not None and config.keep:
            from sag_dit.output.finish import write_manifest

            write_manifest(job.plan.folder, job.plan.requests, job.plan.model.class_names)
        write_record(finished, job.identity, record)
    return record


def _see(predictor: Predictor, job: Job, text: str, measure: Measure) -> None:
    """Draw or read all images of a job, for ``measure`` to see."""
    from sag_dit.cli.measuring import Stored, read_back
    from sag_dit.data.requests import PendingRequests

    plan = job.plan
    if plan is None:
        if job.images is None:
            raise TypeError("a job is drawn or on disk")
        predictor.read(Stored(job.images, READ), [measure], text=text, total=job.count)
        return
    if not job.row.config.keep:
        predictor.draw(plan.model, plan.requests, plan.settings, [measure], text=text)
        return
    # Kept images are drawn as sample.py draws them, those that are missing alone, and read back.
    config = replace(job.row.config, sampler=plan.sampler)
    plan.folder.claim(plan.pixels, plain(placed(config, plan.folder.path)))
    missing = plan.folder.missing(plan.requests, gallery=0)
    # Found by all ranks before any of them draws.
    predictor.trainer.strategy.barrier()
    if missing:
        done = job.count - len(missing)
        predictor.draw(
            plan.model, missing, plan.settings, [plan.folder.write], text=text, done=done
        )
        predictor.trainer.strategy.barrier()
    data = PendingRequests(plan.requests, plan.settings.batch_size)
    predictor.read(
        data, [measure], text=text, total=job.count, read=partial(read_back, plan.folder)
    )


def _spread(suite: Suite, repeats: int, warnings: list[str]) -> Mapping[str, float]:
    if not repeats:
        return {}
    if suite.groups == 1:
        warnings.append("no ± can be told of so few images")
        return {}
    try:
        return {name: spread for name, (_, spread) in suite.confidence(repeats).items()}
    except ValueError as error:
        warnings.append(f"no ± could be told: {error}")
        return {}


def start(arguments: Sequence[str], entry: Sequence[str] = ()) -> None:
    """Run ``evaluate.py`` with the user's arguments."""
    try:
        choices = expand(arguments)
    except (ValueError, HydraException) as error:
        fail(str(error))

    def job(config: Evaluate) -> None:
        # Other ranks are started with the arguments as the user wrote them.
        sys.argv[1:] = [*entry, *arguments]
        run(config, choices)

    launch("evaluate", job, arguments if choices is None else choices[0].arguments, entry)


def main(arguments: Sequence[str] | None = None, entry: Sequence[str] = ()) -> None:
    """Run ``evaluate.py``, with the arguments of the command line unless others are given."""
    start(with_presets("evaluate", sys.argv[1:] if arguments is None else arguments), entry)
