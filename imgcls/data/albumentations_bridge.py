"""Pipelines of the library albumentations, written down as rows; an optional extra.

A row is ``[name, {argument: value}]``; a composition holds rows of its own: ``["OneOf", [row, ...], {"p": 0.5}]``.
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

INSTALL = "pip install 'imgcls[albumentations]'"


class Albumentations:
    """A pipeline as a transform of PIL pictures.

    The library draws from a generator of its own; it is set from torch's for every picture, so that a picture's draws
    are a function of whatever torch was seeded with.

    pipeline: rows, or the path of a YAML or JSON file with rows, or of one that ``albumentations.save`` wrote.
    Raises ``ValueError`` for a pipeline that the library does not take, ``ImportError`` without the library.
    """

    def __init__(self, pipeline: list[Any] | str) -> None:
        self.pipeline = _read(pipeline) if isinstance(pipeline, str) else pipeline
        self._compose = _compose(self.pipeline)

    def __call__(self, picture: Image.Image) -> Image.Image:
        self._compose.set_random_seed(int(torch.randint(2**31, ())))
        try:
            pixels = self._compose(image=np.array(picture))["image"]
        except Exception as error:  # OpenCV has errors of its own, which do not say where they come from
            raise ValueError(f"the pipeline of albumentations fails: {error}") from error
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            kind = getattr(pixels, "dtype", type(pixels).__name__)
            raise ValueError(f"the pipeline gives {kind} pixels; leave out what normalises or makes tensors")
        return Image.fromarray(pixels)

    # The library's objects hold locks and generators; a worker that is spawned builds its own.
    def __getstate__(self) -> dict[str, Any]:
        return {"pipeline": self.pipeline}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["pipeline"])  # type: ignore[misc]


def _library() -> ModuleType:
    # Or it asks the network for its newest version on import.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        return importlib.import_module("albumentations")
    except ImportError as error:
        raise ImportError(f"the transform albumentations needs that library: {INSTALL} ({error})") from error


def _read(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the pipeline {path}: {error}") from error


def _compose(pipeline: Any) -> Any:
    library = _library()
    # A wrong argument is a mere warning there, and ignored.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            if isinstance(pipeline, dict):
                return library.Compose([library.from_dict(pipeline)])
            return library.Compose(_built(library, pipeline))
        except (UserWarning, KeyError, NotImplementedError) as error:
            raise ValueError(str(error)) from error


def _built(library: ModuleType, rows: Any) -> list[Any]:
    if not isinstance(rows, (list, tuple)) or not rows:
        raise ValueError(f"a pipeline is a list of rows [name, {{argument: value}}]; this is {rows!r}")
    return [_one(library, row) for row in rows]


def _one(library: ModuleType, row: Any) -> Any:
    if not isinstance(row, (list, tuple)) or not row or not isinstance(row[0], str):
        raise ValueError(f"a row is [name, {{argument: value}}]; this is {row!r}")
    name, *rest = row
    kind = getattr(library, name, None)
    if not (isinstance(kind, type) and issubclass(kind, (library.BasicTransform, library.BaseCompose))):
        raise ValueError(f"the library {library.__version__} has no transform {name!r}")
    inner = [_built(library, rest.pop(0))] if issubclass(kind, library.BaseCompose) and rest else []
    arguments = rest.pop(0) if rest else {}
    if rest or not isinstance(arguments, dict):
        raise ValueError(f"a row is [name, {{argument: value}}]; this is {row!r}")
    return kind(*inner, **arguments)
