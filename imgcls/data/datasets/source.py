"""What a data set is to imgcls: samples with a label, and the classes in a stated order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from torch.utils.data import Dataset


class Source(Dataset):
    """A torch Dataset of dicts; detectron2's DatasetCatalog and its loaders take it as it is.

    A sample is ``{"image_id": int, "label": int or float vector, ...}`` with ``file_name`` (a path) or ``pixels``
    ((H, W) or (H, W, 3) uint8).
    """

    name: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} has no length")

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise TypeError(f"{type(self).__name__} has no samples")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


class ArraySource(Source):
    """Pictures that lie in memory: pixels (N, H, W) or (N, H, W, 3) uint8, labels (N,) int64."""

    def __init__(self, name: str, pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
        if len(pixels) != len(labels):
            raise ValueError(f"{name}: {len(pixels)} pictures but {len(labels)} labels")
        self.name, self.pixels, self.labels, self.classes = name, pixels, labels, tuple(classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image_id": index, "label": int(self.labels[index]), "pixels": self.pixels[index]}


class DictSource(Source):
    """A user's own registered list of dicts with ``file_name`` and ``label``; classes from the set's metadata."""

    def __init__(self, name: str, samples: Sequence[dict[str, Any]]) -> None:
        metadata = MetadataCatalog.get(name).as_dict()
        classes = metadata.get("classes") or metadata.get("thing_classes")
        if not classes:
            raise ValueError(
                f"the data set {name!r} does not name its classes; "
                f"call MetadataCatalog.get({name!r}).set(classes=[...]) where it is registered"
            )
        self.name, self.classes, self._samples = name, tuple(classes), samples
        if isinstance(samples, list):  # anything else may be loading pictures when it is asked for a sample
            for index, sample in enumerate(samples):
                self._require_labelled(index, sample)

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


class ConcatSource(Source):
    """Several sources of the same classes, one after another."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.name = "+".join(source.name for source in sources)
        self.classes = sources[0].classes
        for source in sources[1:]:
            if source.classes != self.classes:
                raise ValueError(
                    f"{source.name} has the classes {list(source.classes)[:5]}..., {sources[0].name} has "
                    f"{list(self.classes)[:5]}...; data sets trained together need the same classes in the same order; "
                    "change DATASETS.TRAIN"
                )
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[which - 1]) if which else 0
        return {**self._sources[which][index - before], "image_id": index}
