"""Which class each image has: from a CSV or JSON file, or from members beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sag_dit.messages import counted, readable
from sag_dit.untrusted import csv_rows, parse_json

Mark = int | str
"""What says the class of an image: its number, or its name."""

LABELS_SIZE = 2 << 30
"""Bytes that a file of labels may have."""
MOST_VALUES = 100_000_000
"""Values that it may have: ImageNet's has four millions."""
MOST_CLASSES = 10**6
FILE_COLUMNS = ("file", "file_name", "filename", "path", "image", "name")
LABEL_COLUMNS = ("label", "class", "class_name")
DATASET_JSON = "dataset.json"
"""The labels in an archive of StyleGAN or EDM2."""


def read_labels(content: str, where: str) -> dict[str, Mark] | None:
    """Return the class of each image by its name, from the text of a CSV or JSON file.

    JSON is that of StyleGAN and EDM2, ``{"labels": [["00000/img.png", 6], ...]}``, or a mapping in
    place of the list. With ``null`` in its place there are no classes, and None is returned. A CSV
    has a row for each image; its first row may name the columns, such as ``file_name,label``.

    Raises:
        ValueError: it is no such file; the message names the row.
    """
    if where.lower().endswith(".json"):
        return _of_json(content, where)
    return _of_csv(content, where)


def _of_json(content: str, where: str) -> dict[str, Mark] | None:
    values = parse_json(content, where, MOST_VALUES)
    example = 'expected {"labels": [["cats/0.png", 0], ...]}, as StyleGAN and EDM2 write'
    if not isinstance(values, Mapping) or "labels" not in values:
        raise ValueError(f"{where}: no labels in it; {example}")
    listed = values["labels"]
    if listed is None:
        return None
    rows = list(listed.items()) if isinstance(listed, Mapping) else listed
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ValueError(f"{where}: labels={rows!r:.60}; {example}")
    found: dict[str, Mark] = {}
    for place, row in enumerate(rows):
        pair = isinstance(row, (list, tuple)) and len(row) == 2
        name, mark = row if pair else (None, None)
        marked = isinstance(mark, (int, str)) and not isinstance(mark, bool)
        if not isinstance(name, str) or mark is None or not marked:
            raise ValueError(
                f"{where}: label {place} is {row!r:.80}; {example}; vectors cannot be trained on"
            )
        _add(found, name.replace("\\", "/"), mark, f"{where}: label {place}")
    return found


def _of_csv(content: str, where: str) -> dict[str, Mark]:
    reader = csv.reader(io.StringIO(content))
    rows = [(reader.line_num, row) for row in csv_rows(reader, where) if any(row)]
    if not rows:
        raise ValueError(f"{where} is empty: expected a row for each image, such as cats/0.png,cat")
    # The columns, which a first row may name.
    names = [each.strip().lower() for each in rows[0][1]]
    columns = [
        next((names.index(each) for each in known if each in names), None)
        for known in (FILE_COLUMNS, LABEL_COLUMNS)
    ]
    file, label = (0, 1) if None in columns else columns
    if None not in columns:
        rows = rows[1:]
    elif len(names) != 2 or "." not in names[0]:
        raise ValueError(
            f"{where}, line 1: {names!r:.80}: expected columns called file and label, or "
            f"two columns, a file such as cats/0.png and its class"
        )
    assert file is not None and label is not None
    texts: dict[str, Mark] = {}
    for line, row in rows:
        place = f"{where}, line {line}"
        if len(row) <= max(file, label) or not row[label].strip():
            raise ValueError(f"{place}: {row!r:.80}: expected a file and its class")
        _add(texts, row[file].strip().replace("\\", "/"), row[label].strip(), place)
    return _numbers_if_all(texts, where)


def _add(found: dict[str, Mark], name: str, mark: Mark, where: str) -> None:
    name = name.removeprefix("./")
    if found.get(name, mark) != mark:
        raise ValueError(
            f"{where}: {name} is of class {mark}, and before of {found[name]}; mend it"
        )
    found[name] = mark


def _numbers_if_all(texts: Mapping[str, Mark], where: str) -> dict[str, Mark]:
    """Return the classes as numbers if all of them are.

    Raises:
        ValueError: all are numbers, but not all are whole ones from 0 on; or one is nothing.
    """
    counts = {name: f"{mark}" for name, mark in texts.items() if _is_count(f"{mark}")}
    if len(counts) == len(texts):
        return {name: int(mark) for name, mark in texts.items()}
    # What is written as 3.0, -1 or nan would become the name of a class.
    rest = {name: f"{mark}" for name, mark in texts.items() if name not in counts}
    if all(map(_reads_as_number, rest.values())):
        name, mark = next(iter(rest.items()))
        raise ValueError(
            f"{where}: {readable(name)} is of class {mark}: expected a whole number, 0 or more, "
            f"or names of classes throughout"
        )
    nameless = [name for name, mark in rest.items() if not mark]
    if nameless:
        raise ValueError(f"{where}: {readable(nameless[0])} has no class: expected its class")
    return {**texts}


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def beside_images(names: Sequence[str], classes: Mapping[str, str], where: str) -> dict[str, Mark]:
    """Return the class of each image from those of the samples, as WebDataset has them.

    A sample is what has the same name up to the first dot. ``where`` they are from is for errors.

    Raises:
        ValueError: classes that are numbers, but not all whole ones from 0 on; or one is nothing.
    """
    return _numbers_if_all({name: classes[sample_of(name)] for name in names}, where)


def sample_of(name: str) -> str:
    """Return the key of a member's sample in WebDataset's layout: its name up to the first dot.

    Example:
        >>> sample_of("a.tar/0001.seg.png")
        'a.tar/0001'
    """
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def numbered(
    marks: Sequence[Mark],
    names: Sequence[str],
    class_names: Sequence[str | int] | None,
    where: str,
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the class of each image as a number, and the names of the classes.

    ``names`` of the images are for errors, as is ``where`` the classes are from.

    Named classes are in the order of ``class_names``, by default that of their names; numbers are
    called what stands there at their place, by default what they are.

    Raises:
        ValueError: numbers and names, a number or name beyond ``class_names``, or no class.
    """
    stated = None if class_names is None else tuple(map(str, class_names))
    if stated is not None and len(set(stated)) < len(stated):
        raise ValueError(f"data.class_names={list(stated)}: expected each name once")

    def image_of_class(mark: Mark) -> str:
        return f"{readable(names[marks.index(mark)])} is of class {mark}"

    # Numbers, which are the classes themselves.
    found = set(marks)
    if all(isinstance(mark, int) for mark in found):
        least, most = min(map(int, found)), max(map(int, found))
        if not 0 <= least <= most < MOST_CLASSES:
            bad = least if least < 0 else most
            last = (len(stated) if stated else MOST_CLASSES) - 1
            raise ValueError(f"{where}: {image_of_class(bad)}: expected 0 to {last:,}")
        called = stated or tuple(map(str, range(most + 1)))
        if most >= len(called):
            raise ValueError(
                f"data.class_names: {counted(len(called), 'name')}, and in {where} "
                f"{image_of_class(most)}: expected 0 to {len(called) - 1}, or {most + 1} names"
            )
        return np.array(marks, dtype=np.int64), called
    # Names, which are numbered in their order.
    if not all(isinstance(mark, str) for mark in found):
        odd = next(mark for mark in marks if isinstance(mark, str))
        raise ValueError(
            f"{where}: classes are numbers, and {odd!r:.60}, that of "
            f"{readable(names[marks.index(odd)])}: expected one kind"
        )
    called = stated or tuple(sorted(map(str, found)))
    # A name among numbers is what went wrong, and not the numbers.
    unknown = sorted(map(str, found - {*called}), key=lambda mark: (_is_count(mark), mark))
    if unknown:
        raise ValueError(
            f"data.class_names: {unknown[0]!r:.60} is not among them, which {where} has, for "
            f"{readable(names[marks.index(unknown[0])])}: expected the names of all "
            f"{len(called)} classes"
        )
    places = {name: place for place, name in enumerate(called)}
    return np.array([places[str(mark)] for mark in marks], dtype=np.int64), called
