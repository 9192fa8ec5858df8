"""From the command line to a training config: a YAML, or a folder of images and nothing else."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from detectron2.config import CfgNode

from imgcls.config import find_config, load_config
from imgcls.data import Source, open_source, splits_below
from imgcls.data.datasets.known_sets import KNOWN_SETS
from imgcls.data.reading import ImageError, read_size
from imgcls.modeling import family_of

logger = logging.getLogger(__name__)

FOLDER_RECIPE = "folder/from_scratch.yaml"
SMALL_IMAGE = 64  # pixels: up to this short side the network keeps its resolution (small stem)
ROOTED_SETS = tuple(f"{name}_" for name in KNOWN_SETS)  # sets for which --data names the root
_SAMPLE = 50


def training_config(args: argparse.Namespace) -> CfgNode:
    """The config of ``--config-file``, or of ``--data`` alone, with the other options and the overrides applied.

    Order of precedence: KEY VALUE pairs, then options, then what the images suggest, then the YAMLs, the last first.
    """
    if not (args.config_file or args.data):
        raise ValueError(
            "nothing says what to train: give --config-file FILE, or --data DIR (a folder of class folders)"
        )
    overrides = _from_options(args)
    paths = [find_config(name) for name in args.config_file or [FOLDER_RECIPE]]
    suggested = _data_for_config(args.data, paths) if args.config_file else _data_for_folder(args.data)
    return load_config(paths, [*suggested, *overrides, *args.opts])


def _from_options(args: argparse.Namespace) -> list[str]:
    overrides: list[str] = []
    if args.variant:
        overrides += ["MODEL.BACKBONE.VARIANT", args.variant, "MODEL.BACKBONE.NAME", family_of(args.variant).builder]
    if args.output:
        overrides += ["OUTPUT_DIR", repr(args.output)]  # a folder may be called 2026: quoted, it stays text
    return overrides


def _data_for_config(data: str, paths: Sequence[Path]) -> list[str]:
    """``--data`` beside a config: the root of the sets that it names, or, where those have no root, a folder."""
    if not data:
        return []
    cfg = load_config(paths)
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    if names and all(name.startswith(ROOTED_SETS) for name in names):
        return ["DATASETS.ROOT", repr(data)]
    return _sets_of(data)


def _data_for_folder(data: str) -> list[str]:
    train, _ = splits_below(data)
    return [*_sets_of(data), *sizes_for(open_source(train))]


def _sets_of(data: str) -> list[str]:
    train, test = splits_below(data)
    return ["DATASETS.TRAIN", repr((train,)), "DATASETS.TEST", repr((test,))]


def sizes_for(source: Source) -> list[str]:
    """Input sizes for pictures of thumbnail size; larger ones keep the recipe's 224."""
    step = max(1, len(source) // _SAMPLE)
    sides = [_short_side(source[index]) for index in range(0, len(source), step)]
    side = int(median([side for side in sides if side] or [SMALL_IMAGE + 1]))
    if side > SMALL_IMAGE:
        return []
    # He et al. 2015, section 4.2: crops of the picture's own size from a border of an eighth.
    transforms = [["resize"], ["random_crop", side // 8], ["horizontal_flip", 0.5]]
    logger.info("the images are %d pixels small: input %d, small stem, random crops and flips", side, side)
    return [
        *("INPUT.TRAIN_SIZE", str(side), "INPUT.TEST_SIZE", str(side), "INPUT.TEST_RESIZE", "0"),
        *("INPUT.TRAIN_TRANSFORMS", repr(transforms), "MODEL.BACKBONE.STEM", "small"),
    ]


def _short_side(sample: dict[str, Any]) -> int:
    """Pixels; 0 for a file that is no picture, which is for the set's own check to name."""
    if "pixels" in sample:
        return int(min(sample["pixels"].shape[:2]))
    try:
        return min(read_size(sample["file_name"] if "file_name" in sample else sample["encoded"]))
    except ImageError:
        return 0
