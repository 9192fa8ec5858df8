"""The benchmark of training: its interval, its blocks, and what it prints and writes."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from imgcls.commands import benchmark_train
from imgcls.commands.paired import median_of_ratios, median_with_interval
from imgcls.commands.training_loops import Feed
from imgcls.structures import Batch


@pytest.mark.parametrize("count", [6, 9, 12])
def test_the_interval_is_the_narrowest_that_all_outcomes_of_fair_coins_allow(count: int) -> None:
    """Each value lies above or below the true median with probability 1/2: counted over all 2^n outcomes."""
    found = median_with_interval(list(range(count)))
    rank = int(found.low) + 1

    def covered(rank: int) -> float:
        below = np.array([sum(signs) for signs in product((0, 1), repeat=count)])
        return float(((below >= rank) & (below <= count - rank)).mean())

    assert covered(rank) >= 0.95 > covered(rank + 1)
    assert found.high == count - rank and found.median == (count - 1) / 2


def test_the_ranks_of_a_published_table() -> None:
    """For n = 30 the 10th and the 21st value (Conover 1999, Table A3: 0.0214 below on each side)."""
    found = median_with_interval([float(value) for value in range(1, 31)])
    assert (found.low, found.high) == (10.0, 21.0)


def test_five_pairs_are_too_few_for_an_interval() -> None:
    found = median_of_ratios([2.0] * 5, [1.0] * 5)
    assert (found.median, found.low, found.high) == (2.0, -math.inf, math.inf)


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = [
        found.low <= 1.0 <= found.high
        for found in (median_with_interval(list(rng.lognormal(0, 1, 30))) for _ in range(1000))
    ]
    assert 0.94 <= np.mean(hits) < 0.99


def test_a_block_is_its_steps_and_one_that_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Feed(Batch(torch.zeros(2, 3, 4, 4)), steps=3)
    clock = iter(range(10))
    monkeypatch.setattr(Feed, "_now", lambda self: float(next(clock)))
    assert len(list(feed)) == 4 and feed.seconds == 1.0  # asked for the time twice
    assert len(list(feed)) == 4 and next(clock) == 4  # and again in the next block


def test_every_loop_takes_all_steps_and_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    file = tmp_path / "train.json"
    work = ["--variant", "mobilenet_v1_0.25", "--size", "32", "--batch", "2", "--steps", "2", "--pairs", "6"]
    benchmark_train.main([*work, "--device", "cpu", "--no-memory", "--out", str(file)])
    report, printed = json.loads(file.read_text()), capsys.readouterr().out
    names = [row["name"] for row in report["parts"]["overhead"]]
    assert names == ["bare loop", "imgcls, plain loop", "imgcls, builtin loop", "timm's step"]
    assert [row["name"] for row in report["parts"]["settings"]] == ["imgcls, settings chosen", "timm's defaults"]
    for row in (*report["parts"]["overhead"], *report["parts"]["settings"]):
        assert row["name"] in printed
        assert len(row["seconds"]) == 6 and min(row["seconds"]) > 0
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["milliseconds"] == pytest.approx(1000 * np.median(row["seconds"]) / 2)
    assert report["parts"]["overhead"][0]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert report["work"]["pairs"] == 6 and report["machine"]["threads"] == 1 and "written" in printed


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    args = benchmark_train.parser().parse_args(["--variant", "mobilenet_v1_0.25", "--size", "32", "--device", "cpu"])
    cfg, data = benchmark_train.config_of(args, str(tmp_path))
    small, large = (benchmark_train.peak_of(benchmark_train.PLAIN, cfg, data, batch, 1) for batch in (2, 512))
    assert small > 50 * 2**20 and large - small > 50 * 2**20


@pytest.mark.parametrize(("option", "value"), [("--pairs", "0"), ("--batch", "1"), ("--steps", "0"), ("--size", "-1")])
def test_options_that_leave_nothing_to_measure_are_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark_train.main([option, value])
    assert stop.value.code == 2 and f"change {option}" in capsys.readouterr().err
