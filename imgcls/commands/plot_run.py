"""Draw the curves of one run or of several, from their metrics.json; print where each ends and its extremes."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from imgcls.commands.arguments import Parser, one_line_errors
from imgcls.structures import Problem

# Drawn when --metrics does not say: those of them that a run has.
USUAL = ("loss", "top1", "top5", "mAP", "lr")
# What a short name stands for, in this order; any other is looked for as it is and at the end of a longer one.
MEANT = {"loss": ("total_loss", "classification/loss")}
COLUMNS = 2
MOST_MARKED = 60  # points of a curve that are drawn as dots too: evaluations are few


class Point(NamedTuple):
    """A value at an iteration (counted from 1) and epoch; the epoch is not a number where the run did not write it."""

    iteration: int
    epoch: float
    value: float


@dataclass
class Recorded:
    """What a run wrote: the points of each metric in the order of iterations, and how many lines were unreadable."""

    name: str
    curves: dict[str, list[Point]] = field(default_factory=dict)
    torn: int = 0


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__)
    made.add_argument("runs", nargs="+", metavar="RUN", help="OUTPUT_DIR of a run, or a metrics.json")
    made.add_argument("--output", default="run.png", metavar="FILE", help=".png, .svg or .pdf; .csv: the numbers")
    made.add_argument(
        "--metrics",
        default="",
        metavar="NAMES",
        help=f"with commas, e.g. loss,top1,images_per_second; ({','.join(USUAL)})",
    )
    made.add_argument("--x", choices=("epoch", "iteration"), default="epoch", help="what is to the right (epoch)")
    return made


def read_run(place: str) -> Recorded:
    """The curves of ``place``, a run's folder or its metrics.json.

    A line that a kill tore is left out and counted. Of an iteration that was run twice the later line counts.
    """
    path = Path(place)
    file = path / "metrics.json" if path.is_dir() else path
    if not file.is_file():
        raise Problem("there is no metrics.json", place, "the OUTPUT_DIR of a run", "RUN").error()
    run = Recorded(path.name if path.is_dir() else path.parent.name or path.name)
    values: dict[str, dict[int, tuple[float, float]]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        content = _content(line)
        run.torn += content is None
        epoch = (content or {}).pop("epoch", math.nan)
        for name, value in (content or {}).items():
            if name != "iteration" and isinstance(value, int | float):
                values.setdefault(name, {})[content["iteration"]] = (epoch, value)  # type: ignore[index]
    for name, found in values.items():
        run.curves[name] = [Point(iteration + 1, *found[iteration]) for iteration in sorted(found)]
    return run


def _content(line: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and isinstance(content.get("iteration"), int) else None


def chosen(runs: Sequence[Recorded], names: Sequence[str]) -> dict[str, list[str]]:
    """For each name asked for, or for each usual one, the full names of its metrics in the runs."""
    known = list(dict.fromkeys(name for run in runs for name in run.curves))
    if not known:
        what, allowed = "metrics.json has no line that can be read", "a run that has logged something"
        raise Problem(what, ", ".join(run.name for run in runs), allowed, "RUN").error()
    found = {name: _meant(name, known) for name in names or USUAL}
    missing = [name for name, metrics in found.items() if not metrics]
    if names and missing:
        raise Problem("no run has this metric", missing[0], ", ".join(known), "--metrics").error()
    if not any(found.values()):
        what = "the runs have none of the usual metrics"
        raise Problem(what, ", ".join(run.name for run in runs), ", ".join(known), "--metrics").error()
    return {name: metrics for name, metrics in found.items() if metrics}


def _meant(name: str, known: Iterable[str]) -> list[str]:
    if name in MEANT:
        return [metric for metric in MEANT[name] if metric in known]
    return [metric for metric in known if metric == name or metric.endswith(f"/{name}")]


def draw(runs: Sequence[Recorded], panels: dict[str, list[str]], file: Path, *, x: str) -> None:
    """An axis for each name; each run has its colour, each metric within an axis its line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3 * rows), squeeze=False)
    for axis, (title, metrics) in zip(axes.flat, panels.items(), strict=False):
        for number, run in enumerate(runs):
            for metric, line in zip(metrics, ("-", "--", ":", "-.") * len(metrics), strict=False):
                points = run.curves.get(metric, [])
                label = f"{run.name} {metric}" if len(metrics) > 1 else run.name
                marker = "." if len(points) <= MOST_MARKED else ""
                across, up = [getattr(point, x) for point in points], [point.value for point in points]
                axis.plot(across, up, line, color=f"C{number % 10}", marker=marker, markersize=4, label=label)
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def write_csv(runs: Sequence[Recorded], metrics: Sequence[str], file: Path) -> None:
    """Rows run, metric, iteration, epoch, value."""
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(("run", "metric", "iteration", "epoch", "value"))
        for run in runs:
            for metric in metrics:
                for point in run.curves.get(metric, []):
                    writer.writerow((run.name, metric, point.iteration, f"{point.epoch:.6g}", f"{point.value:.9g}"))


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    output = Path(args.output)
    if output.suffix not in (".png", ".svg", ".pdf", ".csv"):
        allowed = ".png, .svg, .pdf, .csv"
        raise Problem("the kind of picture is unknown", output.suffix or args.output, allowed, "--output").error()
    runs = [read_run(place) for place in args.runs]
    _tell_apart(runs, args.runs)
    panels = chosen(runs, [name.strip() for name in args.metrics.split(",") if name.strip()])
    metrics = [metric for found in panels.values() for metric in found]
    x = _x_of_all(runs, metrics, args.x)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(runs, metrics, output) if output.suffix == ".csv" else draw(runs, panels, output, x=x)
    rows = [
        _landmarks(run.name, metric, run.curves[metric]) for metric in metrics for run in runs if metric in run.curves
    ]
    headers = ("run", "metric", "points", "smallest", "largest", "last", "at iteration", "epoch")
    print(tabulate(rows, headers, disable_numparse=True))
    for run in runs:
        if run.torn:
            print(f"{run.name}: {run.torn} unreadable line{'s' if run.torn > 1 else ''} left out")
    print(f"{output}: {len(runs)} run{'s' if len(runs) > 1 else ''}")


def _tell_apart(runs: Sequence[Recorded], places: Sequence[str]) -> None:
    """Runs whose folders are called the same go by their whole paths."""
    names = [run.name for run in runs]
    for run, place in zip(runs, places, strict=True):
        if names.count(run.name) > 1:
            run.name = str(Path(place))


def _x_of_all(runs: Sequence[Recorded], metrics: Sequence[str], asked: str) -> str:
    points = [point for run in runs for metric in metrics for point in run.curves.get(metric, [])]
    if asked == "epoch" and any(math.isnan(point.epoch) for point in points):
        print("not every line says its epoch: drawn by iteration")
        return "iteration"
    return asked


def _landmarks(run: str, metric: str, points: Sequence[Point]) -> tuple[str, ...]:
    values = [point.value for point in points if math.isfinite(point.value)] or [math.nan]
    figures = (min(values), max(values), points[-1].value)
    last = points[-1]
    return (run, metric, str(len(points)), *(f"{v:.4g}" for v in figures), str(last.iteration), f"{last.epoch:.4g}")
