"""field_study: every guidance method on several trainings of several models, compared fairly.

The most valuable cells come first, each is kept when it is done, and a deadline ends the study
where it is. So the same call goes on with what is missing, and what there is can be read any time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from sag_dit.bounds import Natural
from sag_dit.checkpoints import Model
from sag_dit.data.requests import make_requests
from sag_dit.files import using
from sag_dit.guidance import CFG, Term
from sag_dit.identity import settings as identity_of
from sag_dit.sampling import Pixels, Request, Settings, by_key, drawn
from sag_dit.study.contenders import UNGUIDED, Contender, Objects, Terms, beside_cfg, contenders
from sag_dit.study.effective import CFGScale, effect, like
from sag_dit.study.measurement import (
    Measurement,
    Measuring,
    Setting,
    ToDraw,
    guidance_text,
    measurement,
)
from sag_dit.study.results import Record, read_record, write_json, write_record
from sag_dit.study.setup import Setup, Setups, example_of
from sag_dit.untrusted import read_json_as

TUNE_SEED, EFFECT_SEED = 1000, 2000
"""Seeds of the images that scales are chosen with, and that effects are measured on."""
SHOWN = 8
"""Images of each cell that are kept, to be looked at."""
REPEATS = 10
"""Halves of the images that the standard error of each cell is estimated from."""


@dataclass(frozen=True)
class Rules:
    """The protocol, declared before anything is drawn; a folder holds the study of one.

    Each method is tried at ``scales`` scales on ``tuning`` images against the split ``tune``, on
    the first training of a family. The one of least FD is reported: ``images`` images of every
    training, at each of ``seeds`` seeds, against the split ``report``. Effects are measured on
    ``effects`` images.

    Example:
        >>> Rules(images=100, seeds=1).steps
        20
    """

    steps: Natural = 20
    images: Natural = 300
    seeds: Natural = 2
    scales: Natural = 4
    tuning: Natural = 100
    effects: Natural = 100
    batch_size: Natural = 100


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained model, with what some methods need besides it.

    Example::

        Subject(sag_dit.load("digits"), {"worse": sag_dit.load("EARLIER.ckpt").denoiser})
    """

    model: Model
    objects: Objects = field(default_factory=dict)


@dataclass(eq=False)
class Deadline:
    """When a study ends: so many seconds after this was made. ``left`` says how many there are.

    Example:
        >>> Deadline(3600.0).left > 3599
        True
    """

    seconds: float = math.inf
    _since: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """The seconds that are left, 0 or more."""
        return max(0.0, self.seconds - (time.monotonic() - self._since))


@dataclass(frozen=True, eq=False)
class Family:
    """Models that differ in their training seed alone, and the splits they are measured against.

    ``trainings`` makes or loads a subject for each training seed, when its turn comes; it is told
    the deadline, and returns None where that came before.

    Example::

        bundled = {0: lambda _: Subject(sag_dit.load("digits"))}
        Family("digits", bundled, "digits:tune", "digits:report")
    """

    name: str
    trainings: Mapping[int, Callable[[Deadline], Subject | None]]
    tune: str
    report: str


@dataclass(frozen=True)
class Row:
    """A cell of the study: what was drawn, what it cost, and its numbers.

    ``part`` is ``tune`` or ``report``, the split that it was measured against, or ``effect``.
    ``role`` is ``method``, or what CFG was matched to the method in: ``along`` and ``size`` of its
    :class:`~sag_dit.study.effective.Effect`, at as many steps, or ``passes``: ``along``, at as many
    passes. ``effect`` holds the effect, and the scales of CFG that match it. A cell that cannot be
    measured has a reason in ``missing``.

    Example:
        >>> Row("digits", 0, 0, "report", "SAG", "method", missing="no blocks").metrics
        {}
    """

    family: str
    training: Natural
    seed: Natural
    part: str
    method: str
    role: str
    strength: float | None = None
    guidance: str = ""
    sampler: str = ""
    steps: Natural = 0
    passes: float = 0.0
    others: Natural = 0
    images: Natural = 0
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    spread: Mapping[str, float | None] = field(default_factory=dict)
    effect: Mapping[str, float | None] = field(default_factory=dict)
    identity: str = ""
    seconds: float = 0.0
    missing: str = ""

    @property
    def file(self) -> str:
        """The name of its file."""
        told = [self.family, self.training, self.seed, self.part, self.method, self.role]
        told += [self.strength] if self.part == "tune" else []
        digest = sha256(json.dumps(told).encode()).hexdigest()[:8]
        words = f"{self.family}-{self.training}-{self.seed}-{self.part}-{self.method}-{self.role}"
        return "".join(c if c.isalnum() or c in "-." else "_" for c in words) + f"-{digest}.json"


class DeadlineReached(Exception):
    """No time is left; what is there is kept.

    Example::

        raise DeadlineReached
    """


def read_rows(folder: Path) -> list[Row]:
    """Return all cells that a folder holds, in the order of their names.

    Raises:
        ValueError: a file that is no row.

    Example::

        rows = read_rows(Path("outputs/study"))
    """
    return [read_json_as(file, Row) for file in sorted((folder / "rows").glob("*.json"))]


def field_study(
    families: Sequence[Family],
    folder: Path,
    rules: Rules | None = None,
    deadline: Deadline | None = None,
    *,
    only: Sequence[str] | None = None,
    tell: Callable[[str], object] = print,
) -> list[Row]:
    """Measure every guidance method on every family, most valuable cells first; return all cells.

    First come the methods alone, family by family and training by training, each beside CFG at its
    effective scale; then further sampling seeds; then the methods beside CFG. ``only`` names some
    methods. A cell that fails is kept with its reason and tried again by the next call.

    Raises:
        ValueError: the folder holds the study of other rules.

    Example::

        bundled = {0: lambda _: Subject(sag_dit.load("digits"))}
        digits = Family("digits", bundled, "digits:tune", "digits:report")
        rows = field_study([digits], Path("outputs/study"), deadline=Deadline(3600))
    """
    rules, deadline = rules or Rules(), deadline or Deadline()
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, rules)
    chosen = [each for each in contenders(rules.scales) if only is None or each.name in only]
    if only is not None and len(chosen) < len(only):
        names = ", ".join(each.name for each in contenders(1))
        raise ValueError(f"only={', '.join(only)}: expected titles of methods, some of {names}")
    studies = [_FamilyStudy(family, folder, rules, deadline, tell) for family in families]
    with using(folder, shared=True):
        try:
            for seed in range(rules.seeds):
                for study in studies:
                    study.report([UNGUIDED, *chosen], seed)
            for study in studies:
                study.report(study.beside_cfg(chosen), 0)
        except DeadlineReached:
            tell("no time is left; the same command goes on")
    return read_rows(folder)


def _claim(folder: Path, rules: Rules) -> None:
    """Write the rules down, or refuse a folder of other ones."""
    file = folder / "rules.json"
    if not file.exists():
        write_json(file, asdict(rules))
    known = read_json_as(file, Rules)
    if known != rules:
        differ = {
            name: each for name, each in asdict(known).items() if each != getattr(rules, name)
        }
        told = ", ".join(f"{name}={each}" for name, each in differ.items())
        raise ValueError(f"{folder} holds a study with {told}: choose that, or another folder")


class _FamilyStudy:
    """One family's part of a study."""

    def __init__(
        self,
        family: Family,
        folder: Path,
        rules: Rules,
        deadline: Deadline,
        tell: Callable[[str], object],
    ) -> None:
        self.family, self.folder, self.rules, self.deadline = family, folder, rules, deadline
        self._tell, self._setups = tell, Setups("cpu")
        self._subjects: dict[int, Subject] = {}
        self._scales: dict[int, CFGScale] = {}

    def report(self, chosen: Sequence[Contender], seed: int) -> None:
        """Measure contenders on every training at one seed, and CFG as it matches each."""
        for training in self.family.trainings:
            for contender in chosen:
                self._report(contender, training, seed)

    def beside_cfg(self, chosen: Sequence[Contender]) -> list[Contender]:
        """Return contenders beside CFG at its own best scale; none where CFG is not tried."""
        cfg = next((each for each in chosen if each.kind is CFG), None)
        try:
            best = None if cfg is None else self._best(cfg)
        except ValueError:
            best = None
        if best is None:
            return []
        scale = round(CFG.neutral + best, 6)
        return [each for each in (beside_cfg(each, scale) for each in chosen) if each is not None]

    def _report(self, contender: Contender, training: int, seed: int) -> None:
        """Measure a contender at its best strength, its effect, and CFG that matches it."""
        row = Row(self.family.name, training, seed, "report", contender.name, "method")
        asked = row
        try:
            asked = row = replace(row, strength=self._best(contender))
            own = self._measured(row, self._terms(contender, row), self.family.report)
            if contender is UNGUIDED:
                return
            asked = replace(row, part="effect", seed=EFFECT_SEED)
            effect = self._effect(contender, asked)
            # CFG is its own match.
            for role in () if contender.kind is CFG else ("along", "passes", "size"):
                asked = replace(row, role=role)
                self._matched(asked, own, effect)
        except DeadlineReached:
            raise
        except Exception as error:
            # One method's fault must not end a study of hours: its cell says what it was.
            refused = isinstance(error, ValueError)
            told = str(error) if refused else f"failed: {type(error).__name__}: {error}"
            self._tell(f"{self._name(asked)}: {told}")
            self._write(replace(asked, missing=told))

    def _best(self, contender: Contender) -> float:
        """Return the strength of least FD on the tuning split, on the first training.

        Raises:
            ValueError: the contender cannot guide the model.
        """
        first = next(iter(self.family.trainings))
        if len(contender.strengths) == 1:
            return contender.strengths[0]
        tried = []
        for strength in contender.strengths:
            row = Row(
                self.family.name, first, TUNE_SEED, "tune", contender.name, "method", strength
            )
            told = self._measured(row, self._terms(contender, row), self.family.tune)
            distance = told.metrics["fid"]
            tried.append((math.inf if distance is None else distance, strength))
        return min(tried)[1]

    def _effect(self, contender: Contender, row: Row) -> Row:
        """Return a contender's effect on a training, and the scales of CFG that match it."""
        known = self._known(row)
        if known is not None and known.strength == row.strength and not known.missing:
            return known
        self._check_time()
        subject, since = self._subject(row.training), time.monotonic()
        settings = self._settings(row.training, self._terms(contender, row))
        found = effect(subject.model, settings, self._effect_requests(row.training))
        told = asdict(found)
        if not math.isnan(found.along):
            size = self._scale(row.training).of_size(found.size)
            told |= {"cfg_along": found.along, "cfg_size": size}
        row = replace(row, guidance=_text(subject, settings), effect=told)
        self._write(replace(row, seconds=time.monotonic() - since))
        return row

    def _matched(self, row: Row, own: Row, effect: Row) -> None:
        """Measure CFG as it matches a contender in the role of ``row``."""
        scale = effect.effect.get("cfg_size" if row.role == "size" else "cfg_along")
        if scale is None or not math.isfinite(scale):
            return
        passes = own.passes if row.role == "passes" else None
        how = like(self._settings(row.training, ()), scale, passes)
        # Passes of another kind of network are no passes of CFG's.
        if passes is not None and (how.steps == self.rules.steps or own.others):
            return
        strength = how.guidance[0].scale if how.guidance else CFG.neutral
        row = replace(row, strength=strength)
        self._measured(row, how.guidance, self.family.report, how.steps)

    def _measured(
        self, row: Row, terms: Sequence[Term], split: str, steps: int | None = None
    ) -> Row:
        """Return a cell, measured now unless it was before.

        Raises:
            ValueError: it cannot be drawn or measured.
            DeadlineReached: it was not measured before, and no time is left.
        """
        # What is drawn, and how it is measured.
        subject = self._subject(row.training)
        settings = self._settings(row.training, terms, steps)
        settings.check(subject.model)
        count = self.rules.tuning if row.part == "tune" else self.rules.images
        requests = make_requests(count, row.seed, None, subject.model.class_names)
        request = {"seed": row.seed, "classes": "all"}
        pixels = identity_of(Pixels.of(subject.model, settings, by_key(settings.guidance), request))
        cost = settings.cost(subject.model.denoiser)
        images = ToDraw(subject.model, settings, requests, pixels, cost)
        each = measurement(Setting(row.method), images, self._setup(subject, split), REPEATS)
        # As it was measured before, or now.
        record = read_record(self.folder / "records", each.identity)
        if record is None or each.lacking(record):
            self._check_time()
            record = self._draw(each, images, record)
        row = replace(
            row,
            guidance=_text(subject, settings),
            sampler=each.facts["sampler"],
            steps=settings.steps,
            passes=round(cost.passes, 3),
            others=cost.unlike,
            images=each.count,
            metrics=record.of(each.setup.metrics).metrics,
            spread=record.of(each.setup.metrics).spread,
            identity=each.identity,
            seconds=record.seconds,
        )
        if self._known(row) != row:
            self._write(row)
            told = f"FD {row.metrics['fid']:.4g}, {row.passes:g} passes, {row.seconds:.0f} s"
            self._tell(f"{self._name(row)}: {row.guidance}, {told}")
        return row

    def _draw(self, each: Measurement, images: ToDraw, known: Record | None) -> Record:
        """Draw and measure a set of images, and keep its numbers and the first images."""
        records = self.folder / "records"
        measuring = Measuring(each, "cpu", known, records / each.identity, SHOWN)
        for batch in drawn(images.model, images.requests, images.settings):
            measuring(batch)
        record = measuring.record()
        write_record(records, each.identity, record)
        return record

    def _terms(self, contender: Contender, row: Row) -> Terms:
        assert row.strength is not None
        return contender.make(row.strength, **self._subject(row.training).objects)

    def _subject(self, training: int) -> Subject:
        if training not in self._subjects:
            made = self.family.trainings[training](self.deadline)
            if made is None:
                raise DeadlineReached
            self._subjects[training] = made
        return self._subjects[training]

    def _scale(self, training: int) -> CFGScale:
        if training not in self._scales:
            model, requests = self._subject(training).model, self._effect_requests(training)
            self._scales[training] = CFGScale(model, self._settings(training, ()), requests)
        return self._scales[training]

    def _effect_requests(self, training: int) -> Sequence[Request]:
        names = self._subject(training).model.class_names
        return make_requests(self.rules.effects, EFFECT_SEED, None, names)

    def _settings(self, training: int, terms: Sequence[Term], steps: int | None = None) -> Settings:
        size = min(self.rules.batch_size, self.rules.images)
        model, steps = self._subject(training).model, steps or self.rules.steps
        return Settings.of(model, steps=steps, guidance=terms, batch_size=size)

    def _setup(self, subject: Subject, split: str) -> Setup:
        model = subject.model
        return self._setups.setup(example_of(model), model.class_names, reference=split)

    def _check_time(self) -> None:
        if not self.deadline.left:
            raise DeadlineReached

    def _known(self, row: Row) -> Row | None:
        file = self.folder / "rows" / row.file
        return read_json_as(file, Row) if file.exists() else None

    def _write(self, row: Row) -> None:
        folder = self.folder / "rows"
        folder.mkdir(exist_ok=True)
        write_json(folder / row.file, asdict(row))

    def _name(self, row: Row) -> str:
        role = "" if row.role == "method" else f", CFG as {row.role}"
        return f"{row.family}, training {row.training}, {row.part} {row.seed}: {row.method}{role}"


def _text(subject: Subject, settings: Settings) -> str:
    """Return guidance as one reads it, with its settings that are no scale."""
    identities = {
        key: term.identity(subject.model.denoiser)
        for key, term in by_key(settings.guidance).items()
    }
    return guidance_text(identities) or "none"
