"""The one mapper (sample -> pixels and label), what becomes of bad files, and the two packings of a batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from imgcls.data.batch_buffers import ImageWriter
from imgcls.data.fast_jpeg import FromJpeg, read_fast
from imgcls.data.random_stream import mix, seed_cpu
from imgcls.data.reading import MAX_PIXELS, ImageError, read_image
from imgcls.data.samplers import Draw
from imgcls.structures import Batch

Transform = Callable[[Any], torch.Tensor]

_KEYS = ("INPUT.TRAIN_TRANSFORMS", "INPUT.TRAIN_SIZE")

# Draws in the place of a bad file's before the worker gives up: a set with so many bad ones is no set.
REPLACEMENTS = 100


class SampleError(ValueError):
    """A sample that the transforms cannot make ready; the message names it and the key to change."""


class ClsMapper:
    """Makes ``{"image": (C, H, W) uint8, "label", "image_id"}`` of a sample of a source.

    transform: from a PIL image to a uint8 tensor; it may draw from torch's, numpy's and random's global generators,
        which are set from (seed, epoch, index, repeat) before, so that its draws depend on nothing else. A
        :class:`FromJpeg` gets plain JPEGs undecoded.
    side: the height and width that must come out (0: any).
    at_side: transforms for the other sides that draws may ask for.
    channels: 3 (grey pictures become colour) or 1 (colour pictures become grey).
    """

    def __init__(
        self,
        transform: Transform,
        *,
        seed: int = 0,
        side: int = 0,
        at_side: Mapping[int, Transform] | None = None,
        channels: int = 3,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.transform, self.seed, self.side = transform, seed, side
        self.at_side, self.channels, self.max_pixels = at_side or {}, channels, max_pixels
        self._read = read_fast if isinstance(transform, FromJpeg) else read_image

    def __call__(self, sample: dict[str, Any], draw: Draw) -> dict[str, Any]:
        """Raises :class:`ImageError` for a file that cannot be read, :class:`SampleError` for a wrong size."""
        index = sample["image_id"]
        picture = read_sample(sample, self.max_pixels, self._read)
        if self.channels == 1:
            picture = picture.convert("L")
        self._seed(draw.epoch, index, draw.repeat)
        transform, side = self.at_side.get(draw.side, self.transform), draw.side or self.side
        image = transformed(picture, transform, side, name_of(sample), _KEYS)
        return {"image": image, "label": label_of(sample["label"]), "image_id": index}

    def _seed(self, epoch: int, index: int, repeat: int) -> None:
        # Without the 0, so that a picture's first draw is the same with and without repeats.
        seed_cpu(mix(self.seed, epoch, index, repeat) if repeat else mix(self.seed, epoch, index))


def transformed(picture: Any, transform: Transform, side: int, name: str, keys: tuple[str, str]) -> torch.Tensor:
    """What ``transform`` makes of a picture called ``name``: a square of ``side`` pixels (0: anything).

    Otherwise a :class:`SampleError`. keys: that hold the transforms and the side, to name in the error.
    """
    try:
        image = transform(picture)
    except ImageError:  # found damaged only when it was decoded
        raise
    except ValueError as error:  # such as a picture that is smaller than the crop
        raise SampleError(f"the transforms cannot work on {name}: {error}; change {keys[0]}") from error
    if side and image.shape[-2:] != (side, side):
        raise SampleError(
            f"the training transforms gave {tuple(image.shape[-2:])} pixels for {name}; expected {side} x {side}; "
            f"change {keys[0]} (begin with a crop or resize) or {keys[1]}"
        )
    return image


def read_sample(sample: dict[str, Any], max_pixels: int = MAX_PIXELS, read: Callable[..., Any] = read_image) -> Any:
    """The picture of a source's sample, 8-bit RGB; by ``read`` where it is a file."""
    if "file_name" in sample:
        return read(sample["file_name"], max_pixels=max_pixels)
    if "encoded" in sample:
        return read(sample["encoded"], name=name_of(sample), max_pixels=max_pixels)
    return Image.fromarray(sample["pixels"]).convert("RGB")


def label_of(label: Any) -> int | torch.Tensor:
    """A sample's label as the batch takes it: a class index, or (K,) float32."""
    if np.ndim(label):
        return torch.as_tensor(label, dtype=torch.float32)  # or numpy's doubles make the loss one
    return operator.index(label)


def name_of(sample: dict[str, Any]) -> str:
    """What messages call a sample."""
    return sample.get("file_name") or sample.get("name") or f"sample {sample['image_id']}"


@dataclass(frozen=True)
class BadFile:
    """A picture that could not be read, and why."""

    name: str
    reason: str


@dataclass
class Mapped:
    """What became of one draw: a sample, the bad files met on the way, and what ends the run, if anything does."""

    sample: dict[str, Any] | None = None
    bad: list[BadFile] = field(default_factory=list)
    fatal: str = ""


class MappedDraws(list[Mapped]):
    """Those of a batch, and what wrote their images."""

    def __init__(self, writer: ImageWriter) -> None:
        super().__init__()
        self.writer = writer


class Mapper(Protocol):
    """From a source's sample to what a batch is put together of; all it draws comes from the seed and the draw."""

    seed: int

    def __call__(self, sample: dict[str, Any], draw: Draw) -> dict[str, Any]: ...


class MappedDataset(torch.utils.data.Dataset):
    """A source seen through a mapper, indexed by draws.

    on_bad: ``raise`` (a bad file ends the run), ``replace`` (another sample takes its place: which one is a function
        of the draw alone, so any restart and any number of workers see the same) or ``leave_out``.
    """

    def __init__(self, source: Any, mapper: Mapper, on_bad: str = "raise") -> None:
        self.source, self.mapper, self.on_bad = source, mapper, on_bad

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, draws: Sequence[Draw]) -> list[Mapped]:
        """A whole batch, which torch's DataLoader asks for where it can."""
        writer = ImageWriter(draws)
        mapped = MappedDraws(writer)
        for draw in draws:
            item = self[draw]
            if item.sample is not None and "image" in item.sample:  # and not several views of one
                item.sample["image"] = writer.add(item.sample["image"])
            mapped.append(item)
        return mapped

    def __getitem__(self, draw: Draw) -> Mapped:
        mapped = Mapped()
        for attempt in range(REPLACEMENTS if self.on_bad == "replace" else 1):
            try:
                mapped.sample = self.mapper(self.source[self._index(draw, attempt)], draw)
                return mapped
            except ImageError as error:
                mapped.bad.append(BadFile(error.name, str(error)))
            except (ValueError, OSError) as error:
                # No fault of the file's: transforms that do not fit, or a machine short of open files.
                mapped.fatal = str(error) or type(error).__name__
                return mapped
            except MemoryError:
                mapped.fatal = (
                    f"there is not the memory to read sample {draw.index} of {getattr(self.source, 'name', '')}; lower "
                    "DATALOADER.NUM_WORKERS, SOLVER.IMS_PER_BATCH or INPUT.MAX_PIXELS"
                )
                return mapped
        if self.on_bad == "raise":
            mapped.fatal = mapped.bad[0].reason
        elif self.on_bad == "replace":
            mapped.fatal = (
                f"{REPLACEMENTS} files in a row cannot be read, the first one: {mapped.bad[0].reason}; check "
                "DATASETS.TRAIN"
            )
        return mapped

    def _index(self, draw: Draw, attempt: int) -> int:
        if attempt == 0:
            return draw.index
        return mix(self.mapper.seed, draw.epoch, draw.index, draw.repeat, attempt) % len(self.source)


@dataclass
class Packed:
    """What a worker sends: a batch (None when every sample of it was left out), the bad files, what ends the run."""

    batch: Any
    bad: list[BadFile]
    left_out: int = 0
    fatal: str = ""

    def pin_memory(self) -> Packed:
        """The same in page-locked memory (torch's DataLoader calls this)."""
        if isinstance(self.batch, list):
            self.batch = [{**sample, "image": sample["image"].pin_memory()} for sample in self.batch]
        elif self.batch is not None:
            self.batch = self.batch.pin_memory()
        return self


def collate_tensors(mapped: Sequence[Mapped]) -> Packed:
    """One :class:`Batch`, stacked in the worker: one shared-memory block per batch instead of one per sample."""
    return pack(mapped, partial(stack, writer=getattr(mapped, "writer", None)))


def collate_dicts(mapped: Sequence[Mapped]) -> Packed:
    """detectron2's list of dicts, for models that take nothing else."""
    return pack(mapped, list)


def pack(mapped: Sequence[Mapped], put_together: Callable[[list[dict[str, Any]]], Any]) -> Packed:
    """What a worker sends of its samples: ``put_together`` makes the batch of those that could be read."""
    bad = [file for item in mapped for file in item.bad]
    fatal = next((item.fatal for item in mapped if item.fatal), "")
    samples = [item.sample for item in mapped if item.sample is not None]
    batch = put_together(samples) if samples and not fatal else None
    return Packed(batch, bad, len(mapped) - len(samples), fatal)


def stack(samples: Sequence[dict[str, Any]], writer: ImageWriter | None = None) -> Batch:
    """One batch of what the mapper made; a list of images where their sizes differ. writer: of these images."""
    images: Any = [sample["image"] for sample in samples]
    written = writer.images(len(images)) if writer else None
    if written is not None:
        images = written
    elif all(image.shape == images[0].shape for image in images):
        images = default_collate(images)  # which in a worker stacks into shared memory at once
    return Batch(
        images=images,
        targets=torch.stack([torch.as_tensor(sample["label"]) for sample in samples]),
        ids=torch.tensor([sample["image_id"] for sample in samples]),
    )
