"""Draw the learning-rate schedule of a config, or of several, as a picture; print where it starts, peaks and ends."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from imgcls.commands.arguments import add_config_file, one_line_errors, overriding_parser, parse
from imgcls.config import find_config, load_config, require_sound, resolve_durations
from imgcls.data import open_sources
from imgcls.solver import build_schedule
from imgcls.solver.schedules import SCHEDULES
from imgcls.structures import Problem

Curve = list[tuple[float, float]]  # (epoch, learning rate)

MOST_TOGETHER, COLUMNS = 4, 4
MOST_POINTS = 20_000  # of a curve; longer runs are drawn by every so many iterations


def parser() -> argparse.ArgumentParser:
    made = overriding_parser(__doc__ or "")
    add_config_file(made, "YAML; the option given again: another curve", required=True, action="append")
    made.add_argument(
        "--schedules", default="", metavar="NAMES", help="draw these instead of the config's: names with commas, or all"
    )
    made.add_argument(
        "--images", type=int, default=0, metavar="N", help="size of the training set; 0: DATASETS.TRAIN is counted"
    )
    made.add_argument("--output", default="schedule.png", metavar="FILE", help=".png, .svg or .pdf; .csv: the numbers")
    return made


def curve(cfg: CfgNode, images: int) -> Curve:
    """Learning rate at the iterations of ``cfg``, which lengths in epochs resolve for ``images`` images."""
    cfg = cfg.clone()
    cfg.defrost()
    resolve_durations(cfg, images)
    per_epoch = images / cfg.SOLVER.IMS_PER_BATCH
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    schedule = build_schedule(cfg, optimizer)
    every = max(1, cfg.SOLVER.MAX_ITER // MOST_POINTS)
    points: Curve = []
    for iteration in range(0, cfg.SOLVER.MAX_ITER, every):
        schedule.last_epoch = iteration
        points.append((iteration / per_epoch, float(schedule.get_lr()[0])))
    return points


def draw(curves: dict[str, Curve], file: Path) -> None:
    """One axis with every curve; more than a few get an axis each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    apart = len(curves) > MOST_TOGETHER
    rows = -(-len(curves) // COLUMNS) if apart else 1
    figure, axes = plt.subplots(
        rows, COLUMNS if apart else 1, figsize=(11, 1.9 * rows) if apart else (8, 3.6), squeeze=False, sharey=True
    )
    for index, (name, points) in enumerate(curves.items()):
        axis = axes.flat[index if apart else 0]
        axis.plot(*zip(*points, strict=True), label=name)
        if apart:
            axis.set_title(name, fontsize="small")
    for axis in axes.flat[len(curves) if apart else 1 :]:
        axis.axis("off")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    if not apart:
        axes[0, 0].set(xlabel="epoch", ylabel="learning rate")
        axes[0, 0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def write_csv(curves: dict[str, Curve], file: Path) -> None:
    """Rows schedule, epoch, learning_rate."""
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(("schedule", "epoch", "learning_rate"))
        writer.writerows(
            (name, f"{epoch:.6g}", f"{rate:.9g}") for name, points in curves.items() for epoch, rate in points
        )


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(), argv)
    output = Path(args.output)
    if output.suffix not in (".png", ".svg", ".pdf", ".csv"):
        raise ValueError(
            f"cannot write a picture as {output.suffix or output}; allowed: .png, .svg, .pdf, .csv; change --output"
        )
    if args.images < 0:
        raise Problem("there are no images to train on", args.images, "1 or more, or 0: count them", "--images").error()
    curves: dict[str, Curve] = {}
    for files, title in zip(args.config_file, _titles(args.config_file), strict=True):
        for name in _names(args.schedules):
            chosen = ["SOLVER.LR_SCHEDULER_NAME", name] if name else []
            cfg = load_config([find_config(file) for file in files], [*args.opts, *chosen])
            require_sound(cfg)
            schedule = cfg.SOLVER.LR_SCHEDULER_NAME
            label = name if name and len(args.config_file) == 1 else f"{title} ({schedule})"
            curves[label] = curve(cfg, args.images or _count(cfg))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(curves, output) if output.suffix == ".csv" else draw(curves, output)
    rows = [(name, *_landmarks(points)) for name, points in curves.items()]
    print(tabulate(rows, ("schedule", "first", "largest", "at epoch", "last", "epochs"), disable_numparse=True))
    print(f"{output}: {len(curves)} curve{'s' if len(curves) > 1 else ''}")


def _titles(configs: Sequence[Sequence[str]]) -> list[str]:
    """What each curve's configs are called: by their names, or by their paths where that would be the same twice."""
    short = [" + ".join(Path(file).stem for file in files) for files in configs]
    long = [" + ".join(files) for files in configs]
    return [name if short.count(name) == 1 else path for name, path in zip(short, long, strict=True)]


def _names(words: str) -> list[str]:
    return list(SCHEDULES) if words == "all" else words.split(",")


def _count(cfg: CfgNode) -> int:
    try:
        return len(open_sources(cfg.DATASETS.TRAIN, root=cfg.DATASETS.ROOT))
    except ValueError as error:
        raise ValueError(f"{error}; or say how many images there are: --images 1281167 for ImageNet") from error


def _landmarks(points: Curve) -> tuple[str, ...]:
    peak = max(points, key=lambda point: point[1])
    return (f"{points[0][1]:.4g}", f"{peak[1]:.4g}", f"{peak[0]:.4g}", f"{points[-1][1]:.4g}", f"{points[-1][0]:.4g}")
