"""The corpus of unusual and damaged pictures: for each kind how to make it, and what must become of it.

``python tests/bad_images.py`` prints the table of docs/bad-input.md.
"""

from __future__ import annotations

import functools
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from picture_files import (
    ARITHMETIC_JPEG,
    ARITHMETIC_PROGRESSIVE_JPEG,
    GREY,
    LOSSLESS_JPEG,
    PICTURE,
    SMALL,
    TWELVE_BITS_JPEG,
    WIDE,
    WIDE_RGB,
    animated,
    blank_png,
    changed_in_idat,
    chunk,
    eight_bits_of,
    encoded,
    exif,
    exif_with_thumbnail,
    grey_rgb,
    ifd_entries,
    inks,
    interlaced_png,
    jpeg,
    noise,
    png,
    png_of,
    png_of_bits,
    share,
    sized_jpeg,
    slowly_upright,
    stretched,
    tiff,
    webp_header,
    ycck,
    zeros_after,
)
from PIL import Image, ImageCms

from imgcls.data.reading import IMAGE_SUFFIXES

# Levels that a JPEG of quality 95, colours at full resolution, may be off this picture.
JPEG = 5


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    make: the bytes, or what puts the file at a path. pixels: (H, W, 3) uint8 that must be read, each to ``within``
    levels; None: the file must be refused for a ``reason`` (a regular expression). fate: the word for the docs.
    """

    make: Callable[[], bytes] | Callable[[Path], None]
    fate: str
    file: str
    pixels: np.ndarray | None = None
    within: int = 0
    reason: str = ""
    on_disk: bool = False

    def put(self, folder: Path, prefix: str = "") -> Path:
        """Make the file in ``folder``; its path."""
        path = folder / (prefix + self.file)
        if self.on_disk:
            self.make(path)  # type: ignore[call-arg]
        else:
            path.write_bytes(self.make())  # type: ignore[arg-type, call-arg]
        return path


KINDS: dict[str, Kind] = {}
TURNED, UNTURNED, FIRST = "read, turned upright", "read, not turned", "read, the first frame"
SCALED, OPAQUE, UNPROFILED = "read, scaled", "read, opacity dropped", "read, profile not applied"


def _read(
    kind: str, make: Callable[..., Any], pixels: np.ndarray = PICTURE, fate: str = "read", file: str = "", **more: Any
) -> None:
    assert kind not in KINDS
    KINDS[kind] = Kind(make, fate, file or _file_of(kind), pixels, **more)


def _refuse(kind: str, reason: str, make: Callable[..., Any], **more: Any) -> None:
    assert kind not in KINDS
    KINDS[kind] = Kind(make, "refused", _file_of(kind), reason=reason, **more)


def _file_of(kind: str) -> str:
    """``x.`` and the ending that the kind's first words ask for."""
    form = kind.partition(",")[0].split()[-1].lower()
    return f"x.{form}" if f".{form}" in IMAGE_SUFFIXES else "x.jpg"


# -------------------------------------------------------------------------------------------------------------- JPEGs

_read("JPEG", jpeg, within=JPEG)
_read("JPEG, progressive", lambda: jpeg(progressive=True), within=JPEG)
_read("JPEG, colours at half resolution", lambda: encoded("JPEG", quality=95), within=12)
_read("JPEG, grey", lambda: jpeg(GREY), grey_rgb(GREY), within=JPEG)
_read("JPEG, stored as RGB", lambda: jpeg(keep_rgb=True), within=JPEG)
_read("JPEG, restart markers", lambda: jpeg(restart_marker_rows=1), within=JPEG)
_read("JPEG, CMYK", lambda: jpeg(Image.fromarray(inks(PICTURE), "CMYK")), within=JPEG)
_read("JPEG, YCCK", ycck, within=JPEG)
_read("JPEG, arithmetic coding", lambda: ARITHMETIC_JPEG, SMALL, within=JPEG)
_read("JPEG, arithmetic coding, progressive", lambda: ARITHMETIC_PROGRESSIVE_JPEG, SMALL, within=JPEG)
_read("JPEG, lossless", lambda: LOSSLESS_JPEG, SMALL)
_refuse("JPEG, 12 bits", "it is no BMP", lambda: TWELVE_BITS_JPEG)
for _turn in range(1, 9):
    _read(
        f"JPEG, EXIF orientation {_turn}",
        functools.partial(lambda turn: jpeg(exif=exif(turn)), _turn),
        slowly_upright(PICTURE, _turn),
        TURNED if _turn > 1 else "read",
        within=JPEG,
    )
_read("JPEG, EXIF orientation 9", lambda: jpeg(exif=exif(9)), fate=UNTURNED, within=JPEG)
_read(
    "JPEG, EXIF with a value of the wrong type",
    lambda: jpeg(
        exif=ifd_entries(
            (0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x0100, 4, 1, b"\xff\xff\xff\xff"), (0x0101, 2, 1, b"abcd")
        )
    ),
    slowly_upright(PICTURE, 6),
    TURNED,
    within=JPEG,
)
_read(
    "JPEG, EXIF that ends early",
    lambda: jpeg(exif=b"Exif\0\0II*\0" + struct.pack("<IHHH", 8, 40, 0x0112, 3)),
    fate=UNTURNED,
    within=JPEG,
)
_read("JPEG, EXIF of random bytes", lambda: jpeg(exif=b"Exif\0\0" + noise(8).tobytes()), fate=UNTURNED, within=JPEG)
_read("JPEG, thumbnail in its EXIF", lambda: jpeg(exif=exif_with_thumbnail()), within=JPEG)
_read(
    "JPEG, ICC profile",
    lambda: jpeg(icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    fate=UNPROFILED,
    within=JPEG,
)
_read("JPEG, damaged ICC profile", lambda: jpeg(icc_profile=b"nothing"), fate=UNPROFILED, within=JPEG)
_read("JPEG, then other bytes", lambda: jpeg() + b"\0garbage\xff\xd8" * 50, within=JPEG)
_read("JPEG, then a terabyte of zeros", lambda path: stretched(path, jpeg()), within=JPEG, on_disk=True)
_read("two JPEGs in one file", lambda: jpeg() + jpeg(255 - PICTURE), fate="read, the first", within=JPEG)
_read(
    "JPEG, several pictures (MPO)",
    lambda: animated("MPO", quality=95, subsampling=0),
    fate="read, the first",
    within=JPEG,
)
for _part in (1, 50, 99):
    for _name, _make in (("JPEG", jpeg), ("progressive JPEG", lambda: jpeg(progressive=True))):
        _refuse(
            f"{_part} % of a {_name}",
            "[Tt]runca|end marker",
            functools.partial(lambda m, p: share(m(), p / 100), _make, _part),
        )
_refuse("JPEG without its last 2 bytes", "end marker", lambda: jpeg()[:-2])
_refuse("JPEG, zeros from half on", "end marker|cannot load", lambda: zeros_after(jpeg(noise()), 0.5))
_refuse(
    "JPEG with a thumbnail, zeros from 90 % on",
    "end marker|cannot load",
    lambda: zeros_after(jpeg(noise(), exif=exif_with_thumbnail()), 0.9),
)
_refuse(
    "JPEG without its end, then a terabyte of zeros",
    "end marker",
    lambda path: stretched(path, jpeg()[:-2]),
    on_disk=True,
)
_refuse("JPEG, only its header", "trunca|cannot load|end marker", lambda: jpeg()[: jpeg().index(b"\xff\xda")])
_refuse("JPEG, a header of 65500 x 65500", "MAX_PIXELS", lambda: sized_jpeg(65500, 65500))
_refuse("JPEG, a header of 10000 x 10000", "MAX_PIXELS", lambda: sized_jpeg(10000, 10000))
_refuse("JPEG, a height of 0", "or a damaged one", lambda: sized_jpeg(48, 0))

# --------------------------------------------------------------------------------------------------------------- PNGs

_HALF = np.full_like(GREY, 100)
_read("PNG", lambda: encoded("PNG"))
_read("PNG, interlaced", interlaced_png)
_read("PNG, RGBA", lambda: png_of(np.dstack([PICTURE, _HALF]), 6), fate=OPAQUE)
_read("PNG, opacity 0", lambda: png_of(np.dstack([PICTURE, 0 * _HALF]), 6), fate=OPAQUE)
_read("PNG, grey and opacity", lambda: png_of(np.dstack([GREY, _HALF]), 4), grey_rgb(GREY), OPAQUE)
_read("PNG, one colour transparent", lambda: png_of(PICTURE, 2, chunk(b"tRNS", bytes(6))), fate=OPAQUE)
_read("PNG, grey, 1 bit", lambda: png_of_bits(GREY > 99, 1), grey_rgb((GREY > 99) * 255))
_read("PNG, grey, 2 bits", lambda: png_of_bits(GREY // 64, 2), grey_rgb(GREY // 64 * 85))
_read("PNG, grey, 4 bits", lambda: png_of_bits(GREY // 16, 4), grey_rgb(GREY // 16 * 17))
_read("PNG, grey, 16 bits", lambda: png_of(WIDE, 0), eight_bits_of(WIDE), SCALED)
_read(
    "PNG, grey and opacity, 16 bits",
    lambda: png_of(np.dstack([WIDE, WIDE // 2]), 4),
    eight_bits_of(WIDE),
    SCALED,
    within=1,
)
_read("PNG, RGB, 16 bits", lambda: png_of(WIDE_RGB, 2), eight_bits_of(WIDE_RGB), SCALED, within=1)
_read(
    "PNG, RGBA, 16 bits", lambda: png_of(np.dstack([WIDE_RGB, WIDE // 2]), 6), eight_bits_of(WIDE_RGB), SCALED, within=1
)


def _palette(**options: Any) -> bytes:
    image = Image.fromarray((GREY // 64).astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    return encoded("PNG", image, **options)


_COLOURS = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]], np.uint8)[GREY // 64]
_read("PNG, palette", _palette, _COLOURS)
_read("PNG, palette with opacities", lambda: _palette(transparency=bytes([0, 128, 255, 7])), _COLOURS, OPAQUE)
_read("PNG, EXIF orientation 6", lambda: encoded("PNG", exif=exif(6)), slowly_upright(PICTURE, 6), TURNED)
_read("PNG, animated", lambda: animated("PNG"), fate=FIRST)
_read("PNG called .jpg", lambda: encoded("PNG"), file="x.jpg")
_read("JPEG called .png", jpeg, within=JPEG, file="x.png")
_read("1 x 1", lambda: encoded("PNG", PICTURE[5:6, 7:8]), PICTURE[5:6, 7:8])
_LONG = np.repeat(PICTURE[:, :1], 125, axis=0)
_read("1 x 5000", lambda: encoded("PNG", _LONG), _LONG)
_read("5000 x 1", lambda: encoded("PNG", _LONG.transpose(1, 0, 2)), _LONG.transpose(1, 0, 2))
for _part in (1, 50, 99):
    _refuse(
        f"{_part} % of a PNG", "truncated", functools.partial(lambda p: share(encoded("PNG", noise()), p / 100), _part)
    )
_refuse("PNG, a changed byte in its pixels", "broken data", lambda: changed_in_idat(mend_checksum=False))
_refuse("PNG, a changed byte, checksum mended", "broken data", lambda: changed_in_idat(mend_checksum=True))
_refuse(
    "PNG, a text of 64 MB packed small",
    "too large",
    lambda: png_of(PICTURE, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))),
)
_refuse(
    "PNG, an ICC profile of 64 MB packed small",
    "too large",
    lambda: png_of(PICTURE, 2, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 26)))),
)
_refuse("PNG, 100 megapixels", "MAX_PIXELS", lambda: blank_png(10000, 10000))
_refuse("PNG, 225 megapixels", "MAX_PIXELS", lambda: blank_png(15000, 15000))
_refuse("PNG, a header of 65500 x 65500", "MAX_PIXELS", lambda: png(65500, 65500, 8, 2, b""))
_refuse("PNG, a width of 0", "or a damaged one", lambda: png(0, 40, 8, 2, b""))

# ------------------------------------------------------------------------------------------------------------- others

_read("BMP", lambda: encoded("BMP"))
_read("BMP, 1 bit", lambda: encoded("BMP", Image.fromarray(GREY > 99)), grey_rgb((GREY > 99) * 255))
_refuse("50 % of a BMP", "truncated", lambda: share(encoded("BMP"), 0.5))
_read("GIF", lambda: encoded("GIF", Image.fromarray(GREY)), grey_rgb(GREY))
_read(
    "GIF, animated",
    lambda: encoded("GIF", Image.fromarray(GREY), save_all=True, append_images=[Image.fromarray(255 - GREY)]),
    grey_rgb(GREY),
    FIRST,
)
_refuse("50 % of a GIF", "truncated", lambda: share(encoded("GIF", noise()), 0.5))
_refuse(
    "GIF, a header of 65500 x 65500",
    "MAX_PIXELS",
    lambda: b"GIF89a" + struct.pack("<HH", 65500, 65500) + encoded("GIF")[10:],
)
_read("WebP, lossless", lambda: encoded("WEBP", lossless=True))
_read(
    "WebP, opacity 0", lambda: encoded("WEBP", np.dstack([PICTURE, 0 * _HALF]), lossless=True, exact=True), fate=OPAQUE
)
_read(
    "WebP, EXIF orientation 6", lambda: encoded("WEBP", lossless=True, exif=exif(6)), slowly_upright(PICTURE, 6), TURNED
)
_read("WebP, animated", lambda: animated("WEBP", lossless=True), fate=FIRST)
_refuse("50 % of a WebP", "decoder", lambda: share(encoded("WEBP", noise()), 0.5))
_refuse("WebP, a header of 16384 x 16384", "MAX_PIXELS", lambda: webp_header(16384, 16384))
_read("TIFF", lambda: encoded("TIFF"))
for _packing in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
    _read(f"TIFF, packed ({_packing})", functools.partial(encoded, "TIFF", compression=_packing))
_read(
    "TIFF, fax (group 4)",
    lambda: encoded("TIFF", Image.fromarray(GREY > 99), compression="group4"),
    grey_rgb((GREY > 99) * 255),
)
_read("TIFF, several pages", lambda: animated("TIFF"), fate="read, the first page")
_read("TIFF, CMYK", lambda: encoded("TIFF", Image.fromarray(inks(PICTURE), "CMYK")))
_read("TIFF, EXIF orientation 6", lambda: encoded("TIFF", exif=exif(6)), slowly_upright(PICTURE, 6), TURNED)
_read("TIFF, grey, 16 bits", lambda: tiff(16, WIDE.astype("<u2").tobytes(), 48, 40), eight_bits_of(WIDE), SCALED)
_read(
    "TIFF, grey, 16 bits, big-endian",
    lambda: encoded("TIFF", Image.frombytes("I;16B", (48, 40), WIDE.astype(">u2").tobytes())),
    eight_bits_of(WIDE),
    SCALED,
)
_read(
    "TIFF, RGB, 16 bits",
    lambda: tiff(16, WIDE_RGB.astype("<u2").tobytes(), 48, 40, samples=3),
    eight_bits_of(WIDE_RGB),
    SCALED,
    within=1,
)
_refuse("TIFF, 12 bits", "no agreed range", lambda: tiff(12, b"\x12\x34\x56" * 8, 4, 4))
_refuse("TIFF, 16 bits, signed", "no agreed range", lambda: tiff(16, b"\x01\x02" * 16, 4, 4, signed_or_float=2))
_refuse("TIFF, 32 bits", "no agreed range", lambda: tiff(32, b"\x01\x02\0\0" * 16, 4, 4))
_refuse("TIFF, floating point", "no agreed range", lambda: tiff(32, b"\0\0\x80\x3f" * 16, 4, 4, signed_or_float=3))
_refuse("50 % of a TIFF", "or a damaged one", lambda: encoded("TIFF", noise(), compression="tiff_lzw")[:4000])
_refuse("TIFF, a header of 65500 x 65500", "MAX_PIXELS", lambda: tiff(8, bytes(16), 65500, 65500))
_read("PGM", lambda: b"P5 48 40 255\n" + GREY.tobytes(), grey_rgb(GREY))
_read("PGM, 16 bits", lambda: b"P5 48 40 65535\n" + WIDE.astype(">u2").tobytes(), eight_bits_of(WIDE), SCALED)
_read(
    "PGM, 10 bits",
    lambda: b"P5 48 40 1023\n" + (WIDE // 64).astype(">u2").tobytes(),
    eight_bits_of(WIDE // 64, 1023),
    SCALED,
    within=1,
)
_read("PPM, as text", lambda: b"P3 48 40 255\n" + b" ".join(b"%d" % level for level in PICTURE.ravel()))
_read(
    "PPM, 16 bits",
    lambda: b"P6 48 40 65535\n" + WIDE_RGB.astype(">u2").tobytes(),
    eight_bits_of(WIDE_RGB),
    SCALED,
    within=1,
)
_refuse("50 % of a PPM", "truncated", lambda: share(encoded("PPM"), 0.5))
_refuse("PFM, floating point", "no agreed range", lambda: b"Pf 4 4 -1.0\n" + b"\0\0\x80\x3f" * 16)

# --------------------------------------------------------------------------------------- no pictures, odd files, names

_refuse("no byte", "it is empty", lambda: b"")
_refuse("a terabyte of zeros", "it is no BMP", lambda path: stretched(path, b""), on_disk=True)
_refuse("one byte", "it is no BMP", lambda: b"\xff")
_refuse("text", "it is no BMP", lambda: b"this is not a picture\n" * 9)
_refuse("HTML", "it is no BMP", lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
_refuse("SVG", "it is no BMP", lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>")
# Pillow would hand it to Ghostscript, which runs what the file says.
_refuse(
    "PostScript", "it is no BMP", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
)
_refuse("a folder", "not a regular file", lambda path: path.mkdir(), on_disk=True)
_refuse("a link to nowhere", "No such file", lambda path: path.symlink_to("nowhere.jpg"), on_disk=True)
_refuse("a link to itself", "symbolic links", lambda path: path.symlink_to(path.name), on_disk=True)
_refuse("a link to a device", "not a regular file", lambda path: path.symlink_to("/dev/zero"), on_disk=True)
_refuse("a pipe", "not a regular file", lambda path: os.mkfifo(path), on_disk=True)
_read(
    "a link to a picture",
    lambda path: (path.with_name("aim").write_bytes(jpeg()), path.symlink_to("aim")),
    within=JPEG,
    on_disk=True,
)

ODD_NAMES = {
    "a newline in the name": "two\nlines.jpg",
    "a name that is no UTF-8": os.fsdecode(b"caf\xe9.jpg"),
    "a very long name": "n" * 240 + ".jpg",
    "a name that begins with a dash": "--resume.jpg",
    "spaces and quotes in the name": ' it\'s "a" cat .jpg',
    "an emoji in the name": "\N{CAT FACE}.jpg",
    "percent signs and braces in the name": "100%s {0} %d.jpg",
    "a name of other letters": "\u732b-\u043a\u043e\u0442.JPG",
}
for _what, _name in ODD_NAMES.items():
    _read(_what, jpeg, within=JPEG, file=_name)


def readable() -> Iterator[tuple[str, Kind]]:
    return ((name, kind) for name, kind in KINDS.items() if kind.pixels is not None)


def refused() -> Iterator[tuple[str, Kind]]:
    return ((name, kind) for name, kind in KINDS.items() if kind.pixels is None)


def table() -> str:
    """Markdown: each kind and its fate."""
    rows = [f"| {name} | {kind.fate} |" for name, kind in KINDS.items()]
    return "\n".join(["| file | what becomes of it |", "| --- | --- |", *rows])


if __name__ == "__main__":
    print(table())
