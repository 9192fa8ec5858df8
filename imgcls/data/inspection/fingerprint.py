"""What the doctor keeps of a picture: digests, a thumbnail, its size and kind; some 2 KB instead of a photograph."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image

from imgcls.data.mapper import read_sample
from imgcls.data.reading import opened

THUMB = 40  # pixels, side of the grey thumbnail
COLOUR = 8  # pixels, side of the colour thumbnail
# Bit k of Fingerprint.kinds says that the picture is of the k-th kind.
KINDS = ("grey", "grey in colour", "palette", "transparent", "CMYK", "16 bits", "turned by EXIF", "animated")


class Fingerprint(NamedTuple):
    """One picture. Of a picture that cannot be read only ``error`` and ``label`` mean anything.

    error: why it cannot be read; empty when it can.
    label: its sample's.
    content, pixels: SHA-256 of the file's bytes, and of the decoded 8-bit RGB pixels with their size.
    thumb: (THUMB, THUMB) uint8, grey. colour: (COLOUR, COLOUR, 3) uint8, RGB. Both show the whole picture, squeezed.
    size: width and height in pixels, upright.
    kinds: bits, see :data:`KINDS`.
    moments: (2, 3) mean of the RGB values and of their squares, values in 0..255.
    """

    error: str
    label: Any = -1
    content: bytes = b""
    pixels: bytes = b""
    thumb: np.ndarray | None = None
    colour: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    kinds: int = 0
    moments: np.ndarray | None = None


def fingerprint(sample: dict[str, Any], max_pixels: int) -> Fingerprint:
    """Decode a source's sample once, to the last byte; what cannot be read comes back with ``error`` set."""
    try:
        picture = read_sample(sample, max_pixels)
        content, kinds = _file_facts(sample)
    except (ValueError, OSError) as error:
        return Fingerprint(" ".join(str(error).split()), sample["label"])
    except MemoryError:
        return Fingerprint("decoding it takes more memory than the doctor allows", sample["label"])
    values = np.asarray(picture)
    if not kinds & _bit("grey") and _is_grey(values):
        kinds |= _bit("grey in colour")
    return Fingerprint(
        error="",
        label=sample["label"],
        content=content,
        pixels=hashlib.sha256(repr(picture.size).encode() + values.tobytes()).digest(),
        thumb=_squeezed(cv2.cvtColor(values, cv2.COLOR_RGB2GRAY), THUMB),
        colour=_squeezed(values, COLOUR),
        size=picture.size,
        kinds=kinds,
        moments=_moments(values),
    )


def _file_facts(sample: dict[str, Any]) -> tuple[bytes, int]:
    """The SHA-256 of the file's bytes and its kinds, as its header tells them."""
    if "pixels" in sample:
        values = np.ascontiguousarray(sample["pixels"])
        kinds = _bit("grey") if values.ndim == 2 else 0
        return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).digest(), kinds
    data = sample["encoded"] if "encoded" in sample else Path(sample["file_name"]).read_bytes()
    with opened(data) as image:
        return hashlib.sha256(data).digest(), _kinds_of(image)


def _kinds_of(image: Image.Image) -> int:
    mode = image.mode
    holds = {
        "grey": mode in ("1", "L", "LA", "La") or mode.startswith("I"),
        "palette": mode in ("P", "PA"),
        "transparent": mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in image.info,
        "CMYK": mode == "CMYK",
        "16 bits": mode.startswith("I"),
        "turned by EXIF": _is_turned(image),
        "animated": bool(getattr(image, "is_animated", False)),
    }
    return sum(_bit(kind) for kind, there in holds.items() if there)


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # damaged EXIF; the reader passes over it too
        return False


def _bit(kind: str) -> int:
    return 1 << KINDS.index(kind)


def _is_grey(values: np.ndarray) -> bool:
    red, green, blue = values[..., 0], values[..., 1], values[..., 2]
    return bool((red == green).all() and (green == blue).all())


def _squeezed(values: np.ndarray, side: int) -> np.ndarray:
    # Averaging areas, where they are larger than a pixel, makes a resized copy look the same.
    mode = cv2.INTER_AREA if min(values.shape[:2]) >= side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(values, (side, side), interpolation=mode))


def _moments(values: np.ndarray) -> np.ndarray:
    count = values.shape[0] * values.shape[1]
    mean, deviation = cv2.meanStdDev(values)
    assert count
    return np.stack([mean[:, 0], deviation[:, 0] ** 2 + mean[:, 0] ** 2]).astype(np.float32)
