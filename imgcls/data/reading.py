"""The one image reader: every command that looks at a picture goes through it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})

# EXIF's orientation (where row 0 and column 0 of the stored picture lie) -> what makes it upright; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS_PER_SAMPLE = 258


class ImageError(ValueError):
    """A file that is no readable image; the message names it."""


def read_image(path: str) -> Image.Image:
    """The picture at ``path`` as 8-bit RGB, upright as its EXIF tag says (detectron2 turns pictures too).

    Sixteen-bit greys are scaled to eight bits (Pillow alone would clip them to white). Transparency is dropped and
    of an animation the first frame is taken, as detectron2 and torchvision do. Anything that cannot be decoded to the
    last byte is an :class:`ImageError`.
    """
    with _opened(path) as image:
        # load() and not verify(): only decoding sees a truncated file.
        image.load()
        upright = _UPRIGHT.get(_orientation(image))
        picture = _to_rgb(image)
        return picture if upright is None else picture.transpose(upright)


def check_header(path: str) -> None:
    """Raise :class:`ImageError` if ``path`` does not even begin like an image; cheap, decodes nothing."""
    with _opened(path):
        pass


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is not a regular file")
        with Image.open(path) as image:
            yield image
    except Exception as error:  # a damaged file can make a decoder raise anything
        reason = str(error) or type(error).__name__
        raise ImageError(f"cannot read the image {path}: {reason}; replace the file or remove it") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF (ImageNet has some) is no damaged picture; detectron2 does likewise
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # Pillow warns of the way straight to RGB; the colours are the same
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    # Only a TIFF can say "12 bits" or "32 bits, signed"; whatever the values of one such file, black is not agreed on.
    if image.format == "TIFF" and (image.mode == "I" or image.tag_v2.get(_TIFF_BITS_PER_SAMPLE) != (16,)):  # type: ignore[attr-defined]
        raise ValueError("integer pixels of other than 16 unsigned bits have no agreed range")
    values = np.asarray(image).astype(np.int64)  # mode "I" is how Pillow hands out 16-bit PGM, and PNG in old releases
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integer pixels outside 0..65535 have no agreed range")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
