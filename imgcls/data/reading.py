"""The one image reader: every command that looks at a picture goes through it."""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
# What a file may hold, whatever its ending. Not all that Pillow knows: PostScript it hands to Ghostscript to be run.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

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
_QUARTER_TURNS = range(5, 9)
_TIFF_BITS_PER_SAMPLE = 258
_JPEG_END = b"\xff\xd9"
_BLOCK = 1 << 20  # bytes
_MOST_JPEG_BYTES = 8  # for a pixel; noise in the best quality has half of them
# Pixels of a picture at most: reading takes 8 bytes of memory for each, of some kinds up to 17, in every worker.
MAX_PIXELS = 64_000_000
# No fault of the file's: the process has too many files open, or the machine no memory.
_MACHINE_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class ImageError(ValueError):
    """A file that is no readable image; the message names it, and so does ``name``."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def read_image(source: str | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in the file ``source``, as 8-bit RGB, upright as its EXIF tag says (detectron2 turns pictures too).

    source: a path, or the bytes of an image file, which messages then call ``name``.
    max_pixels: more are refused before anything is decoded.

    Sixteen-bit levels are scaled to eight bits (Pillow alone would clip greys to white). Transparency is dropped and
    of an animation the first frame is taken, as detectron2 and torchvision do. Anything that cannot be decoded to the
    last byte is an :class:`ImageError`, whatever Pillow has been told to put up with.
    """
    with opened(source, name) as image:
        _require_few(image, max_pixels)
        _require_range(image)
        _require_end(image)
        # load() and not verify(): only decoding sees a truncated file.
        image.load()
        upright = _UPRIGHT.get(_orientation(image))
        picture = _to_rgb(image)
    # Outside, where what was decoded is gone: a turn needs the picture twice, and it would be there three times.
    return picture if upright is None else picture.transpose(upright)


def read_size(source: str | bytes, *, name: str = "") -> tuple[int, int]:
    """(width, height) in pixels of the picture as :func:`read_image` gives it; raises :class:`ImageError` as well."""
    with opened(source, name) as image:
        width, height = image.size
        # The header of a TIFF is Pillow's to turn, when it opens the file.
        turned = image.format != "TIFF" and _orientation(image) in _QUARTER_TURNS
        return (height, width) if turned else (width, height)


def read_orientation(source: str | bytes, *, name: str = "") -> int:
    """How EXIF says that the picture lies, 1..8; 1 where it says nothing. Raises :class:`ImageError` as well."""
    with opened(source, name) as image:
        return _orientation(image)


def check_header(source: str | bytes, *, name: str = "") -> None:
    """Raise :class:`ImageError` if ``source`` does not even begin like an image; cheap, decodes nothing."""
    with opened(source, name):
        pass


@contextmanager
def opened(source: str | bytes, name: str = "") -> Iterator[ImageFile.ImageFile]:
    """Pillow's image of which only the header was read, to ask for its mode or format; faults are `ImageError`s."""
    name = name or (source if isinstance(source, str) else "in memory")
    try:
        # Pillow's warnings name no file, and those of damage are about what is read well enough or refused here.
        with _strict(), warnings.catch_warnings(), _bytes_of(source) as file:
            warnings.simplefilter("ignore")
            with closing(Image.open(file, formats=FORMATS)) as image:  # which frees its pixels; its own "with" does not
                yield image
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make a decoder raise anything
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            raise
        reason = f"cannot read the image {_in_one_line(name)}: {_reason(error)}; replace the file or remove it"
        raise ImageError(reason, name) from error


def _bytes_of(source: str | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        file: BinaryIO = io.BytesIO(source)
        size = len(source)
    else:
        status = os.stat(source)
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        # A file and not its path, which Pillow may map: a mapped file that shrinks kills the process.
        file, size = open(source, "rb"), status.st_size  # noqa: SIM115  # the caller's "with" closes it
    if size == 0:
        file.close()
        raise ValueError("it is empty")
    return file


@contextmanager
def _strict() -> Iterator[None]:
    """Other code may have told Pillow to make do with half a file."""
    told = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = told


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, or a damaged one"
    if isinstance(error, Image.DecompressionBombError):
        return "it has more pixels than INPUT.MAX_PIXELS may allow"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _in_one_line(str(error)) or type(error).__name__


def _in_one_line(text: str) -> str:
    """Line breaks and bytes that are no UTF-8, both legal in file names, as escapes: logs are lines of UTF-8."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _require_few(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(
            f"it has {width} x {height} = {width * height:,} pixels, more than INPUT.MAX_PIXELS {max_pixels:,}"
        )


def _require_range(image: Image.Image) -> None:
    """Which values are black and white must be agreed on: Pillow would make these all of one or the other."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    # Only a TIFF can say "12 bits" or "32 bits, signed".
    if image.format == "TIFF" and image.mode.startswith("I"):
        bits = image.tag_v2.get(_TIFF_BITS_PER_SAMPLE)  # type: ignore[attr-defined]
        if image.mode == "I" or bits != (16,):
            raise ValueError("integer pixels of other than 16 unsigned bits have no agreed range")


def _require_end(image: ImageFile.ImageFile) -> None:
    """A JPEG whose last part never arrived and is zeros decodes to the end, as grey; but its end marker is missing."""
    if image.format not in ("JPEG", "MPO"):
        return
    file = image.fp
    assert file is not None
    first_scan = file.tell()  # Pillow has read on to there; the marker of a thumbnail lies before
    file.seek(-len(_JPEG_END), os.SEEK_END)
    if file.read() == _JPEG_END:
        return
    file.seek(first_scan)
    before = b""
    # A file may claim more bytes than the disk has: there is no looking through them all.
    for _ in range(1 + _MOST_JPEG_BYTES * image.width * image.height // _BLOCK):
        block = file.read(_BLOCK)
        if _JPEG_END in before + block:
            return
        before = block[-1:]
        if not block:
            break
    raise ValueError("its end marker is missing")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF (ImageNet has some) is no damaged picture; detectron2 does likewise
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # Pillow warns of the way straight to RGB; the colours are the same
    return image.convert("RGB")


# To the nearest level of eight bits; row by row below, for numpy's indices take eight bytes each.
_LEVELS = ((np.arange(65536) + 128) // 257).astype(np.uint8)


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)  # mode "I" is how Pillow hands out 16-bit PGM, and PNG in old releases
    if values.min() < 0 or values.max() >= len(_LEVELS):
        raise ValueError("integer pixels outside 0..65535 have no agreed range")
    return Image.fromarray(np.stack([_LEVELS[row] for row in values])).convert("RGB")
