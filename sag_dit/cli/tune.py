"""``tune.py``: the guidance that serves a model best, found within a budget and then confirmed.

The first rung draws a few images of each candidate that Optuna proposes; the best third go on with
three times as many, and so on. What is left on the front of quality and cost is measured again on
other real images, with other seeds.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sag_dit.bounds import Natural
from sag_dit.cli.app import alone_in, launch, quiet_lightning
from sag_dit.cli.composing import changed, compose, make
from sag_dit.cli.keys import BUDGET, Evaluate, Guides, Tune
from sag_dit.cli.keys.key import keys_of, to_dict
from sag_dit.cli.presets import comparison_of
from sag_dit.cli.schema import determining
from sag_dit.cli.trainer_flags import check_drawing
from sag_dit.cli.tuned import unlike_defaults
from sag_dit.cli.typed import MULTIRUN, check_arguments, keys_and_flags
from sag_dit.cli.values import check_logger, make_terms
from sag_dit.files import InUse, atomic
from sag_dit.messages import nearest
from sag_dit.methods import scales
from sag_dit.untrusted import read_json_as

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from sag_dit.output.folder import SampleFolder
    from sag_dit.study.comparison import Comparison
    from sag_dit.study.measurement import Measurement, ToDraw
    from sag_dit.study.results import Record
    from sag_dit.study.tuning import Budget, Changes, Point, Space

USUAL = ("cfg", "sag", "pag")
"""Methods that are tried unless the user says which."""
PROPOSALS = 100
"""Proposals in a row of which none can be drawn, or none is new, after which the search ends."""
CONFIRMED = 4
"""Candidates of the front that are confirmed, at most."""
MOST = 10_000
"""Images of a setting and seed that confirm, at most."""
KEPT = 0.95
"""Share of a time that is planned with; the rest is for reading references and writing the page."""
FEWEST = 10
"""Images of a setting and seed that confirm, at least."""
WAIT = 0.5
"""Seconds between two looks at what other processes are drawing."""
OUT = "outputs/tune"
"""The folder of studies."""
PRESETS = "configs"
"""The folder of presets in that of the study, for ``--config-dir``."""
UNGUIDED = -1
"""Stands among the numbers of trials for no guidance at all."""


@dataclass(frozen=True)
class Candidates:
    """Candidates by the numbers of their trials, and the images that each is drawn with.

    Example:
        >>> Candidates([-1, 4], num_images=300).num_images
        300
    """

    trials: Sequence[int]
    num_images: Natural


@dataclass(frozen=True)
class Finished:
    """What was asked for when a study was finished.

    Example:
        >>> Finished(amount=600.0, unit="seconds").unit
        'seconds'
    """

    amount: float
    unit: str


def run_tune(config: Tune, arguments: Sequence[str], began: float) -> None:
    """Search, confirm, and write the preset, its card and the page.

    Raises:
        ValueError: a value that cannot be used; the message says what to do.
    """
    # What can be refused before anything heavy is imported.
    if find_spec("optuna") is None:
        raise ValueError('tune needs optuna, which is not installed: pip install -e ".[tune]"')
    check_logger(config.logger)
    if set(MULTIRUN) & set(arguments):
        raise ValueError("-m: a study tries several values by itself, such as steps=[10,20]")
    if config.requests is not None:
        raise ValueError(
            f"requests={config.requests}: the first images of a set have to stand for all of it, "
            f"which a file of requests does not promise; state classes or prompt instead"
        )
    from sag_dit.study.setup import check_metrics
    from sag_dit.study.tuning import Budget

    check_metrics([config.quality])
    found = re.fullmatch(BUDGET, config.budget)
    assert found is not None  # by the schema
    budget = Budget.of(float(found[1]), found[2])
    quiet_lightning()
    tuning = Tuning(config, arguments, budget, began)
    with alone_in(tuning.folder, shared=config.workers > 1):
        if tuning.finished:
            print(
                f"this study is finished: {tuning.folder} had {tuning.finished.text}; a larger "
                f"budget goes on"
            )
            print(f"page: {(tuning.folder / 'index.html').resolve()}")
            return
        try:
            tuning.run()
        except SystemExit as stop:
            stop.told = (  # type: ignore[attr-defined]
                "what is measured is kept; repeat the command to go on"
            )
            raise


class Tuning:
    """A study in its folder: what is proposed, measured, chosen and confirmed.

    Example::

        Tuning(config, ["ckpt=digits"], Budget.of(10, "min"), time.monotonic()).run()
    """

    def __init__(
        self, config: Tune, arguments: Sequence[str], budget: Budget, began: float
    ) -> None:
        from sag_dit.checkpoints.model import plain_name
        from sag_dit.cli.measurements import Loaded
        from sag_dit.cli.stopping import LeaveWhenTold
        from sag_dit.evaluation.suite import metric_kind
        from sag_dit.identity import digest
        from sag_dit.output.claim import claim
        from sag_dit.study.tuning import Ledger, limits, passes, rungs, scale_key
        from sag_dit.training.predicting import Predictor

        self.config, self.arguments, self.budget, self.began = config, arguments, budget, began
        self.steps = [config.steps] if isinstance(config.steps, int) else config.steps
        self.sizes, self.limits = rungs(config.num_images, config.rungs), limits(config.rungs)
        self.stated = {each.lstrip("+~").partition("=")[0] for each in keys_and_flags(arguments)[0]}
        # What draws and measures: evaluate's own configuration, Trainer and measurements.
        self.base = _base(config, arguments, max(self.steps))
        check_drawing(self.base.trainer)
        self.predictor = Predictor(
            partial(make, self.base.trainer, "trainer"), Path(OUT), [LeaveWhenTold()]
        )
        if self.predictor.trainer.world_size > 1:
            raise ValueError(
                f"trainer.devices={config.trainer['devices']}: one process of a study draws on one "
                f"device; leave it out, or state workers=2 and start the command twice"
            )
        self.loaded = Loaded(self.predictor.trainer.strategy.root_device)
        # No guidance at all, which all costs are told relative to.
        terms = make_terms(self.base.guidance)
        self.unguided = {
            (scale_key(name) if each == "scale" else f"guidance.{name}.{each}"): term.neutral
            for name, term in terms.items()
            for each in term.strengths
        } | {"steps": max(self.steps)}
        self.search, self.report = self._references()
        plain = self.measurement(self.unguided, config.num_images)
        self.model = _drawn(plain).model
        self.unit = passes(_drawn(plain).cost)
        self.higher = metric_kind(config.quality).higher_is_better
        if self.higher is None:
            raise ValueError(
                f"quality={config.quality}: expected a metric of which more, or less, is better"
            )
        # The folder, which belongs to what determines the results.
        kept = set(keys_of(Tune)) - set(determining("tune", "nothing", "model"))
        values = to_dict(config)
        identity = {name: values[name] for name in values if name in kept - {"trainer"}}
        if self.base.cache.every == 1:  # As in studies of before there was a cache.
            del identity["cache"]
        identity |= {
            "methods": list(self.space.terms),
            "pinned": sorted(self.space.pinned),
            "precision": str(self.base.trainer.get("precision")),
            "weights_sha256": self.model.sha256,
            "classes": config.classes,
            "prompt": config.prompt,
            "reference": self.search,
            "report": self.report,
        }
        name = f"{plain_name(self.model.name)}-{digest(identity)[:8]}"
        self.folder = Path(config.out or f"{OUT}/{name}")
        self.name = str(config.name or f"{plain_name(self.model.name)}_tuned")
        self.results, self.ledger = self.folder / "measured", Ledger(self.folder / "spent.jsonl")
        self.spent_before = self.ledger.total()
        if self.finished is None:
            self._refuse_short()
        self.folder.mkdir(parents=True, exist_ok=True)
        claim(self.folder, identity, values, "a study")

    # What is tried.

    @cached_property
    def space(self) -> Space:
        """What may be tried, of what the model can be drawn with."""
        from sag_dit.study.tuning import Space, scale_key

        names = list(self.config.methods or USUAL)
        terms = make_terms(self.base.guidance)
        for name in names:
            if name not in terms:
                raise ValueError(
                    f"methods: {name}: no such method; expected some of {', '.join(terms)}"
                    f"{nearest(name, terms)}"
                )
        # Each by itself, with the settings that the user has stated.
        usable = {}
        for name in dict.fromkeys(names):
            term = terms[name]
            alone = {
                **self.unguided,
                scale_key(name): term.scale if not term.off else term.neutral + 1,
            }
            try:
                self.measurement(alone, self.config.num_images)
            except ValueError as error:
                if self.config.methods is not None:
                    raise ValueError(f"methods: {name} cannot be tried: {error}") from error
                print(f"{name} is not tried: {error}")
                continue
            usable[name] = term
        pinned = {*_changed_settings(self.base.guidance)}
        pinned |= {each for each in self.stated if each.startswith("guidance.") or each in scales()}
        pinned |= {scale_key(name) for name in terms if f"guidance.{name}.scale" in self.stated}
        pinned |= {scale_key(name) for name, term in terms.items() if not term.off}
        layers = [*self.model.denoiser.layers]
        return Space(usable, layers, self.steps, frozenset(pinned))

    def changes(self, number: int, trials: Sequence[FrozenTrial]) -> Changes:
        """Return in what a candidate differs from the configuration."""
        from optuna.trial import FixedTrial

        if number == UNGUIDED:
            return self.unguided
        fixed: Any = FixedTrial(dict(trials[number].params))
        return self.space.propose(fixed)

    def _references(self) -> tuple[str, str]:
        """Return the images to search with, and the others to confirm with.

        Raises:
            ValueError: there is no pair of them, or they are the same.
        """
        search, report = self.config.reference, self.config.report
        if search is None or report is None:
            # The model's own: of a bundled model, the halves of what it was not trained on.
            default = self._default_reference()
            report = report or default
            if search is None and default is not None and default.endswith(":report"):
                search = f"{default.removesuffix('report')}tune"
        for key, value, what in (("reference", search, "search"), ("report", report, "confirm")):
            if value is None:
                raise ValueError(
                    f"{key} is not set: expected real images to {what} with, a folder or an npz"
                )
        assert search is not None and report is not None
        if search == report:
            raise ValueError(
                f"report={report}: expected other images than those of reference, so that what "
                f"was chosen is not confirmed by what it was chosen with"
            )
        return search, report

    def _default_reference(self) -> str | None:
        try:
            measured = self._measurements([("", self.unguided, 0)], self.config.num_images, None)
        except ValueError as error:
            if "reference is not set" not in str(error):
                raise
            return None
        return measured[0].setup.reference.name

    # What is measured.

    def measurement(self, changes: Changes, num_images: int) -> Measurement:
        """Return the first images of a candidate, to search with."""
        rows = [("", changes, self.config.seed)]
        return self._measurements(rows, num_images, self.search, [self.config.quality])[0]

    def _measurements(
        self,
        rows: Iterable[tuple[str, Changes, int]],
        num_images: int,
        reference: str | None,
        metrics: Sequence[str] | None = None,
    ) -> list[Measurement]:
        """Return a measurement for each row: a name, changes, and a seed."""
        from sag_dit.cli.measurements import make_measurements
        from sag_dit.cli.rows import Configured

        places: dict[str, int] = {}
        listed = []
        for name, changes, seed in rows:
            own: dict[str, Any] = {"num_images": num_images, "seed": seed, "reference": reference}
            own["metrics"] = None if metrics is None else list(metrics)
            config = changed("evaluate", self.base, {**changes, **own})
            listed.append(Configured(name, places.setdefault(name, len(places)), {}, config))
        return make_measurements(listed, self.loaded.device, self.loaded)

    def record(self, measured: Measurement) -> Record | None:
        """Return the numbers of a set of images, None if they are not all known."""
        from sag_dit.study.results import read_record

        known = read_record(self.results, measured.identity)
        return None if measured.lacking(known) else known

    def measure(self, measured: Measurement, text: str, num: int = 0) -> Record:
        """Draw what is missing of a set, measure all of it, and keep the numbers.

        Raises:
            InUse: another process is drawing it.
        """
        from sag_dit.study.measurement import measure
        from sag_dit.study.tuning import Spent, passes

        images = _drawn(measured)
        folder = self._set(images)
        folder.claim(images.pixels, {"num_images": measured.count})
        with alone_in(folder.path):
            known = self.record(measured)
            if known is not None:
                return known
            since, missing = time.monotonic(), len(folder.missing(images.requests, gallery=0))
            measured = replace(measured, images=replace(images, folder=folder))
            record = measure(self.predictor, measured, self.results, text=text, num=num)
            spent = _computed(missing, images) * passes(images.cost)
            self.ledger.add(Spent(spent, time.monotonic() - since))
        return record

    def _set(self, images: ToDraw) -> SampleFolder:
        """Return the folder that keeps a set of images, whatever their number."""
        from sag_dit.identity import digest
        from sag_dit.output.folder import SampleFolder

        return SampleFolder(self.folder / "images" / digest(images.pixels)[:16])

    def missing(self, measured: Measurement) -> int:
        """Return the passes that a set still takes."""
        from sag_dit.study.tuning import passes

        images = _drawn(measured)
        folder = self._set(images)
        known = (folder.path / "images").is_dir()
        count = len(folder.missing(images.requests, gallery=0)) if known else measured.count
        return _computed(count, images) * passes(images.cost)

    def room(self, share: float) -> float:
        """Return how many passes may still be drawn before a share of the budget is spent."""
        total, amount = self.ledger.total(), share * self.budget.amount
        if self.budget.unit == "passes":
            return amount - total.passes
        # At the speed so far; neither all processes together nor this one may take longer.
        workers, before = self.config.workers, self.spent_before.seconds
        all_of_them = KEPT * amount * workers - total.seconds
        own = KEPT * amount - before / workers - (time.monotonic() - self.began)
        return min(all_of_them, own) * total.passes / max(total.seconds, 1e-9)

    def point(self, measured: Measurement) -> Point:
        """Return how good and how dear a measured candidate is; of both less is better."""
        record = self.record(measured)
        assert record is not None
        value = float(record.metrics[self.config.quality])
        quality = -value if self.higher else value
        return quality if math.isfinite(value) else math.inf, self.relative(measured)

    def _needed(self) -> int:
        """Return the passes below which a study can tell nothing."""
        from sag_dit.study.tuning import SEARCHED, least

        # To search, and to confirm one candidate of twice the passes beside CFG and no guidance.
        first = _drawn(self.measurement(self.unguided, self.sizes[0]))
        batch = first.settings.batch_size
        search = least(_computed(self.sizes[0], first), self.unit, self.config.rungs)
        return max(search, round(5 * batch * self.unit * self.config.seeds / (1 - SEARCHED)))

    def _refuse_short(self) -> None:
        """Refuse a budget of passes, before anything is drawn, in which nothing can be found."""
        needed = self._needed()
        if self.budget.unit == "passes" and self.budget.amount < needed:
            raise ValueError(
                f"budget={self.config.budget}: with {self.config.num_images} images a candidate "
                f"and {max(self.steps)} steps a study takes at least {needed} passes; raise it, or "
                f"lower num_images, rungs or steps"
            )

    # The study.

    @property
    def finished(self) -> Budget | None:
        """The budget that the study was finished with, None where this one is larger."""
        from sag_dit.study.tuning import Budget

        file = self.folder / "finished.json"
        if not file.exists():
            return None
        found = read_json_as(file, Finished)
        spent = self.ledger.total()
        reached = found.amount if found.unit == self.budget.unit else spent.of(self.budget.unit)
        if self.budget.amount > reached:
            return None
        return Budget(found.amount, "passes" if found.unit == "passes" else "seconds")

    def run(self) -> None:
        """Search, halve, confirm and report."""
        study = self._study()
        self._first(study)
        self._search(study)
        points = self._halve(study)
        comparison, listed = self._confirm(study, points)
        self._finish(study, comparison, listed)

    def _study(self) -> Study:
        """Open the journal of trials; one that a killed process left unfinished has failed."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        from sag_dit.study.journal_lock import JournalLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        direction: Literal["maximize", "minimize"] = "maximize" if self.higher else "minimize"
        file = self.folder / "trials.log"
        lock: Any = JournalLock(file)
        backend = JournalFileBackend(str(file), lock)
        study = optuna.create_study(
            storage=JournalStorage(backend),
            study_name="tune",
            directions=[direction, "minimize"],
            load_if_exists=True,
        )
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            place = trial.user_attrs.get("images")
            if place is None and self.config.workers > 1:
                continue  # Another process may be about to draw it.
            with suppress(InUse), alone_in(self.folder / "images" / str(place)):
                fail = optuna.trial.TrialState.FAIL
                study.tell(trial.number, state=fail, skip_if_finished=True)
        return study

    def _first(self, study: Study) -> None:
        """Measure the unguided model, which tells what the budget is worth here."""
        plain = self.measurement(self.unguided, self.sizes[0])
        if self.record(plain) is None:
            sizes = ", ".join(f"{size:,}" for size in self.sizes)
            print(f"budget: {self.budget.text}; rungs of {sizes} images")
        self._measure_all({UNGUIDED: plain}, "unguided")
        # Of a time it is known only now whether anything can be found in it.
        total, needed = self.ledger.total(), self._needed()
        enough = self.room(1.0) + total.passes >= needed and self.room(self.limits[0]) > 0
        if self.budget.unit == "passes" or self._complete(study) or enough:
            return
        taken = time.monotonic() - self.began + needed / max(1, total.passes) * total.seconds
        raise ValueError(
            f"budget={self.config.budget}: with {self.sizes[0]} images a candidate and "
            f"{max(self.steps)} steps a study takes at least some {taken / KEPT:.0f} s here; raise "
            f"it, or lower num_images, rungs or steps"
        )

    def _measure_all(
        self,
        sets: Mapping[Any, Measurement],
        text: str,
        share: float | None = None,
        num: int = 0,
    ) -> None:
        """Measure sets of images, and wait for those that other processes are measuring.

        Those that no longer fit into a share of the budget are left out.
        """
        left = dict(sets)
        done = 0
        while left:
            busy: dict[Any, Measurement] = {}
            for number, measured in left.items():
                if self.record(measured) is not None:
                    continue
                if share is not None and self.missing(measured) > self.room(share):
                    continue
                done += 1
                try:
                    record = self.measure(measured, f"{text} ({done} of {len(sets)})", num)
                except InUse:
                    busy[number] = measured
                    continue
                self._tell(number, measured, record)
            if busy and len(busy) == len(left):
                time.sleep(WAIT)
            left = busy

    def _tell(self, number: int | str, measured: Measurement, record: Record) -> None:
        """Print what a candidate has come to."""
        from sag_dit.study.measurement import guidance_text

        images = _drawn(measured)
        value = record.metrics[self.config.quality]
        title = measured.setup.labels()[self.config.quality].label
        told = guidance_text(images.pixels["guidance"]) or "unguided"
        who = f"candidate {number}: " if isinstance(number, int) and number != UNGUIDED else ""
        cost = self.relative(measured)
        print(f"{title} {value:.4g} at {cost:.3g} x unguided, {measured.count} images: {who}{told}")

    def relative(self, measured: Measurement) -> float:
        """Return what an image costs, as a multiple of an unguided one."""
        from sag_dit.study.tuning import passes

        return passes(_drawn(measured).cost) / self.unit

    def _search(self, study: Study) -> None:
        """Draw what Optuna proposes, until the first rung's share of the budget is spent."""
        from optuna.trial import TrialState

        from sag_dit.study.tuning import ask

        idle = 0
        refusal = ""
        while idle < PROPOSALS and not self._file("rung_1").exists():
            # A proposal that can be drawn, and that costs no more than is allowed.
            trial = ask(study, self.config.seed)
            fail = partial(study.tell, trial, state=TrialState.FAIL, skip_if_finished=True)
            try:
                measured = self.measurement(self.space.propose(trial), self.sizes[0])
            except ValueError as error:
                refusal, idle = str(error), idle + 1
                fail()
                continue
            cost = self.relative(measured)
            if self.config.max_cost is not None and cost > self.config.max_cost + 1e-9:
                refusal, idle = f"the last one costs {cost:.3g} x unguided", idle + 1
                fail()
                continue
            # It is drawn while there is room, unless the same has been drawn before.
            new = self.record(measured) is None
            if new and self.missing(measured) > self.room(self.limits[0]):
                fail()
                break
            trial.set_user_attr("images", self._set(_drawn(measured)).path.name)
            try:
                record = self.measure(measured, f"candidate {trial.number}")
            except InUse:
                fail()
                continue
            idle = 0 if new else idle + 1
            value = float(record.metrics[self.config.quality])
            if not math.isfinite(value):
                fail()
                continue
            study.tell(trial, [value, cost], skip_if_finished=True)
            if new:
                self._tell(trial.number, measured, record)
        if not self._complete(study):
            raise ValueError(
                f"no candidate could be drawn: {refusal}; raise max_cost or budget, or choose "
                f"other methods"
            )

    def _complete(self, study: Study) -> dict[int, Point]:
        """Return what each setting that was proposed has come to, by the number of its trial."""
        from optuna.trial import TrialState

        found: dict[str, tuple[int, Point]] = {}
        for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            quality, cost = trial.values
            point = (-quality if self.higher else quality, cost)
            # Two trials of one set of images are one setting.
            found.setdefault(str(trial.user_attrs["images"]), (trial.number, point))
        return dict(found.values())

    def _halve(self, study: Study) -> dict[int, Point]:
        """Return what is left, by the numbers of trials: measured with the most images."""
        from sag_dit.study.tuning import best

        trials = study.get_trials(deepcopy=False)
        plain = self.measurement(self.unguided, self.sizes[0])
        points = {UNGUIDED: self.point(plain)}
        # What comes to the same as no guidance never acts: its interval holds no step.
        points |= {n: each for n, each in self._complete(study).items() if each != points[UNGUIDED]}
        if len(points) == 1:
            raise ValueError("no candidate changes anything; try other methods, or more steps")
        print(f"rung 1: {len(points) - 1} candidates with {self.sizes[0]:,} images")
        for place, size in enumerate(self.sizes[1:], start=1):
            # The best third, and all that nothing dominates. Unguided stays to compare with.
            def promoted(points: Mapping[int, Point] = points, size: int = size) -> Candidates:
                numbers, values = [*points], [*points.values()]
                taken = [numbers[i] for i in best(values, math.ceil(len(values) / 3))]
                return Candidates([UNGUIDED, *(each for each in taken if each != UNGUIDED)], size)

            chosen = self._decided(f"rung_{place}", promoted).trials
            sets = {each: self.measurement(self.changes(each, trials), size) for each in chosen}
            print(f"rung {place + 1}: {len(sets) - 1} go on with {size:,} images")
            self._measure_all(sets, f"rung {place + 1}", self.limits[place])
            known = {number: each for number, each in sets.items() if self.record(each)}
            if not known.keys() - {UNGUIDED} or UNGUIDED not in known:
                print(f"rung {place + 1}: nothing of it fits into the budget")
                break
            points = {number: self.point(each) for number, each in known.items()}
        return points

    def _confirm(
        self, study: Study, points: Mapping[int, Point]
    ) -> tuple[Comparison, dict[str, Changes]]:
        """Measure what is left again, on other real images and with other seeds.

        Returns:
            the comparison, and the changes of those of its rows that were found, by their names:
            the first is the winner, the best on the images of the search.
        """
        from sag_dit.evaluation.suite import usual_metrics
        from sag_dit.study.comparison import Comparison
        from sag_dit.study.tuning import fronts, spread_over

        trials, seeds = study.get_trials(deepcopy=False), self.config.seeds
        plain = self._beside()

        def settled() -> Candidates:
            # The best of the front and others over its costs, as many as leave enough images.
            numbers, values = [*points], [*points.values()]
            guided = [i for i in range(len(numbers)) if numbers[i] != UNGUIDED]
            front = [i for i in fronts(values)[0] if i in guided]
            front = front or [min(guided, key=lambda i: values[i])]
            taken = [numbers[i] for i in spread_over(front, values, CONFIRMED)]
            others = sum(self.relative(self.measurement(each, FEWEST)) for each in plain.values())
            # In whole batches, since the last one is filled up, and in whole turns of the classes.
            example = self.measurement(self.unguided, MOST)
            batch = _drawn(example).settings.batch_size
            while True:
                each = self.unit * (others + sum(points[number][1] for number in taken)) * seeds
                count = min(MOST, int(self.room(1.0) / (each * batch)) * batch)
                if len(taken) == 1 or count >= self.sizes[0] // 2:
                    break
                taken.pop()
            turn = example.period if count >= example.period else 1
            return Candidates(taken, count - count % turn)

        chosen = self._decided("confirmed", settled)
        if chosen.num_images < FEWEST:
            raise ValueError(
                f"budget={self.config.budget}: it is spent before the result could be confirmed; "
                f"what is measured is kept, and a larger budget goes on"
            )
        listed: dict[str, Changes] = dict(plain)
        for place, number in enumerate(chosen.trials, start=1):
            listed[f"front {place}"] = self.changes(number, trials)
        # All of them at the same seeds, which the search has not seen.
        first = self.config.seed + 1
        rows = [
            (name, changes, seed)
            for name, changes in listed.items()
            for seed in range(first, first + seeds)
        ]
        print(
            f"confirmation: {len(listed)} settings, {seeds} seeds of {chosen.num_images:,} images, "
            f"on {self.report}"
        )
        # The usual metrics; another one stands by itself.
        metrics = None if self.config.quality in usual_metrics() else [self.config.quality]
        sets = self._measurements(rows, chosen.num_images, self.report, metrics)
        named = {str(place): each for place, each in enumerate(sets)}
        self._measure_all(named, "confirmation", num=self.config.gallery.num)
        records = {each.identity: self.record(each) for each in sets}
        known = {identity: record for identity, record in records.items() if record is not None}
        comparison = Comparison.of(sets, known, against="unguided")
        names = [each.name for each in comparison]
        found = dict(zip(names, listed.values(), strict=True))
        return comparison, {name: found[name] for name in names[len(plain) :]}

    def _beside(self) -> dict[str, Changes]:
        """Return what the candidates are confirmed beside: no guidance, and CFG alone."""
        found: dict[str, Changes] = {"unguided": self.unguided}
        cfg = {**self.unguided, **comparison_of(str(self.config.ckpt))["cfg"]}
        try:
            self.measurement(cfg, FEWEST)
        except ValueError:
            return found  # A model without a null condition.
        return {**found, "cfg": cfg}

    def _finish(self, study: Study, comparison: Comparison, front: Mapping[str, Changes]) -> None:
        """Write presets, card and page, and tell where they are."""
        from rich.console import Console

        from sag_dit.cli.tuned import Told, card, front_charts, write_preset
        from sag_dit.study.report import log, report
        from sag_dit.study.results import write_json

        # The presets: the winner under the study's name, the others numbered.
        costs = {each.name: self._cost(each.facts) for each in comparison}
        presets: dict[str, str] = {}
        for place, (name, changes) in enumerate(front.items(), start=1):
            presets[name] = own = f"{self.name}_{place}" if place > 1 else self.name
            config = changed("evaluate", self.base, changes)
            write_preset(self.folder / PRESETS, own, config, self._use(own))
        # The table, and the page with the front.
        told = Told(comparison, self.config.quality, costs, presets)
        comparison.show(Console(soft_wrap=True, highlight=False))
        charts = front_charts(told, self._complete(study), self.higher, self.sizes[0])
        num = self.config.gallery.num
        page = report(comparison, self.folder, self.results, num=num, plots=True, before=charts)
        if self.config.logger:
            log(make(self.config.logger, "logger"), comparison.results)
        # The card, and that nothing is left to do.
        command = shlex.join(["python", "-m", "sag_dit", "tune", *self.arguments])
        text = card(told, self.name, self.model.name, command, self._use, self._about())
        file = self.folder / "card.md"
        with atomic(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        done = Finished(self.budget.amount, self.budget.unit)
        write_json(self.folder / "finished.json", vars(done))
        print(f"preset: {self.folder / PRESETS / 'guidance' / self.name}.yaml")
        print(f"to draw with it: {self._use(self.name)}")
        if told.unclear:
            print(told.unclear)
        print(f"card: {file}")
        print(f"page: {page.resolve()}")

    def _cost(self, facts: Mapping[str, Any]) -> float:
        """Return what an image of a result costs, as a multiple of an unguided one."""
        cost = facts["cost"]
        rows = cost["rows_per_step"] + cost["rows_of_others_per_step"]
        return float(rows * cost["steps"] / self.unit)

    def _use(self, preset: str) -> str:
        keys = [f"ckpt={self.config.ckpt}", f"guidance={preset}"]
        return shlex.join(
            ["python", "sample.py", "--config-dir", str(self.folder / PRESETS), *keys]
        )

    def _about(self) -> list[str]:
        """Return what was searched, a line each."""
        spent, config = self.ledger.total(), self.config
        limit = f", at most {config.max_cost:g} x unguided" if config.max_cost else ""
        return [
            f"methods {', '.join(self.space.terms)}, {len(self.space.sets)} sets of them{limit}; "
            f"steps {', '.join(map(str, self.steps))}",
            f"rungs of {', '.join(map(str, self.sizes))} images with seed {config.seed}, measured "
            f"against {self.search} by {config.quality}",
            f"confirmed against {self.report} with {config.seeds} other seeds",
            f"stated by the user: {', '.join(sorted(self.stated)) or 'nothing'}",
            f"budget {self.budget.text}; spent {spent.passes:,} passes, drawn and measured in "
            f"{spent.seconds / 60:.1f} minutes",
        ]

    def _file(self, what: str) -> Path:
        return self.folder / "decided" / f"{self.budget.amount:.0f}_{self.budget.unit}_{what}.json"

    def _decided(self, what: str, decide: Callable[[], Candidates]) -> Candidates:
        """Return what one of the processes has decided for all, now or before it was stopped."""
        file = self._file(what)
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            mine = file.with_name(f".{file.name}.{os.getpid()}")
            mine.write_text(json.dumps(vars(decide())), encoding="utf-8")
            with suppress(FileExistsError):
                os.link(mine, file)
            mine.unlink()
        return read_json_as(file, Candidates)


def _computed(count: int, images: ToDraw) -> int:
    """Return how many images are computed for so many, since the last batch is filled up."""
    size = images.settings.batch_size
    return math.ceil(count / size) * size


def _drawn(measured: Measurement) -> ToDraw:
    """Return the images of a measurement of a model, which are drawn."""
    images: Any = measured.images
    return images  # type: ignore[no-any-return]


def _changed_settings(guidance: Mapping[str, Any]) -> set[str]:
    """Return the keys of settings that a preset of the user's choice has changed."""
    return {
        f"guidance.{name}.{key}"
        for name, node in guidance.items()
        if node is not None
        for key in unlike_defaults(name, node)
        if key not in ("scale", "_target_")
    }


def _base(config: Tune, arguments: Sequence[str], steps: int) -> Evaluate:
    """Return the configuration that candidates differ from, as evaluate.py has it."""
    own = {"steps", "logger", "requests"}
    taken = {*keys_of(Guides), "features", "background", "hydra"} - own
    keys = [
        each
        for each in keys_and_flags(arguments)[0]
        if each.lstrip("+~").partition("=")[0].partition(".")[0] in taken
    ]
    composed: Evaluate = compose("evaluate", check_arguments("evaluate", keys, ["--config-dir"]))
    same = {"ckpt": config.ckpt, "steps": steps, "compare": None, "confidence.repeats": 0}
    trainer = {"trainer.devices": config.trainer.get("devices")}
    found: Evaluate = changed("evaluate", composed, {**same, **trainer})
    return found


def start_tune(arguments: Sequence[str] | None = None, entry: Sequence[str] = ()) -> None:
    """Run ``tune.py``, with the arguments of the command line unless others are given."""
    began = time.monotonic()
    given = list(sys.argv[1:] if arguments is None else arguments)
    launch("tune", partial(run_tune, arguments=given, began=began), given, entry)


main = start_tune
