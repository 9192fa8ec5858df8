"""The counter sampler: what is trained on at an iteration is a function of the iteration alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from imgcls.data.random_stream import permutation


class CounterBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one rank.

    Position p = iteration x global batch + slot; its epoch is p // size and its place in that epoch's permutation is
    p % size. Batches run across the ends of epochs, so every index comes once in each ``size`` positions, whatever the
    number of ranks: a rank takes a contiguous share of the global batch's slots.
    """

    def __init__(
        self, size: int, *, global_batch: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> None:
        if size < 1:
            raise ValueError("the training set is empty; change DATASETS.TRAIN")
        if global_batch % world:
            legal = [n for n in range(1, global_batch + 1) if global_batch % n == 0]
            raise ValueError(
                f"a batch of {global_batch} images cannot be shared by {world} ranks; allowed numbers of ranks: "
                f"{legal}; change SOLVER.IMS_PER_BATCH or --num-gpus"
            )
        self.size, self.global_batch, self.seed = size, global_batch, seed
        self.start, self.stop = start, stop
        self.share = global_batch // world
        self.first_slot = rank * self.share
        self._orders: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for iteration in range(self.start, self.stop):
            first = iteration * self.global_batch + self.first_slot
            yield [self._at(position) for position in range(first, first + self.share)]

    def _at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.size)
        if epoch not in self._orders:
            # A batch touches at most a few neighbouring epochs; older orders are not needed again.
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = permutation(self.size, self.seed, epoch)
        return epoch, int(self._orders[epoch][place])
