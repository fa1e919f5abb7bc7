"""Batches are written while the next ones are drawn: in order, not too many, and whole or told."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread, current_thread, main_thread

import pytest
import torch

from sag_dit.output.folder import SampleFolder
from sag_dit.sampling import Drawn, Request
from sag_dit.training.predicting import WAITING, Behind

SECONDS = 60.0
"""After which a wait of these tests has failed."""


def batch(number: int) -> Drawn:
    images = torch.full((2, 1, 8, 8), number, dtype=torch.uint8)
    return Drawn([Request(2 * number + row, 0, 0, 2 * number + row) for row in (0, 1)], images)


def number(drawn: Drawn) -> int:
    return drawn.requests[0].index // 2


class Gate:
    """A consumer that waits before each batch until it may go on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.open, self.begun = Event(), Event()
        self.taken: list[int] = []
        self._fails_at = fails_at

    def __call__(self, drawn: Drawn) -> None:
        assert current_thread() is not main_thread()
        self.begun.set()
        assert self.open.wait(SECONDS)
        if number(drawn) == self._fails_at:
            raise OSError(28, "No space left on device", "somewhere")
        self.taken.append(number(drawn))


def test_drawing_goes_on_while_a_batch_is_written_and_all_are_there_in_the_end() -> None:
    gate = Gate()
    with Behind(gate) as write:
        for each in range(WAITING):
            write(batch(each))
        # All of these calls came back, though nothing is written yet.
        assert gate.begun.wait(SECONDS) and gate.taken == []
        gate.open.set()
        for each in range(WAITING, 9):
            write(batch(each))
            # What was begun is not more than may wait.
            assert each + 1 - len(gate.taken) <= WAITING + 1
    assert gate.taken == list(range(9))


def test_one_more_than_may_wait_waits_for_the_first() -> None:
    gate = Gate()
    with Behind(gate) as write:
        for each in range(WAITING):
            write(batch(each))
        came_back = Event()

        def one_more() -> None:
            write(batch(WAITING))
            came_back.set()

        other = Thread(target=one_more)
        other.start()
        # It can come back only once the first is written.
        assert gate.begun.wait(SECONDS) and not came_back.wait(0.1)
        gate.open.set()
        assert came_back.wait(SECONDS) and gate.taken[0] == 0
        other.join()


def test_what_fails_is_told_by_the_next_call_and_nothing_later_is_written() -> None:
    gate = Gate(fails_at=1)
    gate.open.set()
    told = pytest.raises(OSError, match="No space left")
    with told, Behind(gate) as write:
        for each in range(20):
            write(batch(each))
    assert gate.taken == [0]


def test_what_fails_last_is_told_at_the_end() -> None:
    gate = Gate(fails_at=0)
    gate.open.set()
    with pytest.raises(OSError, match="No space left"), Behind(gate) as write:
        write(batch(0))


@pytest.mark.parametrize("error", [ValueError("image 7 became NaN"), SystemExit(143)])
def test_what_was_drawn_before_an_error_is_written(tmp_path: Path, error: BaseException) -> None:
    folder = SampleFolder(tmp_path / "run")
    folder.claim({"steps": 2}, {})
    with pytest.raises(type(error)), Behind(folder.write) as write:
        for each in range(3):
            write(batch(each))
        raise error
    assert [folder.image(index).exists() for index in range(7)] == [True] * 6 + [False]
    assert sorted(folder.journal.read()) == list(range(6))


def test_of_two_errors_the_first_is_told() -> None:
    gate = Gate(fails_at=0)
    with pytest.raises(SystemExit), Behind(gate) as write:
        write(batch(0))
        gate.open.set()
        raise SystemExit(130)
