"""tools/plot_schedule.py: the picture, and the numbers behind it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imgcls.solver.schedules import SCHEDULES

QUICK = Path(__file__).parents[1] / "configs" / "quick" / "digits_mobilenet_v1.yaml"
CONFIG = ("--config-file", "quick/digits_mobilenet_v1.yaml", "--images", "1000")
RUN = (
    "SOLVER.MAX_EPOCHS",
    "4.0",
    "SOLVER.WARMUP_EPOCHS",
    "1.0",
    "SOLVER.IMS_PER_BATCH",
    "100",
    "SOLVER.BASE_LR",
    "0.2",
)
LINEAR = ("--schedules", "WarmupLinearLR")


def test_the_numbers_are_those_that_training_uses(tool: Callable[..., Any], tmp_path: Path) -> None:
    done = tool("tools/plot_schedule.py", *CONFIG, *LINEAR, "--output", tmp_path / "new" / "s.csv", *RUN)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "new" / "s.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["epoch"]) for row in rows] == pytest.approx([step / 10 for step in range(40)])
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[10:] == pytest.approx([0.2 * (1 - step / 40) for step in range(10, 40)])
    assert rates[:10] == pytest.approx([0.002 + (0.15 - 0.002) * step / 10 for step in range(10)])
    assert {row["schedule"] for row in rows} == {"WarmupLinearLR"}


@pytest.mark.parametrize(("words", "size"), [(LINEAR, (800, 360)), (("--schedules", "all"), (1100, 570))])
def test_the_picture(words: tuple[str, ...], size: tuple[int, int], tool: Callable[..., Any], tmp_path: Path) -> None:
    done = tool("tools/plot_schedule.py", *CONFIG, *words, "--output", tmp_path / "s.png", *RUN)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == size and len(picture.convert("RGB").getcolors(10**6)) > 10
    assert all((name in done.stdout) == (name in words or "all" in words) for name in SCHEDULES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "s.gif"), "cannot write a picture as .gif; allowed: .png"),
        (("--schedules", "Cosine"), "got 'Cosine'; allowed: WarmupMultiStepLR"),
        (("--images", "-5"), "got -5; allowed: 1 or more, or 0: count them; change --images"),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str, tool: Callable[..., Any]) -> None:
    done = tool("tools/plot_schedule.py", *CONFIG, *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_set_that_is_not_here_asks_for_its_size(tool: Callable[..., Any], tmp_path: Path) -> None:
    words = ("--config-file", "imagenet/resnet50_sgd_90ep.yaml", "DATASETS.ROOT", tmp_path / "nowhere")
    done = tool("tools/plot_schedule.py", *words)
    assert done.returncode == 2 and "--images 1281167 for ImageNet" in done.stderr


def test_configs_that_are_called_the_same_are_two_curves(tool: Callable[..., Any], tmp_path: Path) -> None:
    """As the config.yaml of two runs are."""
    files = [tmp_path / run / "config.yaml" for run in ("one", "two")]
    for file, rate in zip(files, (0.1, 0.3), strict=True):
        file.parent.mkdir()
        file.write_text(f"_BASE_: {QUICK}\nSOLVER: {{BASE_LR: {rate}, LR_SCHEDULER_NAME: WarmupConstantLR}}\n")
    words = [word for file in files for word in ("--config-file", file)]
    done = tool("tools/plot_schedule.py", *words, "--images", "1000", "--output", tmp_path / "s.csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "s.csv").open() as lines:
        last = {row["schedule"]: float(row["learning_rate"]) for row in csv.DictReader(lines)}
    assert last == {f"{files[0]} (WarmupConstantLR)": 0.1, f"{files[1]} (WarmupConstantLR)": 0.3}
