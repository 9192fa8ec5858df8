"""Which label a class name means: one order, and alignment of other splits by name, never by position."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from imgcls.data.datasets.source import Source

logger = logging.getLogger(__name__)


def ordered(names: Iterable[str], where: str) -> tuple[str, ...]:
    """The classes of a training set, sorted as text ("1", "10", "2"), in Unicode's composed form (NFC).

    where: what to call the set. Two names that differ in their Unicode form only are a ``ValueError``: on screen they
    are one. Names that differ in letter case are two classes.
    """
    found = list(names)
    by_name = {composed(name): name for name in found}
    if len(by_name) < len(found):
        twice = next(name for name in found if by_name[composed(name)] != name)
        raise ValueError(
            f"{where} has the class {twice!r} in two Unicode spellings, {twice!a} and "
            f"{by_name[composed(twice)]!a}; give both one name"
        )
    classes = tuple(sorted(by_name))
    _say_order_of_numbers(classes, where)
    return classes


def _say_order_of_numbers(classes: Sequence[str], where: str) -> None:
    if all(name.isdecimal() for name in classes) and list(classes) != sorted(classes, key=int):
        shown = ", ".join(f"{index} is {name!r}" for index, name in enumerate(classes[:6]))
        more = ", ..." if len(classes) > 6 else ""
        logger.info("%s: the classes are numbers and sorted as text, so that index %s%s", where, shown, more)


def align(found: Sequence[str], classes: Sequence[str], where: str) -> list[int]:
    """The index in ``classes``, the training set's, of each class that another split has.

    A name that is not among ``classes`` is a ``ValueError``; names of ``classes`` that were not found are said in the
    log. Two Unicode forms of a name count as one; letter case and blanks do not, but the message points them out.
    """
    index_of = {composed(name): index for index, name in enumerate(classes)}
    extra = [name for name in found if composed(name) not in index_of]
    if extra:
        raise ValueError(
            f"{where} has the class {extra[0]!r} ({len(extra)} in all) that the training set has not"
            f"{_hint(extra[0], classes)}; its classes are {few(classes)}; rename or remove it, or change DATASETS.TEST"
        )
    places = [index_of[composed(name)] for name in found]
    filled = set(places)
    if len(filled) < len(places):
        ordered(found, where)  # says which name comes twice
    lacking = [name for index, name in enumerate(classes) if index not in filled]
    if lacking:
        counts = len(lacking), len(classes)
        logger.warning("%s has no pictures of %d of the %d classes: %s", where, *counts, few(lacking))
    return places


def _hint(name: str, classes: Sequence[str]) -> str:
    near = [other for other in classes if _loose(other) == _loose(name)]
    return f", where it is written {near[0]!r}" if near else ""


def aligned(source: Source, classes: Sequence[str] | None) -> Source:
    """``source`` with the training set's ``classes`` (None: its own), its labels renumbered where that takes it."""
    if classes is None or tuple(classes) == source.classes:
        return source
    return AlignedSource(source, classes)


class AlignedSource(Source):
    """Another source seen through the training set's classes (:func:`align`)."""

    def __init__(self, source: Source, classes: Sequence[str]) -> None:
        self.name, self.classes, self.multi_label = source.name, tuple(classes), source.multi_label
        self._source = source
        self._places = np.asarray(align(source.classes, classes, source.name), dtype=np.int64)
        self.labels = None if source.labels is None else self._renumbered(source.labels)
        self.weights, self.runs = source.weights, source.runs

    def _renumbered(self, labels: np.ndarray) -> np.ndarray:
        """labels: (N,) or () whole numbers, -1 for none; or (N, K) or (K,) one column a class."""
        if np.issubdtype(labels.dtype, np.integer):
            return np.where(labels < 0, labels, self._places[labels])
        moved = np.zeros((*labels.shape[:-1], len(self.classes)), dtype=labels.dtype)
        moved[..., self._places] = labels
        return moved

    def check_files(self) -> None:
        self._source.check_files()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self._source[index]
        label = self._renumbered(np.asarray(sample["label"]))
        return {**sample, "label": label if label.ndim else int(label)}


def few(names: Sequence[str]) -> str:
    """The first names, and how many there are when these are not all."""
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


def composed(name: str) -> str:
    """``name`` in Unicode's composed form (NFC), in which two spellings that look alike are equal."""
    return unicodedata.normalize("NFC", name)


def _loose(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
