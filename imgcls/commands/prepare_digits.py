"""Compose the embedded digits into a detection data set, and say how detectron2 takes it."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from imgcls.data.digit_canvases import prepare
from imgcls.data.digits import NUM_CLASSES, SPLITS


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data set asked for on the command line; return 0, or 2 after one line ``error: ...``."""
    arguments = _parser().parse_args(argv)
    try:
        written = prepare(**vars(arguments))
        lines = [_describe(arguments.output, split) for split in SPLITS]
    except (ValueError, OSError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    lines.insert(0, f"{'written to' if written else 'already complete in'} {arguments.output}")
    print("\n".join([*lines, "", _format_registration(arguments.output)]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compose handwritten digits into a COCO detection data set.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--train", type=int, default=600, help="training images (default: %(default)s)")
    parser.add_argument("--val", type=int, default=200, help="validation images (default: %(default)s)")
    parser.add_argument("--canvas", type=int, default=128, help="side in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


def _describe(folder: Path, split: str) -> str:
    coco = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
    counts = Counter(item["category_id"] - 1 for item in coco["annotations"])
    per_class = ", ".join(f"{number}: {counts[number]}" for number in range(NUM_CLASSES))
    return f"{split}: {len(coco['images'])} images, {len(coco['annotations'])} boxes ({per_class})"


def _format_registration(folder: Path) -> str:
    lines = ["# Python, before the config is used:"]
    lines.append("from detectron2.data.datasets import register_coco_instances")
    yaml = ["", "# YAML; imgcls' own commands take the names behind # without any Python:", "DATASETS:"]
    for key, split in (("TRAIN", "train"), ("TEST", "val")):
        # Not "digits_train": imgcls has the single digits under that name.
        name, annotations, images = f"digit_detection_{split}", str(folder / f"{split}.json"), str(folder / split)
        lines.append(f"register_coco_instances({name!r}, {{}}, {annotations!r}, {images!r})")
        yaml.append(f'  {key}: ["{name}"]  # {json.dumps([f"coco:{annotations}@{images}"])}')
    yaml += ["INPUT:", "  MASK_FORMAT: bitmask  # only read with MODEL.MASK_ON"]
    yaml += ["MODEL:", "  ROI_HEADS:", f"    NUM_CLASSES: {NUM_CLASSES}"]
    yaml += ["  RETINANET:", f"    NUM_CLASSES: {NUM_CLASSES}"]
    return "\n".join(lines + yaml)
