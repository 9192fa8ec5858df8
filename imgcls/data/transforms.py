"""From a picture to the square of uint8 pixels that the network takes; torchvision's v2 transforms do the work."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from imgcls.config import register_check
from imgcls.structures import Problem

Transform = Callable[[Image.Image], Any]
_Row = Callable[..., Transform]

_KEY = "INPUT.TRAIN_TRANSFORMS"


def train_transform(rows: Sequence[Sequence[Any]], size: int, interpolation: str) -> v2.Compose:
    """The transforms of ``INPUT.TRAIN_TRANSFORMS`` in order, then (3, size, size) uint8.

    rows: ``[name, arguments...]`` each, names from :data:`TRANSFORMS`.
    """
    mode = InterpolationMode(interpolation)
    for row in rows:
        problem = _problem_with(row, size, mode)
        if problem:
            raise problem.error()
    return v2.Compose([*(_build(row, size, mode) for row in rows), _pixels])


def test_transform(resize: int, size: int, interpolation: str) -> v2.Compose:
    """Short side to ``resize`` and the centre crop of ``size``; with ``resize`` 0 the whole picture to the square."""
    mode = InterpolationMode(interpolation)
    if resize == 0:
        steps: list[Any] = [v2.Resize((size, size), interpolation=mode)]
    else:
        steps = [v2.Resize(resize, interpolation=mode), v2.CenterCrop(size)]
    return v2.Compose([*steps, _pixels])


def _pixels(image: Image.Image) -> torch.Tensor:
    return v2.functional.pil_to_tensor(image)


@register_check
def check_transforms(cfg: CfgNode) -> list[Problem]:
    """Every row of ``INPUT.TRAIN_TRANSFORMS``, before anything is built."""
    node = cfg.INPUT
    if cfg.MODEL.META_ARCHITECTURE != "ClsNet" or node.INTERPOLATION not in {mode.value for mode in InterpolationMode}:
        return []
    mode = InterpolationMode(node.INTERPOLATION)
    found = [_problem_with(row, max(1, node.TRAIN_SIZE), mode) for row in node.TRAIN_TRANSFORMS]
    return [problem for problem in found if problem]


def _problem_with(row: Any, size: int, mode: InterpolationMode) -> Problem | None:
    if not isinstance(row, (list, tuple)) or not row or not isinstance(row[0], str):
        return Problem("a transform is not a row", row, 'a list [name, arguments...], e.g. ["resize"]', _KEY)
    name, *arguments = row
    if name not in TRANSFORMS:
        near = difflib.get_close_matches(name, TRANSFORMS, n=1)
        hint = f"did you mean {near[0]}? All: " if near else ""
        return Problem("there is no such transform", name, hint + ", ".join(TRANSFORMS), _KEY)
    try:
        # torchvision looks at some arguments only when it draws: try a picture that has the right size already.
        with torch.random.fork_rng(devices=[]):
            _build(row, size, mode)(Image.new("RGB", (size, size)))
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"the transform {name} does not take these arguments ({error})"
        return Problem(what, arguments, _arguments_of(name), _KEY)
    return None


def _build(row: Sequence[Any], size: int, mode: InterpolationMode) -> Transform:
    return TRANSFORMS[row[0]](size, mode, *row[1:])


def _arguments_of(name: str) -> str:
    parameters = list(inspect.signature(TRANSFORMS[name]).parameters.values())[2:]
    return ", ".join(f"{parameter.name} (default {parameter.default})" for parameter in parameters) or "none"


def _random_resized_crop(
    size: int, mode: InterpolationMode, min_area: float = 0.08, max_area: float = 1.0
) -> Transform:
    if not 0 < min_area <= max_area:
        raise ValueError("the areas are shares of the picture, the smaller one first")
    return v2.RandomResizedCrop(size, scale=(min_area, max_area), interpolation=mode)


def _random_crop(size: int, mode: InterpolationMode, padding: int = 0) -> Transform:
    return v2.RandomCrop(size, padding=padding)


def _resize(size: int, mode: InterpolationMode) -> Transform:
    return v2.Resize((size, size), interpolation=mode)


def _horizontal_flip(size: int, mode: InterpolationMode, probability: float = 0.5) -> Transform:
    return v2.RandomHorizontalFlip(probability)


def _random_affine(
    size: int,
    mode: InterpolationMode,
    degrees: float = 0.0,
    shift: float = 0.0,
    min_scale: float = 1.0,
    max_scale: float = 1.0,
) -> Transform:
    return v2.RandomAffine(degrees, translate=(shift, shift), scale=(min_scale, max_scale), interpolation=mode)


def _color_jitter(
    size: int,
    mode: InterpolationMode,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.0,
) -> Transform:
    return v2.ColorJitter(brightness, contrast, saturation, hue)


def _random_invert(size: int, mode: InterpolationMode, probability: float = 0.5) -> Transform:
    return v2.RandomInvert(probability)


# name in YAML -> function(size, interpolation, *arguments of the row)
TRANSFORMS: dict[str, _Row] = {
    "random_resized_crop": _random_resized_crop,  # Szegedy et al. 2015: area range; aspect 3/4 to 4/3
    "random_crop": _random_crop,  # He et al. 2015, section 4.2: padding in pixels
    "resize": _resize,  # the whole picture to the square
    "horizontal_flip": _horizontal_flip,  # probability
    "random_affine": _random_affine,  # degrees, shift (share of the side), smallest and largest scale
    "color_jitter": _color_jitter,  # brightness, contrast, saturation, hue
    "random_invert": _random_invert,  # probability; for drawings, which come dark on light and light on dark
}
