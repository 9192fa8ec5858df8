"""From the command line to a training config: a YAML, or a folder of images and nothing else."""

from __future__ import annotations

import argparse
import logging
from statistics import median

from detectron2.config import CfgNode
from PIL import Image

from imgcls.config import find_config, load_config
from imgcls.data import open_source, splits_below
from imgcls.data.datasets import FolderSource
from imgcls.modeling import family_of

logger = logging.getLogger(__name__)

FOLDER_RECIPE = "folder/from_scratch.yaml"
SMALL_IMAGE = 64  # pixels: up to this short side the network keeps its resolution (small stem)
ROOTED_SETS = ("imagenet_", "cifar10_", "mnist_")  # sets for which --data names the root
_SAMPLE = 50


def training_config(args: argparse.Namespace) -> CfgNode:
    """The config of ``--config-file``, or of ``--data`` alone, with the other options and the overrides applied.

    Order of precedence: KEY VALUE pairs, then options, then what the images suggest, then the YAML.
    """
    if not (args.config_file or args.data):
        raise ValueError(
            "nothing says what to train: give --config-file FILE, or --data DIR (a folder of class folders)"
        )
    overrides = _from_options(args)
    if args.config_file:
        path = find_config(args.config_file)
        overrides = [*_data_for_config(args.data, load_config(path)), *overrides]
    else:
        path = find_config(FOLDER_RECIPE)
        overrides = [*_data_for_folder(args.data), *overrides]
    return load_config(path, [*overrides, *args.opts])


def _from_options(args: argparse.Namespace) -> list[str]:
    overrides: list[str] = []
    if args.variant:
        overrides += ["MODEL.BACKBONE.VARIANT", args.variant, "MODEL.BACKBONE.NAME", family_of(args.variant).builder]
    if args.output:
        overrides += ["OUTPUT_DIR", repr(args.output)]  # a folder may be called 2026: quoted, it stays text
    return overrides


def _data_for_config(data: str, cfg: CfgNode) -> list[str]:
    """``--data`` beside a config: the root of the sets that it names, or, where those have no root, a folder."""
    if not data:
        return []
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    if names and all(name.startswith(ROOTED_SETS) for name in names):
        return ["DATASETS.ROOT", repr(data)]
    return _sets_of(data)


def _data_for_folder(data: str) -> list[str]:
    train, _ = splits_below(data)
    source = open_source(train)
    assert isinstance(source, FolderSource)
    return [*_sets_of(data), *_sizes_for(source)]


def _sets_of(data: str) -> list[str]:
    train, test = splits_below(data)
    return ["DATASETS.TRAIN", repr((train,)), "DATASETS.TEST", repr((test,))]


def _sizes_for(source: FolderSource) -> list[str]:
    """Input sizes for pictures of thumbnail size; larger ones keep the recipe's 224."""
    step = max(1, len(source) // _SAMPLE)
    sides = []
    for index in range(0, len(source), step):
        with Image.open(source.path(index)) as image:
            sides.append(min(image.size))
    side = int(median(sides))
    if side > SMALL_IMAGE:
        return []
    # He et al. 2015, section 4.2: crops of the picture's own size from a border of an eighth.
    transforms = [["resize"], ["random_crop", side // 8], ["horizontal_flip", 0.5]]
    logger.info("the images are %d pixels small: input %d, small stem, random crops and flips", side, side)
    return [
        *("INPUT.TRAIN_SIZE", str(side), "INPUT.TEST_SIZE", str(side), "INPUT.TEST_RESIZE", "0"),
        *("INPUT.TRAIN_TRANSFORMS", repr(transforms), "MODEL.BACKBONE.STEM", "small"),
    ]
