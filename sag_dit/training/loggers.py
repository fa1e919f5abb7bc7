"""Loggers that go on with the one log of a run after it was stopped."""

from __future__ import annotations

import csv
import json
import re
import secrets
from argparse import Namespace
from collections.abc import Mapping, Sequence
from io import StringIO
from itertools import zip_longest
from numbers import Real
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from torchmetrics import Metric

from sag_dit.files import atomic, writing
from sag_dit.untrusted import csv_rows, read_json, read_text


class CSVLog(Logger):
    """Writes ``logs/metrics.csv``, one file for all starts of a run, with a column per metric.

    Lightning's own CSVLogger deletes the file of an earlier start.

    ``first_step`` is the step at which the run goes on. Rows from there on, which a killed run had
    logged after its last checkpoint, are dropped, as they are going to be logged again.

    Raises:
        ValueError: there is a log that cannot be read.

    Example::

        from lightning.pytorch import Trainer

        trainer = Trainer(logger=CSVLog("outputs/train/photos-1f3a"))
    """

    def __init__(self, save_dir: str | Path, first_step: int = 0) -> None:
        super().__init__()
        self._file = Path(save_dir) / "logs" / "metrics.csv"
        self._first_step = first_step
        self._columns: list[str] | None = None
        if self._file.exists():
            self._rows()  # so that one that cannot be read is told before anything is trained

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self._file.parent.name

    @property
    def version(self) -> str:
        """Empty, since there is one log only; a ModelCheckpoint makes a folder of any other."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any) -> None:
        """Write nothing: a run's settings stand in its ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row, and columns if there are new metrics.

        Raises:
            ValueError: one of them is something else than one number.
        """
        for name, value in metrics.items():
            check_one_number(name, value)
        if self._columns is None:
            self._columns = self._begin()
        row = {"step": step, **convert_tensors_to_scalars(metrics)}
        new = sorted(row.keys() - set(self._columns))
        if new:
            self._columns += new
            self._rewrite(self._columns, self._rows())
        with writing(self._file), self._file.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writerow(row)

    def _begin(self) -> list[str]:
        """Drop what is going to be logged again, and return the columns there are."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        rows = self._rows() if self._file.exists() else []
        columns = list(rows[0]) if rows else ["step"]
        self._rewrite(columns, [row for row in rows if int(row["step"]) < self._first_step])
        return columns

    def _rows(self) -> list[dict[str, str]]:
        """Return the rows by their columns; a row may lack the last of them.

        Raises:
            ValueError: the file is no log; its line is named.
        """
        remedy = "move it away and repeat the command to go on with an empty log"
        try:
            reader = csv.reader(StringIO(read_text(self._file), newline=""))
            header, *rows = [*csv_rows(reader, self._file)] or [["step"]]
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from None
        if "step" not in header:
            raise ValueError(f"{self._file}, line 1: expected a column of steps; {remedy}")
        for number, row in enumerate(rows, start=2):
            step = dict(zip(header, row, strict=False)).get("step", "")
            if len(row) > len(header) or not re.fullmatch(r"\d{1,15}", step):
                raise ValueError(
                    f"{self._file}, line {number}: step={step[:20]!r}: expected a row of "
                    f"{len(header)} values with the number of its step; {remedy}"
                )
        return [dict(zip_longest(header, row, fillvalue="")) for row in rows]

    def _rewrite(self, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
        with (
            atomic(self._file) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)


def check_one_number(name: str, value: object) -> None:
    """Refuse to log what is not one number, in a sentence.

    Raises:
        ValueError: the metric, and what its value is.

    Example:
        >>> check_one_number("train/spread", 0.25)
    """
    if isinstance(value, torch.Tensor):
        single = value.numel() == 1 and not value.is_complex()
    else:
        single = isinstance(value, (Real, Metric))
    if single:
        return
    told = f"{value!r:.60} ({type(value).__name__})"
    if getattr(value, "shape", None):
        told = f"{type(value).__name__} of shape {tuple(value.shape)}"  # type: ignore[attr-defined]
    raise ValueError(
        f"logging {name}: {told}; expected one number, such as the mean of several, or several "
        f"names"
    )


BY_VERSION: Mapping[str, str] = {
    "TensorBoardLogger": "version",
    "MLFlowLogger": "run_id",
    "CometLogger": "experiment_key",
}
"""Loggers that go on with the log that was theirs before, and the argument that names it."""

VERSIONS = "loggers.json"
"""Which logs the loggers of a run write into, in its folder."""


def going_on(target: str, name: str, out: Path, step: int) -> dict[str, Any]:
    """Return the arguments with which a class of loggers goes on with a run's log at a step.

    ``name`` is what tells it from the run's other loggers at every start. Classes derived from
    those that are known go on too.
    """
    kinds = _kinds(target)
    if "WandbLogger" in kinds:
        return {"id": wandb_id(out), "name": out.name}
    if "CSVLog" in kinds:
        return {"first_step": step}
    found: dict[str, Any] = {}
    if "TensorBoardLogger" in kinds:
        # TensorBoard hides what was logged from there on before.
        found["purge_step"] = step
    before = _versions(out).get(name)
    for kind, argument in BY_VERSION.items():
        if kind in kinds and step > 0 and before is not None:
            found[argument] = before
    return found


def note_versions(out: Path, made: Mapping[str, Logger]) -> list[str]:
    """Write down the logs that loggers write into, by their names, for the starts to come.

    Those of loggers that this start does without are kept. Returned are the names of those that
    wrote into another log at the start before.
    """
    before = _versions(out)
    found = {
        name: logger.version
        for name, logger in made.items()
        if isinstance(logger.version, (int, str)) and logger.version != ""
    }
    now = {**before, **found}
    if now != before:
        with atomic(out / VERSIONS) as temporary:
            temporary.write_text(json.dumps(now, indent=1), encoding="utf-8")
    return [name for name, each in found.items() if each != before.get(name, each)]


def _kinds(target: str) -> set[str]:
    """Return the names of a class and of those that it is derived from."""
    thing = resolve_name(target)
    return {each.__name__ for each in thing.__mro__} if isinstance(thing, type) else {target}


def _versions(out: Path) -> dict[str, int | str]:
    """Return what was written down, nothing where that cannot be read."""
    try:
        found = read_json(out / VERSIONS)
    except ValueError:
        return {}
    return {name: each for name, each in found.items() if isinstance(each, (int, str))}


def wandb_id(out: Path) -> str | None:
    """Return the run's id at Weights & Biases; None on all ranks but the first.

    The id is random and stored in the run's folder. It is not computed from the run, because an id
    cannot be used again after its run was deleted there.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        return None
    file = out / "wandb_id.txt"
    if not file.exists():
        with atomic(file) as temporary:
            temporary.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8")
