"""Training batches: a pure function of (seed, step) that covers the data epoch by epoch."""

from __future__ import annotations

from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sag_dit.data.training_batches import TrainingBatches


def batches(items: int, batch_size: int, seed: int, **options: int) -> TrainingBatches:
    return TrainingBatches(np.arange(items), batch_size, seed, flip=False, **options)


def take(count: int, items: int, batch_size: int, seed: int, **options: int) -> list[list[int]]:
    return [b.indices for b in islice(batches(items, batch_size, seed, **options), count)]


SIZES = st.integers(1, 40).flatmap(lambda items: st.tuples(st.just(items), st.integers(1, items)))


@settings(max_examples=60)
@given(sizes=SIZES, seed=st.integers(0, 2**64 - 1), first=st.integers(0, 30))
def test_going_on_at_a_step_gives_the_batches_from_there(
    sizes: tuple[int, int], seed: int, first: int
) -> None:
    whole = take(first + 3, *sizes, seed)
    assert take(3, *sizes, seed, first=lambda: first) == whole[first:]


@settings(max_examples=60)
@given(sizes=SIZES, seed=st.integers(0, 1000))
def test_every_epoch_holds_every_item_once(sizes: tuple[int, int], seed: int) -> None:
    items, batch_size = sizes
    epochs = 3
    sequence = [i for batch in take(epochs * items // batch_size + 1, *sizes, seed) for i in batch]
    for epoch in range(epochs):
        assert sorted(sequence[epoch * items : (epoch + 1) * items]) == list(range(items))


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 1000), world=st.integers(2, 4))
def test_ranks_partition_the_batch_of_one_rank(data: st.DataObject, seed: int, world: int) -> None:
    batch_size = data.draw(st.integers(1, 6))
    items = data.draw(st.integers(batch_size * world, 50))
    together = take(5, items, batch_size * world, seed)
    shares = [take(5, items, batch_size, seed, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(together):
        assert [i for share in shares for i in share[step]] == batch


def test_batches_are_shuffled_by_the_seed_and_anew_every_epoch() -> None:
    first, second = take(2, 100, 100, 0)
    assert first != second != sorted(second)
    assert first != sorted(first)
    assert take(1, 100, 100, 1) != [first]
    assert take(2, 100, 100, 0) == [first, second]


def test_two_iterators_of_one_sampler_do_not_disturb_each_other() -> None:
    sampler = batches(10, 3, 0)
    left, right = iter(sampler), iter(sampler)
    assert [next(left), next(left)] == [next(right), next(right)]
