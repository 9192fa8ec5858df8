"""The counter sampler: what is trained on at an iteration is a function of the iteration alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from imgcls.data.random_stream import mix, permutation, run_permutation


class Draw(NamedTuple):
    """One picture to make ready. Everything random about it is a function of these numbers and the seed.

    repeat: counts the draws of one picture within an epoch, where it is drawn more than once.
    side: pixels, of the square to train on; 0: what the mapper was made for.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # tuple's own method of this name is not needed
    repeat: int = 0
    side: int = 0


class EpochOrder(NamedTuple):
    """The samples of one epoch in order, (N,) int64, and how often each was drawn before in it (None: never)."""

    indices: torch.Tensor
    repeats: torch.Tensor | None = None


Order = Callable[[int], EpochOrder]  # of an epoch


def shuffled(size: int, seed: int) -> Order:
    """Every sample once."""
    return lambda epoch: EpochOrder(permutation(size, seed, epoch))


def in_blocks(runs: Sequence[int], group: int, seed: int) -> Order:
    """Every sample once, ``group`` runs of samples that lie together mixed at a time (:func:`run_permutation`)."""
    return lambda epoch: EpochOrder(run_permutation(runs, group, seed, epoch))


def repeated(order: Order, times: int) -> Order:
    """Repeated augmentation (Hoffer et al. 2020; Touvron et al. 2021): ``times`` draws of each sample in a row.

    An epoch keeps its length, so it shows one in ``times`` samples only; other ones in each epoch.
    """

    def repeating(epoch: int) -> EpochOrder:
        indices = order(epoch).indices
        places = torch.arange(len(indices))
        return EpochOrder(indices[places // times], places % times)

    return repeating


def weighted(weights: np.ndarray, seed: int) -> Order:
    """As many draws as there are samples, with replacement, each sample as likely as its weight says."""
    sums = np.cumsum(weights, dtype=np.float64)
    if not len(weights) or np.min(weights) < 0 or not 0 < sums[-1] < np.inf:
        raise ValueError("sampling weights are finite numbers >= 0, not all of them 0; change the data set's weights")

    def order(epoch: int) -> EpochOrder:
        generator = torch.Generator().manual_seed(mix(seed, epoch))
        marks = torch.rand(len(sums), generator=generator, dtype=torch.float64).numpy() * sums[-1]
        # "right": a sample of weight 0 is never drawn, not even by a mark of exactly 0.
        indices = np.minimum(np.searchsorted(sums, marks, side="right"), len(sums) - 1)
        return EpochOrder(torch.from_numpy(indices), torch.from_numpy(_drawn_before(indices)))

    return order


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Sampling weights (N,) with which every class is drawn equally often; with several labels the rarest counts.

    labels: (N,) int64 or (N, K) 0/1. A sample without any label is as likely as one of the most frequent class.
    """
    if labels.ndim == 1:
        return 1.0 / np.bincount(labels)[labels]
    counts = labels.sum(axis=0)
    per_class = np.where(counts > 0, 1.0 / np.maximum(counts, 1), 0.0)
    return np.maximum((labels * per_class).max(axis=1), per_class[counts > 0].min(initial=1.0))


def _drawn_before(indices: np.ndarray) -> np.ndarray:
    """For each place, at how many earlier places the same index stands."""
    by_index = np.argsort(indices, kind="stable")
    in_order = indices[by_index]
    places = np.arange(len(indices))
    starts = np.r_[True, in_order[1:] != in_order[:-1]]
    before = np.empty_like(places)
    before[by_index] = places - np.maximum.accumulate(np.where(starts, places, 0))
    return before


class SizeSteps:
    """Progressive image size: the side in force at an iteration. steps: (first iteration, pixels), rising."""

    def __init__(self, steps: Sequence[tuple[int, int]] = ()) -> None:
        self._steps = list(steps)

    def __call__(self, iteration: int) -> int:
        return next((side for first, side in reversed(self._steps) if iteration >= first), 0)


class CounterBatchSampler(Sampler[list[Draw]]):
    """Batches of draws for one rank.

    Position p = iteration x global batch + slot; its epoch is p // size and its place in that epoch's order is
    p % size. Batches run across the ends of epochs, so every place of an order comes once in each ``size`` positions,
    whatever the number of ranks: a rank takes a contiguous share of the global batch's slots.

    order: of an epoch; :func:`shuffled` when not given. side_at: of an iteration; 0, the usual one, when not given.
    """

    def __init__(
        self,
        size: int,
        *,
        global_batch: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world: int = 1,
        order: Order | None = None,
        side_at: Callable[[int], int] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError("the training set is empty; change DATASETS.TRAIN")
        if global_batch % world:
            legal = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
            raise ValueError(
                f"a batch of {global_batch} images cannot be shared by {world} ranks; allowed numbers of ranks: "
                f"{legal}; change SOLVER.IMS_PER_BATCH or --num-gpus"
            )
        self.size, self.global_batch = size, global_batch
        self.start, self.stop = start, stop
        self.share = global_batch // world
        self.first_slot = rank * self.share
        self.order, self.side_at = order or shuffled(size, seed), side_at or SizeSteps()
        self._orders: dict[int, EpochOrder] = {}

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[Draw]]:
        for iteration in range(self.start, self.stop):
            first = iteration * self.global_batch + self.first_slot
            yield list(self._draws(first, first + self.share, self.side_at(iteration)))

    def _draws(self, first: int, end: int, side: int) -> Iterator[Draw]:
        """The draws at the positions ``first`` .. ``end`` - 1, one epoch's stretch after another."""
        while first < end:
            epoch, place = divmod(first, self.size)
            stop = min(place + end - first, self.size)
            order = self._order_of(epoch)
            # Turning single places of a tensor into numbers costs several times as much.
            indices = order.indices[place:stop].tolist()
            repeats = [0] * len(indices) if order.repeats is None else order.repeats[place:stop].tolist()
            for index, repeat in zip(indices, repeats, strict=True):
                yield Draw(epoch, index, repeat, side)
            first += stop - place

    def _order_of(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            # A batch touches at most a few neighbouring epochs; older orders are not needed again.
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = self.order(epoch)
        return self._orders[epoch]
