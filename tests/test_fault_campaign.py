"""The fault campaign: a short one finds nothing, one over a broken product finds that, and its parts judge rightly."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from faults import judging, plan, power, report, tape
from faults.jobs import VARIANTS
from faults.spots import draw_spots, spots

from imgcls.checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs/data/faults.json"
KILLS = 12

# Campaigns over a product with one fault each: kind, kills, and what has to be seen.
TWINS = {
    "rename": ("save", 1, "cannot be read"),
    "sampler": ("iteration", 1, "the trace differs|metrics.json differs"),
    "momentum": ("iteration", 1, "model_final.pth differs"),
    "fsync": ("power", 2, "cannot be read|ends with 2"),
}
DRIVER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from faults import strikes
from faults.bench import Workshop, make_reference
from faults.jobs import VARIANTS, make_pictures
from faults.plan import Task, do
from faults.processes import adopt_orphans
adopt_orphans()
folder, found = Path(sys.argv[1]), {}
data = make_pictures(folder / "data")
def in_the_last_write(places, count, chance):
    last = lambda spot: spot[0] == "half a write, a periodic one" and spot[1][0] == 9
    return [list(filter(last, strikes.spots(places)))[-1]]
strikes.draw_spots = in_the_last_write
for broken, (kind, count, _) in json.loads(sys.argv[2]).items():
    reference = make_reference(Workshop(folder, data, broken), VARIANTS[0])
    task = Task(0, kind, VARIANTS[0], count)
    found[broken] = do(task, folder / broken, data, {VARIANTS[0]: reference}, 1, broken)
Path(sys.argv[1], "found.json").write_text(json.dumps(found))
"""


def python(*words: object) -> subprocess.CompletedProcess[str]:
    """A process that has no threads of pytest's, so that it may fork."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=500, cwd=ROOT, env=environment
    )


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A campaign of twelve kills: what it printed, and its report."""
    out = tmp_path_factory.mktemp("campaign") / "report.json"
    done = python("scripts/fault_campaign.py", "--kills", KILLS, "--out", out, "--seed", 1)
    assert out.is_file(), done.stderr[-3000:]
    return done, json.loads(out.read_text())


def test_twelve_kills_and_the_other_faults_lose_nothing(
    short: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    done, content = short
    cases = report.cases(content["parts"])
    assert [case for case in cases if case["problems"]] == [] and done.returncode == 0, done.stdout
    assert [case for case in cases if case.get("bad_newest") or case.get("equal") is False] == []
    counts = Counter(case["kind"] for case in cases)
    kills = [case for case in cases if case["kind"] in plan.KILLS]
    assert len(kills) == KILLS and counts["save"] >= 4 and min(counts[kind] for kind in plan.KILLS) >= 1
    assert {case["loop"] for case in kills} == {"plain", "builtin"} and {case["ranks"] for case in kills} == {1, 2}
    others = ("signal", "dead rank", "stopped rank", "pointer", "not finite", "full disk", "two jobs", "other ranks")
    assert all(counts[kind] for kind in (*others, "flipped bits", "truncations", "damaged file", "changed config"))
    assert f"save{' ' * 12}" in done.stdout and "FAILED" not in done.stdout


def test_each_case_is_written_down(short: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    _, content = short
    assert content["digest"] == report.digest() and content["kills"] == KILLS and content["versions"]["torch"]
    for case in report.cases(content["parts"]):
        assert {"kind", "loop", "ranks", "workers", "features", "point", "exit_code", "cause"} <= set(case)
        if case["kind"] in plan.KILLS:
            assert case["exit_code"] == 137 and case["equal"] and not case["bad_newest"] and case["seconds"] > 0
            assert case["lost_iterations"] <= 5 and case["done"] - case["lost_iterations"] <= case["done"]
    tallies = [case for case in report.cases(content["parts"]) if case["kind"] == "flipped bits"]
    # torch.load takes nearly all of them for good; the first tally is with the manifest.
    assert tallies[0]["refused"] == tallies[0]["tried"] == 20 and tallies[0]["torch.load notices nothing"] > 10
    assert tallies[1]["accepted"] == 0 and tallies[1]["refused"] + tallies[1]["harmless"] == 20
    stages = {case["stage"] for case in report.cases(content["parts"]) if case["kind"] == "save"}
    assert len(stages) >= 3


def test_twins_each_fault_of_the_product_is_found(tmp_path: Path) -> None:
    done = python("-c", DRIVER, tmp_path, json.dumps(TWINS))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for broken, (_, _, expected) in TWINS.items():
        problems = "; ".join(problem for case in found[broken] for problem in case["problems"])
        assert re.search(expected, problems), (broken, problems)
    assert any(case["bad_newest"] for case in found["rename"]) and not any(c["bad_newest"] for c in found["sampler"])


# -- what a campaign consists of ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [12, 100, 300, 1000])
def test_a_plan_has_its_kills_and_is_the_same_for_the_same_seed(kills: int) -> None:
    tasks = plan.plan(kills, seed=3)
    counts = Counter[str]()
    for task in tasks:
        counts[task.kind] += task.count
    assert sum(counts[kind] for kind in plan.KILLS) == kills
    assert tasks == plan.plan(kills, seed=3) != plan.plan(kills, seed=4)
    assert set(counts) >= {kind for kind in plan.CASES if not kind.endswith("fresh")}
    if kills >= 300:
        assert counts["save"] >= 100 and counts["fresh"] >= 30 and counts[plan.BITS] == 200
        killed = {task.variant for task in tasks if task.kind in plan.KILLS}
        assert killed == set(VARIANTS)
    assert {(v.loop, v.ranks, v.workers) for v in VARIANTS} == {
        (loop, ranks, workers) for loop in ("plain", "builtin") for ranks in (1, 2) for workers in (0, 1, 4)
    }


def test_a_report_is_gone_on_with_by_the_same_campaign_only(tmp_path: Path) -> None:
    head, case = report.heading(12, 0, ""), {"kind": "save", "problems": []}
    report.write(tmp_path / "r.json", head, {"a part": [case]}, 1.0)
    assert report.read(tmp_path / "r.json", head) == {"a part": [case]}
    for other in (report.heading(13, 0, ""), report.heading(12, 1, ""), report.heading(12, 0, "rename")):
        assert report.read(tmp_path / "r.json", other) == {}
    assert report.read(tmp_path / "r.json", {**head, "digest": "another"}) == report.read(tmp_path / "none", head) == {}


def save(iteration: int, *names: str) -> list[tape.Place]:
    """The operations of one save, as a tape would have them."""
    steps = ("open", "write", "write", "fsync", "rename", "sync folder")
    return [(iteration, step, name) for name in names for step in steps]


def test_spots_come_one_after_the_other_and_from_every_stage() -> None:
    places = [
        *save(4, "model_0000004.pth", "model_0000004.pth.json", "last_checkpoint"),
        *save(9, "model_best.pth", "model_0000009.pth", "last_checkpoint"),
        *[(9, "unlink", "model_0000004.pth.json"), (9, "unlink", "model_0000004.pth")],
        *save(14, "model_final.pth", "last_checkpoint"),
    ]
    stages = {stage for stage, _, _ in spots(places)}
    assert {"unlink, a pruned one", "unlink, manifest of a pruned one", "half a write, the last one"} <= stages
    assert {"fsync, pointer", "rename, a periodic one", "open, the best one"} <= stages
    # Every write is there to die before it and in it: seven to eight spots a file.
    assert len(spots(places)) == 8 * (3 + 3 + 2) + 2
    drawn = [draw_spots(places, 3, Random(seed)) for seed in range(400)]
    assert all([spot[1][0] for spot in three] == [4, 9, 14] for three in drawn)
    assert {spot[0] for three in drawn for spot in three} == stages
    assert len({spot[2] for three in drawn for spot in three}) == 2  # the first write and the second


# -- reading what was left ---------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "model_0000004.pth"
    content = {"model": {"w": torch.arange(2000.0)}, "iteration": 4, "optimizer": {"state": {0: {"m": torch.ones(3)}}}}
    write_checkpoint(path, content, iteration=4, newest=True)
    return path


def test_a_checkpoint_is_judged_without_the_products_own_code(checkpoint: Path) -> None:
    good = judging.read_checkpoint(checkpoint)
    assert good.problem == "" and good.iteration == 4
    assert set(good.digests) == {"model.w", "iteration", "optimizer.state.0.m"}
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["w"][5] += 1
    torch.save(content, checkpoint)
    other = judging.read_checkpoint(checkpoint)
    assert other.problem == "model_0000004.pth.json is not that of model_0000004.pth"
    assert judging.differing(other.digests, good.digests) == ["model.w"]
    content["model"]["w"][5] = torch.nan
    torch.save(content, checkpoint)
    assert judging.read_checkpoint(checkpoint).problem == "model_0000004.pth is not finite in model.w"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert judging.read_checkpoint(checkpoint).problem.startswith("model_0000004.pth cannot be read")
    assert judging.newest(judging.checkpoints(checkpoint.parent)) is None


LINES = [{"iteration": i, "total_loss": 0.5 * i, "time": 0.1} for i in range(4)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda lines: lines, ""),
        (lambda lines: [{**line, "time": 7.0, "eta_seconds": 1.0} for line in lines], ""),
        (lambda lines: lines[:2] + lines[3:], "missing: [2]"),
        (lambda lines: lines + lines[3:], "do not rise strictly"),
        (lambda lines: [*lines[:3], {**lines[3], "total_loss": 1.4999}], "uninterrupted run from iteration 3"),
        (lambda lines: [*lines, {"iteration": 4, "total_loss": 2.0}], "has 5 lines, not 4"),
    ],
    ids=["equal", "other-times", "a-gap", "twice", "another-loss", "one-too-many"],
)
def test_lines_are_compared(tmp_path: Path, change: Callable[[list[Any]], list[Any]], problem: str) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    expected = judging.figures(path)
    path.write_text("".join(json.dumps(line) + "\n" for line in change(LINES)))
    problems = judging.line_problems("metrics.json", path, expected)
    assert (problem in "; ".join(problems)) if problem else problems == []


def test_a_torn_line_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 0}\n{"iterat')
    assert judging.line_problems("metrics.json", path, [{"iteration": 0}]) == ["1 lines of metrics.json do not parse"]


# -- a power failure ---------------------------------------------------------------------------------------------------


def test_a_power_failure_takes_what_was_not_synced_and_nothing_else(tmp_path: Path) -> None:
    run, gone = tmp_path / "run", tmp_path / "gone"
    outcomes = Counter[str]()
    for seed in range(60):
        for folder in (run, gone):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        (run / "old").write_bytes(b"old")
        os.link(run / "old", gone / "old")
        for name, content in (("synced", b"s" * 50), ("half", b"h" * 50), (".new.tmp", b"new")):
            (run / name).write_bytes(content)
        inode = {name: (run / name).stat().st_ino for name in ("synced", "half", ".new.tmp", "old")}
        (run / ".new.tmp").replace(run / "old")
        journal = [
            {"operation": "safe", "inode": inode["synced"], "bytes": 50},
            {"operation": "safe", "inode": inode["half"], "bytes": 20},
            {"operation": "safe", "inode": inode[".new.tmp"], "bytes": 3},
            {
                **{"operation": "rename", "path": "run/old", "old": "run/.new.tmp"},
                **{"inode": inode[".new.tmp"], "kept": str(gone / "old")},
            },
        ]
        undone = power.cut(run, journal, {inode["old"]: 3}, Random(seed))["undone"]
        assert (run / "synced").read_bytes() == b"s" * 50
        half = (run / "half").read_bytes()
        assert half[:20] == b"h" * 20 and half != b"h" * 50
        outcomes["zeros" if half.endswith(b"\0") else "cut"] += 1
        assert (run / "old").read_bytes() == (b"old" if undone else b"new")
        outcomes["undone" if undone else "kept"] += 1
        synced = [*journal, {"operation": "folder is safe", "path": str(run)}]
        assert power.cut(run, synced, {inode["old"]: 3, inode["half"]: 99}, Random(seed))["undone"] == 0
    assert min(outcomes[kind] for kind in ("zeros", "cut", "undone", "kept")) > 5


# -- the long campaign -------------------------------------------------------------------------------------------------


def test_the_recorded_campaign_is_long_and_speaks_of_this_code() -> None:
    record = json.loads(RECORD.read_text())
    assert record["digest"] == report.digest(), f"run {record['command']}"
    cases = report.cases(record["parts"])
    counts = Counter(case["kind"] for case in cases)
    assert sum(counts[kind] for kind in plan.KILLS) >= 300 and counts["save"] >= 100 and counts["fresh"] >= 30
    assert [case for case in cases if case["problems"] or case.get("bad_newest") or case.get("equal") is False] == []
    assert {task.name for task in plan.plan(record["kills"], record["seed"])} == set(record["parts"])
    assert record["sums"] == report.sums(cases) and "broken" not in record


def test_twin_a_changed_line_of_code_makes_it_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "imgcls/checkpoint", tmp_path / "imgcls/checkpoint")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    before, file = report.digest(), tmp_path / "imgcls/checkpoint/writing.py"
    file.write_text("# a comment\n\n" + file.read_text())
    assert report.digest() == before
    file.write_text(file.read_text().replace("os.fsync(", "print("))
    assert report.digest() != before
