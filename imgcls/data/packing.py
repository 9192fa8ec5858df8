"""Writing a set as WebDataset tar shards, smaller if wanted, with the index that reads them by number."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from imgcls.data.datasets.shard_index import ShardIndex, write_index
from imgcls.data.datasets.shards import checked_index
from imgcls.data.datasets.source import Source
from imgcls.data.random_stream import permutation
from imgcls.data.reading import ImageError, opened, read_image

logger = logging.getLogger(__name__)

# A picture's format by Pillow's name -> the ending of its member in the shard.
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "PPM": "ppm"}
_MISSING = "writing shards needs the webdataset library: pip install 'imgcls[shards]'"


@dataclass(frozen=True)
class PackOptions:
    """How shards are written.

    short_side: pixels; pictures with a longer short side are resized to it (antialiased, aspect kept) and become JPEG.
        0: none is. All others keep their files' bytes.
    quality: of those JPEGs, 1..95.
    shard_bytes, shard_samples: a shard ends before it would have more of either; 0: no limit.
    seed: of the order in which pictures are packed, so that a shard holds a mixture of classes; -1: the set's own.
    workers: processes that read and resize; the shards are the same with any number.
    skip_bad: leave out pictures that cannot be read, instead of ending with an error.
    """

    short_side: int = 0
    quality: int = 90
    shard_bytes: int = 100_000_000
    shard_samples: int = 0
    seed: int = 0
    workers: int = 0
    skip_bad: bool = False


@dataclass
class Packed:
    """What became of a set: how many pictures were resized and copied, and which were left out, with the reasons."""

    resized: int = 0
    copied: int = 0
    left_out: list[str] = field(default_factory=list)
    shards: int = 0
    bytes: int = 0


def pack(source: Source, folder: Path, options: PackOptions) -> Packed:
    """Write ``source`` into ``folder``, which is there and empty: ``shard-000000.tar`` and on, and the index.

    Every picture is decoded once, so that none goes into a shard that cannot be read. Raises
    :class:`~imgcls.data.reading.ImageError` for such a one unless ``skip_bad``, and ``ValueError`` for a label that
    shards cannot hold.
    """
    order = permutation(len(source), options.seed).numpy() if options.seed >= 0 else np.arange(len(source))
    done, kept = Packed(), []
    with _Writer(folder, options) as writer:
        for index, picture in zip(order.tolist(), _pictures(source, order, options), strict=True):
            if picture.fault:
                if not options.skip_bad:
                    raise ImageError(picture.fault, picture.name)
                logger.warning("left out: %s", picture.fault)
                done.left_out.append(picture.fault)
                continue
            writer.write({picture.ending: picture.content, **_label_entry(source, picture)})
            done.resized += picture.resized
            done.copied += not picture.resized
            kept.append(index)
    if not kept:
        raise ValueError(f"no picture of {source.name} can be read; check the set with tools/doctor.py")
    index = checked_index(folder, source.classes, None if source.weights is None else source.weights[kept])
    write_index(index, folder, packed=True)
    _require_what_was_written(index, kept, source)
    done.shards, done.bytes = len(index.shards), sum(shard.bytes for shard in index.shards)
    return done


def _require_what_was_written(index: ShardIndex, kept: list[int], source: Source) -> None:
    if len(index.offsets) != len(kept) or (
        source.labels is not None and not np.array_equal(index.labels, source.labels[kept])
    ):
        raise AssertionError(f"{source.name}: the shards read back otherwise than they were written")


@dataclass(frozen=True)
class _Picture:
    """What a worker hands back: the bytes to store and their ending, or why there are none."""

    name: str
    label: Any = None
    content: bytes = b""
    ending: str = ""
    resized: bool = False
    fault: str = ""


class _Encoder(Dataset):
    """The pictures of a source in the order of packing, as they are to be stored."""

    def __init__(self, source: Source, order: np.ndarray, options: PackOptions) -> None:
        self.source, self.order, self.options = source, order, options

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> _Picture:
        sample = self.source[int(self.order[place])]
        name = sample.get("file_name") or sample.get("name") or f"sample {sample['image_id']} of {self.source.name}"
        try:
            content = _file_bytes(sample, name)
            picture = read_image(content, name=name)
        except ImageError as error:
            return _Picture(name, fault=str(error))
        if 0 < self.options.short_side < min(picture.size):
            content = _smaller(picture, self.options)
            return _Picture(name, sample["label"], content, "jpg", resized=True)
        with opened(content, name) as image:
            ending = ENDINGS.get(image.format or "", (image.format or "img").lower())
        return _Picture(name, sample["label"], content, ending)


def _file_bytes(sample: dict[str, Any], name: str) -> bytes:
    if "file_name" in sample:
        try:
            return Path(sample["file_name"]).read_bytes()
        except OSError as error:
            raise ImageError(
                f"cannot read the image {name}: {error.strerror}; replace it or remove it", name
            ) from error
    if "encoded" in sample:
        return bytes(sample["encoded"])
    stream = io.BytesIO()
    Image.fromarray(sample["pixels"]).save(stream, "PNG")
    return stream.getvalue()


def _smaller(picture: Image.Image, options: PackOptions) -> bytes:
    scale = options.short_side / min(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    stream = io.BytesIO()
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)  # Pillow's resizing is antialiased
    resized.save(stream, "JPEG", quality=options.quality)
    return stream.getvalue()


def _pictures(source: Source, order: np.ndarray, options: PackOptions) -> Iterator[_Picture]:
    """In order, whatever the number of workers."""
    encoder = _Encoder(source, order, options)
    as_it_is: Any = _as_it_is  # torch's annotation knows batches only
    try:
        yield from DataLoader(encoder, batch_size=None, num_workers=options.workers, collate_fn=as_it_is)
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise ValueError(
            f"a packing worker failed: {str(error).splitlines()[0]} Try again with fewer --workers"
        ) from error


def _as_it_is(picture: _Picture) -> _Picture:
    return picture


def _label_entry(source: Source, picture: _Picture) -> dict[str, bytes]:
    """The label's member: WebDataset's ``cls``, or ``json`` with the names where there may be several."""
    label = picture.label
    if not source.multi_label and np.ndim(label) == 0:
        if int(label) < 0:
            raise ValueError(f"{picture.name} has no label; shards are of labelled pictures; change --data")
        return {"cls": str(int(label)).encode()}
    values = np.asarray(label)
    if not source.multi_label or not np.isin(values, (0, 1)).all():
        raise ValueError(f"{picture.name} has shares of classes as its label; shards hold classes only; change --data")
    names = [source.classes[column] for column in np.flatnonzero(values)]
    return {"json": json.dumps({"labels": names}, ensure_ascii=False).encode()}


class _Writer:
    """Samples into numbered shards through webdataset's own writer, with nothing in them that depends on time."""

    def __init__(self, folder: Path, options: PackOptions) -> None:
        try:
            from webdataset import TarWriter
        except ImportError as error:
            raise ImportError(_MISSING) from error
        self._make, self.folder, self.options = TarWriter, folder, options
        self._file: Any = None
        self._tar: Any = None
        self.shards = self.samples = self._inside = self._bytes = 0

    def write(self, members: dict[str, bytes]) -> None:
        """Write a sample: ending -> bytes."""
        size = sum(len(content) for content in members.values())
        limits = self.options.shard_samples, self.options.shard_bytes
        full = any(0 < limit < now for limit, now in zip(limits, (self._inside + 1, self._bytes + size), strict=True))
        if self._tar is None or (full and self._inside):
            self._begin()
        self._tar.write({"__key__": f"{self.samples:09d}", **members})
        self.samples += 1
        self._inside += 1
        self._bytes += size

    def _begin(self) -> None:
        self._end()
        self._file = (self.folder / f"shard-{self.shards:06d}.tar").open("wb")
        self._tar = self._make(self._file, encoder=False, mtime=0)
        self.shards += 1
        self._inside = self._bytes = 0

    def _end(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            self._tar = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
