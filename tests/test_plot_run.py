"""tools/plot_run.py: the picture, and the numbers behind it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imgcls.commands.plot_run import read_run


def write_run(folder: Path, *, start: float = 2.0, epochs: bool = True, tail: str = "") -> Path:
    """A line every 10 of 100 iterations, an evaluation every 50; 20 iterations an epoch."""
    folder.mkdir(parents=True)
    lines: list[dict[str, float]] = []
    for done in range(10, 101, 10):
        line = {"iteration": done - 1, "total_loss": start - done / 100, "lr": 0.1 * (1 - done / 100), "time": 0.5}
        if epochs:
            line["epoch"] = done / 20
        if done % 50 == 0:
            line |= {"classification/top1": done / 2, "classification/top5": done, "classification/loss": start / done}
        lines.append(line)
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_the_numbers_are_those_of_the_run(tool: Callable[..., Any], tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "a"), tmp_path / "new" / "curves.csv"
    done = tool("tools/plot_run.py", run, "--output", output)
    assert done.returncode == 0, done.stderr
    rows = rows_of(output)
    assert list(dict.fromkeys(row["metric"] for row in rows)) == [
        *("total_loss", "classification/loss", "classification/top1", "classification/top5", "lr"),
    ]
    top1 = [(row["iteration"], row["epoch"], row["value"]) for row in rows if row["metric"] == "classification/top1"]
    assert top1 == [("50", "2.5", "25"), ("100", "5", "50")]
    losses = [float(row["value"]) for row in rows if row["metric"] == "total_loss"]
    assert losses == pytest.approx([2 - step / 10 for step in range(1, 11)])
    line = next(line for line in done.stdout.splitlines() if "total_loss" in line)
    assert line.split() == ["a", "total_loss", "10", "1", "1.9", "1", "100", "5"]


def test_several_runs_with_metrics_of_ones_own(tool: Callable[..., Any], tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", start=3.0)
    words = ("--metrics", "top1, time", "--output", tmp_path / "c.csv")
    assert tool("tools/plot_run.py", one, two / "metrics.json", *words).returncode == 0
    rows = rows_of(tmp_path / "c.csv")
    assert {row["metric"] for row in rows} == {"classification/top1", "time"}
    assert {row["run"] for row in rows} == {str(one), str(two / "metrics.json")}  # both are called run


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ((), (920, 600)),
        (("--metrics", "lr"), (460, 300)),
        (("--metrics", "loss,top1,time", "--x", "iteration"), (920, 600)),
    ],
)
def test_the_picture(words: tuple[str, ...], size: tuple[int, int], tool: Callable[..., Any], tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, start=start) for name, start in (("a", 2.0), ("b", 3.0))]
    done = tool("tools/plot_run.py", *runs, *words, "--output", tmp_path / "p.png")
    assert done.returncode == 0 and done.stdout.endswith("p.png: 2 runs\n"), done.stderr
    with Image.open(tmp_path / "p.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
        assert picture.size == size
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line of each run, in matplotlib's first two colours


def test_one_run_has_one_colour(tool: Callable[..., Any], tmp_path: Path) -> None:
    """The twin: the second colour above is the second run's."""
    assert tool("tools/plot_run.py", write_run(tmp_path / "a"), "--output", tmp_path / "p.png").returncode == 0
    with Image.open(tmp_path / "p.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
    assert (31, 119, 180) in colours and (255, 127, 14) not in colours


def test_what_a_kill_tore_is_left_out(tool: Callable[..., Any], tmp_path: Path) -> None:
    torn = '{"iteration": 109, "total_lo\n\x00\x00\x00\n[1]\n{"iteration": 99, "lr": NaN}\n'
    run = write_run(tmp_path / "a", tail=torn)
    done = tool("tools/plot_run.py", run, "--output", tmp_path / "c.csv")
    assert done.returncode == 0 and "a: 3 unreadable lines left out" in done.stdout
    assert [row["value"] for row in rows_of(tmp_path / "c.csv") if row["metric"] == "lr"][-2:] == ["0.01", "nan"]
    assert [point.iteration for point in read_run(str(run)).curves["total_loss"]] == list(range(10, 101, 10))


def test_a_run_that_does_not_know_its_epochs(tool: Callable[..., Any], tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", epochs=False)
    done = tool("tools/plot_run.py", run, "--output", tmp_path / "p.png")
    assert done.returncode == 0 and "drawn by iteration" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "s.gif"), "the kind of picture is unknown: got '.gif'; allowed: .png, .svg, .pdf, .csv"),
        (
            ("--metrics", "top3"),
            "no run has this metric: got 'top3'; allowed: total_loss, lr, time, classification/top1",
        ),
        (("nowhere",), "there is no metrics.json: got 'nowhere'; allowed: the OUTPUT_DIR of a run; change RUN"),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str, tool: Callable[..., Any], tmp_path: Path) -> None:
    done = tool("tools/plot_run.py", write_run(tmp_path / "a"), *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_run_without_any_line(tool: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.json").touch()
    done = tool("tools/plot_run.py", tmp_path)
    assert done.returncode == 2 and "metrics.json has no line that can be read: got" in done.stderr
