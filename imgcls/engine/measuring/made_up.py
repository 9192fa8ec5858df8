"""Batches of random pixels, and a set with a length alone, for measuring what a config costs without its data."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode

from imgcls.data import Source
from imgcls.engine.setup import Data
from imgcls.structures import Batch


class LengthOnly(Source):
    """A set that knows how many pictures it has, and has none."""

    def __init__(self, length: int, classes: tuple[str, ...]) -> None:
        self.name, self.classes, self._length = "made up", classes, length

    def __len__(self) -> int:
        return self._length


def made_up_data(data: Data) -> Data:
    """What a run asks of ``data`` before it reads any: the length of the training set, and the classes."""
    return Data(LengthOnly(data.images, data.classes), None, data.classes)


def made_up_batch(cfg: CfgNode, images: int, *, seed: int = 0) -> Batch:
    """``images`` random pictures (uint8) with targets, in memory, of the largest side that ``cfg`` trains on.

    cfg: with everything decided, as engine.setup does.
    """
    generator = torch.Generator().manual_seed(seed)
    side = max([cfg.INPUT.TRAIN_SIZE, *(side for _, side in cfg.INPUT.TRAIN_SIZE_STEPS)])
    shape = (images, len(cfg.MODEL.PIXEL_MEAN), side, side)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    classes = cfg.MODEL.HEAD.NUM_CLASSES
    if cfg.MODEL.HEAD.MULTI_LABEL:
        targets = torch.randint(0, 2, (images, classes), generator=generator).float()
    else:
        targets = torch.randint(0, classes, (images,), generator=generator)
    return Batch(pixels, targets, torch.arange(images))
