"""Random draws as a function of what is drawn for, not of what was drawn before.

A number that depends only on (seed, epoch, sample) is the same with any number of workers or ranks and after any
restart; no generator state has to be saved.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

_MASK = (1 << 64) - 1


def mix(*counters: int) -> int:
    """A 64-bit seed from integers; every bit of each of them matters (SplitMix64 steps, Steele et al. 2014)."""
    state = 0
    for counter in counters:
        state = (state ^ (counter & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def seed_cpu(seed: int) -> None:
    """Set the CPU generators of torch, numpy and random.

    ``torch.manual_seed`` would also queue a seed for every GPU, with a stack trace each time: far too slow per sample.
    """
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """What is drawn in here from the CPU generators of torch, numpy and random counts as not drawn."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def permutation(size: int, *counters: int) -> torch.Tensor:
    """A random order of ``range(size)``, (size,) int64, that depends on ``counters`` only."""
    generator = torch.Generator().manual_seed(mix(*counters))
    return torch.randperm(size, generator=generator)


def run_permutation(runs: Sequence[int], group: int, *counters: int) -> torch.Tensor:
    """A random order of ``range(sum(runs))`` for storage that is read faster in one piece; (N,) int64.

    runs: lengths of the runs of samples that lie together, such as the shards of a set.
    group: runs that are mixed at a time, at least 1. They come in a random order; the samples of each ``group`` of them
        are shuffled among themselves. With all runs in one group it is an order like any other.

    Every sample comes once, and the order depends on ``counters`` only.
    """
    generator = torch.Generator().manual_seed(mix(*counters))
    lengths = torch.as_tensor(runs, dtype=torch.int64)
    runs_of_samples = torch.arange(int(lengths.sum())).split(lengths.tolist())
    order = torch.randperm(len(lengths), generator=generator).tolist()
    parts = []
    for first in range(0, len(order), group):
        members = torch.cat([runs_of_samples[run] for run in order[first : first + group]])
        parts.append(members[torch.randperm(len(members), generator=generator)])
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
