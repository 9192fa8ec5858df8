"""Sets whose pictures are files below one folder, however they were listed."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from imgcls.data.datasets.shared_arrays import SharedArrays
from imgcls.data.datasets.source import Source
from imgcls.data.reading import check_header

# Opening a header takes some 50 microseconds: beyond this many files an even selection is looked at.
HEADERS_CHECKED = 20_000


class FileSource(Source):
    """Labelled files: a path each, from ``root`` (absolute ones stay), and a row of ``labels``.

    labels: (N,) int64, or (N, K) float32 with 0 and 1 where a file may have several.
    """

    labels: np.ndarray

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Iterable[str],
        labels: np.ndarray,
        classes: tuple[str, ...],
        *,
        weights: np.ndarray | None = None,
    ) -> None:
        self.name, self.root, self.classes = name, root, classes
        self.labels, self.weights, self.multi_label = labels, weights, labels.ndim == 2
        self._paths = PackedPaths.of(paths)

    def check_files(self) -> None:
        step = max(1, len(self) // HEADERS_CHECKED)
        for index in range(0, len(self), step):
            check_header(self.path(index))

    def path(self, index: int) -> str:
        """The file of sample ``index``."""
        return os.path.join(self.root, self._paths[index])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self.labels[index] if self.multi_label else int(self.labels[index])
        return {"image_id": index, "label": label, "file_name": self.path(index)}


class PackedPaths(SharedArrays):
    """Strings in one block of bytes, which workers share; the pages of a list of str are copied as it is read.

    content: their bytes, one after another. ends: (N,) int64, where each ends.
    """

    def __init__(self, content: np.ndarray, ends: np.ndarray) -> None:
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> PackedPaths:
        content, ends = bytearray(), array("q")
        for path in paths:
            content += os.fsencode(path)
            ends.append(len(content))
        return cls(np.frombuffer(bytes(content), dtype=np.uint8), np.array(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.content[start : self.ends[index]].tobytes())
