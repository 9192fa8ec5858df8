"""Draw what the network is fed: pictures after all transforms and mixing, with their labels."""

from __future__ import annotations

import argparse
import io
import math
import os
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.figure import Figure
from torch import Tensor

from imgcls.commands.arguments import add_config_file, one_line_errors, overriding_parser, parse
from imgcls.commands.recipe import training_config
from imgcls.data import Mixing, build_test_loader, build_train_loader
from imgcls.data.samplers import Draw
from imgcls.data.views import build_view_loader
from imgcls.engine import Data, finalize, start_log
from imgcls.engine.step import seed_iteration
from imgcls.modeling import is_classifier
from imgcls.structures import Problem, Views

TILE = 1.7  # inches, side of a picture
DOTS_PER_INCH = 110
LABEL_WIDTH = 24  # characters of a line under a picture
MOST_CLASSES = 3  # that a label names
MIXED_BATCHES = 4  # to take pictures from


class Shown(NamedTuple):
    """One picture as the network sees it, (C, S, S) each, in one view or in several, and its label in words."""

    views: list[Tensor]
    label: str


def parser() -> argparse.ArgumentParser:
    made = overriding_parser(__doc__ or "")
    add_config_file(made)
    made.add_argument(
        "--data", default="", metavar="DIR", help="folder of class folders, or the root of the config's data set"
    )
    made.add_argument("--output", default="show_data.png", metavar="FILE.png", help="default: %(default)s")
    made.add_argument("--count", type=int, default=16, metavar="N", help="pictures to show (default: %(default)s)")
    made.add_argument("--epoch", type=int, default=0, metavar="E", help="of training (default: %(default)s)")
    made.add_argument("--split", choices=("train", "test"), default="train", help="default: %(default)s")
    return made


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(), argv)
    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise Problem("the picture is a PNG", args.output, "a name that ends with .png", "--output").error()
    for option, lowest in (("count", 1), ("epoch", 0)):
        if getattr(args, option) < lowest:
            raise Problem("too small", getattr(args, option), f"{lowest} or more", f"--{option}").error()
    start_log("")
    cfg, data = _opened(args)
    if args.split == "test":
        shown, where = list(_of_evaluation(cfg, data, args.count)), "evaluation"
    else:
        start = _first_iteration(cfg, data, args.epoch)
        shown = list(islice(_of_training(cfg, data, start, args.count), args.count))
        where = f"epoch {args.epoch}, from iteration {start}, seed {cfg.SEED}"
    _write(output, draw(shown))
    source = data.test if args.split == "test" else data.train
    sides = dict.fromkeys(f"{view.shape[-1]} x {view.shape[-2]}" for item in shown for view in item.views)
    print(f"{output}: {len(shown)} pictures of {source.name}, {', '.join(sides)} pixels, {where}")  # type: ignore[union-attr]


def _opened(args: argparse.Namespace) -> tuple[CfgNode, Data]:
    """The finalized config and its data; in this process, so that workers need not be started."""
    named = {"config_file": args.config_file, "data": args.data, "opts": args.opts}
    cfg = training_config(argparse.Namespace(**named, variant="", output=""))
    if not is_classifier(cfg):
        meta = cfg.MODEL.META_ARCHITECTURE
        raise Problem("only a classifier's data can be shown", meta, "ClsNet", "MODEL.META_ARCHITECTURE").error()
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.PACKING, cfg.MODEL.DEVICE = 0, "tensors", "cpu"
    return finalize(cfg)


def _first_iteration(cfg: CfgNode, data: Data, epoch: int) -> int:
    """The first one whose batch begins in ``epoch``."""
    length = len(data.train)  # type: ignore[arg-type]
    start = math.ceil(epoch * length / cfg.SOLVER.IMS_PER_BATCH)
    if start >= cfg.SOLVER.MAX_ITER:
        last = (cfg.SOLVER.MAX_ITER - 1) * cfg.SOLVER.IMS_PER_BATCH // length
        raise Problem("training ends before", epoch, f"0 to {last}", "--epoch, or SOLVER.MAX_EPOCHS").error()
    return start


def _of_training(cfg: CfgNode, data: Data, start: int, count: int) -> Iterator[Shown]:
    """What one process trains on from iteration ``start`` on, mixed as the training step mixes it.

    A batch is mixed in one way; so where there is mixing, ``count`` pictures come from several batches.
    """
    build = build_view_loader if cfg.INPUT.VIEWS else build_train_loader
    mixing = Mixing.from_cfg(cfg)
    share = count if mixing is None else math.ceil(count / MIXED_BATCHES)
    for iteration, batch in enumerate(build(cfg, data.train, start=start), start):  # type: ignore[arg-type]
        if mixing is not None and not isinstance(batch, Views):
            seed_iteration(cfg.SEED, iteration)
            batch = mixing(batch)
        views = batch.images if isinstance(batch, Views) else [batch.images]
        for *images, target in islice(zip(*views, batch.targets, strict=True), share):
            yield Shown(images, label_text(target, data.classes))


def _of_evaluation(cfg: CfgNode, data: Data, count: int) -> Iterator[Shown]:
    """``count`` pictures spread evenly over the set, whose order is that of the classes as a rule."""
    if data.test is None:
        raise Problem("there is nothing to evaluate on", (), "a data set", "DATASETS.TEST").error()
    dataset, length = build_test_loader(cfg, data.test).dataset, len(data.test)
    for index in np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist():
        mapped = dataset[Draw(0, index)]
        if mapped.fatal:
            raise ValueError(mapped.fatal)
        if mapped.sample is not None:  # left out, as evaluation does
            target = torch.as_tensor(mapped.sample["label"])
            yield Shown([mapped.sample["image"]], label_text(target, data.classes))


def label_text(target: Tensor, classes: Sequence[str]) -> str:
    """The class, or the classes of a weighted label, the largest weight first; a weight of 1 is not said."""
    if target.dim() == 0:
        return classes[int(target)] if target >= 0 else "no label"
    weights, order = target.sort(descending=True, stable=True)
    named = [
        (float(weight), classes[index]) for weight, index in zip(weights, order.tolist(), strict=True) if weight > 0
    ]
    said = [name if abs(weight - 1) < 1e-6 else f"{name} ({weight:.2f})" for weight, name in named]
    more = f" and {len(said) - MOST_CLASSES} more" if len(said) > MOST_CLASSES else ""
    return " + ".join(said[:MOST_CLASSES]) + more or "no class"


def draw(shown: Sequence[Shown]) -> Figure:
    """A grid of the pictures; those of several views take a row each."""
    views = max(len(item.views) for item in shown)
    columns = views if views > 1 else math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) * views / columns)
    figure = Figure(figsize=(TILE * columns, (TILE + 0.3) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    pictures = [(view, item.label) for item in shown for view in item.views]
    for axis, (picture, label) in zip(axes, pictures, strict=False):
        pixels = picture.round().clamp(0, 255).byte().permute(1, 2, 0).squeeze(2).numpy()
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        text = textwrap.fill(label, LABEL_WIDTH, max_lines=2, placeholder=" ...")
        axis.set_title(text, fontsize=7, pad=2, parse_math=False)
    return figure


def _write(output: Path, figure: Figure) -> None:
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # A class name may be in a script that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(picture, format="png", dpi=DOTS_PER_INCH)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(picture.getvalue())
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
