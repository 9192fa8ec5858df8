"""COCO files by name, so that a detector's config needs no code: ``coco:ANNOTATIONS.json@IMAGES_DIR``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

PREFIX = "coco:"


def register_coco_names(names: Iterable[str]) -> None:
    """Register each ``coco:JSON@IMAGES`` among ``names`` with detectron2, under that name; others are left alone."""
    for name in names:
        if name.startswith(PREFIX) and name not in DatasetCatalog.list():
            annotations, images = coco_paths(name)
            register_coco_instances(name, {}, str(annotations), str(images))


def coco_paths(name: str, prefix: str = PREFIX) -> tuple[Path, Path]:
    """The annotation file and the images' folder that a name spells; what is not there is a ``ValueError``."""
    annotations, mark, images = name.removeprefix(prefix).rpartition("@")
    if not mark:
        raise ValueError(
            f"cannot read the data set {name!r}; expected {prefix}ANNOTATIONS.json@IMAGES_DIR; change DATASETS"
        )
    if not Path(annotations).is_file():
        raise ValueError(f"there is no file {annotations}; change DATASETS.TRAIN/TEST ({name})")
    if not Path(images).is_dir():
        raise ValueError(f"there is no folder {images}; change DATASETS.TRAIN/TEST ({name})")
    return Path(annotations), Path(images)


def count_categories(name: str) -> int:
    """How many categories the annotation file of a ``coco:`` name lists."""
    annotations, _ = coco_paths(name)
    return len(read_coco(annotations, ("categories",))["categories"])


def read_coco(annotations: Path, lists: Iterable[str]) -> dict[str, list[Any]]:
    """The content of a COCO file, in which the named lists must be."""
    try:
        content = json.loads(annotations.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{annotations} is no JSON file: {error}; change DATASETS.TRAIN/TEST") from error
    for key in lists:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{annotations} has no list of {key}, as COCO files have; change DATASETS.TRAIN/TEST")
    return dict(content)
