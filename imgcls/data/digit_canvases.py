"""A small detection data set that needs no download: real handwritten digits composed on larger canvases.

Each canvas is an RGB image with a few digits of :func:`imgcls.data.digits.load_digits`, resized, coloured and
placed at random with little overlap, over a textured background with strokes that are no digits, under pixel
noise. Most canvases are light on dark, as the digits are by themselves; the others are dark on light.

Training canvases hold digits of the "train" split only and validation canvases those of "val" only; the
``digit_id`` of an annotation is the index in that split. Canvas ``i`` depends on seed, split and ``i`` alone,
never on how many canvases are made.

Ink is where a resized digit covers at least :data:`INK_THRESHOLD` of a pixel. A digit is cut to its ink, so its
box, in 0-based continuous pixels, is the tightest around its ink mask. The mask is written too, as COCO RLE
(Mask R-CNN reads it with ``INPUT.MASK_FORMAT: bitmask``), and ``area`` is the area of the mask, as in COCO.
Where two digits cross, both masks and boxes stay whole although the later digit covers the earlier one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from PIL import Image, ImageDraw

from imgcls.data.digits import NUM_CLASSES, SPLITS, load_digits

INK_THRESHOLD = 0.25

# Goes up whenever equal settings give other canvases, so that an older folder is not taken for a current one.
_GENERATOR = 1
_PLACE_TRIES = 50
_SETTINGS_FILE = "settings.json"

FloatArray = npt.NDArray[np.float64]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class CanvasOptions:
    """How canvases look; lengths are in pixels, colours in steps of 0..255.

    Args:
        min_digits, max_digits: digits a canvas is meant to get, drawn evenly; one that finds no free place is
            left out, but never the first.
        min_size, max_size: longer side of a digit, drawn evenly; the threshold rarely takes a few pixels off.
        max_iou: two boxes overlap by no more than this IoU.
        light_on_dark: share of canvases with light digits on a dark background.
        texture: strength of the background's soft spots.
        noise: largest standard deviation of the pixel noise.
        max_strokes: most strokes of clutter.

    Raises:
        ValueError: a value out of range.
    """

    min_digits: int = 1
    max_digits: int = 5
    min_size: int = 20
    max_size: int = 56
    max_iou: float = 0.05
    light_on_dark: float = 0.85
    texture: float = 12.0
    noise: float = 8.0
    max_strokes: int = 6

    def __post_init__(self) -> None:
        _require(1 <= self.min_digits <= self.max_digits, "min_digits, max_digits", self, "1 <= min <= max")
        _require(8 <= self.min_size <= self.max_size, "min_size, max_size", self, "8 <= min <= max")
        _require(0 <= self.max_iou < 1, "max_iou", self, "0 <= max_iou < 1")
        _require(0 <= self.light_on_dark <= 1, "light_on_dark", self, "0 to 1")
        _require(0 <= self.texture <= 64, "texture", self, "0 to 64")
        _require(0 <= self.noise <= 64, "noise", self, "0 to 64")
        _require(self.max_strokes >= 0, "max_strokes", self, "0 or more")


@dataclass(frozen=True, eq=False)
class PlacedDigit:
    """A digit on a canvas: the index in its split, its label, the left upper corner and its ink (h, w)."""

    digit_id: int
    label: int
    x: int
    y: int
    ink: npt.NDArray[np.bool_]

    @property
    def box(self) -> Box:
        """(x, y, width, height) in pixels; pixel ``x`` reaches from ``x`` to ``x + 1``."""
        return self.x, self.y, self.ink.shape[1], self.ink.shape[0]


@dataclass(frozen=True, eq=False)
class Canvas:
    """An image, uint8 of shape (side, side, 3) in RGB, and the digits on it, the undermost first."""

    image: npt.NDArray[np.uint8]
    digits: list[PlacedDigit]


def compose(
    split: str, num_images: int, canvas: int = 128, seed: int = 0, options: CanvasOptions | None = None
) -> Iterator[Canvas]:
    """Return an iterator over the first ``num_images`` canvases of a split.

    Args:
        split: "train" or "val"; says which digits are used.
        num_images: at least 1.
        canvas: side in pixels; at least ``options.max_size``.
        seed: 0 or more; equal arguments give equal canvases.
        options: how they look; the defaults of :class:`CanvasOptions` if left out.

    Raises:
        ValueError: an argument out of range; raised by the call itself, before the first canvas.
    """
    options = options or CanvasOptions()
    _check_arguments(num_images, canvas, seed, options)
    images, labels = load_digits(split)
    return (
        _compose_one(np.random.default_rng([seed, SPLITS.index(split), index]), images, labels, canvas, options)
        for index in range(num_images)
    )


def prepare(
    output: Path,
    train: int = 600,
    val: int = 200,
    canvas: int = 128,
    seed: int = 0,
    options: CanvasOptions | None = None,
) -> bool:
    """Write the data set: ``{train,val}/000000.png`` and on, ``{train,val}.json`` and ``settings.json``.

    The JSON is COCO's: image ``i`` has id ``i + 1``, category ids are 1..10 for "0".."9". Everything is built
    in a folder beside ``output`` that is renamed when complete.

    Returns:
        True where it was written, False where ``output`` already holds it with these settings.

    Raises:
        ValueError: an argument out of range, or ``output`` holds anything else.
    """
    options = options or CanvasOptions()
    counts = {"train": train, "val": val}
    for count in counts.values():
        _check_arguments(count, canvas, seed, options)
    settings = {"generator": _GENERATOR, **counts, "canvas": canvas, "seed": seed, "options": asdict(options)}
    output = Path(output).resolve()
    if _is_there(output, settings):
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex}.partial")
    try:
        for split, count in counts.items():
            _write_split(partial, split, compose(split, count, canvas, seed, options))
        (partial / _SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.rename(partial, output)  # over an empty folder too, but never over a filled one
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _require(holds: bool, names: str, options: CanvasOptions, allowed: str) -> None:
    if not holds:
        values = ", ".join(repr(getattr(options, name)) for name in names.split(", "))
        raise ValueError(f"{names} is {values}; allowed is {allowed}; change CanvasOptions")


def _check_arguments(num_images: int, canvas: int, seed: int, options: CanvasOptions) -> None:
    if num_images < 1:
        raise ValueError(f"{num_images} images are asked for; allowed is 1 or more; change --train or --val")
    if canvas < options.max_size:
        raise ValueError(
            f"canvas is {canvas} pixels wide; allowed is at least the largest digit, {options.max_size}; "
            f"change --canvas, or max_size in CanvasOptions"
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}; allowed is 0 or more; change --seed")


def _compose_one(
    rng: np.random.Generator,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    side: int,
    options: CanvasOptions,
) -> Canvas:
    light = bool(rng.random() < options.light_on_dark)
    picture = _background(rng, side, light, options)
    digits: list[PlacedDigit] = []
    for _ in range(rng.integers(options.min_digits, options.max_digits + 1)):
        digit_id = int(rng.integers(len(images)))
        coverage = _resize(images[digit_id], int(rng.integers(options.min_size, options.max_size + 1)))
        corner = _find_place(rng, coverage.shape, side, [digit.box for digit in digits], options.max_iou)
        if corner is None:
            continue
        x, y = corner
        ink = coverage >= INK_THRESHOLD
        digits.append(PlacedDigit(digit_id, int(labels[digit_id]), x, y, ink))
        area = picture[y : y + ink.shape[0], x : x + ink.shape[1]]
        area += coverage[..., None] * (_digit_colour(rng, light) - area)
    picture += rng.normal(size=picture.shape) * rng.uniform(0, options.noise)
    return Canvas(np.clip(np.rint(picture), 0, 255).astype(np.uint8), digits)


def _background(rng: np.random.Generator, side: int, light_digits: bool, options: CanvasOptions) -> FloatArray:
    """Return (side, side, 3): one colour, soft spots, and strokes that differ from it less than digits do."""
    base = rng.uniform(15, 65) if light_digits else rng.uniform(175, 230)
    colour = base + rng.uniform(-15, 15, size=3)
    spots = rng.normal(size=(3, *rng.integers(3, 9, size=2))).astype(np.float32)
    texture = [np.asarray(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC)) for channel in spots]
    picture = colour + options.texture * np.stack(texture, axis=-1)
    drawing = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    for _ in range(rng.integers(0, options.max_strokes + 1)):
        step = rng.uniform(15, 60, size=3) * (1 if light_digits else -1)
        _draw_stroke(rng, ImageDraw.Draw(drawing), side, np.clip(colour + step, 0, 255))
    return np.asarray(drawing).astype(np.float64)


def _draw_stroke(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int, colour: FloatArray) -> None:
    """Draw a straight line or an arc, the two shapes that digits are made of."""
    fill = (int(colour[0]), int(colour[1]), int(colour[2]))
    width = int(rng.integers(1, 4))
    x, y = (float(value) for value in rng.uniform(0, side, size=2))
    if rng.random() < 0.5:
        angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.5) * side
        draw.line((x, y, x + length * math.cos(angle), y + length * math.sin(angle)), fill, width)
        return
    radius, start = rng.uniform(0.05, 0.2) * side, float(rng.uniform(0, 360))
    stop = start + float(rng.uniform(60, 200))
    draw.arc((x - radius, y - radius, x + radius, y + radius), start, stop, fill, width)


def _digit_colour(rng: np.random.Generator, light: bool) -> FloatArray:
    base = rng.uniform(175, 240) if light else rng.uniform(10, 75)
    return np.asarray(np.clip(base + rng.uniform(-25, 25, size=3), 0, 255))


def _resize(digit: npt.NDArray[np.uint8], size: int) -> FloatArray:
    """Return the share of each pixel that ink covers, cut to the ink, its longer side ``size`` before the cut."""
    cut = _cut_to_ink(digit / 255.0)
    scale = size / max(cut.shape)
    height, width = (max(1, round(length * scale)) for length in cut.shape)
    picture = Image.fromarray(cut.astype(np.float32))
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)
    return _cut_to_ink(resized)


def _cut_to_ink(coverage: FloatArray) -> FloatArray:
    ink = coverage >= INK_THRESHOLD
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _find_place(
    rng: np.random.Generator, shape: tuple[int, ...], side: int, taken: list[Box], max_iou: float
) -> tuple[int, int] | None:
    """Return a left upper corner (x, y) that overlaps no box too much, or None after some tries."""
    height, width = shape
    for _ in range(_PLACE_TRIES):
        x, y = int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1))
        if all(_iou((x, y, width, height), box) <= max_iou for box in taken):
            return x, y
    return None


def _iou(first: Box, second: Box) -> float:
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    common = max(width, 0) * max(height, 0)
    return common / (first[2] * first[3] + second[2] * second[3] - common)


def _write_split(folder: Path, split: str, canvases: Iterator[Canvas]) -> None:
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, canvas in enumerate(canvases):
        height, width = canvas.image.shape[:2]
        name = f"{index:06d}.png"
        Image.fromarray(canvas.image).save(folder / split / name)
        images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
        for digit in canvas.digits:
            ids = {"id": len(annotations) + 1, "image_id": index + 1}
            annotations.append({**ids, **_annotation(digit, height, width)})
    coco = {
        "info": {"description": f"Handwritten digits on canvases, split {split}"},
        "licenses": [],
        "categories": [{"id": number + 1, "name": str(number)} for number in range(NUM_CLASSES)],
        "images": images,
        "annotations": annotations,
    }
    (folder / f"{split}.json").write_text(json.dumps(coco) + "\n", encoding="utf-8")


def _annotation(digit: PlacedDigit, height: int, width: int) -> dict[str, Any]:
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    mask[digit.y : digit.y + digit.ink.shape[0], digit.x : digit.x + digit.ink.shape[1]] = digit.ink
    counts = mask_util.encode(mask)["counts"].decode("ascii")
    return {
        "category_id": digit.label + 1,
        "bbox": list(digit.box),
        "area": int(digit.ink.sum()),
        "iscrowd": 0,
        "segmentation": {"size": [height, width], "counts": counts},
        "digit_id": digit.digit_id,
    }


def _is_there(output: Path, settings: dict[str, Any]) -> bool:
    """Say whether a complete data set of these settings is there; whatever else is there is not touched."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / _SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != settings:
        held = f"a data set with the settings {found}" if found else "other files"
        raise ValueError(
            f"{output} already holds {held}; allowed is an empty or new folder, or one with the settings "
            f"{settings}; change --output or remove the folder"
        )
    for split in SPLITS:
        images = len(list((output / split).glob("*.png")))
        if images != settings[split] or not (output / f"{split}.json").is_file():
            raise ValueError(
                f"{output} lacks files of its {split} split ({images} of {settings[split]} images are there); "
                f"allowed is a complete data set; remove the folder and run again"
            )
    return True
