"""The image reader: right pixels, or an ImageError that names the file."""

from __future__ import annotations

import io
import os
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as detectron2_reads
from PIL import Image, ImageOps
from torchvision.datasets.folder import pil_loader

from imgcls.data.reading import ImageError, check_header, read_image

# A picture without any symmetry: every turn of it is another picture.
STORED = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def pixels(path: Path) -> np.ndarray:
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def written(path: Path, image: Image.Image | np.ndarray, **options: Any) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------------ orientation

# EXIF 2.32, tag 0x0112: where the stored row 0 and the stored column 0 lie in the upright picture.
ROW_0_AND_COLUMN_0 = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def slowly_upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Each stored pixel carried to its place, by the words of the standard."""
    rows, columns = stored.shape[:2]
    row_0, column_0 = ROW_0_AND_COLUMN_0[orientation]
    turned = row_0 in ("left", "right")
    upright = np.zeros((columns, rows, 3) if turned else (rows, columns, 3), dtype=np.uint8)
    for row in range(rows):
        for column in range(columns):
            down_from_row_0 = row if row_0 in ("top", "left") else rows - 1 - row
            along = column if column_0 in ("top", "left") else columns - 1 - column
            y, x = (along, down_from_row_0) if turned else (down_from_row_0, along)
            upright[y, x] = stored[row, column]
    return upright


def with_orientation(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return written(path, STORED, exif=exif)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_follows_the_standard(orientation: int, suffix: str, tmp_path: Path) -> None:
    path = with_orientation(tmp_path / f"x.{suffix}", orientation)
    np.testing.assert_array_equal(pixels(path), slowly_upright(STORED, orientation))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_turned_as_detectron2_turns_it(orientation: int, tmp_path: Path) -> None:
    """A detector sees through detectron2's reader what the classifier saw through ours."""
    path = with_orientation(tmp_path / "x.jpg", orientation)
    np.testing.assert_array_equal(pixels(path), detectron2_reads(str(path), "RGB"))


def test_the_eight_orientations_are_eight_pictures(tmp_path: Path) -> None:
    """The twin of the two tests above: a reader that turns nothing would fail them."""
    upright = {slowly_upright(STORED, orientation).tobytes() for orientation in range(1, 9)}
    assert len(upright) == 8
    turned = with_orientation(tmp_path / "x.png", 6)
    assert np.asarray(pil_loader(str(turned))).shape == (4, 6, 3)  # torchvision's reader ignores the tag
    assert pixels(turned).shape == (6, 4, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int, tmp_path: Path) -> None:
    np.testing.assert_array_equal(pixels(with_orientation(tmp_path / "x.png", orientation)), STORED)


def test_damaged_exif_is_no_damaged_picture(tmp_path: Path) -> None:
    """An entry whose value has the wrong type: Pillow's own exif_transpose ends with struct.error there."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x0100, 4, 1, b"\xff\xff\xff\xff"), (0x0101, 2, 1, b"abcd")]
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0)
    path = written(tmp_path / "x.jpg", noise(16, 24), exif=exif)
    with pytest.raises(struct.error), Image.open(path) as image:
        ImageOps.exif_transpose(image)
    assert pixels(path).shape == (24, 16, 3)
    exif_that_ends_early = b"Exif\0\0II*\0" + struct.pack("<IHHH", 8, 40, 0x0112, 3)
    path = written(tmp_path / "y.jpg", noise(16, 24), exif=exif_that_ends_early)
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        assert pixels(path).shape == (16, 24, 3)


# -------------------------------------------------------------------------------------------------- kinds of pixels

GREY = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_greys_are_scaled(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 64 64 65535\n" + GREY.astype(">u2").tobytes())
    else:
        written(path, GREY)
    seen = pixels(path)
    exact = GREY.astype(np.float64) * 255 / 65535
    assert np.abs(seen - exact[..., None]).max() <= 0.5  # each pixel to the nearest level
    assert abs(seen.mean() - exact.mean()) < 0.05


def test_pillow_alone_would_clip_them(tmp_path: Path) -> None:
    """The twin: what stands in Pillow's convert("RGB") is white."""
    path = written(tmp_path / "x.png", GREY)
    with Image.open(path) as image:
        assert np.asarray(image.convert("RGB")).mean() > 250
    assert 127 < pixels(path).mean() < 128


def tiff(bits: int, data: bytes, width: int, height: int, sample_format: int = 1) -> bytes:
    """A grey TIFF by hand: Pillow writes neither 12 bits nor signed ones."""
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries[339] = sample_format
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    directory = struct.pack("<H", len(entries)) + body + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def test_the_hand_written_tiff_is_one(tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(tiff(16, GREY.astype("<u2").tobytes(), 64, 64))
    assert 127 < pixels(tmp_path / "x.tif").mean() < 128


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(tiff(12, b"\x12\x34\x56" * 8, 4, 4), "16 unsigned bits", id="12 bits"),
        pytest.param(tiff(16, b"\x01\x02" * 16, 4, 4, sample_format=2), "16 unsigned bits", id="16 bits, signed"),
        pytest.param(tiff(32, b"\x01\x02\0\0" * 16, 4, 4), "16 unsigned bits", id="32 bits"),
        pytest.param(tiff(32, b"\0\0\x80\x3f" * 16, 4, 4, sample_format=3), "floating-point", id="float"),
    ],
)
def test_pixels_without_an_agreed_range_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    """Pillow would make them black or white without a word."""
    path = tmp_path / "x.tif"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"x\.tif: .*{reason}.*no agreed range"):
        read_image(str(path))


def test_cmyk(tmp_path: Path) -> None:
    inks = np.zeros((8, 8, 4), dtype=np.uint8)
    inks[:, :4, 0] = 255  # all cyan on the left: no red; no ink on the right: white
    path = written(tmp_path / "x.tif", Image.fromarray(inks, "CMYK"))
    np.testing.assert_array_equal(pixels(path)[0, [0, 7]], [[0, 255, 255], [255, 255, 255]])


def test_palette(tmp_path: Path) -> None:
    indices = np.array([[0, 1], [2, 1]], dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    path = written(tmp_path / "x.png", image)
    expected = [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]
    np.testing.assert_array_equal(pixels(path), expected)
    # With an opacity for each colour Pillow warns, and a warning here is a failure.
    path = written(tmp_path / "y.png", image, transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(pixels(path), expected)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_dropped(mode: str, tmp_path: Path) -> None:
    """Colours under an opacity of 0 stay what they are, as in detectron2's and torchvision's readers."""
    colours = noise(5, 7)
    with_alpha = np.dstack([colours[..., :1] if mode == "LA" else colours, np.zeros((5, 7), dtype=np.uint8)])
    path = written(tmp_path / "x.png", with_alpha)
    expected = np.repeat(colours[..., :1], 3, axis=2) if mode == "LA" else colours
    np.testing.assert_array_equal(pixels(path), expected)
    np.testing.assert_array_equal(np.asarray(pil_loader(str(path))), expected)


def test_one_bit_and_eight_bit_grey(tmp_path: Path) -> None:
    bits = np.array([[True, False, True], [False, False, True]])
    path = written(tmp_path / "x.png", Image.fromarray(bits))
    np.testing.assert_array_equal(pixels(path), np.repeat(bits[..., None] * 255, 3, axis=2))
    grey = np.array([[0, 1, 127], [128, 254, 255]], dtype=np.uint8)
    np.testing.assert_array_equal(pixels(written(tmp_path / "y.bmp", grey)), np.repeat(grey[..., None], 3, axis=2))


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(tmp_path / "x.gif")[0, 0], [255, 0, 0])


def test_the_ending_does_not_have_to_be_right(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jpg", STORED, format="PNG")
    np.testing.assert_array_equal(pixels(path), STORED)


# ---------------------------------------------------------------------------------------------------- damaged files


def encoded(form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(48, 40)).save(buffer, format=form, **options)
    return buffer.getvalue()


def png_with_a_bad_byte() -> bytes:
    """The length and the checksum of the chunk hold, the compressed stream in it does not."""
    data = encoded("PNG")
    start = data.index(b"IDAT") - 4
    length = int.from_bytes(data[start : start + 4], "big")
    chunk = bytearray(data[start + 4 : start + 8 + length])
    chunk[length // 2] ^= 0xFF
    return data[: start + 4] + bytes(chunk) + struct.pack(">I", zlib.crc32(chunk)) + data[start + 12 + length :]


DAMAGED = {
    "no byte": b"",
    "text": b"this is not a picture\n",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "jpeg header": encoded("JPEG")[:30],
    "half a jpeg": encoded("JPEG")[:1500],
    "jpeg without its last bytes": encoded("JPEG")[:-40],
    "half a progressive jpeg": encoded("JPEG", progressive=True)[:1500],
    "half a png": encoded("PNG")[:1500],
    "png with a bad byte": png_with_a_bad_byte(),
    "half a gif": encoded("GIF")[:400],
    "half a webp": encoded("WEBP")[:600],
    "half a tiff": encoded("TIFF")[:3000],
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(case: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(DAMAGED[case])
    with pytest.raises(ImageError, match=r"cannot read the image .*/broken\.jpg: .*replace the file or remove it"):
        read_image(str(path))


def test_the_whole_files_are_read(tmp_path: Path) -> None:
    """The twin of the damaged ones: what is wrong with them is the damage."""
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        (tmp_path / "x").write_bytes(encoded(form))
        assert pixels(tmp_path / "x").shape == (48, 40, 3), form
    (tmp_path / "x").write_bytes(encoded("JPEG", progressive=True))
    assert pixels(tmp_path / "x").shape == (48, 40, 3)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("folder.jpg", "dangling.jpg", "pipe.jpg", "absent.jpg"):
        for read in (read_image, check_header):
            with pytest.raises(ImageError, match=rf"cannot read the image .*/{name}"):
                read(str(tmp_path / name))


def test_the_header_is_cheaper_and_sees_less(tmp_path: Path) -> None:
    for case in ("no byte", "text", "html"):
        (tmp_path / "x.jpg").write_bytes(DAMAGED[case])
        with pytest.raises(ImageError, match=r"x\.jpg"):
            check_header(str(tmp_path / "x.jpg"))
    (tmp_path / "x.jpg").write_bytes(DAMAGED["half a jpeg"])
    check_header(str(tmp_path / "x.jpg"))  # begins well; only decoding can tell


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    """A header that promises 4.3 billion pixels costs no memory."""
    header = struct.pack(">IIBBBBB", 65500, 65500, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(content + b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with pytest.raises(ImageError, match=r"bomb\.png: .*decompression bomb"):
        read_image(str(tmp_path / "bomb.png"))


def test_nothing_but_an_image_error_escapes(tmp_path: Path) -> None:
    """A seeded sample of changed bytes; whatever a decoder raises, the message names the file."""
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a text"
    outcomes = {"read": 0, "refused": 0}
    path = tmp_path / "x.bin"
    for form, options in (("JPEG", {"exif": exif}), ("PNG", {}), ("GIF", {}), ("BMP", {}), ("WEBP", {"exif": exif})):
        whole = encoded(form, **options)
        for _ in range(80):
            content = bytearray(whole)
            for _ in range(rng.choice([1, 2, 8])):
                content[rng.randrange(rng.choice([120, len(content)]))] = rng.randrange(256)
            path.write_bytes(content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about what it could still make of the file
                try:
                    read_image(str(path))
                    outcomes["read"] += 1
                except ImageError as error:
                    assert str(path) in str(error)
                    outcomes["refused"] += 1
    assert min(outcomes.values()) > 40
