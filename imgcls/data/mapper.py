"""The one mapper (sample -> pixels and label) and its two packings (tensors, detectron2's list of dicts)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from imgcls.data.random_stream import mix, seed_cpu
from imgcls.data.reading import ImageError, read_image
from imgcls.structures import Batch


class SampleError(ValueError):
    """A sample that the transforms cannot make ready; the message names it and the key to change."""


@dataclass(frozen=True)
class BadSample:
    """Travels from a worker in place of a batch: the loader raises it as one clean error in the main process."""

    reason: str


class ClsMapper:
    """Makes ``{"image": (3, H, W) uint8, "label", "image_id"}`` of a sample of a source.

    transform: from a PIL image to a uint8 tensor; it may draw from torch's, numpy's and random's global generators,
        which are set from (seed, epoch, index) before, so that its draws depend on nothing else.
    side: the height and width that must come out (0: any).
    """

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor], *, seed: int = 0, side: int = 0) -> None:
        self.transform, self.seed, self.side = transform, seed, side

    def __call__(self, sample: dict[str, Any], epoch: int = 0) -> dict[str, Any]:
        """Raises :class:`ImageError` for a file that cannot be read, :class:`SampleError` for a wrong size."""
        index = sample["image_id"]
        if "file_name" in sample:
            picture = read_image(sample["file_name"])
        else:
            picture = Image.fromarray(sample["pixels"]).convert("RGB")
        seed_cpu(mix(self.seed, epoch, index))
        try:
            image = self.transform(picture)
        except ValueError as error:  # such as a picture that is smaller than the crop
            raise SampleError(
                f"the transforms cannot work on {_name(sample)}: {error}; change INPUT.TRAIN_TRANSFORMS"
            ) from error
        if self.side and image.shape[-2:] != (self.side, self.side):
            raise SampleError(
                f"the training transforms gave {tuple(image.shape[-2:])} pixels for {_name(sample)}; expected "
                f"{self.side} x {self.side}; change INPUT.TRAIN_TRANSFORMS (begin with a crop or resize) or "
                "INPUT.TRAIN_SIZE"
            )
        return {"image": image, "label": _label(sample["label"]), "image_id": index}


def _label(label: Any) -> int | torch.Tensor:
    if np.ndim(label):
        return torch.as_tensor(label, dtype=torch.float32)  # or numpy's doubles make the loss one
    return operator.index(label)


def _name(sample: dict[str, Any]) -> str:
    return sample.get("file_name", f"sample {sample['image_id']}")


class MappedDataset(torch.utils.data.Dataset):
    """A source seen through a mapper, indexed by (epoch, index); a broken sample comes back as :class:`BadSample`."""

    def __init__(self, source: Any, mapper: ClsMapper) -> None:
        self.source, self.mapper = source, mapper

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | BadSample:
        epoch, index = key
        try:
            return self.mapper(self.source[index], epoch)
        except (ImageError, SampleError) as error:
            return BadSample(str(error))


def collate_tensors(samples: Sequence[dict[str, Any] | BadSample]) -> Batch | BadSample:
    """One :class:`Batch`, stacked in the worker: one shared-memory block per batch instead of one per sample."""
    bad = [sample for sample in samples if isinstance(sample, BadSample)]
    if bad:
        return bad[0]
    good = [sample for sample in samples if not isinstance(sample, BadSample)]
    images = [sample["image"] for sample in good]
    same = all(image.shape == images[0].shape for image in images)
    return Batch(
        images=torch.stack(images) if same else images,
        targets=torch.stack([torch.as_tensor(sample["label"]) for sample in good]),
        ids=torch.tensor([sample["image_id"] for sample in good]),
    )


def collate_dicts(samples: Sequence[dict[str, Any] | BadSample]) -> list[dict[str, Any]] | BadSample:
    """detectron2's list of dicts, for models that take nothing else."""
    for sample in samples:
        if isinstance(sample, BadSample):
            return sample
    return [sample for sample in samples if not isinstance(sample, BadSample)]
