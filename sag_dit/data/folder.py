"""Folders of images: which files belong to them, in which order and of which class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sag_dit.data.training_batches import Indices

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFiles:
    """The images below a folder, in one order on every machine.

    Attributes:
        root: the folder.
        names: paths relative to it, with ``/``.
        labels: the class of each.
        class_names: names of the class folders; of a flat folder its own name.

    Example::

        files = find_images("photos/")
        print(len(files), files.class_names, files.path(0))
    """

    root: Path
    names: tuple[str, ...]
    labels: Indices
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Return where an image lies."""
        return self.root / self.names[index]


def find_images(root: str | Path) -> ImageFiles:
    """List the images below a folder: one class per folder in it, or a single class if it has none.

    Class folders are searched in depth. Hidden files and folders, and files without an image's
    ending, are left out.

    Raises:
        ValueError: no such folder, no image in it, a class without image, or images beside class
            folders.
    """
    # What stands in the folder: class folders, or images.
    folder = Path(root).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"data.root={root}: {what}; expected a folder of images")
    entries = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    classes = [name for name in entries if (folder / name).is_dir()]
    loose = [name for name in entries if name not in set(classes) and _is_image(name)]
    if classes and loose:
        raise ValueError(
            f"data.root={root}: {len(loose)} images ({loose[0]}, ...) lie beside the folders "
            f"{_some(classes)}; expected either class folders or images alone"
        )
    # List the images, class by class; a flat folder is one class of its own name.
    if not classes:
        names, labels, classes = loose, [0] * len(loose), [folder.resolve().name]
    else:
        found = [sorted(_walk(folder, name)) for name in classes]
        names = [name for part in found for name in part]
        labels = [label for label, part in enumerate(found) for _ in part]
        empty = [name for name, part in zip(classes, found, strict=True) if not part]
        if names and empty:
            raise ValueError(
                f"data.root={root}: no image in {len(empty)} of {len(classes)} class folders: "
                f"{_some(empty)}; add images or remove the folders"
            )
    if not names:
        raise ValueError(
            f"data.root={root}: no image found; expected files ending in {', '.join(EXTENSIONS)}"
        )
    return ImageFiles(folder, tuple(names), np.array(labels, dtype=np.int64), tuple(classes))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _walk(root: Path, start: str) -> Iterator[str]:
    for folder, below, files in os.walk(root / start, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in files if _is_image(name))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)
