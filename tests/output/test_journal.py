"""That an image exists is not enough: it has to be what was written, which the journal tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sag_dit.output import folder as output
from sag_dit.output.folder import SampleFolder, write_manifest
from sag_dit.output.journal import FileState, Journal, Searched
from sag_dit.sampling import Drawn, Request

NAMES = ("cat", "dog")
REQUESTS = [Request(index, 0, index % 2, index) for index in range(6)]


def drawn(*places: int) -> Drawn:
    """Noise, which cannot be compressed, so that all files have one length."""
    generators = [torch.Generator().manual_seed(place) for place in places]
    images = [torch.randint(0, 256, (3, 8, 8), generator=each) for each in generators]
    return Drawn([REQUESTS[place] for place in places], torch.stack(images).to(torch.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> SampleFolder:
    folder = SampleFolder(tmp_path)
    folder.claim({}, {})
    return folder


def missing(folder: SampleFolder, *, verify: bool = False) -> list[int]:
    return [request.index for request in folder.missing(REQUESTS, 0, verify=verify)]


def swap(folder: SampleFolder) -> None:
    """Two images of one length change places."""
    zero, one = folder.image(0), folder.image(1)
    assert zero.stat().st_size == one.stat().st_size
    first, second = zero.read_bytes(), one.read_bytes()
    zero.write_bytes(second)
    one.write_bytes(first)


CHANGES: dict[str, Callable[[SampleFolder], object]] = {
    "emptied": lambda folder: folder.image(2).write_bytes(b""),
    "cut": lambda folder: folder.image(2).write_bytes(folder.image(2).read_bytes()[:-7]),
    "of another size": lambda folder: folder.image(2).write_bytes(b"another picture"),
    "gone": lambda folder: folder.image(2).unlink(),
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_drawn_again(folder: SampleFolder, change: str, finished: bool) -> None:
    folder.write(drawn(0, 1, 2, 3, 4, 5))
    before = write_manifest(folder, REQUESTS, NAMES).read_bytes() if finished else b""
    assert missing(folder) == missing(folder, verify=True) == []
    CHANGES[change](folder)
    told: list[str] = []
    (request,) = folder.missing(REQUESTS, 0, tell=told.append)
    assert request.index == 2
    assert bool(told) == (change != "gone")
    assert all("1 of 6 finished images" in each and "000002.png" in each for each in told)
    folder.write(drawn(2))
    assert missing(folder, verify=True) == []
    if finished:
        assert write_manifest(folder, REQUESTS, NAMES).read_bytes() == before


def test_swapped_images_of_one_size_are_found_by_their_hashes(folder: SampleFolder) -> None:
    folder.write(drawn(0, 1))
    swap(folder)
    assert missing(folder) == [2, 3, 4, 5]
    assert missing(folder, verify=True) == [0, 1, 2, 3, 4, 5]


def test_the_manifest_vouches_for_what_was_written_and_reads_no_image(
    folder: SampleFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "file_sha256", lambda _: pytest.fail("an image was read"))
    folder.write(drawn(0, 1))
    folder.write(drawn(2, 3))
    hashes = {index: entry.sha256 for index, entry in folder.journal.read().items()}
    swap(folder)
    file = write_manifest(folder, REQUESTS[:4], NAMES)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["index"]: row["sha256"] for row in rows} == hashes
    # Nothing is new, so nothing is written; then two more are.
    at = file.stat().st_mtime_ns
    assert write_manifest(folder, REQUESTS[:4], NAMES).stat().st_mtime_ns == at
    before = file.read_text()
    folder.write(drawn(4, 5))
    assert write_manifest(folder, REQUESTS, NAMES).read_text().startswith(before)
    assert len(file.read_text().splitlines()) == 6


def test_the_journal_does_not_tell_who_drew_what(tmp_path: Path) -> None:
    contents = []
    for name, shares in (("one", [(0, 1, 2, 3)]), ("two", [(2,), (0, 3), (1,)])):
        folder = SampleFolder(tmp_path / name)
        folder.claim({}, {})
        for share in shares:
            folder.write(drawn(*share))
        write_manifest(folder, REQUESTS[:4], NAMES)
        contents.append((folder.path / "journal.jsonl").read_bytes())
        assert not (folder.path / "journal").exists()
    assert contents[0] == contents[1]


def forget(folder: SampleFolder) -> None:
    """Make a folder look as versions without a journal left it."""
    (folder.path / "journal.jsonl").unlink()


def test_a_folder_of_a_former_version_goes_on(folder: SampleFolder) -> None:
    folder.write(drawn(0, 1, 2, 3))
    write_manifest(folder, REQUESTS[:4], NAMES)
    (folder.path / "manifest.jsonl").unlink()
    forget(folder)
    folder.image(3).write_bytes(b"")
    assert missing(folder) == [3, 4, 5]
    # Its images are known from then on, also to whoever looks after others were drawn.
    folder.write(drawn(3, 4))
    assert missing(folder) == [5]
    folder.image(0).write_bytes(b"cut")
    assert missing(folder) == [0, 5]


def test_a_finished_folder_of_a_former_version_is_left_alone(folder: SampleFolder) -> None:
    folder.write(drawn(0, 1, 2, 3, 4, 5))
    file = write_manifest(folder, REQUESTS, NAMES)
    forget(folder)
    before = sorted((each, each.stat().st_mtime_ns) for each in folder.path.rglob("*"))
    assert missing(folder) == missing(folder, verify=True) == []
    write_manifest(folder, REQUESTS, NAMES)
    assert sorted((each, each.stat().st_mtime_ns) for each in folder.path.rglob("*")) == before
    # Its manifest tells hashes, which are not replaced by those of what lies there now.
    text = file.read_text()
    swap(folder)
    assert missing(folder, verify=True) == [0, 1]
    folder.write(drawn(0, 1))
    assert write_manifest(folder, REQUESTS, NAMES).read_text() == text


def test_a_folder_in_an_images_place_is_told(folder: SampleFolder) -> None:
    folder.image(1).mkdir()
    with pytest.raises(ValueError, match=r"000001\.png is a folder, where an image belongs"):
        missing(folder)


def test_a_line_that_a_crash_has_cut_is_passed_over(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.note({0: FileState(10, "a" * 64), 1: FileState(11, "b" * 64)})
    (part,) = (tmp_path / "journal").iterdir()
    part.write_text(part.read_text()[:-20])
    assert journal.read() == {0: FileState(10, "a" * 64)}
    part.write_bytes(b"\xff\x00[1]\n{}\n" + part.read_bytes())
    assert journal.read() == {0: FileState(10, "a" * 64)}


def test_what_a_search_chose_is_kept_unless_it_makes_no_sense(tmp_path: Path) -> None:
    journal, chosen = Journal(tmp_path), Searched(-0.5, [[0, 2], [7, 0]])
    journal.note({0: FileState(10, "a" * 64, chosen), 1: FileState(11, "b" * 64)})
    (part,) = (tmp_path / "journal").iterdir()
    assert "search" not in part.read_text().splitlines()[1]
    assert journal.read()[0].search == chosen
    journal.merge()
    assert journal.read() == {0: FileState(10, "a" * 64, chosen), 1: FileState(11, "b" * 64)}
    text = (tmp_path / "journal.jsonl").read_text()
    for odd in ("[]", "[[0]]", "[[0, -1]]", "7"):
        (tmp_path / "journal.jsonl").write_text(text.replace("[[0, 2], [7, 0]]", odd))
        assert journal.read() == {1: FileState(11, "b" * 64)}


def test_the_length_grows_with_every_image(folder: SampleFolder) -> None:
    lengths = [folder.journal.length()]
    for place in range(3):
        folder.write(drawn(place))
        lengths.append(folder.journal.length())
    assert lengths == sorted(set(lengths))
