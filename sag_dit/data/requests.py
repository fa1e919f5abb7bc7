"""Requests: which images are asked for."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from sag_dit.noise import check_key, generator
from sag_dit.sampling import Chosen, Request, labels_of
from sag_dit.untrusted import csv_rows, read_text

LIMIT = 1 << 30
"""Bytes of a file of requests."""
LABELS = 4
"""Purpose of the random streams that choose classes, see :func:`sag_dit.noise.generator`."""


@dataclass(frozen=True, eq=False)
class ClassRequests(Sequence[Request]):
    """Requests by a class rule, each made when it is asked for.

    ``labels`` are cycled over the indices; without them each is drawn of ``classes``.

    Example::

        ClassRequests(10**9, seed=0, labels=(3, 7), classes=10)[5].label
    """

    num_images: int
    seed: int
    labels: tuple[int, ...] | None
    classes: int

    def __len__(self) -> int:
        return self.num_images

    @overload
    def __getitem__(self, at: int) -> Request: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[Request]: ...

    def __getitem__(self, at: int | slice) -> Request | Sequence[Request]:
        if isinstance(at, slice):
            return Chosen.of(self, np.empty(0, dtype=np.int64))[at]
        index = range(self.num_images)[at]
        if self.labels is None:
            label = int(generator(self.seed, index, 0, LABELS).integers(self.classes))
        else:
            label = self.labels[index % len(self.labels)]
        return Request(index, self.seed, label, stream=index)


def make_requests(
    num_images: int,
    seed: int,
    classes: Sequence[int | str] | str | int | None,
    class_names: Sequence[str],
) -> Sequence[Request]:
    """Return requests 0 to ``num_images`` - 1 by a class rule.

    ``classes``: a list is cycled over the indices; None cycles over all classes, so that their
    counts are equal; ``random`` draws each image's class uniformly from (seed, index).

    Raises:
        ValueError: a class that does not exist, an empty list, or a count below 1.
    """
    if num_images < 1:
        raise ValueError(f"num_images={num_images}: expected 1 or more")
    if classes == "random":
        return ClassRequests(num_images, seed, None, len(class_names))
    if classes is None:
        chosen = list(range(len(class_names)))
    else:
        listed = [classes] if isinstance(classes, (str, int)) else list(classes)
        chosen = labels_of(listed, class_names)
    if not chosen:
        raise ValueError("classes=[]: expected at least one class, 'random', or null for all")
    return ClassRequests(num_images, seed, tuple(chosen), len(class_names))


def read_requests(
    file: str | Path, class_names: Sequence[str], *, prompts: bool = False
) -> list[Request]:
    """Read one request a line, ``seed,class``; a header line of these two words may come first.

    An image depends on its line alone, not on its place in the file. A class is a number, or a
    name, which is in quotation marks if it looks like a number; ``prompts`` are names, in quotation
    marks if they hold a comma.

    Raises:
        ValueError: a line that is not a seed and a class; its number is named.
    """
    requests: list[Request] = []
    for line in _lines(file):
        try:
            (label,) = labels_of([line.text if prompts else line.wanted], class_names)
        except ValueError as error:
            raise _unreadable(file, line.number, f"{line.seed},{line.text}", error) from error
        requests.append(Request(len(requests), line.seed, label, stream=0))
    return requests


def renumbered(file: str | Path, class_names: Sequence[str]) -> bool:
    """Whether a line's number is the name of another class, which it meant in former versions."""
    return any(
        isinstance(line.wanted, int)
        and 0 <= line.wanted < len(class_names)
        and line.text in class_names
        and class_names[line.wanted] != line.text
        for line in _lines(file)
    )


def prompts_in(file: str | Path) -> list[str]:
    """Return the prompts of a file of requests, each once, in the order of their first lines.

    Raises:
        ValueError: a line that is not a seed and a prompt; its number is named.
    """
    return list(dict.fromkeys(line.text for line in _lines(file)))


class _Line(NamedTuple):
    number: int
    seed: int
    text: str
    quoted: bool

    @property
    def wanted(self) -> int | str:
        """The class: a number, or a name."""
        is_number = re.fullmatch(r"[+-]?\d+", self.text) and not self.quoted
        return int(self.text) if is_number else self.text


def _lines(file: str | Path) -> list[_Line]:
    """Return what the lines of a file say."""
    found = []
    if not Path(file).is_file():
        raise ValueError(f"requests={file}: no such file; expected lines of 'seed,class'")
    lines = list(StringIO(read_text(Path(file), most=LIMIT), newline=""))
    reader = csv.reader(lines, skipinitialspace=True)
    for number, row in enumerate(csv_rows(reader, file), start=1):
        if not row or (number == 1 and [cell.strip().lower() for cell in row][:1] == ["seed"]):
            continue
        try:
            seed, wanted = int(row[0]), row[1].strip()
            if len(row) != 2:
                raise ValueError(
                    f"{len(row)} values where two were expected; put a prompt that holds "
                    f"commas in quotation marks"
                )
            check_key("seed", seed)
        except (ValueError, IndexError) as error:
            raise _unreadable(file, number, ",".join(row), error) from error
        quoted = re.match(r'[^,]*,\s*"', lines[reader.line_num - 1]) is not None
        found.append(_Line(number, seed, wanted, quoted))
    if not found:
        raise ValueError(f"{file}: expected at least one line 'seed,class', found none")
    return found


def _unreadable(file: str | Path, number: int, line: str, error: Exception) -> ValueError:
    return ValueError(
        f"{file}, line {number}: expected 'seed,class', found {line!r:.100} ({error!s:.200})"
    )
