"""Picture files of every kind, made of one small picture: by Pillow where it can, by hand where it cannot."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Smooth, so that a JPEG keeps it to a few levels, and without any symmetry: every turn of it is another picture.
_ROWS, _COLUMNS = np.mgrid[0:40, 0:48]
PICTURE = np.dstack([_COLUMNS * 5, _ROWS * 6, (_ROWS + _COLUMNS) * 2]).astype(np.uint8)
GREY = PICTURE[..., 0]
SMALL = PICTURE[:16, :24]  # what the JPEGs show that Pillow cannot write


def encoded(form: str, pixels: np.ndarray | Image.Image = PICTURE, **options: Any) -> bytes:
    """``pixels`` written by Pillow."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(pixels: np.ndarray | Image.Image = PICTURE, **options: Any) -> bytes:
    return encoded("JPEG", pixels, quality=95, subsampling=0, **options)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, bits: int, colours: int, rows: bytes, *extra: bytes, interlaced: bool = False
) -> bytes:
    """A PNG by hand (its specification, section 11): bits a sample, colour type, rows each behind its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, int(interlaced))
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_of(samples: np.ndarray, colours: int, *extra: bytes) -> bytes:
    """A PNG of (H, W) or (H, W, C) uint8 or uint16."""
    height, width = samples.shape[:2]
    big = samples.astype(f">u{samples.itemsize}")
    return png(width, height, 8 * samples.itemsize, colours, b"".join(b"\0" + row.tobytes() for row in big), *extra)


def png_of_bits(levels: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits a pixel."""
    rows = [np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel() for row in levels.astype(np.uint8)]
    return png(levels.shape[1], len(levels), bits, 0, b"".join(b"\0" + np.packbits(row).tobytes() for row in rows))


def interlaced_png() -> bytes:
    """Adam7 (section 8.2): seven passes over a grid of 8 x 8, by first row, first column and the steps."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [row for y, x, down, along in passes for row in PICTURE[y::down, x::along]]
    return png(48, 40, 8, 2, b"".join(b"\0" + row.tobytes() for row in rows), interlaced=True)


def blank_png(width: int, height: int) -> bytes:
    """A whole grey picture of zeros: one compressed piece again and again, so that a huge one costs nothing to make."""
    piece_bytes = 1 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(piece_bytes)) + packer.flush(zlib.Z_FULL_FLUSH)
    size = height * (width + 1)
    whole, rest = divmod(size, piece_bytes)
    last = zlib.compressobj(9, zlib.DEFLATED, -15)
    # Adler-32 (RFC 1950) of n zeros: the sums are 1 and n.
    body = b"\x78\x9c" + piece * whole + last.compress(bytes(rest)) + last.flush()
    body += struct.pack(">HH", size % 65521, 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(bits: int, data: bytes, width: int, height: int, *, signed_or_float: int = 1, samples: int = 1) -> bytes:
    """An uncompressed TIFF by hand (TIFF 6.0, section 2); ``signed_or_float`` is SampleFormat: 2 or 3."""
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 2 if samples == 3 else 1, 273: 8, 277: samples}
    entries |= {278: height, 279: len(data), 339: signed_or_float}
    tail = b""
    directory_at = 8 + len(data)
    body = b""
    for tag, value in sorted(entries.items()):
        if tag in (258, 339) and samples == 3:
            at = directory_at + 2 + 12 * len(entries) + 4 + len(tail)
            body, tail = body + struct.pack("<HHII", tag, 3, 3, at), tail + struct.pack("<HHH", *[value] * 3)
        else:
            body += struct.pack("<HHII", tag, 4, 1, value)
    return b"II*\0" + struct.pack("<I", directory_at) + data + struct.pack("<H", len(entries)) + body + bytes(4) + tail


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def ifd_entries(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block with one directory of (tag, type, count, 4 bytes)."""
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


def exif_with_thumbnail() -> bytes:
    """IFD1 holds a JPEG of its own (EXIF 2.32, section 4.5.5), red all over."""
    thumbnail = jpeg(np.full((8, 8, 3), [255, 0, 0], np.uint8))
    first = struct.pack("<H", 0) + struct.pack("<I", 14)
    second = struct.pack("<HHHIIHHII", 2, 0x0201, 4, 1, 14 + 2 + 24 + 4, 0x0202, 4, 1, len(thumbnail)) + bytes(4)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + second + thumbnail


def sized_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header promises another size than its data have."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def inks(picture: np.ndarray) -> np.ndarray:
    """Cyan, magenta, yellow and black (H, W, 4) whose colours are ``picture``: (255 - C) (255 - K) / 255."""
    return np.dstack([255 - picture, np.zeros_like(picture[..., 0])])


def ycck() -> bytes:
    """Adobe's YCCK: the amounts of the three inks carried as Y, Cb and Cr, and beside them the black ink, inverted."""
    ycc = np.asarray(Image.fromarray(255 - PICTURE).convert("YCbCr"))
    # Pillow inverts what it is given as CMYK.
    stored = 255 - np.dstack([ycc, np.full_like(GREY, 255)])
    data = bytearray(jpeg(Image.fromarray(stored, "CMYK")))
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    data[at] = 2
    return bytes(data)


def share(data: bytes, part: float) -> bytes:
    return data[: int(len(data) * part)]


def zeros_after(data: bytes, part: float) -> bytes:
    return share(data, part).ljust(len(data), b"\0")


def stretched(path: Path, start: bytes) -> None:
    """A file that claims more bytes than the disk has; what lies behind ``start`` reads as zeros."""
    path.write_bytes(start)
    os.truncate(path, 1 << 40)


def noise(side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def changed_in_idat(*, mend_checksum: bool) -> bytes:
    """A byte in the middle of the compressed pixels is another one."""
    data = encoded("PNG", noise())
    start = data.index(b"IDAT") - 4
    length = int.from_bytes(data[start : start + 4], "big")
    body = bytearray(data[start + 8 : start + 8 + length])
    body[length // 2] ^= 0xFF
    check = zlib.crc32(b"IDAT" + bytes(body)) if mend_checksum else zlib.crc32(data[start + 4 : start + 8 + length])
    return data[: start + 8] + bytes(body) + struct.pack(">I", check) + data[start + 12 + length :]


def animated(form: str, **options: Any) -> bytes:
    frames = [Image.fromarray(frame) for frame in (PICTURE, 255 - PICTURE, PICTURE // 2)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


def webp_header(width: int, height: int) -> bytes:
    """An extended WebP (its container specification) that promises a canvas and has one tiny frame."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    tiny = encoded("WEBP", PICTURE)[12:]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + size + tiny
    return b"RIFF" + struct.pack("<I", len(body)) + body


def eight_bits_of(wide: np.ndarray, most: int = 65535) -> np.ndarray:
    """(H, W) or (H, W, 3) levels 0..most as RGB of eight bits, each to the nearest level."""
    levels = np.rint(wide.astype(np.float64) * 255 / most).astype(np.uint8)
    return np.dstack([levels] * 3) if levels.ndim == 2 else levels


def grey_rgb(levels: np.ndarray) -> np.ndarray:
    return np.dstack([levels.astype(np.uint8)] * 3)


def slowly_upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Each stored pixel carried to its place, by the words of EXIF 2.32, tag 0x0112: where row 0 and column 0 lie."""
    row_0, column_0 = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    rows, columns = stored.shape[:2]
    turned = row_0 in ("left", "right")
    upright = np.zeros((columns, rows, 3) if turned else (rows, columns, 3), dtype=np.uint8)
    for row in range(rows):
        for column in range(columns):
            down_from_row_0 = row if row_0 in ("top", "left") else rows - 1 - row
            along = column if column_0 in ("top", "left") else columns - 1 - column
            y, x = (along, down_from_row_0) if turned else (down_from_row_0, along)
            upright[y, x] = stored[row, column]
    return upright


WIDE = (np.arange(40 * 48, dtype=np.uint32) * 65535 // (40 * 48 - 1)).astype(np.uint16).reshape(40, 48)
WIDE_RGB = np.dstack([WIDE, WIDE[::-1], WIDE[:, ::-1]])

# Made by libjpeg-turbo (tj3Compress8 and tj3Compress12) from SMALL; Pillow cannot write them.
ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoKBggL"
    "DAsKDAkKCgr/2wBDAQICAgICAgUDAwUKBwYHCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgr/yQAR"
    "CAAQABgDAREAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/APR6sQonsYHS/ZrHazVznWU7S/2hHQfPZK58NtXWBFYE+lVuYC/x"
    "VVzJe9J/g1x4CR7mA0EVSIYBVStWBbfhw2Ap44kV4eMblIXkstBTWlr/2Q=="
)
ARITHMETIC_PROGRESSIVE_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoKBggL"
    "DAsKDAkKCgr/2wBDAQICAgICAgUDAwUKBwYHCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgr/ygAR"
    "CAAQABgDAREAAhEBAxEB/8wABgAQARD/2gAMAwEAAhADEAAAAf8A6OwTDCi/plcs6kToXoTCA8BNwS7/zAAEEAX/2gAIAQEAAQUCFSmkM0vq"
    "Owhg/8wABBEF/9oACAEDAQE/ARWYfoeL6aXZvGr/zAAEEQX/2gAIAQIBAT8BEDzIl//MAAQQBf/aAAgBAQAGPwJeE/L/zAAEEAX/2gAIAQEA"
    "AT8hVNnEmYD/2gAMAwEAAgADAAAAEMSyoP/MAAQRBf/aAAgBAwEBPxCoDhPl8P/MAAQRBf/aAAgBAgEBPxAdJmWI/8wABBAF/9oACAEBAAE/"
    "EEx6T7VTUOcxQP/Z"
)
LOSSLESS_JPEG = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/8MAEQgAEAAYA1IRAEcRAEIRAP/EABcAAAMBAAAAAAAAAAAAAAAAAAACAwj/2gAMA1IARwBCAAEAAM/5/wA/"
    "1GqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjVGqNUao1R"
    "qjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGqNUao"
    "1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjVGqNU"
    "ao1RqjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGq"
    "NUao1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjV"
    "GqNUao1RqjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGqNUao1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1Rq"
    "jVGqNUao1RizVGqNUao1RqjVGqNUao1RqjVGqNUao1RqjVGqNUao1Rv/2Q=="
)
TWELVE_BITS_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoKBggL"
    "DAsKDAkKCgr/2wBDAQICAgICAgUDAwUKBwYHCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgr/wQAR"
    "DAAQABgDAREAAhEBAxEB/8QAFgABAQEAAAAAAAAAAAAAAAAACggN/8QAIRAAAAQFBQAAAAAAAAAAAAAAAAkLJzVFU2FxAwUiQeH/xAAYAQEB"
    "AAMAAAAAAAAAAAAAAAAHCwgKDP/EACARAAACCwAAAAAAAAAAAAAAAAAJBQgjJTE0QlJhcaH/2gAMAwEAAhEDEQA/AMTJIJTuoIxtOXYsMRUQ"
    "shBt0GZVRw0i8LatZDciCU7rlsjG96cu8CgiFkINuilaVUcNIvC2rWQ3IglO6gjG05diwUEQshBt0UrSqjhpF4W1ayKcIJTuoIxtOXYsNWVE"
    "LIQbdHCmFVHDSLwtq1kNyIJTuuWyMb3py7wKCIWQg26KVpVRw0i8LatZDciCU7qCMbTl2LBQRCyEG3RSsKqOGkXhbVrI/9k="
)
