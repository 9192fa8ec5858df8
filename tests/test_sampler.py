"""The counter sampler: what is trained on is a function of the iteration alone."""

from __future__ import annotations

import re
from itertools import chain

import pytest
import torch

from imgcls.data.random_stream import mix, permutation, seed_cpu
from imgcls.data.samplers import CounterBatchSampler

Key = tuple[int, int]  # (epoch, index)

SHAPES = [(1, 1), (3, 8), (7, 2), (10, 4), (10, 12), (24, 12), (25, 12)]  # (size of the set, global batch)
WORLDS = (1, 2, 3, 4, 6, 12)


def batches(
    size: int, batch: int, *, start: int = 0, stop: int = 20, seed: int = 0, rank: int = 0, world: int = 1
) -> list[list[Key]]:
    sampler = CounterBatchSampler(size, global_batch=batch, seed=seed, start=start, stop=stop, rank=rank, world=world)
    assert all(draw[2:] == (0, 0) for draws in sampler for draw in draws)  # no repeats, the usual size
    return [[draw[:2] for draw in draws] for draws in sampler]


def slowly(size: int, batch: int, seed: int, iteration: int) -> list[Key]:
    """The global batch of one iteration, from the words of the design: position p is epoch p // N, place p % N."""
    keys = []
    for slot in range(batch):
        position = iteration * batch + slot
        epoch = position // size
        order = torch.randperm(size, generator=torch.Generator().manual_seed(mix(seed, epoch))).tolist()
        keys.append((epoch, order[position % size]))
    return keys


@pytest.mark.parametrize(("size", "batch"), SHAPES)
def test_the_slow_reference(size: int, batch: int) -> None:
    assert batches(size, batch, seed=5) == [slowly(size, batch, 5, iteration) for iteration in range(20)]


@pytest.mark.parametrize(("size", "batch"), SHAPES)
def test_every_sample_once_in_each_epoch(size: int, batch: int) -> None:
    """Also where a batch runs across the end of one epoch, or over several."""
    stream = list(chain.from_iterable(batches(size, batch, stop=4 * size)))
    assert len(stream) == 4 * size * batch
    for epoch in range(4 * batch):
        part = stream[epoch * size : (epoch + 1) * size]
        assert {key[0] for key in part} == {epoch}
        assert sorted(key[1] for key in part) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(key[1] for key in batch) for batch in batches(50, 50, stop=20)}
    assert len(orders) == 20
    assert batches(50, 50, stop=1, seed=1) != batches(50, 50, stop=1, seed=2)
    assert batches(50, 50, stop=1, seed=1) == batches(50, 50, stop=1, seed=1)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("size", [5, 25, 48])
def test_the_ranks_together_see_the_same_batch(size: int, world: int) -> None:
    """In the same order even: a rank has a contiguous share of the slots."""
    alone = batches(size, 12)
    shares = [batches(size, 12, rank=rank, world=world) for rank in range(world)]
    assert {len(batch) for share in shares for batch in share} == {12 // world}
    assert [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)] == alone


@pytest.mark.parametrize("start", [0, 1, 7, 19, 20, 25])
def test_a_start_in_the_middle_is_the_tail_of_the_whole(start: int) -> None:
    for world in (1, 3):
        whole = batches(25, 12, rank=world - 1, world=world)
        assert batches(25, 12, start=start, rank=world - 1, world=world) == whole[start:]


def test_its_length_is_what_is_left() -> None:
    def length(start: int, stop: int) -> int:
        return len(CounterBatchSampler(10, global_batch=4, seed=0, start=start, stop=stop))

    assert (length(0, 20), length(5, 20), length(20, 20), length(25, 20)) == (20, 15, 0, 0)


def test_it_can_be_read_twice() -> None:
    sampler = CounterBatchSampler(10, global_batch=4, seed=0, start=3, stop=20)
    assert list(sampler) == list(sampler)


def test_the_orders_of_old_epochs_are_forgotten() -> None:
    """ImageNet's takes 10 MB, and a run has hundreds of epochs."""
    sampler = CounterBatchSampler(10, global_batch=4, seed=0, start=0, stop=500)
    assert max(len(sampler._orders) for _ in sampler) <= 2


def test_a_batch_that_cannot_be_shared_names_the_legal_sizes() -> None:
    with pytest.raises(ValueError, match=r"batch of 12 images cannot be shared by 5 ranks") as told:
        batches(10, 12, world=5)
    legal = re.search(r"allowed numbers of ranks: \[(.*?)\]", str(told.value))
    assert legal is not None and [int(n) for n in legal[1].split(",")] == [1, 2, 3, 4, 6, 12]
    assert "change SOLVER.IMS_PER_BATCH or --num-gpus" in str(told.value)
    for world in (1, 2, 3, 4, 6, 12):  # each of them is legal indeed
        batches(10, 12, world=world)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the training set is empty; change DATASETS\.TRAIN"):
        batches(0, 4)


# ------------------------------------------------------------------------------------------ the stream it draws from


def test_mix_is_splitmix64() -> None:
    """First outputs of SplitMix64 for the seeds 0 and 1234567, as published with the generator's C code."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1234567) == 6457827717110365317


def test_every_bit_of_every_counter_matters() -> None:
    base = mix(3, 1, 4)
    changed = [
        mix(*(c ^ (1 << bit) if place == which else c for place, c in enumerate((3, 1, 4))))
        for which in range(3)
        for bit in range(64)
    ]
    assert len({base, *changed}) == 1 + 3 * 64
    assert mix(1, 2) != mix(2, 1)
    assert mix(1) != mix(1, 0)
    flips = [bin(base ^ other).count("1") for other in changed]
    assert 28 < sum(flips) / len(flips) < 36  # half of the 64 bits, as for independent numbers


def test_mix_takes_negative_counters_and_stays_in_64_bits() -> None:
    values = [mix(seed, -1) for seed in range(50)]
    assert len(set(values)) == 50 and all(0 <= value < 1 << 64 for value in values)


def test_seed_cpu_sets_three_generators() -> None:
    import random

    import numpy as np

    def draw(seed: int) -> tuple[float, float, float]:
        seed_cpu(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    largest = (1 << 64) - 1
    assert draw(largest) == draw(largest)
    assert all(a != b for a, b in zip(draw(1), draw(2), strict=True))


def test_permutation_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert sorted(permutation(9, 1, 2).tolist()) == list(range(9))
    assert torch.equal(torch.rand(2), expected)
