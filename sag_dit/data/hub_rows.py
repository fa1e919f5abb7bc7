"""Images in a data set of Hugging Face on disk, as ``save_to_disk`` writes it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sag_dit.data.crop import UnreadableImageError
from sag_dit.data.labels import LABEL_COLUMNS, Mark
from sag_dit.untrusted import read_json

ONE, SEVERAL = "state.json", "dataset_dict.json"
"""What lies in the folder of one data set, and in that of several splits."""


def is_on_disk(folder: Path) -> bool:
    """Whether a folder is what ``save_to_disk`` has written."""
    return (folder / SEVERAL).is_file() or all(
        (folder / name).is_file() for name in (ONE, "dataset_info.json")
    )


class HubRows:
    """Reads the images of a data set on disk as the bytes of their files.

    A row is called by its number, with eight digits. ``column`` names the column of the classes;
    None takes the one of type ClassLabel, or one called label or class.

    Raises:
        ValueError: ``datasets`` is not installed, the folder is damaged or holds several splits, or
            it is not clear which columns hold images and classes.

    Example::

        rows = HubRows(Path("beans/train"))
        print(rows.class_names, len(rows.read("00000000")))
    """

    def __init__(self, folder: Path, column: str | None = None) -> None:
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(
                f"data.root={folder} is a data set of Hugging Face: reading it needs datasets, "
                f"which is not installed; pip install datasets"
            )
        if (folder / SEVERAL).is_file():
            splits = read_json(folder / SEVERAL).get("splits") or ["train"]
            raise ValueError(
                f"data.root={folder} holds the splits {', '.join(map(str, splits)):.80}: expected "
                f"one of them, such as data.root={folder / str(splits[0])}"
            )
        # Imported here, since it is an extra.
        import datasets

        self.root = folder
        self._version = str(read_json(folder / ONE).get("_fingerprint"))
        try:
            rows = datasets.load_from_disk(str(folder))
            features = rows.features
        except Exception as error:  # readers of Arrow files raise almost any type
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"data.root={folder} cannot be read as a data set of Hugging Face ({reason}): "
                f"expected what save_to_disk writes; save or copy it again"
            ) from None
        images = [name for name, each in features.items() if isinstance(each, datasets.Image)]
        self._image = self._only("images (a feature of type Image)", images, ("image", "img"))
        self._rows: Any = rows
        # The classes, and what they are called.
        classed = [name for name, each in features.items() if isinstance(each, datasets.ClassLabel)]
        named = [name for name in LABEL_COLUMNS if name in features]
        if column is not None and column not in features:
            raise ValueError(
                f"data.labels={column}: expected one of the columns of {folder}: "
                f"{', '.join(features)}"
            )
        if column is None and (classed or named):
            column = self._only("classes", classed or named, LABEL_COLUMNS)
        self.marks: Sequence[Mark] | None = None
        self.class_names: tuple[str, ...] | None = None
        if column is not None:
            self.marks = self._marks(rows.data.column(column).to_pylist(), column)
            if isinstance(features[column], datasets.ClassLabel):
                self.class_names = tuple(features[column].names)
        self.other_columns = [name for name in features if name != self._image]
        self.names = [f"{number:08d}" for number in range(len(rows))]

    def _only(self, what: str, found: Sequence[str], usual: Sequence[str]) -> str:
        chosen = [name for name in usual if name in found][:1] or found
        if len(chosen) != 1:
            have = f"several: {', '.join(chosen)}" if chosen else "none"
            remedy = "; name it by data.labels" if what == "classes" else ""
            raise ValueError(
                f"data.root={self.root}: expected one column of {what}, found {have}{remedy}"
            )
        return chosen[0]

    def _marks(self, values: Sequence[Any], column: str) -> list[Mark]:
        for number, value in enumerate(values):
            if not isinstance(value, (int, str)) or isinstance(value, bool):
                raise ValueError(
                    f"data.root={self.root}: {column} of row {number} is {value!r:.60}: expected a "
                    f"class, its number or its name"
                )
        return [*values]

    def stamp(self, name: str) -> str:
        """Return what tells that a row has changed: the fingerprint of all."""
        return self._version

    def read(self, name: str) -> bytes:
        """Return the content of a row's image file.

        Raises:
            UnreadableImageError: the row has none.
            OSError: it names a file that cannot be read.
        """
        found = self._rows.data.column(self._image)[int(name)].as_py()
        content = None if found is None else found["bytes"]
        if found is not None and content is None and found["path"]:
            content = Path(found["path"]).read_bytes()
        if content is None:
            raise UnreadableImageError(f"{self.root / name} holds no image")
        return bytes(content)
