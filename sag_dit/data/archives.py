"""Images inside zip and tar files: where each one lies is listed once, then it is read from there.

So image i of an archive is as near as image i of a folder, in any order and from any process, and
nothing is ever unpacked to disk. Several tar files, shards, are read as one set.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sag_dit.data.crop import UnreadableImageError
from sag_dit.files import atomic, default_cache

ARCHIVES = (".zip", ".tar")
"""Endings of the archives that are read."""
COMPRESSED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Endings of tar files in which nothing can be found without unpacking all before it."""
PACKED = (*ARCHIVES, *COMPRESSED, ".gz", ".rar", ".7z")
"""Endings of what may hold images."""
CLASS = ".cls"
"""Ending of the members that hold a class, in WebDataset's layout."""
JSON = ".json"
"""Ending of the members that describe a sample there."""
LARGEST = 256 << 20
"""Bytes that a member may have, unpacked."""
LONGEST_CLASS = 256
"""Bytes that a member with a class may have."""
OUTSIDE = "name that leads out of the archive"
LAYOUT = 1
"""Changes when what a kept list of members holds changes."""
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
LOCAL_HEADER, SIGNATURE = 30, b"PK\x03\x04"
"""Bytes before the name of a zip's member, and the first of them."""
ENCRYPTED = 1
"""A zip's flag."""
BLOCK = 512
"""Bytes of a tar's header; all else begins at a multiple of them."""

BROKEN_ZIP = (zipfile.BadZipFile, zlib.error)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Members:
    """The plain files in an archive, and where their bytes are.

    Attributes:
        names: their names, with ``/``.
        spans: (n, 4), of each: offset, bytes there, bytes when unpacked, and CRC-32; -1 for none.
            The offset of a zip's member is that of its local header.
        classes: what members that end in ``.cls`` hold, by name.
        left_out: names of other members, by the reason.

    Example::

        members = list_members(Path("photos.tar"))
        print(len(members.names), members.left_out)
    """

    names: tuple[str, ...]
    spans: NDArray[np.int64]
    classes: Mapping[str, str]
    left_out: Mapping[str, Sequence[str]]


def list_members(file: Path) -> Members:
    """List the files in a zip or an uncompressed tar; the list of a tar is kept in the cache.

    Folders and hidden files are passed over. Links, members without content, and names that lead
    out of the archive are left out by name.

    Raises:
        ValueError: it cannot be opened, is damaged or compressed, or has a name twice.
    """
    if file.name.lower().endswith(COMPRESSED):
        raise ValueError(
            f"{file}: a compressed tar, in which nothing is found without unpacking all before: "
            f"expected a zip or an uncompressed tar; unpack it, or repack it with tar -cf"
        )
    try:
        if file.suffix.lower() == ".zip":
            return _members(file, _in_zip(file))
        kept = _kept_list(file)
        members = _read_list(kept)
        if members is None:
            members = _members(file, _in_tar(file))
            _keep_list(kept, members)
        return members
    except (OSError, EOFError, RuntimeError, tarfile.TarError, *BROKEN_ZIP) as error:
        raise ValueError(
            f"{file} cannot be read as {file.suffix.lower()[1:]} ({_reason(error)}): expected an "
            f"undamaged archive; copy or download it again"
        ) from None


def _reason(error: Exception) -> str:
    told = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(told).split())[:200]


@dataclass(frozen=True)
class _Member:
    """One entry of an archive: a plain file, unless ``left_out`` says why it is none."""

    name: str
    span: tuple[int, int, int, int] = (0, 0, 0, 0)
    left_out: str = ""
    text: bytes | None = None


def _members(file: Path, found: Iterator[_Member]) -> Members:
    names: list[str] = []
    spans: list[tuple[int, int, int, int]] = []
    classes: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    for member in found:
        # As tar -cf x.tar . writes names.
        name = re.sub(r"^(\./)+", "", member.name)
        parts = name.split("/")
        if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
            left_out.setdefault(OUTSIDE, []).append(name)
        elif any(part.startswith(".") for part in parts):
            continue
        elif member.left_out:
            left_out.setdefault(member.left_out, []).append(name)
        else:
            names.append(name)
            spans.append(member.span)
            if member.text is not None:
                classes[name] = member.text.decode("utf-8", "replace").strip()
    if len(set(names)) < len(names):
        twice = next(
            name
            for name, other in zip(sorted(names), sorted(names)[1:], strict=False)
            if name == other
        )
        raise ValueError(f"{file} holds {twice!r} twice: expected each name once; pack it again")
    table = np.array(spans, dtype=np.int64).reshape(-1, 4)
    return Members(tuple(names), table, classes, left_out)


def _in_zip(file: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for each in archive.infolist():
            name = each.filename.replace("\\", "/")  # as some programs write
            span = (each.header_offset, each.compress_size, each.file_size, each.CRC)
            if each.is_dir():
                continue
            if each.flag_bits & ENCRYPTED:
                yield _Member(name, left_out="encrypted")
            elif each.compress_type not in (STORED, DEFLATED):
                yield _Member(name, left_out="compressed otherwise than by deflate")
            elif each.file_size > LARGEST:
                yield _Member(name, left_out=f"more than {LARGEST >> 20} MB")
            else:
                small = name.endswith(CLASS) and each.file_size <= LONGEST_CLASS
                yield _Member(name, span, text=archive.read(each) if small else None)


def _in_tar(file: Path) -> Iterator[_Member]:
    with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        end = 0
        for each in archive:
            end = archive.offset
            if each.isdir():
                continue
            if each.issym() or each.islnk():
                yield _Member(each.name, left_out="link")
            elif not each.isreg() or each.issparse():
                yield _Member(each.name, left_out="no plain file")
            elif each.size > LARGEST:
                yield _Member(each.name, left_out=f"more than {LARGEST >> 20} MB")
            else:
                text = None
                if each.name.endswith(CLASS) and each.size <= LONGEST_CLASS:
                    stream.seek(each.offset_data)
                    text = stream.read(each.size)
                yield _Member(each.name, (each.offset_data, each.size, each.size, -1), text=text)
            # What is listed is not needed again, and there may be millions.
            archive.members = []  # type: ignore[attr-defined]
        # Python's reader takes a header that it cannot read for the end.
        stream.seek(end)
        if stream.read(BLOCK).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {end}")


def _kept_list(file: Path) -> Path:
    """Return where the list of a tar's members is kept: it may have millions of headers to read."""
    state = file.stat()
    told = f"{LAYOUT} {file.resolve()} {state.st_size} {state.st_mtime_ns}"
    digest = hashlib.sha256(told.encode(errors="surrogateescape")).hexdigest()[:32]
    return default_cache() / "archives" / f"{digest}.npz"


def _read_list(kept: Path) -> Members | None:
    """Return a list that was kept, None if there is none or it cannot be read."""
    try:
        with kept.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            names, classes, left_out = (
                _unjoined(stored[name]) for name in ("names", "classes", "left_out")
            )
            spans = stored["spans"]
    except (OSError, EOFError, KeyError, ValueError, *BROKEN_ZIP):
        return None
    if spans.shape != (len(names), 4) or spans.dtype != np.int64:
        return None
    reasons: dict[str, list[str]] = {}
    for reason, name in zip(left_out[::2], left_out[1::2], strict=False):
        reasons.setdefault(reason, []).append(name)
    held = dict(zip(classes[::2], classes[1::2], strict=False))
    return Members(tuple(names), spans, held, reasons)


def _keep_list(kept: Path, members: Members) -> None:
    classes = [text for pair in members.classes.items() for text in pair]
    left_out = [text for why, names in members.left_out.items() for n in names for text in (why, n)]
    if any("\0" in text for text in (*members.names, *classes, *left_out)):
        return
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic(kept) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                names=_joined(members.names),
                spans=members.spans,
                classes=_joined(classes),
                left_out=_joined(left_out),
            )
    except OSError as error:
        log.warning("%s: the list of an archive could not be kept (%s)", kept, error)


def _joined(texts: Sequence[str]) -> NDArray[np.uint8]:
    content = "".join(f"{text}\0" for text in texts).encode(errors="surrogateescape")
    return np.frombuffer(content, dtype=np.uint8)


def _unjoined(content: NDArray[np.uint8]) -> list[str]:
    return content.tobytes().decode(errors="surrogateescape").split("\0")[:-1]


class Archives:
    """Reads members of an archive, or of the shards in a folder, which their names begin with.

    Any process may read, also one that has inherited or unpickled it: no file is kept open.

    Raises:
        ValueError: an archive cannot be read, see :func:`list_members`.

    Example::

        archive = Archives(Path("photos.zip"), [Path("photos.zip")])
        content = archive.read("cats/0.png")
    """

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self.root, self._files = root, [*files]
        listed = [list_members(file) for file in files]
        # A shard's name comes before those of its members, which others may have too.
        self.shards = root.is_dir()
        before = [f"{file.name}/" if self.shards else "" for file in files]
        self.names = [
            prefix + name
            for prefix, members in zip(before, listed, strict=True)
            for name in members.names
        ]
        self.classes = {
            prefix + name: text
            for prefix, members in zip(before, listed, strict=True)
            for name, text in members.classes.items()
        }
        self.left_out: dict[str, list[str]] = {}
        for prefix, members in zip(before, listed, strict=True):
            for why, names in members.left_out.items():
                self.left_out.setdefault(why, []).extend(prefix + name for name in names)
        # Where each member is.
        self._spans = np.concatenate([members.spans for members in listed])
        self._ends = np.cumsum([len(members.names) for members in listed])
        self._places = {name: place for place, name in enumerate(self.names)}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def described(self) -> list[str]:
        """The members that describe a sample."""
        return [name for name in self.names if name.endswith(JSON)]

    def stamp(self, name: str) -> int:
        """Return what tells that a member has changed: its size in bytes, unpacked."""
        return int(self._spans[self._places[name], 2])

    def read(self, name: str) -> bytes:
        """Return a member's content.

        Raises:
            UnreadableImageError: it is damaged.
            OSError: the archive cannot be read, or is shorter than it was.
        """
        place = self._places[name]
        file = self._files[int(np.searchsorted(self._ends, place, side="right"))]
        offset, packed, size, crc = self._spans[place].tolist()
        with file.open("rb") as stream:
            stream.seek(offset)
            compressed = False
            if crc >= 0:
                # The local header of a zip's member, whose length only it tells.
                header = stream.read(LOCAL_HEADER)
                if header[:4] != SIGNATURE:
                    raise UnreadableImageError(f"{self.root / name} is damaged: it has no header")
                compressed = header[8:10] != b"\0\0"
                lengths = np.frombuffer(header[26:30], dtype="<u2")
                stream.seek(int(lengths.sum()), 1)
            content = stream.read(packed)
        if len(content) < packed:
            raise OSError(f"{file} is cut short; copy or download it again")
        try:
            if compressed:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except zlib.error as error:
            raise UnreadableImageError(f"{self.root / name} is damaged ({error})") from None
        if len(content) != size or (crc >= 0 and zlib.crc32(content) != crc):
            raise UnreadableImageError(f"{self.root / name} is damaged: its checksum differs")
        return content
