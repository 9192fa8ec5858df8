"""Classes turned by quarter turns as further classes, as is usual for Omniglot.

Vinyals et al. 2016, section 4.1.1; Snell et al. 2017, section 3.1: 4,800 classes to train on of 1,200 characters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from imgcls.data.datasets.source import Source
from imgcls.data.mapper import name_of, read_sample
from imgcls.data.reading import MAX_PIXELS

# Counterclockwise, in degrees.
TURNS = (0, 90, 180, 270)
_TRANSPOSES = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


class RotatedClasses(Source):
    """Every class of a set four times: as it is, and turned by 90, 180 and 270 degrees as classes of their own.

    With N pictures of K classes in the set, picture ``t * N + i`` of class ``t * K + c`` is its picture i of class c,
    turned by ``t`` quarter turns. max_pixels: of a picture that is read, at most.
    """

    def __init__(self, source: Source, max_pixels: int = MAX_PIXELS) -> None:
        if source.labels is None or source.labels.ndim > 1:
            raise ValueError(
                f"{source.name} cannot have its classes rotated: each picture needs one label, known before it is "
                "read; change the data set"
            )
        self.name, self.source, self.max_pixels = f"rotated:{source.name}", source, max_pixels
        self.classes = tuple(f"{name}@{turn}" if turn else name for turn in TURNS for name in source.classes)
        labels, number = source.labels, len(source.classes)
        turned = [np.where(labels < 0, labels, labels + turns * number) for turns in range(len(TURNS))]
        self.labels: np.ndarray = np.concatenate(turned)
        self.weights = None if source.weights is None else np.tile(source.weights, len(TURNS))

    def check_files(self) -> None:
        self.source.check_files()

    def __len__(self) -> int:
        return len(TURNS) * len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        turns, place = divmod(index, len(self.source))
        sample = {**self.source[place], "image_id": index, "label": int(self.labels[index])}
        if turns == 0:
            return sample
        picture = read_sample(sample, self.max_pixels).transpose(_TRANSPOSES[turns])
        kept = {key: value for key, value in sample.items() if key not in ("file_name", "encoded")}
        return {**kept, "name": name_of(sample), "pixels": np.asarray(picture)}
