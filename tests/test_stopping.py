"""Signals: the run saves what it has and ends; resumed, it is the run that nothing has happened to."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lines_of, tiny_cfg

from imgcls.checkpoint import read_checkpoint
from imgcls.data.workers import start_worker
from imgcls.engine import ClsTrainer, Run, train
from imgcls.engine import run as run_module
from imgcls.engine.output.output_dir import release
from imgcls.engine.ranks import stopping
from imgcls.engine.setup import setup
from imgcls.evaluation import ClassificationEvaluator

# The plateau scheduler and the best value hang on every evaluation: one made twice or not at all would be seen.
EVALUATING = (
    *("DATASETS.TEST", ("digits_val",), "TEST.EVAL_PERIOD", 2, "TEST.IMS_PER_BATCH", 200, "SOLVER.MAX_ITER", 6),
    *("SOLVER.LR_SCHEDULER_NAME", "PlateauLR", "SOLVER.PLATEAU_PATIENCE", 0),
)

STATE = ("model", "optimizer", "scheduler", "iteration", "best", "metrics", "evaluation_due", "statistics_of_ranks")


def run(loop: str, folder: Path, *overrides: object, resume: bool = False) -> Run:
    """Train as the command does."""
    cfg, data = setup(tiny_cfg(folder, "DATASETS.TEST", (), *overrides), resume=resume)
    try:
        with stopping.listening():
            if loop == "builtin":
                trainer = ClsTrainer(cfg, data)
                trainer.resume_or_load(resume=resume)
                trainer.train()
                return trainer.run
            made = Run(cfg, data)
            made.start(resume=resume)
            train(made)
            return made
    finally:
        release(folder)


def content(folder: Path, name: str = "model_final.pth") -> dict[str, Any]:
    """A checkpoint without what speaks of the command, whose OUTPUT_DIR is another."""
    found = read_checkpoint(folder / name)
    return {entry: found[entry] for entry in STATE}


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.json without what is measured with a clock."""
    clocks = ("time", "data_time", "images_per_second", "eta_seconds")
    found = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clocks} for line in found]


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(equal(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return bool(ours == theirs)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    run("plain", folder, *EVALUATING)
    return folder


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``at(3, deed)``: do ``deed()`` while iteration 3 is trained; ``at(3, deed, evaluating=True)``: evaluated."""

    usual, process = Run.record, ClassificationEvaluator.process

    def arrange(iteration: int, deed: Callable[[], object], *, evaluating: bool = False) -> None:
        seen = [-1]

        def record(self: Run, now: int, losses: Any) -> None:
            seen[0] = now
            if now == iteration and not evaluating:
                deed()
            usual(self, now, losses)

        def watched(self: Any, inputs: Any, outputs: Any) -> None:
            if evaluating and seen[0] == iteration:
                seen[0] = -1
                deed()
            process(self, inputs, outputs)

        monkeypatch.setattr(Run, "record", record)
        monkeypatch.setattr(ClassificationEvaluator, "process", watched)

    return arrange


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("loop", "number", "code"),
    [("plain", signal.SIGUSR1, 143), ("builtin", signal.SIGINT, 130)],
    ids=["plain-SIGUSR1", "builtin-SIGINT"],
)
def test_the_next_iteration_is_saved_and_the_last(
    loop: str, number: int, code: int, at: Callable[..., None], straight: Path, tmp_path: Path
) -> None:
    """The signal comes when iteration 1 has asked the ranks already; 2 hears of it. None is lost, none made twice."""
    folder = tmp_path / "run"
    at(1, send(number))
    with pytest.raises(stopping.Stopped) as told, lines_of("imgcls.engine") as said:
        run(loop, folder, *EVALUATING)
    assert told.value.code == code
    assert f"stopped by {signal.Signals(number).name} after iteration " in said[-1]
    assert sorted(path.name for path in folder.glob("model_0*.pth")) in (["model_0000001.pth"], ["model_0000002.pth"])
    run({"plain": "builtin", "builtin": "plain"}[loop], folder, *EVALUATING, resume=True)
    assert lines(folder) == lines(straight)
    assert equal(content(folder), content(straight))


@pytest.mark.parametrize(("loop", "iteration"), [("plain", 3), ("builtin", 3), ("builtin", 5)])
def test_an_evaluation_that_is_cut_short_is_made_after_the_resume(
    loop: str, iteration: int, at: Callable[..., None], straight: Path, tmp_path: Path
) -> None:
    """As if it had never been: the line, the schedule, the best value; at the end of the run too."""
    folder = tmp_path / "run"
    at(iteration, send(signal.SIGTERM), evaluating=True)
    with pytest.raises(stopping.Stopped):
        run(loop, folder, *EVALUATING)
    saved = content(folder, f"model_{iteration:07d}.pth")
    assert saved["evaluation_due"] and not saved["metrics"] and not (folder / "model_final.pth").exists()
    assert [line["iteration"] for line in lines(folder)] == list(range(iteration))
    made = run(loop, folder, *EVALUATING, resume=True)
    assert made.start_iter == iteration + 1
    assert lines(folder) == lines(straight)
    assert equal(content(folder), content(straight))
    assert equal(content(folder, "model_best.pth"), content(straight, "model_best.pth"))
    assert not content(folder, f"model_{iteration:07d}.pth" if iteration == 3 else "model_final.pth")["evaluation_due"]


def test_without_that_the_evaluation_would_be_missing(
    at: Callable[..., None], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    at(3, send(signal.SIGTERM), evaluating=True)
    with pytest.raises(stopping.Stopped):
        run("plain", folder, *EVALUATING)
    monkeypatch.setattr(Run, "catch_up", lambda self, writers: self.owed.clear())
    run("plain", folder, *EVALUATING, resume=True)
    assert lines(folder) != lines(straight)
    assert not equal(content(folder)["scheduler"], content(straight)["scheduler"])


def test_a_second_signal_in_the_same_evaluation_leaves_it_due(
    at: Callable[..., None], straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    at(3, send(signal.SIGTERM), evaluating=True)
    with pytest.raises(stopping.Stopped):
        run("plain", folder, *EVALUATING)
    at(-1, send(signal.SIGTERM), evaluating=True)  # the first evaluation that comes
    with pytest.raises(stopping.Stopped):
        run("plain", folder, *EVALUATING, resume=True)
    assert content(folder, "model_0000003.pth")["evaluation_due"]
    at(99, send(signal.SIGTERM))  # no more
    run("plain", folder, *EVALUATING, resume=True)
    assert lines(folder) == lines(straight) and equal(content(folder), content(straight))


def test_in_the_last_iteration_the_run_comes_to_its_end(at: Callable[..., None], tmp_path: Path) -> None:
    at(3, send(signal.SIGTERM))
    made = run("plain", tmp_path / "run")
    assert made.max_iter == 4 and (tmp_path / "run" / "model_final.pth").is_file()


def test_before_training_there_is_nothing_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "start", lambda self, resume: send(signal.SIGTERM)())
    with pytest.raises(stopping.Stopped) as told:
        run("plain", tmp_path / "run")
    assert told.value.code == 143 and not list((tmp_path / "run").glob("model_*"))


@pytest.mark.parametrize("first", [True, False], ids=["before the first batch", "after one"])
def test_a_wait_for_data_ends_with_patience(first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been trained is saved; before the first batch there is nothing."""
    loader = run_module.build_train_loader
    monkeypatch.setattr(stopping, "PATIENCE", 0.2)

    def stuck(batches: Any) -> Iterator[Any]:
        if not first:
            yield next(iter(batches))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(run_module, "build_train_loader", lambda *words, **more: stuck(loader(*words, **more)))
    began = time.monotonic()
    with pytest.raises(stopping.Stopped):
        run("plain", tmp_path / "run")
    assert time.monotonic() - began < 30
    assert [path.name for path in (tmp_path / "run").glob("model_*.pth")] == ([] if first else ["model_0000000.pth"])


def test_data_that_fail_without_a_signal_are_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Iterator[Any]:
        raise ValueError("the data workers failed")
        yield

    monkeypatch.setattr(run_module, "build_train_loader", broken)
    with pytest.raises(ValueError, match="the data workers failed"):
        run("plain", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------ handlers


def test_handlers_are_there_only_while_somebody_listens() -> None:
    numbers = [*stopping.CODES, signal.SIGALRM]
    before = [signal.getsignal(number) for number in numbers]
    with stopping.listening():
        assert all(signal.getsignal(number) is not handler for number, handler in zip(numbers, before, strict=True))
        with stopping.deferred():
            signal.raise_signal(signal.SIGUSR1)
            assert stopping.asked() == signal.SIGUSR1
    assert [signal.getsignal(number) for number in numbers] == before and stopping.asked() == 0


def test_signals_that_were_blocked_for_us_are_heard() -> None:
    """A process inherits what whoever started it has blocked."""
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        with pytest.raises(stopping.Stopped) as ended, stopping.listening():
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("not heard")
        assert ended.value.code == 143
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)


def test_other_threads_listen_to_nothing() -> None:
    found = []

    def listen() -> None:
        with stopping.listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize(
    ("signals", "pause", "how"),
    [
        (("SIGTERM",), 0.0, 0),
        (("SIGTERM", "SIGTERM"), 0.0, 0),
        (("SIGTERM", "SIGTERM"), 0.3, -signal.SIGTERM),
        (("SIGUSR1", "SIGTERM"), 0.3, 0),
        (("SIGTERM", "SIGINT"), 0.3, -signal.SIGINT),
    ],
    ids=["once", "twice at a time", "twice", "a scheduler's two", "then Ctrl-C"],
)
def test_a_second_one_ends_the_process_at_once(
    signals: tuple[str, ...], pause: float, how: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "TOGETHER", 0.2)

    def child() -> None:
        with stopping.listening(), stopping.deferred():
            for name in signals:
                os.kill(os.getpid(), getattr(signal, name))
                time.sleep(pause)
            os._exit(0 if stopping.asked() == getattr(signal, signals[0]) else 9)

    assert ended(child) == how


def ended(child: Callable[[], None], deed: Callable[[int], None] = lambda pid: None) -> int:
    """Exit code of a forked process that runs ``child``; ``deed(pid)`` is done to it."""
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert process.pid is not None
    deed(process.pid)
    process.join(20)
    assert process.exitcode is not None
    return process.exitcode


def test_data_workers_end_for_their_parent_alone() -> None:
    """A signal to the whole group is not theirs; twin: without our care the first one ends them."""

    def worker(careful: bool) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        if careful:
            start_worker(0)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        time.sleep(1.5)
        os._exit(7)

    assert ended(lambda: worker(True)) == 7
    assert ended(lambda: worker(False)) == -signal.SIGUSR1

    def patient() -> None:
        start_worker(0)
        time.sleep(15)
        os._exit(7)

    def terminate(pid: int) -> None:
        time.sleep(0.5)
        os.kill(pid, signal.SIGTERM)

    assert ended(patient, terminate) == 0


def test_data_workers_end_with_their_parent(tmp_path: Path) -> None:
    def parent() -> None:
        pid = os.fork()
        if not pid:
            start_worker(0)
            time.sleep(30)
            os._exit(0)
        (tmp_path / "pid").write_text(str(pid))
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(parent) == -signal.SIGKILL
    orphan, end = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while Path(f"/proc/{orphan}").exists() and time.monotonic() < end:
        if (Path(f"/proc/{orphan}") / "stat").read_text().rpartition(") ")[2].startswith("Z"):
            break
        time.sleep(0.05)
    assert time.monotonic() < end
