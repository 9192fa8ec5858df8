"""Convert Pascal VOC annotations to COCO JSON, and say how detectron2 takes them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgcls.data.voc import build_coco, check_layout, find_classes, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the splits named on the command line; return 0, or 2 after one line ``error: ...``."""
    arguments = _parser().parse_args(argv)
    try:
        summaries = _convert_splits(arguments)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print("\n".join([_format_table(summaries), "", _format_registration(arguments.root, summaries)]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Convert Pascal VOC annotations to COCO JSON.")
    parser.add_argument("--root", type=Path, required=True, help="folder with JPEGImages and Annotations")
    parser.add_argument("--output", type=Path, required=True, help="folder for <split>.json")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="lists in ImageSets/Main")
    parser.add_argument("--classes", nargs="+", help="class names in order (default: all names, sorted)")
    parser.add_argument(
        "--keep-difficult", action="store_true", help="difficult objects are ordinary, not ignored, ones"
    )
    return parser


def _convert_splits(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Build every split before the first is written: a fault in the last must not leave the others behind."""
    check_layout(arguments.root)
    classes = arguments.classes or find_classes(arguments.root)
    splits = list(dict.fromkeys(arguments.splits))
    built = [build_coco(arguments.root, split, classes, arguments.keep_difficult) for split in splits]
    summaries = []
    for coco, summary in built:
        path = arguments.output / f"{summary['split']}.json"
        write_json(coco, path)
        summaries.append({**summary, "output": str(path)})
    return summaries


def _format_table(summaries: list[dict[str, Any]]) -> str:
    keys = ("images", "images_without_boxes", "boxes", "difficult", "clipped", "dropped", "size_from_image")
    rows = [("", *(str(item["split"]) for item in summaries))]
    rows += [(key.replace("_", " "), *(str(item[key]) for item in summaries)) for key in keys]
    rows += [
        (f"class {name}", *(str(item["boxes_per_class"][name]) for item in summaries))
        for name in summaries[0]["classes"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _format_registration(root: Path, summaries: list[dict[str, Any]]) -> str:
    images = str(root / "JPEGImages")
    named = [(f"{root.resolve().name}_{item['split']}", item) for item in summaries]
    lines = ["# Python, before the config is used:"]
    lines.append("from detectron2.data.datasets import register_coco_instances")
    lines += [f"register_coco_instances({name!r}, {{}}, {item['output']!r}, {images!r})" for name, item in named]
    # Only one training split is named: VOC's "trainval" holds "train" once more.
    train = [pair for pair in named if pair[1]["split"].startswith("train")][:1]
    test = [pair for pair in named if not pair[1]["split"].startswith("train")]
    lines += ["", "# YAML; imgcls' own commands take the names behind # without any Python:", "DATASETS:"]
    for key, pairs in (("TRAIN", train), ("TEST", test)):
        direct = json.dumps([f"coco:{item['output']}@{images}" for _, item in pairs])
        lines.append(f"  {key}: {json.dumps([name for name, _ in pairs])}  # {direct}")
    number = len(summaries[0]["classes"])
    lines += ["MODEL:", "  ROI_HEADS:", f"    NUM_CLASSES: {number}"]
    lines += ["  RETINANET:", f"    NUM_CLASSES: {number}"]
    return "\n".join(lines)
