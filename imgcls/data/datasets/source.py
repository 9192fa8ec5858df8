"""What a data set is to imgcls: samples with a label, and the classes in a stated order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from torch.utils.data import Dataset

from imgcls.data.datasets.shared_arrays import SharedArrays


class Source(SharedArrays, Dataset):
    """A torch Dataset of dicts; detectron2's DatasetCatalog and its loaders take it as it is.

    A sample is ``{"image_id": int, "label": int or float vector, ...}`` and one of ``file_name`` (a path), ``pixels``
    ((H, W) or (H, W, 3) uint8) and ``encoded`` (the bytes of an image file; ``name`` says what to call it).

    multi_label: whether a picture may have several classes, or none.
    labels: (N,) int64, or (N, K) float32 with a column a class; None where they are not known without opening files.
    weights: (N,) float64, how often to draw each sample relative to the others; None: all alike.
    runs: (R,) int64, lengths of the runs of samples that lie together in storage; None: none is nearer than another.
    """

    name: str
    classes: tuple[str, ...]
    multi_label: bool = False
    labels: np.ndarray | None = None
    weights: np.ndarray | None = None
    runs: np.ndarray | None = None

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} has no length")

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} has no samples")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def check_files(self) -> None:
        """Raise ``ImageError`` for a file that does not even begin like an image; cheap, so not all may be opened."""


class ArraySource(Source):
    """Pictures that lie in memory: pixels (N, H, W) or (N, H, W, 3) uint8, labels (N,) int64 or (N, K) float32."""

    labels: np.ndarray

    def __init__(
        self, name: str, pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, multi_label: bool = False
    ) -> None:
        if len(pixels) != len(labels):
            raise ValueError(f"{name}: {len(pixels)} pictures but {len(labels)} labels")
        self.name, self.pixels, self.labels, self.classes = name, pixels, labels, tuple(classes)
        self.multi_label = multi_label

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = self.labels[index]
        return {
            "image_id": index,
            "label": label if self.labels.ndim > 1 else int(label),
            "pixels": self.pixels[index],
        }


class DictSource(Source):
    """A user's own registered list of dicts with ``file_name`` and ``label``; classes from the set's metadata.

    ``MetadataCatalog.get(name).set(multi_label=True)`` says that labels, vectors then, are classes that are there (1)
    or not (0); otherwise a vector holds shares of one label.
    """

    def __init__(self, name: str, samples: Sequence[dict[str, Any]]) -> None:
        metadata = MetadataCatalog.get(name).as_dict()
        classes = metadata.get("classes") or metadata.get("thing_classes")
        if not classes:
            raise ValueError(
                f"the data set {name!r} does not name its classes; "
                f"call MetadataCatalog.get({name!r}).set(classes=[...]) where it is registered"
            )
        self.name, self.classes, self._samples = name, tuple(classes), samples
        self.multi_label = bool(metadata.get("multi_label", False))
        if isinstance(samples, list):  # anything else may be loading pictures when it is asked for a sample
            for index, sample in enumerate(samples):
                self._require_labelled(index, sample)
            self.labels = _as_array([sample["label"] for sample in samples], len(self.classes))

    def _require_labelled(self, index: int, sample: dict[str, Any]) -> None:
        where = f"sample {index} of the data set {self.name!r}"
        remedy = "change the function that is registered in DatasetCatalog"
        if "file_name" not in sample or "label" not in sample:
            raise ValueError(f"{where} has the entries {sorted(sample)}; it needs 'file_name' and 'label'; {remedy}")
        label, number = sample["label"], len(self.classes)
        if not (_is_class(label, number) or (np.ndim(label) == 1 and len(label) == number)):
            raise ValueError(
                f"{where} has the label {label!r}; allowed: a whole number from 0 to {number - 1}, or {number} "
                f"weights, one a class; {remedy}"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._samples[index], "image_id": index}


def _is_class(label: Any, number: int) -> bool:
    return isinstance(label, (int, np.integer)) and 0 <= int(label) < number


def _as_array(labels: Sequence[Any], number: int) -> np.ndarray:
    """Indices (N,) where all labels are; otherwise vectors (N, K), an index among them as one 1."""
    if all(np.ndim(label) == 0 for label in labels):
        return np.asarray(labels, dtype=np.int64)
    rows = [np.eye(number)[label] if np.ndim(label) == 0 else np.asarray(label) for label in labels]
    return np.asarray(rows, dtype=np.float32)


class ConcatSource(Source):
    """Several sources of the same classes, one after another."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.name = "+".join(source.name for source in sources)
        self.classes, self.multi_label = sources[0].classes, sources[0].multi_label
        for source in sources[1:]:
            self._require_alike(sources[0], source)
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])
        labels = [source.labels for source in sources]
        if all(part is not None and part.ndim == labels[0].ndim for part in labels):  # type: ignore[union-attr]
            self.labels = np.concatenate(labels)  # type: ignore[arg-type]
        if any(source.weights is not None for source in sources):
            self.weights = np.concatenate(
                [np.ones(len(source)) if source.weights is None else source.weights for source in sources]
            )
        if any(source.runs is not None for source in sources):
            self.runs = np.concatenate(
                [np.array([len(source)]) if source.runs is None else source.runs for source in sources]
            )

    @staticmethod
    def _require_alike(first: Source, other: Source) -> None:
        if other.classes != first.classes:
            raise ValueError(
                f"{other.name} has the classes {list(other.classes)[:5]}..., {first.name} has "
                f"{list(first.classes)[:5]}...; data sets trained together need the same classes in the same order; "
                "change DATASETS.TRAIN"
            )
        if other.multi_label != first.multi_label:
            several, one = (other, first) if other.multi_label else (first, other)
            raise ValueError(
                f"pictures of {several.name} have several labels each, those of {one.name} one; they cannot be trained "
                "together; change DATASETS.TRAIN"
            )

    def check_files(self) -> None:
        for source in self._sources:
            source.check_files()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        return {**self._sources[which][index - before], "image_id": index}
