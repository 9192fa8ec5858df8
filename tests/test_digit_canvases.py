"""Digits on canvases: boxes and masks against the pixels, no leak between splits, and all or nothing on disk."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from pycocotools.coco import COCO

from imgcls.commands.prepare_digits import main
from imgcls.data import digit_canvases
from imgcls.data.digit_canvases import Canvas, CanvasOptions, PlacedDigit, compose, prepare
from imgcls.data.digits import load_digits

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "prepare_digit_detection.py"

# One colour behind the digits: what differs from it is a digit.
PLAIN = CanvasOptions(texture=0, noise=0, max_strokes=0)
SINGLE = replace(PLAIN, min_digits=1, max_digits=1)


# pycocotools 2.0.11 says so under NumPy 2 whenever a mask is decoded.
ignores_mask_warning = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """Names put in here are taken out of detectron2's catalogs afterwards."""
    names: list[str] = []
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set, read by several tests and changed by none."""
    path = tmp_path_factory.mktemp("digits") / "set"
    assert prepare(path, train=6, val=4, canvas=96, seed=3)
    return path


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def same(first: Canvas, second: Canvas) -> bool:
    digits = [[(d.digit_id, d.label, d.box) for d in canvas.digits] for canvas in (first, second)]
    return bool(np.array_equal(first.image, second.image)) and digits[0] == digits[1]


# What is on a canvas


def tight_box(marked: np.ndarray) -> tuple[int, int, int, int]:
    """Look at pixel after pixel: (x, y, width, height) around all that are marked."""
    columns = [x for y in range(marked.shape[0]) for x in range(marked.shape[1]) if marked[y, x]]
    rows = [y for y in range(marked.shape[0]) for x in range(marked.shape[1]) if marked[y, x]]
    return min(columns), min(rows), max(columns) - min(columns) + 1, max(rows) - min(rows) + 1


def test_box_is_tight_around_what_is_drawn() -> None:
    sides = Counter[int]()
    for canvas in compose("val", 60, 64, 1, SINGLE):
        (digit,) = canvas.digits
        ground = np.array(Counter(map(tuple, canvas.image.reshape(-1, 3).tolist())).most_common(1)[0][0])
        drawn = (canvas.image != ground).any(axis=2)
        assert tight_box(drawn) == digit.box
        for planted in (drawn[1:], drawn[:, 1:], np.pad(drawn, ((1, 0), (0, 0)))):
            assert tight_box(planted) != digit.box
        x, y, width, height = digit.box
        sides.update([x == 0, y == 0, x + width == 64, y + height == 64])
    assert sides[True] > 0 and sides[False] > 0  # some touch the edge of the canvas


def coverage_in(canvas: Canvas, digit: PlacedDigit) -> np.ndarray:
    """How far each pixel of the box went from the ground's colour to the digit's, from the picture alone."""
    x, y, width, height = digit.box
    ground = np.array(Counter(map(tuple, canvas.image.reshape(-1, 3).tolist())).most_common(1)[0][0])
    away = np.abs(canvas.image[y : y + height, x : x + width].astype(float) - ground).sum(axis=2)
    return away / away.max()


def test_ink_is_a_quarter_of_full_coverage() -> None:
    for canvas in compose("train", 30, 64, 2, SINGLE):
        (digit,) = canvas.digits
        coverage = coverage_in(canvas, digit)
        assert digit.ink.shape == coverage.shape
        assert coverage[digit.ink].min() > 0.22
        assert coverage[~digit.ink].max() < 0.28
        assert coverage[~digit.ink[:, ::-1]].max() > 0.28  # mirrored ink does not fit


def test_sizes() -> None:
    options = replace(SINGLE, min_size=20, max_size=24)
    sizes = Counter(max(canvas.digits[0].ink.shape) for canvas in compose("val", 100, 40, 0, options))
    assert set(sizes) == {20, 21, 22, 23, 24}


def iou(first: PlacedDigit, second: PlacedDigit) -> float:
    """Count pixels in both boxes and in either."""
    pixels = [
        {(i, j) for i in range(d.box[0], d.box[0] + d.box[2]) for j in range(d.box[1], d.box[1] + d.box[3])}
        for d in (first, second)
    ]
    return len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1])


def largest_iou(canvases: Iterable[Canvas]) -> float:
    pairs = [
        iou(first, second)
        for canvas in canvases
        for number, first in enumerate(canvas.digits)
        for second in canvas.digits[number + 1 :]
    ]
    return max(pairs)


def test_boxes_overlap_little() -> None:
    crowded = replace(PLAIN, min_digits=4, max_digits=6)
    assert 0 < largest_iou(compose("train", 40, 100, 0, crowded)) <= 0.05
    assert largest_iou(compose("train", 40, 100, 0, replace(crowded, max_iou=0))) == 0
    assert largest_iou(compose("train", 40, 100, 0, replace(crowded, max_iou=0.9))) > 0.05


def test_digits_without_a_place_are_left_out() -> None:
    five = replace(PLAIN, min_digits=5, max_digits=5)
    assert {len(canvas.digits) for canvas in compose("train", 20, 600, 0, five)} == {5}
    crowded = [len(canvas.digits) for canvas in compose("train", 20, 70, 0, five)]
    assert min(crowded) >= 1 and min(crowded) < 5
    everywhere = replace(five, max_iou=0.99)
    assert {len(canvas.digits) for canvas in compose("train", 20, 70, 0, everywhere)} == {5}


def is_light_on_dark(canvas: Canvas) -> bool:
    digit = canvas.digits[-1]  # the uppermost
    x, y, width, height = digit.box
    grey = canvas.image.astype(float).mean(axis=2)
    return bool(grey[y : y + height, x : x + width][digit.ink].mean() > np.median(grey))


def test_both_polarities_all_counts_and_all_classes() -> None:
    canvases = list(compose("train", 200, 128, 0))
    light = sum(map(is_light_on_dark, canvases))
    assert 150 <= light <= 190  # 170 meant, standard deviation 5
    assert {len(canvas.digits) for canvas in canvases} == {1, 2, 3, 4, 5}
    assert {digit.label for canvas in canvases for digit in canvas.digits} == set(range(10))
    for share in (0.0, 1.0):
        options = CanvasOptions(light_on_dark=share)
        assert {is_light_on_dark(canvas) for canvas in compose("train", 20, 128, 0, options)} == {share == 1.0}


def contrast(canvas: Canvas) -> float:
    """Smallest distance between a digit's mean colour and the canvas's median colour, in grey levels."""
    grey = canvas.image.astype(float).mean(axis=2)
    distances = []
    for digit in canvas.digits:
        x, y, width, height = digit.box
        core = grey[y : y + height, x : x + width][digit.ink]
        distances.append(abs(core.mean() - np.median(grey)))
    return float(min(distances))


def test_digits_stand_out() -> None:
    assert min(contrast(canvas) for canvas in compose("train", 100, 128, 0)) > 25
    flat = [Canvas(np.full_like(canvas.image, 90), canvas.digits) for canvas in compose("train", 2, 128, 0)]
    assert max(map(contrast, flat)) == 0


@pytest.mark.parametrize("option", ["texture", "noise", "max_strokes"])
def test_each_disturbance_disturbs(option: str) -> None:
    """Alone, each makes pixels outside the boxes differ from each other; without any they are equal."""

    def spread(options: CanvasOptions) -> float:
        deviations = []
        for canvas in compose("train", 5, 128, 0, options):
            outside = np.ones(canvas.image.shape[:2], dtype=bool)
            for digit in canvas.digits:
                x, y, width, height = digit.box
                outside[y : y + height, x : x + width] = False
            deviations.append(canvas.image[outside].std(axis=0).max())
        return float(max(deviations))

    assert spread(PLAIN) == 0
    assert spread(replace(PLAIN, **{option: getattr(CanvasOptions(), option)})) > 1


# The same again


def test_canvas_depends_on_seed_split_and_index_alone() -> None:
    few, many = list(compose("train", 2, 128, 5)), list(compose("train", 4, 128, 5))
    assert all(same(first, second) for first, second in zip(few, many, strict=False))
    assert not same(many[0], many[1])
    assert not same(few[0], next(compose("train", 1, 128, 6)))
    assert not same(few[0], next(compose("val", 1, 128, 5)))


def test_splits_do_not_share_their_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at with digits of one shape, since real ones would hide equal random numbers."""
    monkeypatch.setattr(digit_canvases, "load_digits", marked_digits)

    def layout(split: str, seed: int) -> list[list[tuple[int, int, int, int]]]:
        return [[digit.box for digit in canvas.digits] for canvas in compose(split, 3, 128, seed)]

    assert layout("train", 5) == layout("train", 5)
    assert all(first != second for first, second in zip(layout("train", 5), layout("val", 5), strict=True))


# No leak


def marked_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """In place of real digits: filled squares for training, hollow ones for validation."""
    image = np.full((28, 28), 255, dtype=np.uint8)
    if split == "val":
        image[4:-4, 4:-4] = 0
    return np.stack([image] * 10), np.arange(10)


def kinds(canvases: Iterable[Canvas]) -> set[str]:
    return {
        "train" if digit.ink.mean() > 0.9 else "val" if digit.ink.mean() < 0.6 else "neither"
        for canvas in canvases
        for digit in canvas.digits
    }


def test_split_uses_its_own_digits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digit_canvases, "load_digits", marked_digits)
    assert kinds(compose("train", 40)) == {"train"}
    assert kinds(compose("val", 40)) == {"val"}

    def leaking(split: str) -> tuple[np.ndarray, np.ndarray]:
        parts = [marked_digits(name)[0] for name in ("train", "val")]
        return np.concatenate(parts), np.arange(20) % 10

    monkeypatch.setattr(digit_canvases, "load_digits", leaking)
    assert kinds(compose("val", 40)) == {"train", "val"}


def fitted(picture: np.ndarray) -> np.ndarray:
    """Squeeze into 16x16, whatever the size was."""
    image = Image.fromarray(picture.astype(np.float32)).resize((16, 16), Image.Resampling.BOX)
    return np.asarray(image).ravel()


def all_digits() -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Every digit of both splits, cut to its ink and squeezed, and its (split, index)."""
    rows, names = [], []
    for split in ("train", "val"):
        for number, image in enumerate(load_digits(split)[0]):
            x, y, width, height = Image.fromarray((image >= 64).astype(np.uint8)).getbbox() or (0, 0, 28, 28)
            rows.append(fitted(image[y:height, x:width] / 255))  # getbbox ends with the far corner
            names.append((split, number))
    return np.stack(rows), names


def wrong_digits(canvases: Sequence[Canvas], split: str, table: np.ndarray, names: list[tuple[str, int]]) -> int:
    """How many pictures look more like another of the 5,000 digits than like the one they are said to be."""
    wrong = 0
    for canvas in canvases:
        (digit,) = canvas.digits
        distances = ((table - fitted(coverage_in(canvas, digit))) ** 2).sum(axis=1)
        wrong += names[int(distances.argmin())] != (split, digit.digit_id)
    return wrong


@pytest.mark.parametrize("split", ["train", "val"])
def test_digit_id_tells_which_digit_is_drawn(split: str) -> None:
    table, names = all_digits()
    canvases = list(compose(split, 40, 56, 0, replace(SINGLE, min_size=40)))
    assert wrong_digits(canvases, split, table, names) == 0
    other = "val" if split == "train" else "train"
    assert wrong_digits(canvases, other, table, names) == 40
    shifted = [Canvas(c.image, [replace(c.digits[0], digit_id=c.digits[0].digit_id + 1)]) for c in canvases]
    assert wrong_digits(shifted, split, table, names) == 40


def leaks(coco: dict[str, Any], split: str) -> list[int]:
    """Annotations whose ``digit_id`` is none of the split, or belongs to another class."""
    labels = load_digits(split)[1]
    return [
        item["id"]
        for item in coco["annotations"]
        if not 0 <= item["digit_id"] < len(labels) or labels[item["digit_id"]] != item["category_id"] - 1
    ]


def test_written_digit_ids(folder: Path) -> None:
    for split in ("train", "val"):
        coco = read(folder / f"{split}.json")
        assert coco["annotations"] and leaks(coco, split) == []
        coco["annotations"][0]["digit_id"] = 4000
        coco["annotations"][1]["category_id"] = coco["annotations"][1]["category_id"] % 10 + 1
        assert leaks(coco, split) == [1, 2]
    assert leaks(read(folder / "train.json"), "val") != []


# The files


def test_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["settings.json", "train", "train.json", "val", "val.json"]
    for split, count in (("train", 6), ("val", 4)):
        names = [f"{number:06d}.png" for number in range(count)]
        assert sorted(path.name for path in (folder / split).iterdir()) == names
        coco = read(folder / f"{split}.json")
        assert [(item["id"], item["file_name"]) for item in coco["images"]] == list(enumerate(names, start=1))
        assert [(item["id"], item["name"]) for item in coco["categories"]] == [(i + 1, str(i)) for i in range(10)]
        assert [item["id"] for item in coco["annotations"]] == list(range(1, len(coco["annotations"]) + 1))
        for item, canvas in zip(coco["images"], compose(split, count, 96, 3), strict=True):
            assert (item["width"], item["height"]) == (96, 96)
            with Image.open(folder / split / item["file_name"]) as image:
                assert image.mode == "RGB"
                assert np.array_equal(np.asarray(image), canvas.image)


@ignores_mask_warning
def test_annotations_are_those_of_the_canvases(folder: Path) -> None:
    coco = COCO(str(folder / "train.json"))
    for number, canvas in enumerate(compose("train", 6, 96, 3), start=1):
        items = coco.loadAnns(coco.getAnnIds(imgIds=number))
        assert len(items) == len(canvas.digits)
        for item, digit in zip(items, canvas.digits, strict=True):
            mask = mask_util.decode(item["segmentation"])
            assert mask.shape == (96, 96)
            assert tuple(item["bbox"]) == tight_box(mask) == digit.box
            x, y, width, height = digit.box
            assert np.array_equal(mask[y : y + height, x : x + width], digit.ink)
            assert item["area"] == mask.sum() == coco.annToMask(item).sum()
            assert (item["category_id"], item["iscrowd"]) == (digit.label + 1, 0)


@ignores_mask_warning
def test_detectron2_reads_boxes_and_masks(folder: Path, registered: list[str]) -> None:
    register_coco_instances("tiny_digits_val", {}, str(folder / "val.json"), str(folder / "val"))
    registered.append("tiny_digits_val")
    records = DatasetCatalog.get("tiny_digits_val")
    assert MetadataCatalog.get("tiny_digits_val").thing_classes == list("0123456789")
    mapper = DatasetMapper(
        is_train=True, augmentations=[], image_format="RGB", use_instance_mask=True, instance_mask_format="bitmask"
    )
    for record, canvas in zip(records, compose("val", 4, 96, 3), strict=True):
        sample = mapper(record)
        assert sample["image"].shape == (3, 96, 96)
        assert sample["instances"].gt_classes.tolist() == [digit.label for digit in canvas.digits]
        corners = [[x, y, x + width, y + height] for x, y, width, height in (digit.box for digit in canvas.digits)]
        assert sample["instances"].gt_boxes.tensor.tolist() == corners
        areas = sample["instances"].gt_masks.tensor.sum(dim=(1, 2)).tolist()
        assert areas == [int(digit.ink.sum()) for digit in canvas.digits]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_equal_settings_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "again", train=6, val=4, canvas=96, seed=3)
    assert contents(tmp_path / "again") == contents(folder)
    prepare(tmp_path / "more", train=7, val=4, canvas=96, seed=3)
    more = contents(tmp_path / "more")
    assert more["train/000005.png"] == contents(folder)["train/000005.png"]
    assert more["val.json"] == contents(folder)["val.json"]
    prepare(tmp_path / "other", train=6, val=4, canvas=96, seed=4)
    assert contents(tmp_path / "other")["train/000005.png"] != more["train/000005.png"]


def test_complete_set_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "deep" / "set"
    assert prepare(output, train=1, val=1, canvas=64)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}

    def no_digits(split: str) -> None:
        raise AssertionError(f"{split} is composed again")

    monkeypatch.setattr(digit_canvases, "load_digits", no_digits)
    assert not prepare(output, train=1, val=1, canvas=64)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    with pytest.raises(AssertionError, match="train is composed again"):
        prepare(tmp_path / "new", train=1, val=1, canvas=64)


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    output = tmp_path / "set"
    output.mkdir()
    assert prepare(output, train=1, val=1, canvas=64)
    assert (output / "settings.json").is_file()


@pytest.mark.parametrize(
    "change",
    [{"train": 2}, {"val": 2}, {"canvas": 65}, {"seed": 1}, {"options": CanvasOptions(noise=1)}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"train": 1, "val": 1, "canvas": 64, "seed": 0}
    prepare(tmp_path / "set", **settings)
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match=r"set already holds a data set with the settings .*change --output"):
        prepare(tmp_path / "set", **{**settings, **change})
    assert contents(tmp_path / "set") == before
    assert not prepare(tmp_path / "set", **settings)


def test_set_of_another_generator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path / "set", train=1, val=1, canvas=64)
    monkeypatch.setattr(digit_canvases, "_GENERATOR", digit_canvases._GENERATOR + 1)
    with pytest.raises(ValueError, match="already holds a data set with the settings"):
        prepare(tmp_path / "set", train=1, val=1, canvas=64)


@pytest.mark.parametrize("name", ["notes.txt", "settings.json"])
def test_foreign_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text("mine")
    with pytest.raises(ValueError, match=r"set already holds other files; allowed is an empty or new folder"):
        prepare(tmp_path / "set", train=1, val=1, canvas=64)
    assert contents(tmp_path) == {f"set/{name}": b"mine"}
    with pytest.raises(ValueError, match=rf"{name} already holds other files"):
        prepare(tmp_path / "set" / name, train=1, val=1, canvas=64)


@pytest.mark.parametrize("lost", ["val/000000.png", "train.json"])
def test_incomplete_set_is_refused(tmp_path: Path, lost: str) -> None:
    prepare(tmp_path / "set", train=1, val=1, canvas=64)
    (tmp_path / "set" / lost).unlink()
    with pytest.raises(
        ValueError, match=rf"lacks files of its {lost.split('/')[0].split('.')[0]} split .*remove the folder"
    ):
        prepare(tmp_path / "set", train=1, val=1, canvas=64)


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt()])
def test_interruption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    def stop(*_: object) -> None:
        raise interruption

    with monkeypatch.context() as patch, pytest.raises(type(interruption)):
        patch.setattr(digit_canvases, "_annotation", stop)
        prepare(tmp_path / "set", train=1, val=1, canvas=64)
    assert list(tmp_path.iterdir()) == []
    assert prepare(tmp_path / "set", train=1, val=1, canvas=64)


# Arguments


def test_both_counts_are_checked_before_anything_is_composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_digits(split: str) -> None:
        raise AssertionError(f"{split} is composed")

    monkeypatch.setattr(digit_canvases, "load_digits", no_digits)
    with pytest.raises(ValueError, match=r"0 images are asked for; allowed is 1 or more; change --train or --val"):
        prepare(tmp_path / "set", train=1, val=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"unknown digit split 'test'; allowed are train, val"),
        ({"num_images": 0}, r"0 images are asked for; allowed is 1 or more; change --train or --val"),
        ({"canvas": 55}, r"canvas is 55 pixels wide; allowed is at least the largest digit, 56; change --canvas"),
        ({"seed": -1}, r"seed is -1; allowed is 0 or more; change --seed"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(**{"split": "train", "num_images": 1, **arguments})
    compose("train", 1, 56, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_digits": 0}, r"min_digits, max_digits is 0, 5; allowed is 1 <= min <= max; change CanvasOptions"),
        ({"min_digits": 6}, r"min_digits, max_digits is 6, 5"),
        ({"min_size": 7}, r"min_size, max_size is 7, 56; allowed is 8 <= min <= max"),
        ({"max_size": 19}, r"min_size, max_size is 20, 19"),
        ({"max_iou": 1.0}, r"max_iou is 1\.0; allowed is 0 <= max_iou < 1"),
        ({"max_iou": -0.1}, r"max_iou is -0\.1"),
        ({"light_on_dark": 1.1}, r"light_on_dark is 1\.1; allowed is 0 to 1"),
        ({"light_on_dark": float("nan")}, r"light_on_dark is nan"),
        ({"texture": -1.0}, r"texture is -1\.0; allowed is 0 to 64"),
        ({"noise": 65.0}, r"noise is 65\.0; allowed is 0 to 64"),
        ({"max_strokes": -1}, r"max_strokes is -1; allowed is 0 or more"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CanvasOptions(**options)


# The command


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], registered: list[str]) -> None:
    words = ["--output", str(tmp_path / "set"), "--train", "3", "--val", "2", "--canvas", "64", "--seed", "9"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("written to")
    settings = read(tmp_path / "set" / "settings.json")
    assert [settings[key] for key in ("train", "val", "canvas", "seed")] == [3, 2, 64, 9]
    labels = [item["category_id"] - 1 for item in read(tmp_path / "set" / "train.json")["annotations"]]
    counts = ", ".join(f"{number}: {labels.count(number)}" for number in range(10))
    assert f"train: 3 images, {len(labels)} boxes ({counts})" in printed

    python, yaml = printed.split("# Python")[1].split("# YAML")
    registered += ["digit_detection_train", "digit_detection_val"]
    exec(python.partition("\n")[2])  # the very lines that the user is told to use
    cfg = get_cfg()
    (tmp_path / "printed.yaml").write_text(yaml.partition("\n")[2])
    cfg.merge_from_file(str(tmp_path / "printed.yaml"))
    assert [len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TRAIN + cfg.DATASETS.TEST] == [3, 2]
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.INPUT.MASK_FORMAT) == (10, "bitmask")

    assert main(words) == 0
    assert capsys.readouterr().out.startswith("already complete in")


def test_command_line_error_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--output", str(tmp_path / "set"), "--canvas", "20"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: canvas is 20") and captured.err.count("\n") == 1

    def absent(split: str) -> None:
        raise ImportError("install it with:\n  pip install imgcls[digits]")

    monkeypatch.setattr(digit_canvases, "load_digits", absent)
    assert main(["--output", str(tmp_path / "set")]) == 2
    assert capsys.readouterr().err == "error: install it with: pip install imgcls[digits]\n"
    assert list(tmp_path.iterdir()) == []


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for canvas, code in (("20", 2), ("64", 0)):
        words = ["--output", str(tmp_path / "set"), "--train", "1", "--val", "1", "--canvas", canvas]
        monkeypatch.setattr(sys, "argv", ["prepare_digit_detection.py", *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert stop.value.code == code
    assert (tmp_path / "set" / "settings.json").is_file()
