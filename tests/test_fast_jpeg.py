"""Fast reading of JPEGs: the same boxes and, but for the resize filter, the same pixels as the exact reader gives."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from imgcls.config import get_config
from imgcls.data import build_test_loader, build_train_loader, fast_jpeg, loaders, open_source
from imgcls.data.fast_jpeg import DamagedError, FromJpeg, Jpeg, from_jpeg, read_fast
from imgcls.data.jpeg_header import plain_frame
from imgcls.data.mapper import ClsMapper, MappedDataset
from imgcls.data.photo_like import jpeg_of, photo_like
from imgcls.data.random_stream import seed_cpu
from imgcls.data.reading import ImageError, read_image
from imgcls.data.samplers import Draw
from imgcls.data.transforms import test_transform as evaluation_transform
from imgcls.data.transforms import train_transform

BILINEAR = InterpolationMode.BILINEAR
CROP_AND_FLIP = [["random_resized_crop", 0.08, 1.0], ["horizontal_flip", 0.5]]
# Mean absolute difference to Pillow's exact pipeline, in levels of 255, of a picture.
WHOLE_SCALE = 0.25  # decoded at its size: the resize rounds differently, by one level at most
REDUCED = 6.0  # decoded at 1/2, 1/4 or 1/8: another filter; of photographs less than half of it


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return photo_like(203, 155, np.random.default_rng(0))


@pytest.fixture(scope="module")
def large() -> np.ndarray:
    return photo_like(1210, 900, np.random.default_rng(1))


def opened(data: bytes) -> Jpeg:
    jpeg = read_fast(data, name="x.jpg")
    assert isinstance(jpeg, Jpeg)
    return jpeg


def levels(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    return (a.int() - b.int()).abs().float().mean().item()


def with_orientation(pixels: np.ndarray, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg_of(pixels, quality=90, exif=exif)


# ------------------------------------------------------------------------------------------------------------ decoding

KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True, "subsampling": 2},
    "restart markers": {"restart_marker_blocks": 3, "subsampling": 2},
    "optimized tables": {"optimize": True},
}
BOXES = [(0, 0, 203, 155), (0, 0, 203, 1), (17, 31, 150, 96), (200, 150, 203, 155), (64, 15, 80, 16), (5, 0, 6, 154)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_has_the_pixels_of_the_whole_picture(kind: str, photo: np.ndarray) -> None:
    """Not resized, nothing may differ: not at the last row before the cut, where chroma is interpolated either."""
    data = jpeg_of(photo, quality=85, **KINDS[kind])
    whole = np.asarray(read_image(data))
    for left, top, right, bottom in BOXES:
        pixels = opened(data).resized((left, top, right, bottom), (bottom - top, right - left), BILINEAR)
        np.testing.assert_array_equal(pixels.permute(1, 2, 0), whole[top:bottom, left:right], str((left, top)))


def test_a_grey_picture_becomes_three_equal_planes(photo: np.ndarray) -> None:
    data = jpeg_of(photo[..., 0], quality=85)
    pixels = opened(data).resized((10, 20, 60, 50), (30, 50), BILINEAR)
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), np.asarray(read_image(data))[20:50, 10:60])


def test_rows_below_the_box_are_not_decoded(photo: np.ndarray) -> None:
    """What is broken there is not seen."""
    data = bytearray(jpeg_of(photo, quality=85, subsampling=0))
    broken = bytearray(data)
    broken[-400:-2] = bytes(398)
    upper = (0, 0, 203, 60)
    expected = opened(bytes(data)).resized(upper, (60, 203), BILINEAR)
    assert torch.equal(opened(bytes(broken)).resized(upper, (60, 203), BILINEAR), expected)
    with pytest.raises(DamagedError, match="Corrupt JPEG data"):
        opened(bytes(broken)).resized((0, 0, 203, 155), (155, 203), BILINEAR)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_upright_picture(orientation: int, photo: np.ndarray) -> None:
    data = with_orientation(photo, orientation)
    upright, jpeg = read_image(data), opened(data)
    assert jpeg.size == upright.size == ((155, 203) if orientation > 4 else (203, 155))
    box = (20, 31, 120, 96)
    expected = v2.functional.pil_to_tensor(upright.crop(box))
    assert torch.equal(jpeg.resized(box, (65, 100), BILINEAR), expected)
    assert (
        levels(jpeg.resized(box, (40, 31), BILINEAR), v2.functional.resize(expected, [40, 31], antialias=True))
        < 2 * WHOLE_SCALE
    )  # two passes of rounding, in the other order


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_reduced_picture_lies_where_the_whole_one_does(scale: int, large: np.ndarray) -> None:
    """A slope from 0 to 250 tells where a pixel is from, whatever the filter."""
    slope = np.broadcast_to(np.linspace(0, 250, 1200)[None, :, None], (640, 1200, 3)).astype(np.uint8)
    data = jpeg_of(np.ascontiguousarray(slope), quality=95)
    box = (103, 7, 103 + 64 * scale + 5, 7 + 64 * scale + 3)
    exact = v2.functional.pil_to_tensor(read_image(data).crop(box).resize((64, 64), Image.Resampling.BILINEAR))
    fast = opened(data).resized(box, (64, 64), BILINEAR)
    per_pixel = 250 / 1200 * scale  # levels from one column of the result to the next
    assert (fast.int() - exact.int()).abs().max() <= max(1, 0.6 * per_pixel)


def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sizes of what simplejpeg is asked for from now on."""
    sizes: list[tuple[int, ...]] = []
    decode = fast_jpeg.simplejpeg.decode_jpeg

    def noting(*args: Any, **options: Any) -> Any:
        sizes.append(options["buffer"].shape)
        return decode(*args, **options)

    monkeypatch.setattr(fast_jpeg.simplejpeg, "decode_jpeg", noting)
    return sizes


def test_what_is_decoded_stays_as_large_as_what_becomes_of_it(
    large: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpeg, sizes = opened(jpeg_of(large, subsampling=0)), decoded_sizes(monkeypatch)
    whole = (0, 0, 1210, 900)
    for side in (451, 450, 226, 225, 113, 112, 10):
        jpeg.resized(whole, (side, side), BILINEAR)
    jpeg.resized((0, 0, 1210, 100), (100, 100), BILINEAR)  # only its rows, of blocks of 8
    jpeg.resized(whole, (10, 10), InterpolationMode.NEAREST)  # which is no average
    heights = [900, 450, 450, 225, 225, 113, 113, 104, 900]
    assert [shape[0] for shape in sizes] == heights
    assert [shape[1] for shape in sizes] == [1210, 605, 605, 303, 303, 152, 152, 1210, 1210]


# ---------------------------------------------------------------------------------------------------------- transforms


def mapped(data: bytes, transform: Any, epochs: int = 12) -> list[torch.Tensor]:
    mapper = ClsMapper(transform, seed=3)
    sample = {"image_id": 0, "label": 0, "encoded": data, "name": "x.jpg"}
    return [mapper(sample, Draw(epoch, 0))["image"] for epoch in range(epochs)]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_training_sees_the_same_boxes_and_flips(interpolation: str, photo: np.ndarray) -> None:
    data = jpeg_of(photo, quality=90)
    exact = train_transform(CROP_AND_FLIP, 96, interpolation)
    fast = from_jpeg(exact)
    assert isinstance(fast, FromJpeg)
    pairs = list(zip(mapped(data, exact), mapped(data, fast), strict=True))
    differences = [levels(a, b) for a, b in pairs]
    assert max(differences) < WHOLE_SCALE
    assert max((a.int() - b.int()).abs().max() for a, b in pairs) <= (0 if interpolation == "nearest" else 2)
    # Other boxes, or one flip in the other direction, would be far away.
    first = pairs[0][0]
    assert min(levels(first, b) for _, b in pairs[1:]) > 20 * WHOLE_SCALE
    assert levels(first, first.flip(-1)) > 20 * WHOLE_SCALE


def test_large_pictures_differ_by_a_filter(large: np.ndarray) -> None:
    data = jpeg_of(large, quality=90)
    exact = train_transform(CROP_AND_FLIP, 64, "bilinear")
    pairs = list(zip(mapped(data, exact), mapped(data, from_jpeg(exact)), strict=True))
    assert max(levels(a, b) for a, b in pairs) < REDUCED
    assert max(levels(a, b) for a, b in pairs) > WHOLE_SCALE  # it was reduced
    # Twice as coarse is outside the bound: it is one on the filter, and not on pictures in general.
    coarse = [v2.functional.resize(v2.functional.resize(a, [32, 32]), [64, 64]) for a, _ in pairs]
    assert min(levels(a, b) for (a, _), b in zip(pairs, coarse, strict=True)) > REDUCED


@pytest.mark.parametrize("rows", [[*CROP_AND_FLIP, ["color_jitter", 0.4, 0.4, 0.4]], [["resize"], ["vertical_flip"]]])
def test_what_follows_the_crop_is_the_same(rows: list[list[Any]], photo: np.ndarray) -> None:
    data = jpeg_of(photo, quality=90)
    exact = train_transform(rows, 96, "bilinear")
    pairs = list(zip(mapped(data, exact), mapped(data, from_jpeg(exact)), strict=True))
    assert max(levels(a, b) for a, b in pairs) < 3 * WHOLE_SCALE  # the jitter widens them
    assert len({bytes(b.numpy().tobytes()) for _, b in pairs}) > 1


@pytest.mark.parametrize("size", [(203, 155), (155, 203), (101, 101), (64, 301), (97, 96), (40, 30)])
def test_evaluation_cuts_the_same_centre(size: tuple[int, int]) -> None:
    data = jpeg_of(photo_like(*size, np.random.default_rng(2)), quality=90)
    for resize in (72, 0):
        exact = evaluation_transform(resize, 64, "bilinear")
        (a,), (b,) = mapped(data, exact, 1), mapped(data, from_jpeg(exact), 1)
        assert levels(a, b) < (REDUCED if min(size) >= 128 else WHOLE_SCALE)


def test_other_first_steps_stay_exact() -> None:
    for rows in ([["random_crop", 4]], [["horizontal_flip", 0.5], ["resize"]], []):
        transform = train_transform(rows, 32, "bilinear")
        assert from_jpeg(transform) is transform
    lanczos = v2.Compose([v2.RandomResizedCrop(32, interpolation=InterpolationMode.LANCZOS), v2.PILToTensor()])
    assert from_jpeg(lanczos) is lanczos


def test_a_picture_that_is_no_jpeg_goes_through_the_exact_transform(photo: np.ndarray) -> None:
    exact = train_transform(CROP_AND_FLIP, 96, "bilinear")
    image = Image.fromarray(photo)
    seed_cpu(5)
    a = exact(image)
    seed_cpu(5)
    assert torch.equal(from_jpeg(exact)(image), a)


# ------------------------------------------------------------------------------------------- what the exact reader gets


def broken_middle(data: bytes) -> bytes:
    return data[: len(data) // 2] + b"\xff\x00" * 30 + data[len(data) // 2 + 60 :]


def test_what_the_decoder_warns_of_is_read_exactly(photo: np.ndarray) -> None:
    """Pillow reads on over wrong codes; so the pixels are its."""
    data = broken_middle(jpeg_of(photo, quality=85))
    exact = evaluation_transform(0, 64, "bilinear")
    with pytest.raises(DamagedError):
        opened(data).resized((0, 0, 203, 155), (64, 64), BILINEAR)
    assert torch.equal(mapped(data, from_jpeg(exact), 1)[0], mapped(data, exact, 1)[0])


def encoded(photo: np.ndarray, format: str, mode: str = "RGB", **options: Any) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(photo).convert(mode).save(file, format, **options)
    return file.getvalue()


def set_bits(data: bytes, bits: int) -> bytes:
    frame = plain_frame(bytearray(data))
    assert frame is not None
    return data[: frame.place + 4] + bytes([bits]) + data[frame.place + 5 :]


def set_marker(data: bytes, marker: int) -> bytes:
    frame = plain_frame(bytearray(data))
    assert frame is not None
    return data[: frame.place + 1] + bytes([marker]) + data[frame.place + 2 :]


NOT_PLAIN: dict[str, Callable[[np.ndarray], bytes]] = {
    "PNG": partial(encoded, format="PNG"),
    "CMYK": partial(encoded, format="JPEG", mode="CMYK"),
    "nothing": lambda photo: b"",
    "text": lambda photo: b"no image at all",
    "1 %": lambda photo: jpeg_of(photo)[: len(jpeg_of(photo)) // 100],
    "99 %": lambda photo: jpeg_of(photo)[: len(jpeg_of(photo)) * 99 // 100],
    "the end in zeros": lambda photo: jpeg_of(photo)[:-1000] + bytes(1000),
    "a tail": lambda photo: jpeg_of(photo) + b"and more",
    "12 bits": lambda photo: set_bits(jpeg_of(photo), 12),
    "arithmetic coding": lambda photo: set_marker(jpeg_of(photo), 0xC9),
    "lossless": lambda photo: set_marker(jpeg_of(photo), 0xC3),
    "no height": lambda photo: jpeg_of(photo).replace(b"\x08\x00\x9b\x00\xcb\x03", b"\x08\x00\x00\x00\xcb\x03"),
    "no scan": lambda photo: jpeg_of(photo)[: jpeg_of(photo).index(b"\xff\xda")] + b"\xff\xd9",
    "a start and an end": lambda photo: b"\xff\xd8\xff\xd9",
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_no_plain_jpeg_is_read_or_refused_as_ever(kind: str, photo: np.ndarray, tmp_path: Path) -> None:
    data = NOT_PLAIN[kind](photo)
    assert plain_frame(bytearray(data)) is None
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    for source in (os.fspath(path), data):
        assert outcome(read_fast, source) == outcome(read_image, source)


def outcome(read: Callable[..., Any], source: str | bytes) -> Any:
    try:
        picture = read(source, name="" if isinstance(source, str) else "in a shard")
    except ImageError as error:
        return str(error), error.name
    assert isinstance(picture, Image.Image)
    return picture.size, picture.tobytes()


def test_files_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("gone.jpg", "pipe.jpg", "."):
        source = os.fspath(tmp_path / name)
        assert outcome(read_fast, source) == outcome(read_image, source)


def test_no_more_pixels_than_allowed(photo: np.ndarray) -> None:
    data = jpeg_of(photo)
    assert isinstance(read_fast(data, max_pixels=203 * 155), Jpeg)
    with pytest.raises(
        ImageError, match=r"x\.jpg: it has 203 x 155 = 31,465 pixels, more than INPUT.MAX_PIXELS 31,464"
    ):
        read_fast(data, name="x.jpg", max_pixels=203 * 155 - 1)


def test_an_embedded_thumbnail_is_not_taken_for_the_picture(photo: np.ndarray) -> None:
    thumbnail = jpeg_of(photo[:40, :30])
    data = jpeg_of(photo)
    segment = b"Exif\x00\x00" + thumbnail
    data = data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
    frame = plain_frame(bytearray(data))
    assert frame is not None and (frame.width, frame.height, frame.tagged) == (203, 155, True)
    assert opened(data).size == (203, 155)


def test_without_the_library_everything_is_exact(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_jpeg, "simplejpeg", None)
    data = jpeg_of(photo)
    assert outcome(read_fast, data) == outcome(read_image, data)
    exact = train_transform(CROP_AND_FLIP, 32, "bilinear")
    for a, b in zip(mapped(data, exact, 3), mapped(data, from_jpeg(exact), 3), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- loaders


@pytest.fixture
def cfg(photo: np.ndarray, tmp_path: Path) -> CfgNode:
    for index in range(4):
        (tmp_path / "ant").mkdir(exist_ok=True)
        (tmp_path / "ant" / f"{index}.jpg").write_bytes(jpeg_of(np.roll(photo, 40 * index, axis=1), quality=90))
    cfg = get_config("Base-ClsNet.yaml")
    cfg.MODEL.DEVICE, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = "cpu", 1, 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.TEST.IMS_PER_BATCH = 4, 2, 4
    cfg.INPUT.TRAIN_SIZE, cfg.INPUT.TEST_SIZE, cfg.INPUT.TEST_RESIZE = 64, 64, 72
    cfg.DATASETS.TRAIN = (f"folder:{tmp_path}",)
    return cfg


@pytest.mark.parametrize(
    ("build", "key", "default"),
    [(build_train_loader, "TRAIN_DECODE", "fast"), (build_test_loader, "TEST_DECODE", "exact")],
)
def test_the_keys_choose_the_reader(
    build: Callable[..., Any], key: str, default: str, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cfg.INPUT[key] == default
    sizes, batches = decoded_sizes(monkeypatch), {}
    source = open_source(cfg.DATASETS.TRAIN[0])
    for how in ("fast", "exact"):
        cfg.INPUT[key] = how
        batches[how] = torch.cat([batch.images for batch in build(cfg, source)])
        assert bool(sizes) == (how == "fast")
        sizes.clear()
    assert 0 < levels(batches["fast"], batches["exact"]) < REDUCED
    cfg.INPUT[key], cfg.MODEL.PIXEL_MEAN = "fast", [127.0]
    assert next(iter(build(cfg, source))).images.shape == (4, 1, 64, 64)  # grey: exact
    assert not sizes


def test_workers_give_what_no_workers_give(cfg: CfgNode) -> None:
    source = open_source(cfg.DATASETS.TRAIN[0])
    expected = [batch.images for batch in build_train_loader(cfg, source)]
    cfg.DATALOADER.NUM_WORKERS = 2
    for a, b in zip(expected, build_train_loader(cfg, source), strict=True):
        assert torch.equal(a, b.images)


def test_a_file_that_is_cut_off_ends_training_with_its_name(cfg: CfgNode, tmp_path: Path) -> None:
    source = open_source(cfg.DATASETS.TRAIN[0])
    path = tmp_path / "ant" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"cannot read the image {path}: "):
        list(build_train_loader(cfg, source))


def test_a_file_found_damaged_by_the_decoder_is_a_bad_file(photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no fault of the transforms', within which it is decoded."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise ImageError("cannot read the image x.jpg: broken", "x.jpg")

    data = broken_middle(jpeg_of(photo))
    monkeypatch.setattr(Jpeg, "exact", refuse)
    source = [{"image_id": 0, "label": 0, "encoded": data, "name": "x.jpg"}]
    dataset = MappedDataset(source, ClsMapper(from_jpeg(evaluation_transform(0, 32, "bilinear"))), "leave_out")
    result = dataset[Draw(0, 0)]
    assert [file.name for file in result.bad] == ["x.jpg"] and not result.fatal and result.sample is None


def test_a_worker_leaves_what_it_was_born_with_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("signal.sigtimedwait", raising=False)  # this process is to keep its signals
    try:
        loaders.start_worker(0)
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()
    assert gc.get_freeze_count() == 0
