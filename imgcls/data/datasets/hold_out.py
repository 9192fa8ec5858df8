"""The split of a set that has none: some of each class are held out, by a rule that depends on names alone."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode

from imgcls.data.datasets.source import Source


class HoldOut(NamedTuple):
    """How much of each class is held out (a share in (0, 1)), and which of the possible splits it is."""

    share: float = 0.1
    seed: int = 0

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> HoldOut:
        """``DATASETS.HOLD_OUT`` and ``DATASETS.SPLIT_SEED``."""
        return cls(cfg.DATASETS.HOLD_OUT, cfg.DATASETS.SPLIT_SEED)

    def choose(self, names: Sequence[str], class_name: str) -> set[str]:
        """Which of the names, at least two and all different, of one class are held out: at least one, never all."""
        ranked = sorted(names, key=lambda name: (self._rank(os.fsencode(f"{class_name}/{name}")), name))
        return set(ranked[: min(max(1, round(self.share * len(names))), len(names) - 1)])

    def _rank(self, name: bytes) -> int:
        if self.seed == 0:
            return zlib.crc32(name)
        # A checksum is linear: seeding it would give splits that are much alike.
        return int.from_bytes(blake2b(name, digest_size=8, key=str(self.seed).encode()).digest(), "big")


TENTH = HoldOut()


def held_out(files: Sequence[str], class_name: str, split: str, root: Path, hold_out: HoldOut = TENTH) -> list[str]:
    """The files of one class that belong to "train" or "val": a share, chosen by a checksum of the names, is held out.

    The rule looks at names only, so it is the same on every machine and the split of a file never depends on its
    neighbours' content.
    """
    if len(files) < 2:
        raise ValueError(
            f"the class folder {root / class_name} has {len(files)} image; holding some out for validation needs 2. "
            f"Add images, or give {root}/train and {root}/val"
        )
    val = hold_out.choose(files, class_name)
    return [file for file in files if (file in val) == (split == "val")]


class HeldOutSource(Source):
    """ "train" or "val" of a labelled source of fixed order; a sample's name is its index there.

    With several labels a picture, and where none is known (-1), the share is of all pictures instead of each class.
    """

    def __init__(self, source: Source, split: str, hold_out: HoldOut = TENTH) -> None:
        if source.labels is None:
            raise ValueError(f"{source.name} cannot be split: its labels are not known beforehand; change DATASETS")
        self.name, self.classes, self.multi_label = f"{source.name}#{split}", source.classes, source.multi_label
        self._source, self._indices = source, _indices(source, source.labels, split, hold_out)
        self.labels = source.labels[self._indices]
        self.weights = None if source.weights is None else source.weights[self._indices]
        if source.runs is not None:
            ends = np.searchsorted(self._indices, np.cumsum(source.runs))
            self.runs = np.diff(ends, prepend=0)

    def check_files(self) -> None:
        self._source.check_files()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[int(self._indices[index])], "image_id": index}


def _indices(source: Source, labels: np.ndarray, split: str, hold_out: HoldOut) -> np.ndarray:
    classes = np.full(len(labels), -1) if labels.ndim > 1 else labels
    val = np.zeros(len(labels), dtype=bool)
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        name = source.classes[label] if label >= 0 else ""
        if len(members) < 2:
            raise ValueError(
                f"{source.name} has 1 picture of the class {name!r}; holding some out for validation needs 2; "
                "change DATASETS"
            )
        val[[int(chosen) for chosen in hold_out.choose([str(index) for index in members], name)]] = True
    return np.flatnonzero(val == (split == "val"))
