"""From a picture to the square of uint8 pixels that the network takes: the rows of the config put together."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from imgcls.config import register_check
from imgcls.data.augmentations import TRANSFORMS, Transform
from imgcls.data.policies import POLICIES
from imgcls.data.random_stream import generators_kept
from imgcls.structures import Problem

_KEY = "INPUT.TRAIN_TRANSFORMS"
_POLICY = "policy"


def train_transform(rows: Sequence[Sequence[Any]], size: int, interpolation: str, key: str = _KEY) -> v2.Compose:
    """The transforms of ``INPUT.TRAIN_TRANSFORMS`` in order, then (3, size, size) uint8; of grey pictures one channel.

    rows: ``[name, arguments...]`` each, names from :data:`TRANSFORMS`; or ``["policy", name]``, names from
        :data:`POLICIES`. Asking again for the same ones costs nothing.
    key: that holds the rows, to name in an error.
    """
    return _train_transform(json.dumps(rows, default=repr), size, interpolation, key)


@functools.lru_cache(maxsize=64)
def _train_transform(rows: str, size: int, interpolation: str, key: str) -> v2.Compose:
    steps = list(_expanded(json.loads(rows), size))
    for problem in transform_problems(steps, size, interpolation, key):
        raise problem.error()
    mode = InterpolationMode(interpolation)
    return v2.Compose([*(_build(row, size, mode) for row in steps), _pixels])


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


def _expanded(rows: Iterable[Any], size: int) -> Iterable[Any]:
    """The rows, policies replaced by theirs; a policy that does not exist stays, to be complained about."""
    for row in rows:
        known = isinstance(row, (list, tuple)) and len(row) == 2 and row[0] == _POLICY
        if known and isinstance(row[1], str) and row[1] in POLICIES:
            yield from POLICIES[row[1]](size)
        else:
            yield row


@register_check
def check_transforms(cfg: CfgNode) -> list[Problem]:
    """Every row of ``INPUT.TRAIN_TRANSFORMS``, before anything is built."""
    node = cfg.INPUT
    if cfg.MODEL.META_ARCHITECTURE != "ClsNet" or node.INTERPOLATION not in {mode.value for mode in InterpolationMode}:
        return []
    return list(transform_problems(node.TRAIN_TRANSFORMS, max(1, node.TRAIN_SIZE), node.INTERPOLATION))


def transform_problems(rows: Iterable[Any], size: int, interpolation: str, key: str = _KEY) -> Iterator[Problem]:
    """What is wrong with each row of ``key`` that :func:`train_transform` would refuse, in order."""
    mode = InterpolationMode(interpolation)
    for row in _expanded(rows, size):
        problem = _problem_with(row, size, mode)
        if problem:
            yield replace(problem, key=key)


def _problem_with(row: Any, size: int, mode: InterpolationMode) -> Problem | None:
    if not isinstance(row, (list, tuple)) or not row or not isinstance(row[0], str):
        return Problem("a transform is not a row", row, 'a list [name, arguments...], e.g. ["resize"]', _KEY)
    name, *arguments = row
    if name == _POLICY:
        return _unknown("policy", arguments[0] if len(arguments) == 1 else arguments, POLICIES)
    if name not in TRANSFORMS:
        return _unknown("transform", name, [*TRANSFORMS, _POLICY])
    # A pipeline of albumentations may cut out fixed sizes, larger than the square that follows.
    side = size if name != "albumentations" else max(512, 2 * size)
    try:
        # torchvision looks at some arguments only when it draws: try a picture that has the right size already.
        with generators_kept():
            _build(row, size, mode)(Image.new("RGB", (side, side)))
    except ImportError as error:
        return Problem(str(error), name, "the other transforms", _KEY)
    except Exception as error:  # arguments of every kind in libraries of several makers
        reason = " ".join(str(error).split())
        return Problem(
            f"the transform {name} does not take these arguments ({reason})", arguments, _arguments_of(name), _KEY
        )
    return None


def _unknown(kind: str, name: Any, known: Iterable[str]) -> Problem:
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]}? All: " if near else ""
    return Problem(f"there is no such {kind}", name, hint + ", ".join(known), _KEY)


def _build(row: Sequence[Any], size: int, mode: InterpolationMode) -> Transform:
    return TRANSFORMS[row[0]](size, mode, *row[1:])


def _arguments_of(name: str) -> str:
    parameters = list(inspect.signature(TRANSFORMS[name]).parameters.values())[2:]
    return ", ".join(map(_described, parameters)) or "none"


def _described(parameter: inspect.Parameter) -> str:
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name} (default {parameter.default})"
