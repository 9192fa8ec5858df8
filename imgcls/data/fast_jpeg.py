"""Fast reading of JPEG files: only what the first transform keeps of a picture is made into pixels.

A plain JPEG stays undecoded (:class:`Jpeg`) until the transforms know the box to cut out (:class:`FromJpeg`). Then

- rows below the box are not decoded: a decoder stops at the height in the frame header, so that is lowered;
- a large picture is decoded at 1/2, 1/4 or 1/8 of its size, as long as the box stays no smaller than what becomes of
  it: the inverse transform makes 4 x 4, 2 x 2 or 1 x 1 pixels of a block of 8 x 8, which libjpeg has always offered;
- the box is resized with torch's antialiased kernel for bytes, whose results are Pillow's within one level.

Files that are no plain JPEG, or that the decoder warns of, are left to :func:`imgcls.data.reading.read_image`, and so
is everything where simplejpeg cannot be imported: what is refused and why is the same either way.
"""

from __future__ import annotations

import os
import stat
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from imgcls.data.jpeg_header import Frame, plain_frame
from imgcls.data.reading import MAX_PIXELS, read_image, read_orientation

try:
    import simplejpeg
except ImportError:  # no wheel for this platform
    simplejpeg = None

_SCALES = (8, 4, 2)  # other eighths exist; without vector code they cost more than they save
_MOST_BYTES = 1 << 28  # a file may claim more than there is memory; the exact reader does not take all of it
_PILLOW_FILTERS = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
}
# EXIF's orientation -> (transposed, then turned upside down, then mirrored) to be upright.
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
Size = tuple[int, int]  # height, width, in pixels


class DamagedError(ValueError):
    """The decoder warned of a file; the exact reader decides what becomes of it."""


def read_fast(source: str | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Jpeg | Image.Image:
    """A plain JPEG as :class:`Jpeg`; anything else as :func:`read_image` reads or refuses it."""
    data = _content(source) if simplejpeg else None
    frame = plain_frame(data) if data else None
    if data is None or frame is None or frame.height * frame.width > max_pixels:
        return read_image(source, name=name, max_pixels=max_pixels)
    name = name or (source if isinstance(source, str) else "")
    orientation = read_orientation(bytes(data), name=name) if frame.tagged else 1
    return Jpeg(data, frame, orientation, name)


def _content(source: str | bytes) -> bytearray | None:
    """All bytes, to be changed at will; None for what cannot be read, the exact reader says why."""
    if isinstance(source, bytes):
        return bytearray(source)
    try:
        # Opening a pipe would wait for ever.
        file = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            return None
        data = bytearray(status.st_size)
        return data if os.readv(file, [data]) == len(data) else None
    except OSError:
        return None
    finally:
        os.close(file)


class Part(NamedTuple):
    """Decoded pixels (H, W, 3) uint8, and the box among them that was asked for; it need not begin at a whole one."""

    pixels: np.ndarray
    box: tuple[float, float, float, float]

    def resized(self, size: Size, mode: InterpolationMode) -> torch.Tensor:
        """The box at ``size``, antialiased: (3, height, width) uint8."""
        height, width = self.pixels.shape[:2]
        if self.box != (0, 0, width, height) or mode is InterpolationMode.NEAREST:
            # torch's kernel begins at whole pixels. Few boxes do not: those of pictures that were reduced.
            image = Image.fromarray(np.ascontiguousarray(self.pixels))
            return v2.functional.pil_to_tensor(image.resize(size[::-1], _PILLOW_FILTERS[mode], self.box))
        planes = torch.from_numpy(self.pixels).permute(2, 0, 1)
        return torch.nn.functional.interpolate(planes[None], size, mode=mode.value, antialias=True)[0]


class Jpeg:
    """A plain JPEG file that was looked at and not decoded.

    orientation: EXIF's. name: for messages.
    size: (width, height) in pixels, of the upright picture.
    """

    def __init__(self, data: bytearray, frame: Frame, orientation: int, name: str) -> None:
        self._data, self._frame, self._name = data, frame, name
        self._turns = _TURNS.get(orientation, (False, False, False))
        self.size = (frame.height, frame.width) if self._turns[0] else (frame.width, frame.height)

    def exact(self) -> Image.Image:
        """The whole picture, by the exact reader."""
        return read_image(bytes(self._data), name=self._name, max_pixels=self._frame.height * self._frame.width)

    def resized(self, box: Box, size: Size, mode: InterpolationMode) -> torch.Tensor:
        """The part of the upright picture within ``box`` at ``size``: (3, height, width) uint8.

        Raises :class:`DamagedError`.
        """
        decoded = self.decode(box, size, mode)
        transposed, flipped, mirrored = self._turns
        pixels = decoded.resized(size[::-1] if transposed else size, mode)
        if transposed:
            pixels = pixels.transpose(1, 2)
        axes = [axis for axis, turned in ((1, flipped), (2, mirrored)) if turned]
        return (pixels.flip(axes) if axes else pixels).contiguous()

    def decode(self, box: Box, size: Size, mode: InterpolationMode) -> Part:
        """What :meth:`resized` resizes: as it lies in the file, and reduced as far as ``size`` allows."""
        transposed, flipped, mirrored = self._turns
        left, top, right, bottom = box
        width, height = self.size
        if mirrored:
            left, right = width - right, width - left
        if flipped:
            top, bottom = height - bottom, height - top
        if transposed:
            left, top, right, bottom = top, left, bottom, right
            size = size[::-1]
        scale = 1
        if mode is not InterpolationMode.NEAREST:
            fits = min((right - left) / size[1], (bottom - top) / size[0])
            scale = next((scale for scale in _SCALES if scale <= fits), 1)
        pixels = self._rows(bottom, scale)
        # Whole pixels around the box, and the box among them.
        x, y = left // scale, top // scale
        pixels = pixels[y : -(-bottom // scale), x : -(-right // scale)]
        return Part(pixels, (left / scale - x, top / scale - y, right / scale - x, bottom / scale - y))

    def _rows(self, bottom: int, scale: int) -> np.ndarray:
        """The picture's rows down to ``bottom`` or further, at 1/``scale`` of the size."""
        data, frame = self._data, self._frame
        # One row more than needed: where chroma is coarser than luma, it is interpolated between rows.
        height = min(frame.height, (bottom // frame.unit + 1) * frame.unit)
        pixels = np.empty((-(-height // scale), -(-frame.width // scale), 3), np.uint8)
        bounds = {"min_height": pixels.shape[0], "min_width": pixels.shape[1]} if scale > 1 else {}
        stated = data[frame.height_field]
        data[frame.height_field] = height.to_bytes(2, "big")
        try:
            simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=pixels, **bounds)
        except ValueError as error:
            # The first thing to complain of being what stands below the last row means: all was well until there.
            if height == frame.height or "extraneous bytes before marker" not in str(error):
                raise DamagedError(str(error)) from error
        finally:
            data[frame.height_field] = stated
        return pixels


class FromJpeg:
    """``transform``, for pictures and for :class:`Jpeg`, of which it decodes what its first step keeps.

    transform: a Compose that begins with a resize or a random resized crop; see :func:`from_jpeg`.
    Its draws are the same for both.
    """

    def __init__(self, transform: v2.Compose) -> None:
        self.transform = transform
        self._first, *rest = transform.transforms
        self.interpolation: InterpolationMode = self._first.interpolation
        # Mirroring moves pixels only, so a tensor does as well and needs no way through a Pillow image.
        on_tensors = all(type(step) in (v2.RandomHorizontalFlip, v2.RandomVerticalFlip) for step in rest[:-1])
        self._rest = rest[:-1] if on_tensors else [v2.functional.to_pil_image, *rest]

    def __call__(self, picture: Jpeg | Image.Image) -> torch.Tensor:
        if not isinstance(picture, Jpeg):
            return self.transform(picture)
        box, size = self.keeps(picture)
        mode = self.interpolation
        try:
            result: Any = picture.resized(box, size, mode)
        except DamagedError:
            image = picture.exact().crop(box).resize(size[::-1], _PILLOW_FILTERS[mode])
            result = v2.functional.pil_to_tensor(image)
        for step in self._rest:
            result = step(result)
        return result

    def keeps(self, picture: Jpeg) -> tuple[Box, Size]:
        """The box that the first step cuts out of ``picture``, drawn if random, and what size it becomes."""
        (width, height), size = picture.size, self._first.size
        if isinstance(self._first, v2.RandomResizedCrop):
            drawn = self._first.make_params([torch.empty(()).expand(1, height, width)])
            left, top = drawn["left"], drawn["top"]
            return (left, top, left + drawn["width"], top + drawn["height"]), (size[0], size[1])
        if len(size) == 2:
            return (0, 0, width, height), (size[0], size[1])
        short, long = min(width, height), int(size[0] * max(width, height) / min(width, height))
        return (0, 0, width, height), ((size[0], long) if height == short else (long, size[0]))


def from_jpeg(transform: v2.Compose) -> FromJpeg | v2.Compose:
    """``transform`` such that it takes what :func:`read_fast` returns, where its first step makes that worthwhile."""
    first = transform.transforms[0]
    resizes = isinstance(first, v2.RandomResizedCrop) or (type(first) is v2.Resize and first.max_size is None)
    return FromJpeg(transform) if resizes and first.interpolation in _PILLOW_FILTERS else transform
