"""N-way K-shot episodes, as few-shot methods train and are judged (Vinyals et al. 2016; Snell et al. 2017)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch.utils.data import Sampler

from imgcls.data.datasets.shared_arrays import SharedArrays
from imgcls.data.datasets.source import Source
from imgcls.data.guarded_loader import Loader
from imgcls.data.loaders import make_loader, on_bad_in_training
from imgcls.data.mapper import ClsMapper, Mapped, MappedDataset, Mapper, Packed, pack, stack
from imgcls.data.random_stream import permutation
from imgcls.data.samplers import Draw
from imgcls.data.transforms import test_transform, train_transform
from imgcls.structures import Batch, Episode, Problem

logger = logging.getLogger(__name__)


class EpisodeSampler(SharedArrays, Sampler[list[Draw]]):
    """The draws of episodes ``start`` .. ``episodes`` - 1; rank r of w gets every w-th one, from ``start`` + r on.

    Episode e is a function of (seed, e): ``ways`` classes without replacement, and of each ``shots`` + ``queries``
    pictures without replacement. First come the shots of the first class, of the second, ..., then the queries
    likewise. A draw's epoch is the number of its episode, so a picture is augmented anew in each.

    labels: (N,) int64, -1 for pictures without one. Classes with too few pictures are left out, with a line in the log.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        episodes: int = 600,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        for what, value, least in (
            *(("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)),
            *(("episodes", episodes, 0), ("start", start, 0)),
        ):
            if type(value) is not int or value < least:
                raise Problem("an episode cannot be drawn so", value, f"a whole number >= {least}", what).error()
        self.ways, self.shots, self.queries, self.seed = ways, shots, queries, seed
        self.numbers = range(start + rank, episodes, world)
        self.labels = labels
        # The pictures of class c: _members[_ends[c] - _counts[c] : _ends[c]], in the order of the data set.
        self._members = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]
        self._counts = np.bincount(labels[labels >= 0], minlength=1)
        self._ends = np.cumsum(self._counts)
        self._classes = self._usable_classes()

    def _usable_classes(self) -> np.ndarray:
        needed = self.shots + self.queries
        usable = np.flatnonzero(self._counts >= needed)
        short = np.count_nonzero(self._counts) - len(usable)
        if len(usable) < self.ways:
            what = f"{len(usable)} classes have the {needed} pictures that an episode takes of each"
            allowed = (
                f"2 to {len(usable)}, or fewer shots and queries" if len(usable) > 1 else "fewer shots and queries"
            )
            raise Problem(what, self.ways, allowed, "ways").error()
        if short:
            logger.warning("%d classes are left out: an episode takes %d pictures of each", short, needed)
        return usable

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[Draw]]:
        return map(self.episode, self.numbers)

    def episode(self, number: int) -> list[Draw]:
        """The draws of one episode, whatever the rank and the start."""
        chosen = self._classes[permutation(len(self._classes), self.seed, number)[: self.ways].numpy()]
        orders = [self._order(number, int(label)) for label in chosen]
        support = [order[: self.shots] for order in orders]
        queries = [order[self.shots : self.shots + self.queries] for order in orders]
        return [Draw(number, index) for index in np.concatenate(support + queries).tolist()]

    def _order(self, number: int, label: int) -> np.ndarray:
        """All pictures of a class in the order in which an episode takes them."""
        end, count = self._ends[label], self._counts[label]
        return self._members[end - count : end][permutation(int(count), self.seed, number, label).numpy()]

    def spares(self, draw: Draw) -> Iterator[int]:
        """The pictures of a draw's class that its episode leaves, in the order in which they may replace bad ones."""
        order = self._order(draw.epoch, int(self.labels[draw.index]))
        return iter(order[self.shots + self.queries :].tolist())


class EpisodeDataset(MappedDataset):
    """A source seen through a mapper; a picture that cannot be read is replaced by the next one of its class."""

    def __init__(self, source: Source, mapper: Mapper, on_bad: str, sampler: EpisodeSampler) -> None:
        super().__init__(source, mapper, on_bad)
        self.sampler = sampler
        self._spares: dict[int, Iterator[int]] = {}  # of the classes of the episode that is being read

    def __getitems__(self, draws: Sequence[Draw]) -> list[Mapped]:
        """A whole episode, for no two of its bad pictures may be replaced by the same (DataLoader calls this)."""
        self._spares = {}
        return [self[draw] for draw in draws]

    def _index(self, draw: Draw, attempt: int) -> int:
        if attempt == 0:
            return draw.index
        label = int(self.sampler.labels[draw.index])
        if label not in self._spares:
            self._spares[label] = self.sampler.spares(draw)
        for index in self._spares[label]:
            return index
        raise ValueError(
            f"the class {self.source.classes[label]} has too few pictures that can be read for an episode of "
            f"{self.sampler.shots} shots and {self.sampler.queries} queries; mend its files or ask for fewer"
        )


def build_episode_loader(
    cfg: CfgNode,
    source: Source,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    start: int = 0,
    augment: bool = False,
) -> Loader:
    """:class:`~imgcls.structures.Episode` number ``start`` .. ``episodes`` - 1; ranks share them out.

    The defaults are the usual 5-way 1-shot evaluation. augment: ``INPUT.TRAIN_TRANSFORMS`` instead of the resize and
    centre crop of an evaluation. Seed, workers and what becomes of bad files are the config's.
    """
    node = cfg.INPUT
    if augment:
        transform = train_transform(node.TRAIN_TRANSFORMS, node.TRAIN_SIZE, node.INTERPOLATION)
    else:
        transform = test_transform(node.TEST_RESIZE, node.TEST_SIZE, node.INTERPOLATION)
    sampler = EpisodeSampler(
        _labels(source),
        ways=ways,
        shots=shots,
        queries=queries,
        episodes=episodes,
        seed=cfg.SEED,
        start=start,
        rank=comm.get_rank(),
        world=comm.get_world_size(),
    )
    mapper = ClsMapper(
        transform,
        seed=cfg.SEED,
        side=node.TRAIN_SIZE if augment else 0,
        channels=len(cfg.MODEL.PIXEL_MEAN),
        max_pixels=node.MAX_PIXELS,
    )
    dataset = EpisodeDataset(source, mapper, on_bad_in_training(cfg), sampler)
    return make_loader(cfg, dataset, sampler, collate=partial(collate_episode, ways=ways, shots=shots))


def _labels(source: Source) -> np.ndarray:
    if source.labels is None:
        what, allowed = "the labels of the set are known only when its samples are read", "a set that knows its labels"
    elif source.labels.ndim > 1:
        what, allowed = "episodes are of pictures with one class each", "a set with one label a picture"
    else:
        return source.labels
    raise Problem(what, source.name, allowed, "the data set").error()


def collate_episode(mapped: Sequence[Mapped], *, ways: int, shots: int) -> Packed:
    """One :class:`Episode` of its samples in the order of :meth:`EpisodeSampler.episode`, stacked in the worker."""
    return pack(mapped, partial(_episode, ways=ways, shots=shots))


def _episode(samples: Sequence[dict[str, Any]], ways: int, shots: int) -> Episode:
    support, queries = samples[: ways * shots], samples[ways * shots :]
    classes = torch.tensor([sample["label"] for sample in support[::shots]])
    return Episode(_renumbered(support, ways), _renumbered(queries, ways), classes)


def _renumbered(samples: Sequence[dict[str, Any]], ways: int) -> Batch:
    """As many samples of each of ``ways`` classes, class after class; targets 0 .. ways - 1."""
    each = len(samples) // ways
    return stack([{**sample, "label": place // each} for place, sample in enumerate(samples)])
