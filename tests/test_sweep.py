"""tools/sweep.py: what is searched, what becomes of each trial, and that an interrupted sweep goes on."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import run_tool

import imgcls
from imgcls.commands import search, train, trial
from imgcls.commands.search_space import Choices, Range, own_values, read_space
from imgcls.config import load_config
from imgcls.engine.output.output_dir import claim, release

FORK = multiprocessing.get_context("fork")
CONFIG = "quick/digits_mobilenet_v1.yaml"

# Stands for the train command: three evaluations, best at BASE_LR 0.1. The optimizer decides what befalls it.
TRAINING = """
import json, os, signal, sys, time
words = sys.argv[1:]
place = words.index("--output")
folder, keys = words[place + 1], dict(zip(words[place + 2::2], words[place + 3::2]))
lr, fate = float(keys["SOLVER.BASE_LR"]), keys.get("SOLVER.OPTIMIZER", "SGD")
with open(folder + "/words.txt", "a") as file:
    print(time.time(), os.environ.get("OMP_NUM_THREADS"), *words, file=file)
with open(folder + "/config.yaml", "w") as file:
    file.write("TEST: {METRIC: top1}")
if fate == "Lion":
    os.kill(os.getpid(), signal.SIGKILL)
if fate == "RMSprop":
    print("loading"); print("error: the loss is not finite", file=sys.stderr); sys.exit(2)
if fate == "LARS":
    print("Traceback", file=sys.stderr); print("torch.OutOfMemoryError: CUDA out of memory. Tried", file=sys.stderr)
    sys.exit(1)
open(folder + "/model_final.pth", "w").close()
with open(folder + "/metrics.json", "a") as file:
    for step in (1, 2, 3):
        figure = 10 * step - 5 * abs(lr - 0.1) - 20 * (fate == "Adagrad")
        print(json.dumps({"iteration": step, "classification/top1": figure}), file=file, flush=True)
        time.sleep(0.15 if fate == "Adagrad" else WAIT)
with open(folder + "/words.txt", "a") as file:
    print(time.time(), "end", file=file)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``fake(wait)``: trainings that take 3 x ``wait`` seconds."""

    def make(wait: float = 0.0) -> None:
        script = tmp_path / "training.py"
        script.write_text(TRAINING.replace("WAIT", str(wait)))
        monkeypatch.setattr(trial, "TRAIN", (sys.executable, "-I", "-S", str(script)))
        monkeypatch.setattr(search, "LOOK_EVERY", 0.01)

    return make


def write_space(folder: Path, **rows: Any) -> Path:
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump({key.replace("__", "."): row for key, row in rows.items()}))
    return file


LR = {"SOLVER__BASE_LR": [0.01, 1.0, "log"]}


def rows_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "trials.csv").open() as lines:
        return list(csv.DictReader(lines))


def sweep_words(tmp_path: Path, space: Path, *words: object) -> tuple[object, ...]:
    return ("tools/sweep.py", "--space", space, "--config-file", CONFIG, "--output", tmp_path / "sweep", *words)


# -- trials and what becomes of them ---------------------------------------------------------------------------------


def test_no_fate_of_a_trial_ends_the_sweep_and_the_best_one_is_written(
    tool: Callable[..., Any], fake: Callable[..., None], tmp_path: Path
) -> None:
    """Every fate occurs: finished, pruned, failed, out of memory, killed. None of them ends the sweep."""
    fake()
    fates = ["SGD", "Adagrad", "Lion", "RMSprop", "LARS"]
    space = write_space(tmp_path, **LR, SOLVER__OPTIMIZER={"choices": fates}, SOLVER__MAX_ITER=[10, 20, "int"])
    done = tool(*sweep_words(tmp_path, space, "--trials", 24, "SOLVER.BASE_LR", "0.2"))
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "sweep")
    assert [row["trial"] for row in rows] == [str(number) for number in range(24)]
    states: dict[str, set[str]] = {fate: set() for fate in fates}
    reasons: dict[str, set[str]] = {fate: set() for fate in fates}
    for row in rows:
        states[row["SOLVER.OPTIMIZER"]].add(row["state"])
        reasons[row["SOLVER.OPTIMIZER"]].add(row["reason"])
    assert states["Lion"] == states["RMSprop"] == states["LARS"] == {"fail"}
    assert "complete" in states["SGD"] and "pruned" in states["Adagrad"]
    assert reasons["Lion"] == {"ended by SIGKILL, as the system does when memory runs out"}
    assert reasons["RMSprop"] == {"exit code 2, error: the loss is not finite"}
    (reason,) = reasons["LARS"]
    assert reason.startswith("out of memory: exit code 1, torch.OutOfMemoryError: CUDA")
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert all(int(row["evaluations"]) < 3 for row in pruned if row["SOLVER.OPTIMIZER"] == "Adagrad")

    complete = [row for row in rows if row["state"] == "complete"]
    best = max(complete, key=lambda row: float(row["value"]))
    assert float(best["value"]) == pytest.approx(30 - 5 * abs(float(best["SOLVER.BASE_LR"]) - 0.1))
    cfg, base = (load_config(tmp_path / "sweep" / name) for name in ("best.yaml", "base.yaml"))
    assert (str(cfg.SOLVER.BASE_LR), str(cfg.SOLVER.MAX_ITER)) == (best["SOLVER.BASE_LR"], best["SOLVER.MAX_ITER"])
    assert (base.SOLVER.BASE_LR, base.SOLVER.MAX_EPOCHS, cfg.SOLVER.MAX_EPOCHS) == (0.2, 20.0, 0.0)  # epochs are off
    assert cfg.MODEL == base.MODEL and cfg.MODEL.BACKBONE == imgcls.get_config(CONFIG).MODEL.BACKBONE
    assert not cfg.TEST.EXPECTED_RESULTS  # they speak of another length

    weights = [file.parent.name for file in (tmp_path / "sweep" / "trials").glob("*/model_final.pth")]
    assert weights == [f"{int(best['trial']):04d}"]
    table = done.stdout[done.stdout.index("trial    value") :].splitlines()
    assert table[2].split()[:2] == [best["trial"], f"{float(best['value']):.4f}"]
    assert f"trial {best['trial']} reached {float(best['value']):.4f}, the best" in done.stdout


def test_the_first_trial_is_the_config_itself(
    tool: Callable[..., Any], fake: Callable[..., None], tmp_path: Path
) -> None:
    fake()
    words = sweep_words(tmp_path, write_space(tmp_path, **LR), "--trials", 2)
    assert tool(*words, "--keep-weights", "SOLVER.BASE_LR", "0.25").returncode == 0
    first, second = rows_of(tmp_path / "sweep")
    assert first["SOLVER.BASE_LR"] == "0.25" != second["SOLVER.BASE_LR"]
    assert len(list((tmp_path / "sweep" / "trials").glob("*/model_final.pth"))) == 2


def test_more_trials_later_are_others(tool: Callable[..., Any], fake: Callable[..., None], tmp_path: Path) -> None:
    fake()
    words = sweep_words(tmp_path, write_space(tmp_path, **LR), "--pruner", "none", "SOLVER.BASE_LR", "3.0")
    for trials in (2, 2, 5):
        assert tool(*words, "--trials", trials).returncode == 0
        assert len(rows_of(tmp_path / "sweep")) == trials
    rates = [row["SOLVER.BASE_LR"] for row in rows_of(tmp_path / "sweep")]
    assert len(set(rates)) == 5 and "3.0" not in rates and all(0.01 <= float(rate) <= 1 for rate in rates)


@pytest.mark.parametrize("jobs", [1, 3])
def test_jobs_run_side_by_side(
    jobs: int, tool: Callable[..., Any], fake: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    fake(3 if jobs == 3 else 0.1)  # the last begins before the first ends, on a loaded machine too
    words = sweep_words(tmp_path, write_space(tmp_path, **LR), "--trials", jobs, "--jobs", jobs, "--pruner", "none")
    assert tool(*words).returncode == 0
    lines = [file.read_text().splitlines() for file in (tmp_path / "sweep" / "trials").glob("*/words.txt")]
    begins, ends = ([float(line[place].split()[0]) for line in lines] for place in (0, 1))
    assert len(lines) == jobs and max(begins) < min(ends)
    assert {line[0].split()[1] for line in lines} == ({"4"} if jobs == 3 else {"None"})


def test_a_sweep_of_which_no_trial_came_to_its_end_fails(
    tool: Callable[..., Any], fake: Callable[..., None], tmp_path: Path
) -> None:
    fake()
    space = write_space(tmp_path, **LR, SOLVER__OPTIMIZER={"choices": ["Lion", "RMSprop"]})
    done = tool(*sweep_words(tmp_path, space, "--trials", 3))
    assert done.returncode == 2 and "no trial came to its end; the last one: e" in done.stderr
    assert len(rows_of(tmp_path / "sweep")) == 3 and not (tmp_path / "sweep" / "best.yaml").exists()


# -- interrupted and resumed -----------------------------------------------------------------------------------------


def in_a_process(*words: object, forking: bool = False) -> multiprocessing.process.BaseProcess:
    """The command in a process of its own; forking: its trainings too are forked, which spares them the imports."""

    def work() -> None:
        os.setsid()
        if forking:
            names = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
            trial.subprocess = SimpleNamespace(Popen=Forked, **names)  # type: ignore[attr-defined]
        os._exit(run_tool(*words).returncode)  # type: ignore[arg-type]

    process = FORK.Process(target=work)
    process.start()
    return process


class Forked(FORK.Process):  # type: ignore[name-defined, misc]
    """In the place of subprocess.Popen: the train command in a fork of this process."""

    def __init__(self, words: list[str], *, stdout: Any, preexec_fn: Callable[[], None], **_: Any) -> None:
        super().__init__()
        self.words, self.console, self.prepare = words[len(trial.TRAIN) :], os.dup(stdout.fileno()), preexec_fn
        self.start()

    def run(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a program that is started has no handlers of its starter's
        self.prepare()
        for stream in (1, 2):
            os.dup2(self.console, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        train.main(self.words)

    def poll(self) -> int | None:
        return self.exitcode


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)


def is_free(folder: Path) -> bool:
    try:
        claim(folder, resume=True)
    except ValueError:
        return False
    release(folder)
    return True


def test_a_terminated_sweep_ends_its_trainings_and_takes_them_up_again(
    tool: Callable[..., Any], fake: Callable[..., None], tmp_path: Path
) -> None:
    fake(30)
    words = sweep_words(tmp_path, write_space(tmp_path, **LR), "--trials", 3, "--jobs", 2)
    first = tmp_path / "sweep" / "trials" / "0000"
    sweep = in_a_process(*words)
    wait_for(lambda: len(list((tmp_path / "sweep" / "trials").glob("*/metrics.json"))) == 2)
    time.sleep(0.1)
    os.kill(sweep.pid, signal.SIGTERM)  # type: ignore[arg-type]
    sweep.join(20)
    assert sweep.exitcode == 143
    assert [row["state"] for row in rows_of(tmp_path / "sweep")] == ["running", "running"]
    fake()
    done = tool(*words)
    assert done.returncode == 0, done.stderr
    assert "trial 0 goes on: SOLVER.BASE_LR 0.1\ntrial 1 goes on" in done.stdout and "trial 2 begins" in done.stdout
    assert [row["state"] for row in rows_of(tmp_path / "sweep")] == ["complete"] * 3
    before, after, _ = (first / "words.txt").read_text().splitlines()
    assert "--resume" not in before and "--resume" in after
    assert after.split()[2:] == [*before.split()[2:4], "--resume", *before.split()[4:]]


def test_a_killed_sweep_goes_on_where_its_training_was(tool: Callable[..., Any], tmp_path: Path) -> None:
    """SIGKILL to the sweep in the middle of a real training; the train command then resumes it."""
    small = (
        *("MODEL.BACKBONE.STEM", "small", "INPUT.TRAIN_SIZE", 8, "INPUT.TEST_SIZE", 8, "SOLVER.IMS_PER_BATCH", 8),
        *("SOLVER.MAX_ITER", 300, "SOLVER.CHECKPOINT_PERIOD", 10, "TEST.EVAL_PERIOD", 150, "SOLVER.LOG_PERIOD", 1),
        *("SOLVER.WRITERS", "[]", "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu"),
    )
    words = sweep_words(tmp_path, write_space(tmp_path, **LR), "--trials", 1, *small)
    folder = tmp_path / "sweep" / "trials" / "0000"
    sweep = in_a_process(*words, forking=True)
    wait_for(lambda: list(folder.glob("model_*.pth.json")))
    os.kill(sweep.pid, signal.SIGKILL)  # type: ignore[arg-type]
    sweep.join(20)
    wait_for(lambda: is_free(folder), 40)  # the kernel tells the training that its parent is gone
    assert not (folder / "model_final.pth").exists()
    done = tool(*words)
    assert done.returncode == 0, done.stderr
    log = (folder / "log.txt").read_text()
    assert "resuming from" in log and "trial 0 goes on" in done.stdout
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(300))
    figures = [line["classification/top1"] for line in lines if "classification/top1" in line]
    (row,) = rows_of(tmp_path / "sweep")
    assert (row["state"], len(figures)) == ("complete", 2) and float(row["value"]) == max(figures)


# -- the search space ------------------------------------------------------------------------------------------------


def test_a_space_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"no such file: got 'gone\.yaml'; .*; change --space"):
        read_space("gone.yaml")


def test_a_space_is_read_as_ranges_and_choices(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(
        "SOLVER:\n  BASE_LR: [1e-3, 1, log]\n  MAX_ITER: [10, 500, log, int]\n"
        "MODEL.LOSS.LABEL_SMOOTHING: [0, 0.2]\n"
        "INPUT.TRAIN_TRANSFORMS: {choices: [[[resize]], [[resize], [horizontal_flip, 0.5]]]}\n"
        "SOLVER.NESTEROV: {choices: [true, false]}\n"
    )
    flips = "[['resize'], ['horizontal_flip', 0.5]]"
    assert read_space(file) == [
        Range("SOLVER.BASE_LR", 0.001, 1, log=True),
        Range("SOLVER.MAX_ITER", 10, 500, log=True, whole=True),
        Range("MODEL.LOSS.LABEL_SMOOTHING", 0, 0.2),
        Choices("INPUT.TRAIN_TRANSFORMS", ("[['resize']]", flips)),
        Choices("SOLVER.NESTEROV", ("True", "False")),
    ]
    cfg = imgcls.get_config(CONFIG, ["INPUT.TRAIN_TRANSFORMS", flips, "SOLVER.MAX_ITER", 10])
    assert own_values(read_space(file), cfg) == {
        "SOLVER.BASE_LR": 0.1,
        "SOLVER.MAX_ITER": 10,
        "MODEL.LOSS.LABEL_SMOOTHING": 0.0,
        "INPUT.TRAIN_TRANSFORMS": flips,
        "SOLVER.NESTEROV": "True",
    }
    assert own_values(read_space(file), imgcls.get_config(CONFIG)) is None  # other transforms


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[0.1]", "this is no range and no choice"),
        ("0.1", "this is no range and no choice"),
        ("[0.1, 1.0, lin]", "this is no range and no choice"),
        ("[0.1, b]", "this is no number: got 'b'"),
        ("[0.1, .nan]", "this is no number"),
        ("[1.0, 0.1]", "the range is not sound: .*allowed: low < high;"),
        ("[0, 0.1, log]", "the range is not sound: .*both > 0 for log"),
        ("[0.5, 2, int]", "the range is not sound: .*both whole for int"),
        ("{choices: [0.1]}", "there is nothing to choose"),
        ("{choices: 0.1}", "there is nothing to choose"),
        ("[-1.0, 1.0]", "the value is out of range: got -1.0; .*change SOLVER.BASE_LR"),
        ("{choices: [0.1, high]}", "the value has the wrong type: got 'high'"),
    ],
)
def test_mistakes_in_a_space_are_one_line(row: str, message: str, tool: Callable[..., Any], tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(f"SOLVER.BASE_LR: {row}\n")
    done = tool(*sweep_words(tmp_path, space))
    assert done.returncode == 2 and re.search(message, done.stderr) and "Traceback" not in done.stderr
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("space", "words", "message"),
    [
        ({}, (), "the search space is empty"),
        ({"SOLVER__BASE_RL": [0.1, 1.0]}, (), "SOLVER.BASE_LR"),
        ({"SOLVER__MAX_ITER": [10, 20]}, (), "the range is of fractions: got [10, 20]; allowed: a range with int"),
        (LR, ("DATASETS.TEST", "()"), "there is nothing to compare trials by"),
        (LR, ("--trials", "0"), "0 is less than 1"),
        (LR, ("--trails", "3"), "did you mean --trials?"),
    ],
)
def test_mistakes_in_a_command_are_one_line(
    space: dict[str, Any], words: tuple[str, ...], message: str, tool: Callable[..., Any], tmp_path: Path
) -> None:
    done = tool(*sweep_words(tmp_path, write_space(tmp_path, **space), *words))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_does_not_go_on_as_another(tool: Callable[..., Any], fake: Callable[..., None], tmp_path: Path) -> None:
    fake()
    assert tool(*sweep_words(tmp_path, write_space(tmp_path, **LR), "--trials", 1)).returncode == 0
    before = (tmp_path / "sweep" / "trials.csv").read_bytes()
    done = tool(*sweep_words(tmp_path, tmp_path / "space.yaml", "--trials", 2, "SOLVER.MOMENTUM", "0.5"))
    assert done.returncode == 2 and "began with another config; differing: got 'SOLVER.MOMENTUM'" in done.stderr
    done = tool(*sweep_words(tmp_path, write_space(tmp_path, SOLVER__BASE_LR=[0.01, 2.0]), "--trials", 2))
    assert done.returncode == 2 and "has another search space" in done.stderr
    assert (tmp_path / "sweep" / "trials.csv").read_bytes() == before


def test_without_optuna_it_says_what_to_install(
    tool: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = tool(*sweep_words(tmp_path, write_space(tmp_path, **LR)))
    assert done.returncode == 2 and "pip install 'imgcls[sweep]'" in done.stderr
    assert not (tmp_path / "sweep").exists()
