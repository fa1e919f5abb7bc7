"""SampleFolder: where the images of one run lie, and what is still missing there.

A folder belongs to one set of settings. Every file appears whole or not at all: it is written
under another name and renamed. What an image was then stands in a journal, so that one which was
emptied, cut or replaced since is found and drawn again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sag_dit.bounds import Natural
from sag_dit.files import atomic, file_sha256, writing
from sag_dit.output.claim import CONFIG, claim
from sag_dit.output.gallery import Pair
from sag_dit.output.journal import FileState, Journal, Searched
from sag_dit.output.sheet import SheetText, write_sheet
from sag_dit.profiling import part
from sag_dit.sampling import Chosen, Drawn, Request
from sag_dit.traces import AttentionView, StepView
from sag_dit.untrusted import read_json_lines

Pixels = NDArray[np.uint8]
MANIFEST = "manifest.jsonl"
"""The file that says what every image is; it appears once all are there."""
NPZ = "samples.npz"
"""All images in one file."""
ENCODERS = min(4, os.cpu_count() or 1)
"""Threads that encode the images of a batch."""
ANY_SIZE = -1
"""The size of an image that was finished before sizes were kept."""


def write_arrays(file: Path, view: AttentionView) -> None:
    """Keep a view as an npz: ``steps``, ``times``, and LAYER/saliency, /mask, /query_map."""
    arrays: dict[str, NDArray[np.generic]] = {
        "steps": np.array(view.steps),
        "times": np.array(view.times),
    }
    for layer in view.layers:
        arrays[f"{layer.name}/saliency"] = layer.saliency
        arrays[f"{layer.name}/mask"] = layer.mask
        if layer.query_map is not None:
            arrays[f"{layer.name}/query_map"] = layer.query_map
    with atomic(file) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


@dataclass(frozen=True)
class Written:
    """What a line of ``manifest.jsonl`` says of an image's file.

    Example:
        >>> Written(index=3, sha256="9f86").index
        3
    """

    index: Natural
    sha256: str


@dataclass(frozen=True)
class SampleFolder:
    """The files of one run by index, and its settings.

    ``images/``; for the gallery ``unguided/``, ``maps/``, and beside several methods such as
    ``without_sag/``; and ``attention/`` (with maps=true).

    Example:
        >>> SampleFolder(Path("outputs/sample/digits-1f3a")).image(7).name
        '000007.png'
    """

    path: Path

    def image(self, index: int) -> Path:
        """Return the file of an image."""
        return self.path / "images" / f"{index:06d}.png"

    def twin(self, index: int) -> Path:
        """Return the file of an image's unguided twin."""
        return self.path / "unguided" / f"{index:06d}.png"

    def spared(self, index: int, key: str) -> Path:
        """Return the file of an image's twin that was drawn without a method alone."""
        return self.path / f"without_{key}" / f"{index:06d}.png"

    def views(self, index: int) -> Path:
        """Return the file of what self-attention guidance saw of an image."""
        return self.path / "maps" / f"{index:06d}.npz"

    def attention(self, index: int) -> Path:
        """Return the sheet of an image's attention; its arrays lie beside it."""
        return self.path / "attention" / f"{index:06d}.png"

    @property
    def writable(self) -> bool:
        """Whether files can be written there."""
        return os.access(self.path, os.W_OK)

    def claim(self, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Make the folder this run's own, or find that it is.

        ``settings`` is what determines pixels, ``config`` the whole configuration; both are kept in
        ``config.yaml``.

        Raises:
            ValueError: it is a file, cannot be written, or holds images of other settings; the
                differences are named.
        """
        try:
            for folder in ("images", "unguided", "maps"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            if not self.writable and not (self.path / MANIFEST).exists():
                raise PermissionError(f"no permission to write to {self.path}")
        except OSError as error:
            raise ValueError(
                f"out={self.path}: cannot be used as a folder of images "
                f"({error.strerror or error}); choose another out"
            ) from error
        if not (self.path / CONFIG).exists() and any((self.path / "images").iterdir()):
            raise ValueError(
                f"out={self.path} holds images but no {CONFIG} that says what they are; choose "
                f"another out"
            )
        claim(self.path, settings, config, "images")

    @property
    def journal(self) -> Journal:
        """What the images were when they were written."""
        return Journal(self.path)

    def missing(
        self,
        requests: Sequence[Request],
        gallery: int,
        *,
        attention: bool = False,
        verify: bool = False,
        tell: Callable[[str], object] | None = None,
    ) -> Sequence[Request]:
        """Return the requests of which something is not there, or not as it was written.

        That is the image, for the first ``gallery`` the twin, and with ``attention`` its sheet.
        Sizes are always compared, and hashes with ``verify``; ``tell`` is told of what differs.

        Raises:
            ValueError: a folder is where a file belongs.
        """
        begun, known = self.journal.begun(), self._known()
        # What is whole, and what has changed since it was written.
        whole: list[int] = []
        changed: list[int] = []
        for index, file in self._images(len(requests)):
            entry = known.get(index)
            written = not begun if entry is None else _is(file, entry, verify)
            (whole if written and _size(file) else changed).append(index)
        if changed and tell is not None:
            first = self.image(min(changed)).name
            tell(
                f"{len(changed)} of {len(changed) + len(whole)} finished images are not what was "
                f"written, the first is {first}; they are drawn again"
            )
        # For the gallery more belongs to an image.
        lacking = {
            index
            for index in range(min(gallery, len(requests)))
            if not _size(self.twin(index)) or (attention and not _size(self.attention(index)))
        }
        there = np.array(sorted(set(whole) - lacking), dtype=np.int64)
        if len(there) < len(requests) and whole and not begun and self.writable:
            # Images of a former version, which kept no journal: they are taken as they are.
            hashes = {index: entry.sha256 for index, entry in known.items()}
            sizes = {index: _size(file) for index, file in self._images(sys.maxsize)}
            self.journal.keep(
                {i: FileState(size, hashes.get(i)) for i, size in sizes.items() if size}
            )
        return Chosen.of(requests, there)

    def _images(self, count: int) -> Iterator[tuple[int, Path]]:
        """Yield what lies in the places of the first ``count`` images."""
        for name in os.listdir(self.path / "images"):
            stem, _, ending = name.partition(".")
            if ending == "png" and stem.isdecimal() and stem.isascii() and int(stem) < count:
                file = self.image(int(stem))
                if file.name == name:
                    yield int(stem), file

    def _known(self) -> dict[int, FileState]:
        """Return what is known of images; of those before there was a journal the hash alone."""
        if self.journal.begun():
            return self.journal.read()
        manifest = self.path / MANIFEST
        rows = read_json_lines(manifest, Written) if manifest.exists() else ()
        return {row.index: FileState(ANY_SIZE, row.sha256) for row in rows}

    def write(self, drawn: Drawn, told: Callable[[Request], SheetText] | None = None) -> None:
        """Write a batch: first what belongs to the images, then the images, which mark completion.

        ``told`` says what stands on the sheet of an image's attention.

        Example::

            for batch in drawn(model, requests, settings):
                folder.write(batch)
        """
        shown = dict(zip(drawn.indices.tolist(), drawn.images, strict=True))
        beside = {self.twin(index): twin for index, twin in drawn.twins.items()}
        for key, twins in drawn.spared.items():
            beside |= {self.spared(index, key): twin for index, twin in twins.items()}
        # Encode all at once: zlib lets other threads go on.
        with part("encode"), ThreadPoolExecutor(ENCODERS) as pool:
            files = dict(zip(shown, pool.map(_encoded, shown.values()), strict=True))
            twin_files = dict(zip(beside, pool.map(_encoded, beside.values()), strict=True))
        with part("write"):
            self._put(drawn, files, twin_files, told)

    def _put(
        self,
        drawn: Drawn,
        files: Mapping[int, tuple[bytes, str]],
        twin_files: Mapping[Path, tuple[bytes, str]],
        told: Callable[[Request], SheetText] | None,
    ) -> None:
        """Write what was encoded, and the attention that was kept."""
        # Attention and twins.
        shown = dict(zip(drawn.indices.tolist(), drawn.images, strict=True))
        asked = {request.index: request for request in drawn.requests}
        for index, trace in drawn.traces.items():
            if trace.maps is not None:
                sheet = self.attention(index)
                with writing(sheet):
                    sheet.parent.mkdir(exist_ok=True)
                write_arrays(sheet.with_suffix(".npz"), trace.maps)
                text = SheetText() if told is None else told(asked[index])
                write_sheet(sheet, trace.maps, pixels(shown[index]), text)
            if trace.steps:
                write_views(self.views(index), trace.steps)
        for place, (content, _) in twin_files.items():
            with writing(place):
                place.parent.mkdir(exist_ok=True)
            with atomic(place) as temporary:
                temporary.write_bytes(content)
        # The images, each noted in the journal before it is there.
        found = {index: Searched.of(each) for index, each in drawn.found.items()}
        self.journal.note(
            {
                index: FileState(len(content), sha256, found.get(index))
                for index, (content, sha256) in files.items()
            }
        )
        for index, (content, _) in files.items():
            with atomic(self.image(index)) as temporary:
                temporary.write_bytes(content)


def _encoded(image: UInt8[Tensor, "c h w"]) -> tuple[bytes, str]:
    """Return an image as the content of a PNG file, and its hash."""
    content = _png(pixels(image))
    return content, hashlib.sha256(content).hexdigest()


def _size(file: Path) -> int | None:
    """Return the size of a file, None if there is none.

    Raises:
        ValueError: it is a folder.
    """
    try:
        status = file.stat()
    except OSError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(
            f"{file} is a folder, where an image belongs; take it away and repeat the command"
        )
    return status.st_size


def _is(file: Path, entry: FileState, verify: bool) -> bool:
    """Whether a file is what was written: by its size, and with ``verify`` by its hash."""
    if entry.size not in (ANY_SIZE, _size(file)):
        return False
    return not verify or entry.sha256 in (None, file_sha256(file))


def pixels(image: UInt8[Tensor, "c h w"]) -> Pixels:
    """Move channels last and to NumPy."""
    array: Pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    return array


def write_png(file: Path, image: Pixels) -> None:
    """Write an image (h, w, 1 or 3) as PNG, whole or not at all."""
    with atomic(file) as temporary:
        temporary.write_bytes(_png(image))


def _png(image: Pixels) -> bytes:
    """Return an image as the content of a PNG file."""
    file = BytesIO()
    # Level 1 is three times as fast as Pillow's default and 8 per cent larger.
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(
        file, format="PNG", compress_level=1
    )
    return file.getvalue()


def read_png(file: Path) -> Pixels:
    """Read an image as (h, w, 1 or 3) uint8.

    Raises:
        ValueError: the file is not an image; deleting it lets the command draw it again.
    """
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image)
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read ({error}); delete it and repeat the command to draw it again"
        ) from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def write_views(file: Path, views: Sequence[StepView]) -> None:
    """Keep what guidance saw at several steps as arrays."""
    with atomic(file) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            index=np.array([view.index for view in views]),
            count=np.array([view.count for view in views]),
            t=np.array([view.t for view in views]),
            threshold=np.array([view.threshold for view in views]),
            saliency=np.stack([view.saliency for view in views]),
            mask=np.stack([view.mask for view in views]),
        )


def read_views(file: Path) -> tuple[StepView, ...]:
    """Read what :func:`write_views` kept; nothing if there is no such file.

    Raises:
        ValueError: the file holds something else; deleting it leaves the gallery without masks.
    """
    if not file.exists():
        return ()
    try:
        # From memory: of a broken file NumPy would leave the handle open.
        content = file.read_bytes()
        with ZipFile(BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(content):
                raise ValueError("it is packed")
        with np.load(BytesIO(content)) as arrays:
            columns = {name: arrays[name] for name in arrays.files}
        return tuple(
            StepView(
                index=int(columns["index"][i]),
                count=int(columns["count"][i]),
                t=float(columns["t"][i]),
                saliency=columns["saliency"][i],
                mask=columns["mask"][i],
                threshold=float(columns["threshold"][i]),
            )
            for i in range(len(columns["index"]))
        )
    except Exception as error:  # NumPy raises almost any type on a damaged file
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {error}); delete it and repeat the "
            f"command, for a gallery without it"
        ) from error


def write_manifest(
    folder: SampleFolder, requests: Sequence[Request], class_names: Sequence[str]
) -> Path:
    """Write ``manifest.jsonl``: a line per image with index, seed, class, file and sha256.

    It is left as it is where nothing was drawn since.
    """
    file = folder.path / MANIFEST
    journal = folder.journal
    if not journal.merge() and _count_lines(file) == len(requests):
        return file
    # Hashes are those of what was written; images that are older than the journal are read.
    known = journal.read()
    for request in requests:
        index = request.index
        entry = known.get(index)
        if entry is None or entry.sha256 is None:
            image = folder.image(index)
            searched = None if entry is None else entry.search
            known[index] = FileState(image.stat().st_size, file_sha256(image), searched)
    journal.keep(known)
    with atomic(file) as temporary, temporary.open("w", encoding="utf-8") as lines:
        for request in requests:
            searched = known[request.index].search
            row = {
                "index": request.index,
                "seed": request.seed,
                "stream": request.stream,
                "label": request.label,
                "class": class_names[request.label],
                "file": folder.image(request.index).relative_to(folder.path).as_posix(),
                "sha256": known[request.index].sha256,
                **({} if searched is None else searched.manifest()),
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        lines.flush()
        os.fsync(lines.fileno())
    return file


def _count_lines(file: Path) -> int:
    if not file.exists():
        return 0
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def gallery_entries(
    folder: SampleFolder,
    requests: Sequence[Request],
    class_names: Sequence[str],
    spared: str | None = None,
) -> list[Pair]:
    """Read the pairs that the gallery shows back from the folder.

    Where a search chose an image its label tells the score. ``spared`` is the key of the method
    that a second twin was drawn without; folders of before there were such twins have none.
    """
    known = folder.journal.read()

    def label(request: Request) -> str:
        entry, name = known.get(request.index), class_names[request.label]
        searched = None if entry is None else entry.search
        return name if searched is None else f"{name}, score {searched.score:.4g}"

    return [
        Pair(
            index=request.index,
            seed=request.seed,
            label=label(request),
            guided=read_png(folder.image(request.index)),
            unguided=read_png(folder.twin(request.index)),
            views=read_views(folder.views(request.index)),
            spared=read_png(second) if second is not None and second.exists() else None,
        )
        for request in requests
        for second in [None if spared is None else folder.spared(request.index, spared)]
    ]


def write_npz(folder: SampleFolder, requests: Sequence[Request]) -> Path:
    """Write ``samples.npz`` in the ADM evaluator's format: arr_0, uint8 (n, h, w, 3).

    Grey images are repeated over three channels, since the evaluator reads RGB. The array is filled
    in place, one image at a time.
    """
    file = folder.path / NPZ
    first = read_png(folder.image(requests[0].index))
    images = np.empty((len(requests), *first.shape[:2], 3), dtype=np.uint8)
    for row, request in enumerate(requests):
        images[row] = read_png(folder.image(request.index))
    with atomic(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, arr_0=images)
    return file


def log_gallery(
    logger: Any,
    entries: Sequence[Pair],
    settings: Mapping[str, Any],
    spared: str = "",
) -> None:
    """Log the gallery to Weights & Biases: a row per pair with its scales and masks.

    ``spared`` is what the second twin is called, where all have one. Other loggers have no table of
    images, and get nothing here.
    """
    from lightning.pytorch.loggers import WandbLogger

    if not isinstance(logger, WandbLogger):
        return
    import wandb

    # A column for each scale, so that runs of different scales can be sorted by them.
    scales = {
        f"{name}_scale": term["scale"]
        for name, term in settings["guidance"].items()
        if "scale" in term
    }
    twins = {"unguided": "unguided", "spared": spared}
    if any(entry.spared is None for entry in entries):
        del twins["spared"]
    shown = [*twins.values(), "guided", "masks"]
    columns: list[str | int] = ["index", "class", "seed", *shown, *scales]
    table = wandb.Table(columns=columns)
    # A row for each pair; the masks lie on the guided image and are switched on in the browser.
    for entry in entries:
        size = entry.guided.shape[:2]
        masks = {
            f"step {view.index}": {
                "mask_data": _enlarged(view.mask.astype(np.uint8), size),
                "class_labels": {0: "kept", 1: "attended"},
            }
            for view in entry.views
        }
        table.add_data(
            entry.index,
            entry.label,
            entry.seed,
            *(wandb.Image(_without_one_channel(entry.images[name])) for name in twins),
            wandb.Image(_without_one_channel(entry.guided)),
            wandb.Image(_without_one_channel(entry.guided), masks=masks or None),
            *scales.values(),
        )
    logger.experiment.log({"gallery": table})


def _without_one_channel(
    image: np.ndarray[Any, np.dtype[np.uint8]],
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return image.squeeze(2) if image.shape[2] == 1 else image


def _enlarged(
    mask: np.ndarray[Any, np.dtype[np.uint8]], size: tuple[int, int]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Enlarge a mask over tokens to the image by nearest neighbour."""
    rows = np.arange(size[0]) * mask.shape[0] // size[0]
    columns = np.arange(size[1]) * mask.shape[1] // size[1]
    enlarged: np.ndarray[Any, np.dtype[np.uint8]] = mask[rows[:, None], columns]
    return enlarged
