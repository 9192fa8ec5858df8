"""The image reader beside its corpus (test_bad_images.py): orientation in full, headers, bytes changed at random."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from bad_images import KINDS
from detectron2.data.detection_utils import read_image as detectron2_reads
from picture_files import PICTURE, encoded, exif, ifd_entries, noise, share, slowly_upright
from PIL import Image, ImageOps
from torchvision.datasets.folder import pil_loader

from imgcls.data.reading import ImageError, check_header, read_image, read_orientation, read_size


def pixels(path: Path) -> np.ndarray:
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def with_orientation(path: Path, orientation: int) -> Path:
    Image.fromarray(PICTURE).save(path, exif=exif(orientation))
    return path


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_follows_the_standard(orientation: int, suffix: str, tmp_path: Path) -> None:
    path = with_orientation(tmp_path / f"x.{suffix}", orientation)
    expected = slowly_upright(PICTURE, orientation)
    np.testing.assert_array_equal(pixels(path), expected)
    assert read_size(str(path)) == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_turned_as_detectron2_turns_it(orientation: int, tmp_path: Path) -> None:
    """A detector sees through detectron2's reader what the classifier saw through ours."""
    path = with_orientation(tmp_path / "x.jpg", orientation)
    np.testing.assert_array_equal(pixels(path), detectron2_reads(str(path), "RGB"))
    assert read_orientation(str(path)) == orientation


def test_the_eight_orientations_are_eight_pictures(tmp_path: Path) -> None:
    """The twin of the two tests above: a reader that turns nothing would fail them."""
    upright = {slowly_upright(PICTURE, orientation).tobytes() for orientation in range(1, 9)}
    assert len(upright) == 8
    turned = with_orientation(tmp_path / "x.png", 6)
    assert np.asarray(pil_loader(str(turned))).shape == (40, 48, 3)  # torchvision's reader ignores the tag
    assert pixels(turned).shape == (48, 40, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int, tmp_path: Path) -> None:
    np.testing.assert_array_equal(pixels(with_orientation(tmp_path / "x.png", orientation)), PICTURE)


def test_damaged_exif_is_no_damaged_picture(tmp_path: Path) -> None:
    """An entry whose value has the wrong type: Pillow's own exif_transpose ends with struct.error there."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x0100, 4, 1, b"\xff\xff\xff\xff"), (0x0101, 2, 1, b"abcd")]
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded("JPEG", exif=ifd_entries(*entries)))
    with pytest.raises(struct.error), Image.open(path) as image:
        ImageOps.exif_transpose(image)
    assert pixels(path).shape == (48, 40, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_the_header_is_cheaper_and_sees_less(form: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(share(encoded(form, noise()), 0.9))
    with pytest.raises(ImageError, match=r"x\.jpg"):
        read_image(str(path))
    if form not in ("WEBP", "TIFF"):  # whose headers stand at the end, or tell how long the file is
        check_header(str(path))  # begins well; only decoding can tell
    for name in ("no byte", "text", "HTML", "a folder", "a pipe", "a link to nowhere"):
        path = KINDS[name].put(tmp_path, f"{name} ")
        with pytest.raises(ImageError, match=f"cannot read the image {path}"):
            check_header(str(path))


def test_nothing_but_an_image_error_escapes(tmp_path: Path) -> None:
    """A seeded sample of changed bytes; whatever a decoder raises, the message names the file."""
    rng = random.Random(0)
    tagged = exif(6)
    tagged[0x010E] = "a text"
    outcomes = {"read": 0, "refused": 0}
    path = tmp_path / "x.bin"
    for form, options in (
        ("JPEG", {"exif": tagged}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {"exif": tagged}),
    ):
        whole = encoded(form, noise(), **options)
        for _ in range(80):
            content = bytearray(whole)
            for _ in range(rng.choice([1, 2, 8])):
                content[rng.randrange(rng.choice([120, len(content)]))] = rng.randrange(256)
            path.write_bytes(content)
            try:
                read_image(str(path))
                outcomes["read"] += 1
            except ImageError as error:
                assert str(path) in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 40
