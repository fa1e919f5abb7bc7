"""Requests by a rule or from a file, and each rank's share of those still to be drawn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sag_dit.data.requests import make_requests, read_requests
from sag_dit.sampling import Chosen, Request
from sag_dit.training.pending import PendingRequests

NAMES = ("tench", "goldfish", "great white shark")


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (None, [0, 1, 2, 0, 1]),
        (2, [2] * 5),
        ("goldfish", [1] * 5),
        ("2", [2] * 5),
        ([1], [1] * 5),
        (["great white shark", 0, "1"], [2, 0, 1, 2, 0]),
    ],
)
def test_class_rules(classes: list[int | str] | str | int | None, labels: list[int]) -> None:
    requests = make_requests(5, 7, classes, NAMES)
    assert list(requests) == [Request(i, 7, label, stream=i) for i, label in enumerate(labels)]


def test_random_classes_do_not_depend_on_the_count() -> None:
    many = make_requests(600, 0, "random", NAMES)
    assert list(make_requests(10, 0, "random", NAMES)) == list(many[:10])
    counts = np.bincount([request.label for request in many])
    assert counts.min() > 160  # 200 expected
    assert [r.label for r in make_requests(600, 1, "random", NAMES)] != [r.label for r in many]


@pytest.mark.parametrize("classes", [[3], [-1], "shark", [1, "trout"]])
def test_classes_that_do_not_exist(classes: list[int | str] | str) -> None:
    with pytest.raises(
        ValueError, match=r"does not exist: expected a number from 0 to 2 .*'tench'"
    ):
        make_requests(1, 0, classes, NAMES)


def test_counts_and_empty_lists() -> None:
    with pytest.raises(ValueError, match="num_images=0: expected 1 or more"):
        make_requests(0, 0, None, NAMES)
    with pytest.raises(ValueError, match=r"classes=\[\]: expected at least one class"):
        make_requests(1, 0, [], NAMES)


@pytest.mark.parametrize(
    "text",
    [
        "3,goldfish\n4,2\n",
        "seed,class\n3,goldfish\n4,2\n",
        "Seed, Class\n\n 3 , goldfish \n4,\t2\n\n",
        '3,"goldfish"\r\n4,2',
        "\ufeffseed,class\n3,goldfish\n4,2\n",  # as spreadsheets save it
    ],
)
def test_requests_are_read(tmp_path: Path, text: str) -> None:
    file = tmp_path / "wanted.csv"
    file.write_text(text, encoding="utf-8", newline="")
    expected = [Request(0, 3, 1, stream=0), Request(1, 4, 2, stream=0)]
    assert read_requests(file, NAMES) == expected


def test_names_with_commas_are_quoted(tmp_path: Path) -> None:
    file = tmp_path / "wanted.csv"
    file.write_text('5,"goldfish, Carassius auratus"\n')
    (request,) = read_requests(file, ("tench", "goldfish, Carassius auratus"))
    assert request.label == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1\n", 1),
        ("1,2,3\n", 1),
        ("1,0\none,0\n", 2),
        ("1,0\n\n\n2,9\n", 4),
        ("1,0\n2,trout\n", 2),
        ("1,0\n1.5,0\n", 2),
        ("1,0\n-1,0\n", 2),
        ("1,0\n18446744073709551616,0\n", 2),
        ("1,0\nseed,class\n", 2),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, line: int) -> None:
    file = tmp_path / "wanted.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"wanted\.csv, line {line}: expected 'seed,class'"):
        read_requests(file, NAMES)


@pytest.mark.parametrize("text", ["", "\n\n", "seed,class\n"])
def test_a_file_without_requests(tmp_path: Path, text: str) -> None:
    file = tmp_path / "wanted.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match="expected at least one line"):
        read_requests(file, NAMES)


def share(pending: list[Request], batch_size: int, rank: int, world: int) -> list[list[Request]]:
    data = PendingRequests(pending, batch_size)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
    return list(data.predict_dataloader())


@settings(max_examples=60)
@given(
    count=st.integers(0, 20),
    batch_size=st.integers(1, 5),
    world=st.integers(1, 6),
)
def test_ranks_share_what_is_pending(count: int, batch_size: int, world: int) -> None:
    pending = [Request(3 * i, 0, 0, stream=3 * i) for i in range(count)]
    shares = [share(pending, batch_size, rank, world) for rank in range(world)]
    drawn = [request for batches in shares for batch in batches for request in batch]
    assert sorted(drawn, key=lambda request: request.index) == pending
    sizes = [sum(map(len, batches)) for batches in shares]
    assert max(sizes) - min(sizes) <= 1  # nobody waits for a rank that has more to do
    for batches in shares:
        assert all(len(batch) == batch_size for batch in batches[:-1])


def test_without_a_trainer_all_is_one_share() -> None:
    pending = [Request(i, 0, 0, stream=i) for i in range(5)]
    assert list(PendingRequests(pending, 2).predict_dataloader()) == [
        pending[:2],
        pending[2:4],
        pending[4:],
    ]


def test_requests_stay_where_they_are() -> None:
    batch = [Request(0, 0, 0, stream=0)]
    data = PendingRequests(batch, 1)
    assert data.transfer_batch_to_device(batch, torch.device("meta"), 0) is batch
    assert data.allow_zero_length_dataloader_with_multiple_devices


@pytest.mark.parametrize("classes", [None, "random", [1]])
def test_a_set_too_large_to_list_is_asked_piecewise(classes: Any) -> None:
    many, few = (make_requests(count, 3, classes, NAMES) for count in (10**15, 30))
    assert list(many[:30]) == list(few)
    assert many[-1].index == 10**15 - 1
    with pytest.raises(IndexError):
        few[30]
    # What is left of them, and every rank's share of it.
    there = np.array([0, 1, 4, 5, 6, 29])
    left = [request for request in few if request.index not in there]
    assert list(Chosen.of(few, there)) == left
    assert len(Chosen.of(few, there)) == len(left) == 24
    huge = Chosen.of(many, there)
    assert len(huge) == 10**15 - 6
    assert [huge[i] for i in range(20)] == left[:20]
    for rank in range(3):
        assert list(Chosen.of(few, there)[rank::3]) == left[rank::3]
        assert list(huge[rank::3][:5]) == left[rank::3][:5]


def test_the_first_batch_of_a_huge_set_is_there_at_once() -> None:
    requests = make_requests(10**15, 0, None, NAMES)
    data = PendingRequests(Chosen.of(requests, np.array([0, 2])), batch_size=3)
    batch = next(iter(data.predict_dataloader()))
    assert [request.index for request in batch] == [1, 3, 4]
