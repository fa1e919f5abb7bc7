"""How rank 0 learns from files whether the other ranks have ended, and how."""

from __future__ import annotations

import threading
import time
from itertools import count
from pathlib import Path

import pytest

from sag_dit.output.ranks import RankReports


def report(folder: Path, rank: int, error: BaseException | None = None) -> None:
    try:
        with RankReports(folder, rank, 3).reporting():
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error


def test_rank_0_goes_on_when_all_are_well(tmp_path: Path) -> None:
    for rank in range(3):
        report(tmp_path, rank)
    reports = RankReports(tmp_path, 0, 3)
    reports.wait(lambda: 0, patience=0)
    reports.clear()
    assert list(tmp_path.iterdir()) == []


def test_one_process_needs_no_others(tmp_path: Path) -> None:
    reports = RankReports(tmp_path, 0, 1)
    with reports.reporting():
        pass
    reports.wait(lambda: 0, patience=0)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("image 3 became NaN\nat step 4"), "ValueError: image 3 became NaN\nat step 4"),
        (MemoryError(), "MemoryError: "),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_failure_is_told_and_goes_on(tmp_path: Path, error: BaseException, text: str) -> None:
    report(tmp_path, 0)
    report(tmp_path, 1)
    with pytest.raises(type(error)), RankReports(tmp_path, 2, 3).reporting():
        raise error
    with pytest.raises(ValueError) as told:
        RankReports(tmp_path, 0, 3).wait(lambda: 0, patience=60)
    assert str(told.value) == f"rank 2 failed: {text}"


def test_failure_is_told_at_once_while_others_are_working(tmp_path: Path) -> None:
    report(tmp_path, 0)
    report(tmp_path, 2, RuntimeError("out of memory"))  # and rank 1 says nothing
    began = time.monotonic()
    with pytest.raises(ValueError, match="rank 2 failed: RuntimeError: out of memory"):
        RankReports(tmp_path, 0, 3).wait(lambda: 0, patience=60)
    assert time.monotonic() - began < 5


def test_an_earlier_report_of_this_rank_is_forgotten(tmp_path: Path) -> None:
    report(tmp_path, 0)
    report(tmp_path, 1, ValueError("an earlier run"))
    report(tmp_path, 2)
    rank_0 = RankReports(tmp_path, 0, 3)
    with RankReports(tmp_path, 1, 3).reporting(), pytest.raises(ValueError, match="rank 1 has got"):
        # While rank 1 works again, its earlier failure is no news.
        rank_0.wait(lambda: 0, patience=0.2)
    rank_0.wait(lambda: 0, patience=0)


def test_patience_ends_without_a_sign_of_life(tmp_path: Path) -> None:
    report(tmp_path, 0)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"rank 1, 2 has got nothing done for 0 s.* repeat"):
        RankReports(tmp_path, 0, 3).wait(lambda: 0, patience=0.3)
    assert 0.3 <= time.monotonic() - began < 5


def test_signs_of_life_renew_patience(tmp_path: Path) -> None:
    images = count()
    report(tmp_path, 0)
    report(tmp_path, 1)
    later = threading.Timer(1.0, report, (tmp_path, 2))
    later.start()
    try:
        # Three times as long as patience lasts, but every look finds one more image.
        RankReports(tmp_path, 0, 3).wait(lambda: next(images), patience=0.3)
    finally:
        later.join()
    assert next(images) > 3


def test_a_rank_without_a_heartbeat_is_lost_and_named_with_its_machine(tmp_path: Path) -> None:
    report(tmp_path, 0)
    report(tmp_path, 1)
    (tmp_path / "ranks" / "0002.alive").write_text("7 node-12", encoding="utf-8")
    images, began = count(), time.monotonic()
    with pytest.raises(ValueError, match=r"rank 2 on node-12 is lost.* repeat the command"):
        # Others get images done all the while.
        RankReports(tmp_path, 0, 3).wait(lambda: next(images), silence=0.5)
    assert 0.5 <= time.monotonic() - began < 5


def test_a_rank_that_never_came_is_lost(tmp_path: Path) -> None:
    report(tmp_path, 0)
    report(tmp_path, 2)
    with pytest.raises(ValueError, match="rank 1 on a machine that has not reported is lost"):
        RankReports(tmp_path, 0, 3).wait(lambda: 0, silence=0.3)


def test_heartbeats_go_on_while_a_rank_works_and_end_with_it(tmp_path: Path) -> None:
    report(tmp_path, 0)
    report(tmp_path, 1)
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            RankReports(tmp_path, 0, 3).wait(lambda: 0, silence=1.0)
        except BaseException as error:
            failed.append(error)

    waiting = threading.Thread(target=wait)
    with RankReports(tmp_path, 2, 3).reporting(beat=0.1):
        waiting.start()
        time.sleep(2.5)
        assert waiting.is_alive(), failed
    waiting.join(10)
    assert not waiting.is_alive()
    assert not failed
    alive = tmp_path / "ranks" / "0002.alive"
    beat = alive.read_text(encoding="utf-8")
    time.sleep(0.3)
    assert alive.read_text(encoding="utf-8") == beat


def test_a_report_that_is_being_written_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report is read whole, or not yet: never an empty file."""
    sizes: list[int] = []
    write = Path.write_text

    def noting(self: Path, text: str, **options: str) -> int:
        sizes.append(len(list((tmp_path / "ranks").glob("*.txt"))))
        return write(self, text, **options)

    monkeypatch.setattr(Path, "write_text", noting)
    report(tmp_path, 0)
    assert set(sizes) == {0}
    assert (tmp_path / "ranks" / "0000.txt").read_text() == "ok"


def test_a_rank_that_falls_silent_is_told_while_the_work_goes_on(tmp_path: Path) -> None:
    told: list[str] = []
    folder = tmp_path / "ranks"
    folder.mkdir()
    # A heartbeat that an earlier run has left, of a rank that never begins.
    (folder / "0002.alive").write_text("7 elsewhere")
    with RankReports(tmp_path, 0, 3).watching(told.append, silence=0.4, every=0.02):
        for beat in range(20):
            (folder / "0001.alive").write_text(f"{beat} a-host")
            time.sleep(0.05)
        assert told == []
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline:
            time.sleep(0.02)
    assert len(told) == 1
    assert told[0].startswith("rank 1 on a-host is lost: no heartbeat for 0 s")


def test_a_rank_that_has_ended_is_not_lost(tmp_path: Path) -> None:
    told: list[str] = []
    with RankReports(tmp_path, 0, 2).watching(told.append, silence=0.1, every=0.02):
        with RankReports(tmp_path, 1, 2).reporting(beat=0.02):
            time.sleep(0.1)
        time.sleep(0.5)
    assert told == []
