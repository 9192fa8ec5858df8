"""COCO annotations as a multi-label set, ``coco-labels:ANNOTATIONS.json@IMAGES_DIR``: which categories are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from imgcls.data.datasets.coco import coco_paths, read_coco
from imgcls.data.datasets.files import FileSource

PREFIX = "coco-labels:"


class CocoLabelsSource(FileSource):
    """Every picture of a COCO file, with 1 for each category that has an annotation in it and 0 for the others.

    spelling: ``ANNOTATIONS.json@IMAGES_DIR``.

    Classes are the categories in the order of their ids, as detectron2 numbers them. A crowd counts like any other
    annotation: the category is there. A picture without annotations has no label and stays in the set.
    """

    def __init__(self, spelling: str) -> None:
        file, images = coco_paths(PREFIX + spelling, PREFIX)
        content = read_coco(file, ("categories", "images", "annotations"))
        categories = sorted(
            _entries(content, "categories", {"id": int, "name": str}, file), key=lambda item: item["id"]
        )
        pictures = _entries(content, "images", {"id": int, "file_name": str}, file)
        annotations = _entries(content, "annotations", {"image_id": int, "category_id": int}, file)
        classes = tuple(item["name"] for item in categories)
        if not (classes and pictures):
            raise ValueError(f"{file} has {len(classes)} categories and {len(pictures)} images; it needs some of both")
        column_of = _numbered([item["id"] for item in categories], "categories with the id", file)
        row_of = _numbered([item["id"] for item in pictures], "images with the id", file)
        _numbered(list(classes), "categories with the name", file)
        labels = np.zeros((len(pictures), len(classes)), dtype=np.float32)
        for index, item in enumerate(annotations):
            if item["image_id"] not in row_of or item["category_id"] not in column_of:
                raise ValueError(
                    f"annotation {item.get('id', index)} of {file} speaks of image {item['image_id']} and category "
                    f"{item['category_id']}, and the file does not list both; mend the file"
                )
            labels[row_of[item["image_id"]], column_of[item["category_id"]]] = 1
        super().__init__(PREFIX + spelling, images, [item["file_name"] for item in pictures], labels, classes)


def _entries(content: dict[str, list[Any]], key: str, needed: dict[str, type], file: Path) -> list[dict[str, Any]]:
    for index, item in enumerate(content[key]):
        if not isinstance(item, dict) or any(type(item.get(name)) is not kind for name, kind in needed.items()):
            wanted = " and ".join(f"{name!r} ({kind.__name__})" for name, kind in needed.items())
            raise ValueError(f"entry {index} of {key!r} in {file} needs {wanted}; mend the file")
    return content[key]


def _numbered(keys: list[Any], what: str, file: Path) -> dict[Any, int]:
    numbers = {key: index for index, key in enumerate(keys)}
    if len(numbers) < len(keys):
        twice = next(key for index, key in enumerate(keys) if numbers[key] != index)
        raise ValueError(f"{file} has two {what} {twice!r}; mend the file")
    return numbers
