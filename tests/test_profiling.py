"""Parts of a run add up to no more than the whole, each without what is within it."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

from sag_dit import profiling as module
from sag_dit.profiling import Profile, each_timed, part, profiling
from sag_dit.training.peaks import peak_of
from sag_dit.training.timing import told


class Clock:
    """A clock that tests move."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def steps(clock: Clock) -> list[int]:
    """Three steps of a sampler, each with two rounds of guidance."""

    def solver() -> object:
        for number in range(3):
            clock.now += 1
            with part("guidance"):
                for turn in (1, 2):
                    with part("guidance", label=f"round {turn}"):
                        clock.now += 2
                        with part("network", rows=turn):
                            clock.now += 10 * turn
                            with part("capture"):
                                clock.now += 5
            yield number

    found = []
    for number in each_timed("sampler", solver()):  # type: ignore[arg-type]
        clock.now += 100  # Whoever takes the steps is not the sampler.
        found.append(number)
    return found


def test_each_part_is_told_without_those_within_it(clock: Clock) -> None:
    with profiling() as profile:
        assert steps(clock) == [0, 1, 2]
    assert dict(profile.seconds) == {
        "sampler": 3 * 1,
        "guidance": 3 * 2 * 2,
        "network, round 1": 3 * 10,
        "network, round 2": 3 * 20,
        "capture": 3 * 2 * 5,
    }
    assert profile.rows["network, round 1"] == 3 and profile.rows["network, round 2"] == 6
    assert profile.total - sum(profile.seconds.values()) == 3 * 100


def test_what_another_thread_does_is_told_apart(clock: Clock) -> None:
    settled = []
    with profiling(lambda: settled.append(clock.now)) as profile:

        def write() -> None:
            with part("write"):
                clock.now += 7

        other = Thread(target=write)
        other.start()
        other.join()
        waited = len(settled)
        with part("wait"):
            clock.now += 1
    assert dict(profile.beside) == {"write": 7} and dict(profile.seconds) == {"wait": 1}
    # Only the first thread waits for the device: at the start and the end of a part, and at last.
    assert waited == 0 and len(settled) == 3


def test_nothing_is_timed_unasked(clock: Clock) -> None:
    with profiling() as profile:
        pass
    steps(clock)
    assert not profile.seconds


def test_a_part_that_fails_is_told_too(clock: Clock) -> None:
    with pytest.raises(KeyError), profiling() as profile, part("guidance"), part("network"):
        clock.now += 2
        raise KeyError
    with part("network"):
        pass
    assert profile.seconds == {"network": 2, "guidance": 0} and profile.total == 2


def test_a_profile_in_lines() -> None:
    profile = Profile(total=8.0)
    profile.seconds.update({"sampler": 1.0, "network, round 1": 4.0, "network, round 2": 2.0})
    profile.rows.update({"network, round 1": 30, "network, round 2": 10})
    profile.beside["encode"] = 3.0
    lines = told(profile, 3 * 10**11, torch.device("cpu"))
    assert [line.split("  ")[1].strip() for line in lines[1:5]] == [
        "network, round 1",
        "network, round 2",
        "sampler",
        "everything else",
    ]
    assert "4.00 s   50 %" in lines[1] and "1.00 s   12 %" in lines[4]
    assert lines[5].endswith("on another thread: encode 3.00 s")
    assert lines[6] == "  network: 40 rows of 300 GFLOPs, 2 TFLOP/s"
    assert len(told(profile, None, torch.device("cpu"))) == 6


@pytest.mark.parametrize(
    ("card", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", False, 989.4e12),
        ("NVIDIA H100 PCIe", "32-true", True, 378e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", False, 19.5e12),
        ("NVIDIA L40S", "16-mixed", False, 362e12),
        ("NVIDIA L4", "32-true", False, 30.3e12),
        ("NVIDIA L40", "32-true", False, None),
        ("NVIDIA GH200 480GB", "bf16-true", False, None),
    ],
)
def test_the_peak_of_known_cards(card: str, precision: str, tf32: bool, peak: float | None) -> None:
    assert peak_of(card, precision, tf32) == (None if peak is None else pytest.approx(peak))
