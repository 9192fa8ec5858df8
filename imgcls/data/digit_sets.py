"""A set with several labels a picture and rare classes that needs no download: handwritten digits on one canvas.

A canvas of 64 x 64 pixels has one to four digits of :func:`imgcls.data.digits.load_digits`, each in a quarter of its
own, at a random size, place, ink and colour over a dim background with noise. Its labels are the digits that are
there; the same one may be there twice. The classes are long-tailed as in Cui et al. 2019 (arXiv:1901.05555), section
5.1: each is drawn :data:`TAIL` times as often as the one before, so 0 is on more than half of the canvases and 9 on a
few in a hundred.

Training canvases have training digits. The held-out digits are shared out by halves of each class: thresholds are
tuned on the canvases of one half ("val") and judged on those of the other ("test"). Canvas ``i`` is made when it is
asked for, from the split and ``i`` alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from imgcls.data.datasets.source import Source
from imgcls.data.digits import NUM_CLASSES, load_digits

SIZES = {"train": 12000, "val": 1000, "test": 1000}  # canvases
TAIL = 0.7
SIDE = 64  # pixels
_QUARTER = SIDE // 2
_SMALLEST, _LARGEST = 22, 32  # pixels, side of a digit's own picture of 28


class DigitSets(Source):
    """The canvases of a split: "train", "val" or "test"."""

    multi_label = True
    labels: npt.NDArray[np.float32]

    def __init__(self, split: str) -> None:
        self.name, self.classes = f"digitsets_{split}", tuple(map(str, range(NUM_CLASSES)))
        self._key = list(SIZES).index(split)
        self._digits = _digits_by_class(split)
        drawn = np.random.default_rng([self._key]).random((SIZES[split], 5))
        shares = TAIL ** np.arange(NUM_CLASSES)
        picked = np.searchsorted(np.cumsum(shares / shares.sum()), drawn[:, 1:]).clip(max=NUM_CLASSES - 1)
        # (N, 4): the class in each quarter that is filled, -1 in the others.
        self._classes = np.where(np.arange(4) < 1 + np.floor(4 * drawn[:, :1]), picked, -1)
        self.labels = (self._classes[:, :, None] == np.arange(NUM_CLASSES)).any(axis=1).astype(np.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image_id": index, "label": self.labels[index], "pixels": self._compose(index)}

    def _compose(self, index: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng([self._key, index])
        picture = rng.uniform(10, 70, size=3) + rng.normal(size=(SIDE, SIDE, 3)) * rng.uniform(0, 12)
        corners = rng.permutation([(0, 0), (0, _QUARTER), (_QUARTER, 0), (_QUARTER, _QUARTER)])
        for number, (top, left) in zip(self._classes[index], corners, strict=True):
            if number < 0:
                continue
            digit = self._digits[number][rng.integers(len(self._digits[number]))]
            side = int(rng.integers(_SMALLEST, _LARGEST + 1))
            ink = np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BILINEAR)) / 255.0
            y, x = np.array([top, left]) + rng.integers(_QUARTER - side + 1, size=2)
            area = picture[y : y + side, x : x + side]
            area += ink[..., None] * (rng.uniform(110, 240, size=3) - area)
        return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _digits_by_class(split: str) -> list[npt.NDArray[np.uint8]]:
    """For each class its digits, (n, 28, 28): all of the training ones, or every other of the held-out ones."""
    images, labels = load_digits("train" if split == "train" else "val")
    by_class = [images[labels == number] for number in range(NUM_CLASSES)]
    return by_class if split == "train" else [digits[split == "test" :: 2] for digits in by_class]
