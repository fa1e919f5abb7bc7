"""Images to train on: in class folders or a flat one, with labels in a file, or in archives."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sag_dit.checkpoints import Model
from sag_dit.data.archives import ARCHIVES, CLASS, COMPRESSED, JSON, PACKED, Archives
from sag_dit.data.crop import (
    MODES,
    TRANSPARENT,
    WHITE,
    Header,
    PixelArray,
    Side,
    UnreadableImageError,
    buckets_by_rule,
    check_background,
    crop_of,
    header_of,
    nearest_bucket,
    read_header,
    sides,
    told_size,
)
from sag_dit.data.hub_rows import HubRows, is_on_disk
from sag_dit.data.labels import (
    DATASET_JSON,
    LABELS_SIZE,
    Mark,
    beside_images,
    numbered,
    read_labels,
    sample_of,
)
from sag_dit.data.training_batches import (
    Batch,
    Indices,
    NamedData,
    balanced,
    name_hash,
)
from sag_dit.messages import SHOWN, counted, readable, some
from sag_dit.untrusted import parse_json, read_text


def latent_size(size: int, factor: int = 1, patch_size: int = 1) -> int:
    """Return the side of x_0 for images of ``size`` pixels: size / factor.

    ``factor`` is the codec's pixels per latent cell, ``patch_size`` the denoiser's cells per token.

    Raises:
        ValueError: the size is no multiple of factor times patch_size; the nearest are named.
    """
    step = factor * patch_size
    if size < 1 or size % step:
        below = size // step * step
        near = f"{below} or {below + step}" if below > 0 else str(step)
        raise ValueError(
            f"size={size}: expected a multiple of {step} pixels (autoencoder factor {factor} times "
            f"patch size {patch_size}), such as {near}"
        )
    return size // factor


EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of the files that are read, in capitals too."""
UNKNOWN_TO_PILLOW = (
    *(".heic", ".heif", ".jif", ".jxl", ".svg", ".pfm", ".exr", ".hdr"),
    ".npy",
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)


@cache
def passed_over() -> frozenset[str]:
    """Return the endings of images that are not read, but told of."""
    return frozenset([*Image.registered_extensions(), *UNKNOWN_TO_PILLOW]) - {*EXTENSIONS}


class Store(Protocol):
    """Where images lie that are no files of a folder; a name stands for one of them.

    Example::

        content = store.read(files.names[0])
    """

    def read(self, name: str) -> bytes:
        """Return the content of an image's file."""

    def stamp(self, name: str) -> int | str:
        """Return what tells that an image has changed."""


@dataclass(frozen=True)
class ImageFiles:
    """Images with their classes, in one order on every machine.

    Attributes:
        root: the folder or archive that they lie in.
        names: of each, with ``/``: its path relative to the root.
        labels: the class of each.
        class_names: names of the classes; of a flat folder its own name.
        left_out: names of images that are not among them, by the reason.
        store: what reads them, where they are no files of their own.
        labels_from: what their classes are from, where it is not the folders.

    Example::

        files = find_images("photos/")
        print(len(files), files.class_names, files.path(0))
    """

    root: Path
    names: tuple[str, ...]
    labels: Indices
    class_names: tuple[str, ...]
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    store: Store | None = None
    labels_from: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Return where an image lies, as messages tell it; what lies in an archive is no file."""
        return self.root / self.names[index]

    def read(self, index: int) -> bytes:
        """Return the content of an image's file.

        Raises:
            UnreadableImageError: it is damaged within its archive.
            OSError: it cannot be read.
        """
        if self.store is None:
            return self.path(index).read_bytes()
        return self.store.read(self.names[index])

    def header(self, index: int) -> Header:
        """Return what an image's file says of itself before its pixels.

        Raises:
            UnreadableImageError: it cannot be decoded.
            OSError: it cannot be read.
        """
        if self.store is None:
            return read_header(self.path(index))
        return header_of(BytesIO(self.read(index)), self.path(index))

    def stamp(self, index: int) -> int | str:
        """Return what tells that an image has changed: its size in bytes, of rows their version."""
        if self.store is None:
            return self.path(index).stat().st_size
        return self.store.stamp(self.names[index])


def find_images(
    root: str | Path, labels: str | None = None, class_names: Sequence[str | int] | None = None
) -> ImageFiles:
    """List the images of a folder, an archive or a data set on disk, with their classes.

    ``root`` is a folder of images, a zip, an uncompressed tar, shards (a folder of nothing but tar
    files, or a pattern such as ``train-*.tar`` and ``train-{000..146}.tar``), or what Hugging
    Face's ``save_to_disk`` has written. Without ``labels`` there is one class for each folder in
    it, or a single class if it has none; in an archive ``dataset.json`` or the ``.cls`` of each
    image goes before. ``labels`` names a CSV or JSON file, from here or within the root, or the
    column of a data set. Images that it does not name are left out. ``class_names`` names the
    classes in their order. Of shards ``labels`` may also be a key of the ``.json`` of each sample.

    Folders are searched in depth. Hidden files and folders, and files without an image's ending,
    are left out; images of other endings, links to nothing, and links to a folder that they lie
    in, too, but these are named.

    Raises:
        ValueError: there is nothing of that kind, it is damaged, or has no image; a class folder
            without image or with a name that is not UTF-8; images beside class folders; labels
            that cannot be read or name no image of it.
    """
    # All images there, and what says their classes.
    here = Path(root).expanduser()
    source, stated = "", class_names
    if is_on_disk(here):
        rows = HubRows(here, labels)
        listed = _Listed(here, rows.names, rows.names, {}, rows)
        marks = None if rows.marks is None else dict(zip(rows.names, rows.marks, strict=True))
        source, stated = "its column", class_names or rows.class_names
    else:
        listed, marks = _listed(root, here), None
        if listed.names:
            marks, source = _stated_marks(root, listed, labels)
    if not listed.names:
        raise ValueError(
            f"data.root={root}: no image found{_packed(listed)}; expected files ending in "
            f"{', '.join(EXTENSIONS)}{_also(listed.left_out)}"
        )
    if marks is None:
        marks, folders = _marks_of_folders(root, listed)
        source, stated = "", class_names or folders
    # Class by class, in the order of their names.
    names = [name for name in listed.names if name in marks]
    numbers, called = numbered([marks[name] for name in names], names, stated, source or f"{root}")
    listed_numbers = numbers.tolist()
    order = sorted(range(len(names)), key=lambda place: (listed_numbers[place], names[place]))
    aside = {why: sorted(names) for why, names in sorted(listed.left_out.items())}
    return ImageFiles(
        listed.root,
        tuple(names[place] for place in order),
        numbers[order],
        called,
        aside,
        listed.store,
        source,
    )


class _Listed(NamedTuple):
    """All images of a source, before they have classes.

    ``inside`` are their names without a shard's and without a folder around all of an archive.
    ``folders`` are the folders beside which no image may lie, also those without any.
    """

    root: Path
    names: Sequence[str]
    inside: Sequence[str]
    left_out: dict[str, list[str]]
    store: Store | None = None
    folders: Sequence[str] = ()


def _listed(root: str | Path, place: Path) -> _Listed:
    """List what is in a folder, an archive, or shards.

    Raises:
        ValueError: there is nothing of that kind, or an archive is damaged.
    """
    archives = archives_of(place)
    if archives:
        return _in_archives(place if place.exists() else place.parent, archives)
    if not place.is_dir():
        what = "is a file" if place.is_file() else "does not exist"
        raise ValueError(
            f"data.root={root}: {what}; expected a folder of images, a zip, a tar, or shards such "
            f"as train-*.tar"
        )
    left_out: dict[str, list[str]] = {}
    names = [*_images(place, "", left_out)]
    entries = sorted(entry.name for entry in place.iterdir() if not entry.name.startswith("."))
    folders = [name for name in entries if (place / name).is_dir()]
    return _Listed(place, names, names, left_out, None, folders)


def _packed(listed: _Listed) -> str:
    """Return which archive lies there unread, and what to do with it."""
    if isinstance(listed.store, Archives):
        within = [name for name in listed.store.names if name.lower().endswith(PACKED)]
        return f", but {readable(within[0])} in it; unpack that" if within else ""
    files = sorted(file for file in listed.root.rglob("*") if file.name.lower().endswith(PACKED))
    if not files:
        return ""
    read = [file for file in files if file.name.lower().endswith(ARCHIVES)]
    first = (read or files)[0]
    told = f", but {readable(str(first.relative_to(listed.root)))}"
    if read:
        alike = [
            file for file in read if (file.parent, file.suffix) == (first.parent, first.suffix)
        ]
        root = f"'{first.parent}/*{first.suffix}'" if len(alike) > 1 else f"{first}"
        return f"{told}; data.root={readable(root)} reads it"
    if first.name.lower().endswith((".tar.gz", ".tgz")):
        return f"{told}, which is compressed; gunzip makes a tar of it, for data.root"
    return f"{told}, which is not read; unpack it"


def archives_of(place: Path) -> list[Path]:
    """Return the archives that a root means: itself, or shards; none for a folder of images."""
    name = place.name.lower()
    if place.is_file():
        return [place] if name.endswith((*ARCHIVES, *COMPRESSED)) else []
    if place.is_dir():
        entries = [entry for entry in place.iterdir() if not entry.name.startswith(".")]
        alone = not any(each.is_dir() or each.suffix.lower() in EXTENSIONS for each in entries)
        return sorted(each for each in entries if each.suffix.lower() == ".tar") if alone else []
    # A pattern, or WebDataset's way to name shards.
    counted = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", place.name)
    if counted is None:
        found = place.parent.glob(place.name) if re.search(r"[*?\[]", place.name) else ()
        return sorted(each for each in found if each.name.lower().endswith(ARCHIVES))
    start, first, last, end = counted.groups()
    numbers = range(int(first), min(int(last), int(first) + MOST_SHARDS) + 1)
    return [place.with_name(f"{start}{number:0{len(first)}d}{end}") for number in numbers]


def _in_archives(root: Path, files: Sequence[Path]) -> _Listed:
    store = Archives(root, files)
    left_out = store.left_out
    images = []
    for name in store.names:
        ending = Path(name).suffix.lower()
        if ending in EXTENSIONS:
            images.append(name)
        elif ending in passed_over():
            left_out.setdefault(f"{ending} is not read", []).append(name)
    inside = [name.partition("/")[2] for name in images] if store.shards else images
    # A folder around all of it, such as that which was packed, says nothing.
    while len({name.split("/")[0] for name in inside}) == 1 and all(
        name.count("/") > 1 for name in inside
    ):
        inside = [name.partition("/")[2] for name in inside]
    folders = sorted({name.split("/")[0] for name in inside if "/" in name})
    return _Listed(root, images, inside, left_out, store, folders)


def _stated_marks(
    root: str | Path, listed: _Listed, labels: str | None
) -> tuple[dict[str, Mark] | None, str]:
    """Return the classes of images that a file says, or members of an archive, and which.

    None leaves it to the folders. Images without a class are left out of ``listed``.

    Raises:
        ValueError: labels that cannot be read, or that name what is not there.
    """
    archive = listed.store if isinstance(listed.store, Archives) else None
    file, found = "", None
    if labels is not None:
        near, within = Path(labels).expanduser(), listed.root / labels
        if near.is_file() or within.is_file():
            file = str(near if near.is_file() else within)
            found = read_labels(read_text(Path(file), LABELS_SIZE), file)
        elif archive is not None and labels in archive:
            file, found = labels, _labels_within(archive, labels)
        elif archive is not None and archive.described and not labels.endswith((".csv", JSON)):
            source = f"{labels} in the {JSON} of each image"
            return _marks_described(listed, archive, labels), source
        else:
            key = f", or a key of the {JSON} beside each image" * (archive is not None)
            raise ValueError(
                f"data.labels={labels}: no such file here or in {root}: expected a CSV or JSON "
                f"file{key}"
            )
    elif archive is not None and DATASET_JSON in archive:
        file, found = DATASET_JSON, _labels_within(archive, DATASET_JSON)
    elif archive is not None and archive.classes:
        return _marks_beside(listed, archive), f"the {CLASS} of each image"
    if not file:
        return None, ""
    if found is None:  # It says that there are no classes.
        name = listed.root.resolve().stem
        return dict.fromkeys(listed.names, name), file
    # Both must name the same images, but for those that are not to be trained on.
    by_name = zip(listed.names, listed.inside, strict=True)
    known = {name: name if name in found else short for name, short in by_name}
    absent = found.keys() - {*known.values(), *(n for ns in listed.left_out.values() for n in ns)}
    if absent:
        raise ValueError(
            f"{file} names {counted(len(absent), 'image')} not in {root}, the first of them "
            f"{readable(min(absent))}: expected names relative to it, such as "
            f"{readable(next(iter(known.values())))}; mend the file, or add the images"
        )
    marks = {name: found[short] for name, short in known.items() if short in found}
    unnamed = [name for name in listed.names if name not in marks]
    if unnamed:
        listed.left_out[f"not in {Path(file).name}"] = unnamed
    if not marks:
        raise ValueError(f"{file} names no image: expected a class for each image of {root}")
    return marks, file


def _labels_within(archive: Archives, name: str) -> dict[str, Mark] | None:
    where = str(archive.root / name)
    try:
        return read_labels(archive.read(name).decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} is no UTF-8: expected UTF-8") from None
    except (UnreadableImageError, OSError) as error:
        raise ValueError(f"{error}; copy or download the archive again") from None


def _marks_beside(listed: _Listed, archive: Archives) -> dict[str, Mark]:
    """Return the class of each image from the ``.cls`` of its sample, as WebDataset has it."""
    held = {name.removesuffix(CLASS): text for name, text in archive.classes.items()}
    where = f"the {CLASS} of each image"
    return beside_images(_beside(listed, held.keys(), CLASS), held, where)


def _marks_described(listed: _Listed, archive: Archives, key: str) -> dict[str, Mark]:
    """Return the class of each image from a key of the ``.json`` of its sample, as timm reads it.

    Raises:
        ValueError: one cannot be read, lacks the key, or has no class there.
    """
    # Each image, and what its description says.
    images = _beside(listed, {name.removesuffix(JSON) for name in archive.described}, JSON)

    def mark(image: str) -> Mark:
        name = f"{sample_of(image)}{JSON}"
        where = str(archive.root / name)
        try:
            values = parse_json(archive.read(name).decode("utf-8-sig", "replace"), where)
        except (UnreadableImageError, OSError) as error:
            raise ValueError(f"{error}; copy or download the archive again") from None
        has = sorted(map(str, values)) if isinstance(values, Mapping) else []
        if key not in has:
            raise ValueError(
                f"data.labels={key}: {where} has no such key: expected one of {some(has) or 'them'}"
            )
        found = values[key]
        if not isinstance(found, (int, str)) or isinstance(found, bool):
            raise ValueError(
                f"data.labels={key}: {where} has {found!r:.60} there: expected a class, its number "
                f"or its name"
            )
        return found

    # Read side by side; texts may be numbers that were written as texts.
    with ThreadPoolExecutor(8) as pool:
        marks = [*pool.map(mark, images)]
    found = dict(zip(images, marks, strict=True))
    texts = {sample_of(name): each for name, each in found.items() if isinstance(each, str)}
    if len(texts) < len(images):
        return found
    return beside_images(images, texts, f"{key} in the {JSON} of each image")


def _beside(listed: _Listed, samples: Collection[str], ending: str) -> list[str]:
    """Return the images of the samples that have a member of that ending; the others are left out.

    Raises:
        ValueError: there are none.
    """
    further = {name for name in listed.names if "." in name.removeprefix(f"{sample_of(name)}.")}
    images = [name for name in listed.names if name not in further]
    found = [name for name in images if sample_of(name) in samples]
    without = [name for name in images if sample_of(name) not in samples]
    aside = {"further image of its sample": sorted(further), f"no {ending} beside it": without}
    listed.left_out.update({why: names for why, names in aside.items() if names})
    if not found:
        raise ValueError(
            f"data.root={listed.root}: {ending} files, but none beside an image: expected both of "
            f"a sample under one name, such as 0001.jpg and 0001{ending}"
        )
    return found


def _marks_of_folders(root: str | Path, listed: _Listed) -> tuple[dict[str, Mark], Sequence[str]]:
    """Return the class of each image by its folder; a flat folder is one class of its own name.

    Raises:
        ValueError: a class folder without image or with a name that is not UTF-8, or images beside
            class folders.
    """
    # Folders whose names can be told, and no image beside them.
    folders, left_out = listed.folders, listed.left_out
    for name in folders:
        if os.fsencode(name) != name.encode(errors="replace"):
            raise ValueError(
                f"data.root={root}: the class folder {os.fsencode(name)!r} has a name that is not "
                f"UTF-8, which no file of a run can hold; rename it"
            )
    loose = sorted(name for name in listed.inside if "/" not in name)
    if folders and loose:
        first = readable(loose[0])
        several = f"{len(loose):,} images ({first}, ...) lie"
        told = f"{first} lies" if len(loose) == 1 else several
        raise ValueError(
            f"data.root={root}: {told} beside the folders {some(folders)}; expected "
            f"either class folders or images alone, or data.labels"
        )
    # A flat folder, or a class for each folder.
    if not folders:
        path = listed.root.resolve()
        name = path.stem if listed.store is not None and path.is_file() else path.name
        return dict.fromkeys(listed.names, name), [name]
    pairs = zip(listed.names, listed.inside, strict=True)
    marks: dict[str, Mark] = {name: short.split("/")[0] for name, short in pairs}
    empty = sorted({*folders} - {*marks.values()})
    if empty:
        raise ValueError(
            f"data.root={root}: no image in {len(empty)} of {len(folders)} class folders: "
            f"{some(empty)}; add images or remove the folders{_also(left_out)}"
        )
    return marks, folders


def _images(
    root: Path,
    below: str,
    left_out: dict[str, list[str]],
    *,
    deep: bool = True,
    above: Sequence[os.stat_result] = (),
) -> Iterator[str]:
    """Yield the images below a folder in ``root``; note in ``left_out`` those that are not read.

    ``above`` are the folders on the way to it.
    """
    try:
        # A link to one of them would lead through the same images without end.
        way = [*(above or [root.stat()]), (root / below).stat()]
        if below and any(os.path.samestat(way[-1], each) for each in way[:-1]):
            left_out.setdefault("link to a folder that it lies in", []).append(below)
            return
        entries = list(os.scandir(root / below))
    except OSError:
        left_out.setdefault("folder that cannot be opened", []).append(below)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        name, ending = f"{below}{entry.name}", Path(entry.name).suffix.lower()
        # What a link leads to; of other entries the folder has told it.
        there = Path(entry) if entry.is_symlink() else entry
        if there.is_dir():
            if deep:
                yield from _images(root, f"{name}/", left_out, above=way)
        elif ending in passed_over():
            left_out.setdefault(f"{ending} is not read", []).append(name)
        elif ending in EXTENSIONS and there.is_file():
            yield name
        elif ending in EXTENSIONS:
            what = "broken link" if entry.is_symlink() else "no file"
            left_out.setdefault(what, []).append(name)


def listing_sha256(files: ImageFiles) -> str:
    """Return the sha256 of the images' names and sizes in bytes, and of labels beside them."""
    with ThreadPoolExecutor(8) as pool:
        stamps = pool.map(files.stamp, range(len(files)))
        listing = hashlib.sha256()
        for name, stamp, label in zip(files.names, stamps, files.labels.tolist(), strict=True):
            # The names tell the classes unless something else does.
            own = f" {label}" if files.labels_from else ""
            listing.update(os.fsencode(f"{name} {stamp}{own}\n"))
    return listing.hexdigest()


def told_left_out(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """Return how many files are left out, why and the first of them, a text for each reason."""
    return [f"{len(names):,} ({why}): {some(names)}" for why, names in left_out.items()]


def told_pages(names: Sequence[str]) -> str:
    """Return that these files hold several images each, and what is done with them."""
    hold = f"{len(names):,} hold{'s' * (len(names) == 1)}"
    return f"{hold} several pages or frames, of which the first is read: {some(names)}"


def _also(left_out: Mapping[str, Sequence[str]]) -> str:
    return f"; left out are {'; '.join(told_left_out(left_out))}" if left_out else ""


MOST_SHARDS = 1_000_000
"""Shards that a pattern may name."""
CHECKED_UP_FRONT = 20_000
"""Headers of at most so many images are read before the first step; that takes seconds."""
LOOKED_AT = 1_000
"""Where there are more, the headers of so many are."""

log = logging.getLogger(__name__)


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Centre crops of image files, uint8 (c, size, size) or (c, *size), with their labels.

    In place of an image that cannot be decoded stands the next image of its group, the same one
    every time, and the name of the unreadable one is logged once. With ``strict`` it is an error.
    ``groups`` says which images are to train on and which are held out, so that neither stands in
    for the other. With ``buckets``, several sizes, an image is cropped to the one that has its
    aspect ratio most nearly, see :func:`sag_dit.data.crop.nearest_bucket`; the images of a batch
    have to be of one bucket.

    Raises:
        ValueError: a value out of its range.

    Example::

        crops = Crops(find_images("photos/"), size=256)
        image, label = crops[0]
    """

    def __init__(
        self,
        files: ImageFiles,
        size: Side,
        *,
        channels: int = 3,
        upright: bool = True,
        background: str | None = WHITE,
        strict: bool = False,
        groups: NDArray[np.bool_] | None = None,
        buckets: Sequence[tuple[int, int]] = (),
    ) -> None:
        if channels not in MODES:
            raise ValueError(f"channels={channels}: expected 3 (colour) or 1 (grey)")
        check_background(background)
        self.files, self.size, self.channels = files, sides(size), channels
        self.buckets = tuple(buckets) or (self.size,)
        self.upright, self.background, self.strict = upright, background, strict
        self._groups = np.zeros(len(files), dtype=np.bool_) if groups is None else groups
        # Shared with loader processes, so that an image that one has met is known to all.
        self._unreadable = torch.zeros(len(files), dtype=torch.bool).share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        # Without what was read of the headers, which no loader process needs.
        return {name: each for name, each in vars(self).items() if name != "_all_headers"}

    @property
    def skipped(self) -> list[str]:
        """Names of the images that could not be decoded so far."""
        return [self.files.names[i] for i in self._unreadable.nonzero().flatten().tolist()]

    @cached_property
    def bucket_of(self) -> Indices:
        """The bucket of each image; one whose header cannot be read is in the fullest."""
        if len(self.buckets) == 1:
            return np.zeros(len(self.files), dtype=np.int64)
        found = np.array(self._all_headers.buckets, dtype=np.int64)
        counts = np.bincount(found[found >= 0], minlength=len(self.buckets))
        return np.where(found < 0, counts.argmax(), found)

    def read(self, index: int) -> PixelArray | None:
        """Return one crop, or None if the image cannot be decoded.

        Raises:
            UnreadableImageError: it cannot, and ``strict`` is set.
        """
        if self._unreadable[index]:
            return None
        try:
            content, path = self.files.read(index), self.files.path(index)
            size = self.buckets[self.bucket_of[index]]
            return crop_of(content, path, size, self.channels, self.upright, self.background)
        except UnreadableImageError as error:
            self.note_unreadable(index, error)
            return None

    def note_unreadable(self, index: int, error: UnreadableImageError) -> None:
        """Remember an image as unreadable and log its name; with ``strict``, raise the error."""
        if self.strict:
            raise UnreadableImageError(f"{error}; remove it, or set strict=false") from None
        if not self._unreadable[index]:
            self._unreadable[index] = True
            log.warning("%s: left out", error)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__(Batch(0, [index], [False]))
        return images[0], labels[0]

    def __getitems__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        size = self.buckets[self.bucket_of[batch.indices[0]]]
        images = np.empty((len(batch.indices), self.channels, *size), dtype=np.uint8)
        labels = np.empty(len(batch.indices), dtype=np.int64)
        for place, (wanted, mirrored) in enumerate(zip(batch.indices, batch.mirrored, strict=True)):
            index, pixels = self._next_readable(wanted)
            images[place] = pixels[..., ::-1] if mirrored else pixels
            labels[place] = self.files.labels[index]
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _next_readable(self, wanted: int) -> tuple[int, PixelArray]:
        for further in range(len(self.files)):
            index = (wanted + further) % len(self.files)
            if self._groups[index] != self._groups[wanted]:
                continue
            if self.bucket_of[index] != self.bucket_of[wanted]:
                continue
            pixels = self.read(index)
            if pixels is not None:
                return index, pixels
        raise ValueError(
            f"{self.files.root}: no image can be decoded; expected intact images, or set "
            f"strict=true to learn what is wrong with each"
        )

    def inspect(self, most: int | None = None) -> Inspection:
        """Read the headers of all images, or of ``most`` of them, evenly spaced.

        With several buckets all are read, and only once.

        Raises:
            ValueError: with ``strict``, an image that cannot be read or is too small.
        """
        if len(self.buckets) > 1:
            return self._all_headers
        count = len(self.files)
        return self._look_at(range(count) if most is None else range(0, count, -(-count // most)))

    @cached_property
    def _all_headers(self) -> Inspection:
        return self._look_at(range(len(self.files)))

    def _look_at(self, looked: range) -> Inspection:
        def header(index: int) -> Header | UnreadableImageError:
            try:
                return self.files.header(index)
            except UnreadableImageError as error:
                return error

        # Several threads read the headers; what is found is told in the order of the files.
        inspection = Inspection(len(looked), [], [], {}, [], [])
        with ThreadPoolExecutor(8) as pool:
            for index, found in zip(looked, pool.map(header, looked), strict=True):
                if isinstance(found, UnreadableImageError):
                    self.note_unreadable(index, found)
                    inspection.buckets.append(-1)
                    continue
                inspection.sizes.append((found.width, found.height))
                if found.pages:
                    inspection.pages.append(index)
                if found.unlike_before:
                    inspection.unlike_before.setdefault(found.unlike_before, []).append(index)
                turned = self.upright and found.on_its_side
                width, height = (found.width, found.height)[:: -1 if turned else 1]
                inspection.buckets.append(nearest_bucket(width, height, self.buckets))
                crop = self.buckets[inspection.buckets[-1]]
                if height < crop[0] or width < crop[1]:
                    if self.strict:
                        size = told_size(crop)
                        raise ValueError(
                            f"{self.files.path(index)} has {found.width} x {found.height} pixels: "
                            f"expected {size} or more on each side; remove it, or set "
                            f"strict=false to have small images enlarged"
                        )
                    inspection.small.append(index)
        return inspection


class Inspection(NamedTuple):
    """What the headers of images say.

    Attributes:
        looked: at so many.
        sizes: width and height of each that can be read.
        small: which are smaller than the crop.
        unlike_before: which were read otherwise before there was a background, by the reason.
        pages: which hold several images.
        buckets: of each, the number of its bucket, -1 where it cannot be read.

    Example::

        print(crops.inspect().small)
    """

    looked: int
    sizes: list[tuple[int, int]]
    small: list[int]
    unlike_before: dict[str, list[int]]
    pages: list[int]
    buckets: list[int]

    def told(self, crops: Crops) -> list[str]:
        """Return a text for each thing that is done to some of the images."""
        names, background = crops.files.names, crops.background
        said = []
        for what, indices in self.unlike_before.items():
            if background is None:
                how = (
                    "read as before there was data.background: hidden colours show, and more than "
                    "8 bits are clipped; data.background=white in another run reads them right"
                )
            elif what == TRANSPARENT:
                how = f"laid over {background}"
            else:
                how = "scaled to 8 bits"
            more = f"{len(indices):,} are {what} and {how}, the first is "
            before = f"1 is {what} and {how}: " if len(indices) == 1 else more
            said.append(f"{before}{readable(names[indices[0]])}")
        if self.pages:
            said.append(told_pages([names[index] for index in self.pages]))
        if self.small:
            several = len(crops.buckets) > 1
            size = "their bucket" if several else f"{told_size(crops.size)} pixels"
            one = len(self.small) == 1
            be, before = ("is", ": ") if one else ("are", ", the first is ")
            said.append(
                f"{len(self.small):,} of {counted(self.looked, 'image')} {be} smaller than {size} "
                f"and {be} enlarged{before}{crops.files.path(self.small[0])}"
            )
        return said


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def suspicions(files: ImageFiles) -> list[str]:
    """Return what makes the classes look like others than were meant, a sentence each."""
    if files.labels_from:
        return []
    found = _unread_labels(files)
    # The parent of train/ and val/: the classes lie one level below.
    inside: dict[str, set[str]] = {name: set() for name in files.class_names}
    for name in files.names:
        first, *between = name.split("/")[:-1] or [""]
        if between and first in inside:
            inside[first].add(between[0])
    parents = [names for names in inside.values() if names]
    several = len(parents) > 1 or len(parents) == len(inside)
    shared = set.intersection(*parents) if several else set()
    if len(shared) > 1 and 2 * len(shared) > len(set.union(*parents)):
        with_them = [name for name, names in inside.items() if names]
        found.append(
            f"the class folders {some(with_them)} hold the same folders "
            f"({some(sorted(shared))}); if those are the classes, set "
            f"data.root={files.root / with_them[0]}"
        )
    # The classes stand in the names of files, which say nothing here.
    if len(files.class_names) == 1:
        told = [CLASS_IN_NAME.match(Path(name).stem) for name in files.names]
        names = list(dict.fromkeys(each[1] for each in told if each))
        if all(told) and 1 < len(names) <= max(2, len(told) // 2):
            found.append(
                f"one class, but the files are called as if of {len(names)}: {some(names)}; if so, "
                f"make a folder for each"
            )
    return found


def _unread_labels(files: ImageFiles) -> list[str]:
    """Return what lies beside the images and may hold their classes, a sentence each."""
    one = len(files.class_names) == 1
    if isinstance(files.store, HubRows):
        return [
            f"one class, and the columns {some(files.store.other_columns)} are not read; "
            f"data.labels=COLUMN takes the classes from one"
        ] * bool(files.store.other_columns)
    # A member or file beside each image, as of WebDataset's samples.
    archive = files.store if isinstance(files.store, Archives) else None
    sample = sample_of(files.names[0])
    found = []
    for ending in (JSON, ".txt", CLASS):
        beside = f"{sample}{ending}"
        if beside in archive if archive is not None else one and (files.root / beside).is_file():
            if archive is not None and ending == JSON:
                found.append(
                    f"a {JSON} lies beside each image and is not read; data.labels=KEY takes the "
                    f"classes from a key in it"
                )
            elif one:
                how = f"rename them to {CLASS}, or " * (archive is not None)
                found.append(
                    f"one class, and {readable(beside)} lies beside its image and is not read; if "
                    f"such files hold the classes, {how}list them in a CSV, data.labels=FILE"
                )
    # Tables of all.
    names = [*archive.names] if archive is not None else []
    if files.root.is_dir():
        names += sorted(file.name for file in files.root.iterdir() if file.is_file())
    samples = {sample_of(name) for name in files.names} if one else set()
    tables = []
    for name in names:
        own = Path(name).name.lower()
        table = own.endswith((".csv", JSON)) or re.fullmatch(r".*(label|class).*\.txt", own)
        if name == DATASET_JSON or (one and table and sample_of(name) not in samples):
            tables.append(name)
    return found + [
        f"{readable(name)} lies there and is not read; data.labels={readable(name)} takes the "
        f"classes from it"
        for name in tables[:SHOWN]
    ]


def stated_buckets(buckets: int | Sequence[Sequence[int]], size: Side) -> list[tuple[int, int]]:
    """Return buckets (height, width) that were stated as a list, or by the step of the rule.

    Raises:
        ValueError: one is no size, two have one aspect ratio, or ``size`` is not among them.

    Example:
        >>> stated_buckets([[64, 64], [48, 80]], 64)
        [(64, 64), (48, 80)]
    """
    if isinstance(buckets, int):
        if buckets < 1:
            raise ValueError(f"data.buckets={buckets}: expected 1 or more pixels")
        return buckets_by_rule(size, buckets)
    found: dict[float, tuple[int, int]] = {}
    for each in buckets:
        if len(each) != 2 or min(each) < 1:
            raise ValueError(
                f"data.buckets: {list(each)}: expected [height, width], 1 or more pixels each"
            )
        height, width = each
        other = found.setdefault(height / width, (height, width))
        if other != (height, width):
            raise ValueError(
                f"data.buckets: {told_size(other)} and {told_size(each)} have one aspect ratio, by "
                f"which images are put into buckets: expected one of them"
            )
    if sides(size) not in found.values():
        raise ValueError(
            f"data.buckets: {told_size(size)} is not among them: expected it too, the resolution "
            f"of a run (data.size of encode.py), at which images are drawn"
        )
    return [*found.values()]


def check_buckets(
    stated: int | Sequence[Sequence[int]],
    buckets: Iterable[tuple[int, int]],
    factor: int,
    patch_size: int = 1,
) -> None:
    """Refuse buckets of which the autoencoder or the network cannot take one.

    ``stated`` is what was asked for, for the message.

    Raises:
        ValueError: a side is no multiple of factor times patch_size.
    """
    cell = factor * patch_size
    for height, width in buckets:
        if height % cell or width % cell:
            where = f"={stated}" if isinstance(stated, int) else ""
            patches = f" times patch_size={patch_size}" * (patch_size > 1)
            raise ValueError(
                f"data.buckets{where}: {told_size((height, width))} are no multiples of {cell} "
                f"pixels, the autoencoder's factor {factor}{patches}: expected "
                f"{'a multiple' if where else 'multiples'} of {cell}"
            )


def told_buckets(sizes: Iterable[Side], counts: Sequence[int], batch_size: int) -> str:
    """Return how many images to train on each bucket has, with those that are short of some."""
    named = [(told_size(size), n) for size, n in zip(sizes, counts, strict=True)]
    line = f"  buckets  {', '.join(f'{size} ({n:,})' for size, n in named)}"
    empty = [size for size, n in named if not n]
    if empty:
        line += f"\n  note: {', '.join(empty)}: no image has its aspect ratio most nearly"
    few = [size for size, n in named if 0 < n < batch_size]
    if few:
        line += (
            f"\n  note: {', '.join(few)}: fewer images than a batch of {batch_size}, so that it "
            f"has some of them twice; fewer buckets avoid it"
        )
    return line


CLASS_IN_NAME = re.compile(r"(n\d{8}(?=_)|.*[^\W\d_])[\W\d_]*\d[\W_]*$")
"""The name of a file that ends in a number, before that; ImageNet's classes are numbers too."""


class ImageFolderData(NamedData):
    """Batches (uint8 images (b, c, size, size), labels) of a folder or archive of images.

    ``size`` may also be [height, width]. With ``buckets`` each batch is of one of several sizes,
    and each image is cropped to the one that has its aspect ratio most nearly: a list of [height,
    width], one of which is ``size``, or the step of :func:`sag_dit.data.crop.buckets_by_rule`.

    What ``root`` may be, and what ``labels`` and ``class_names`` say, tells :func:`find_images`.
    ``balance`` repeats the images of small classes, see :func:`balanced`.
    ``flip`` mirrors an image with probability 1/2. ``upright`` turns photos as their camera noted.
    ``background`` is the colour behind what is transparent; with None, as in runs that were begun
    before there was one, transparency is dropped and more than 8 bits are clipped. An image that
    cannot be decoded is left out, and one smaller than ``size`` is enlarged; both are logged. With
    ``strict`` either is an error.

    Raises:
        ValueError: the folder holds no usable images, or a value is out of its range.

    Example::

        trainer.fit(module, ImageFolderData("photos/", size=256, batch_size=64))
    """

    key = "folder"
    former = ("sag_dit.data.images.ImageFolderData",)
    later: ClassVar[Mapping[str, object]] = {
        "background": None,
        "labels": None,
        "class_names": None,
        "balance": 0.0,
        "buckets": None,
    }

    def __init__(
        self,
        root: str | Path,
        size: int | list[int] = 256,
        batch_size: int = 256,
        seed: int = 0,
        *,
        channels: int = 3,
        flip: bool = True,
        held_out: float = 0.0,
        upright: bool = True,
        strict: bool = False,
        workers: int | None = None,
        background: str | None = None,
        labels: str | None = None,
        class_names: Sequence[str | int] | None = None,
        balance: float = 0.0,
        buckets: int | Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, flip=flip, held_out=held_out, workers=workers
        )
        # The images are listed here, and read by loader processes.
        self.files, self.balance = find_images(root, labels, class_names), balance
        self.class_names = self.files.class_names
        self.channels = channels
        self._reported = False
        self._crops = Crops(
            self.files,
            size,
            channels=channels,
            upright=upright,
            background=background,
            strict=strict,
            groups=self.held_out_images,
            buckets=() if buckets is None else stated_buckets(buckets, size),
        )
        self.buckets = buckets

    @property
    def dataset(self) -> Crops:
        """The crops."""
        return self._crops

    @property
    def labels(self) -> Indices:
        """The class of every image."""
        return self.files.labels

    def named(self, index: int) -> str:
        """Return where an image lies."""
        return readable(str(self.files.path(index)))

    @cached_property
    def name_hashes(self) -> Indices:
        """The hash of every image's name."""
        return np.array([name_hash(name) for name in self.files.names], dtype=np.int64)

    @cached_property
    def training_images(self) -> Indices:
        """The images of an epoch, those of small classes repeated."""
        return balanced(super().training_images, self.labels, self.balance)

    def buckets_of(self, images: Indices) -> Indices | None:
        """Return the bucket of each of some images, None where there is one size."""
        return None if self.buckets is None else self._crops.bucket_of[images]

    def listing_sha256(self) -> str:
        """Return the sha256 of the images' names and sizes in bytes, and of labels beside them."""
        return listing_sha256(self.files)

    def remarks(self) -> list[str]:
        """Return the images' sizes, what is left out or changed, and what looks like a mistake."""
        crops = self._crops
        few = crops.strict or len(self.files) <= CHECKED_UP_FRONT
        inspection = crops.inspect(None if few else LOOKED_AT)
        self._reported = True
        lines = []
        if inspection.sizes:
            wide, high = (_range(each) for each in zip(*inspection.sizes, strict=True))
            of = "" if few else f", of {inspection.looked:,} of them"
            lines.append(f"  sizes    {wide} pixels wide, {high} high{of}")
        if self.buckets is not None:
            bucket_of = crops.bucket_of[self.training_images]
            counts = np.bincount(bucket_of, minlength=len(crops.buckets)).tolist()
            lines.append(told_buckets(crops.buckets, counts, self.batch_size))
        if self.files.labels_from:
            lines.append(f"  labels   from {readable(self.files.labels_from)}")
        left_out = {**self.files.left_out}
        if crops.skipped:
            left_out["cannot be decoded"] = crops.skipped
        lines += [f"  left out {text}" for text in told_left_out(left_out)]
        lines += [f"  note: {text}" for text in inspection.told(crops)]
        return lines + [f"  warning: {text}" for text in suspicions(self.files)]

    def prepare_data(self) -> None:
        """Read the images' headers before the first step, unless there are very many images."""
        if not self._reported and (self._crops.strict or len(self.files) <= CHECKED_UP_FRONT):
            for text in self._crops.inspect().told(self._crops):
                log.warning("%s", text)

    def teardown(self, stage: str) -> None:
        """Log how many images were left out."""
        if stage == "fit" and self._crops.skipped:
            count = len(self._crops.skipped)
            log.warning("%d of %d images were left out", count, len(self.files))

    def check(self, model: Model) -> None:
        """Check that a model can be trained on these images.

        Raises:
            ValueError: size, channels or number of classes do not fit.
        """
        channels, height, width = model.denoiser.latent_shape
        factor, crops = model.codec.factor, self._crops
        patch_size = model.class_conditional.network.patch_size
        if tuple(latent_size(side, factor, patch_size) for side in crops.size) != (height, width):
            size, wanted = told_size(crops.size), told_size([height * factor, width * factor])
            raise ValueError(
                f"data.size={size}: expected {wanted}, the resolution of the model "
                f"({height} x {width} cells of {factor} pixels)"
            )
        # Every bucket has to be one that the network can be given.
        if len(crops.buckets) > 1 and model.denoiser.size_multiple is None:
            raise ValueError(
                f"data.buckets: {type(model.class_conditional.network).__name__} takes images of "
                f"one size: expected null, or a network that says any_size = True"
            )
        if self.buckets is not None:
            check_buckets(self.buckets, crops.buckets, factor, patch_size)
        if factor == 1 and channels != crops.channels:
            raise ValueError(
                f"data.channels={crops.channels}: expected {channels}, the channels of the model"
            )
        self.check_classes(model)
