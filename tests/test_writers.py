"""What a run prints and writes, and that nothing which goes wrong there ends it."""

from __future__ import annotations

import json
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import lines_of
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter

from imgcls.engine import Run, finalize, train
from imgcls.engine.output import trackers, writers
from imgcls.engine.output.trackers import TRACKERS, MLflowTracker, Tracker, WandbTracker, stated
from imgcls.engine.output.writers import Metrics, ProgressLine, Tolerant, build_writers


@pytest.fixture
def told() -> Iterator[list[str]]:
    """The lines that imgcls.engine logs during a test."""
    with lines_of("imgcls.engine") as lines:
        yield lines


def record(storage: EventStorage, **scalars: float) -> None:
    storage.put_scalars(**scalars, smoothing_hint=False)


# -- the line of progress --------------------------------------------------------------------------------------------


def test_the_line_of_progress(told: list[str]) -> None:
    """64 images in 0.5 s each, a tenth of a second of it waiting, 60 iterations to go."""
    with EventStorage(0) as storage:
        for iteration in range(40):
            record(storage, time=0.5, data_time=0.2 if iteration % 2 else 0.0, total_loss=0.25, lr=0.1)
            storage.iter = iteration
        ProgressLine(100, 64, 1000).write()
    line, memory = told[-1].split("  memory ")
    assert line == "iter 40/100  epoch 2.56  loss 0.25  lr 0.1  128 images/s  data 20 %  eta 0:00:30"
    assert re.fullmatch(r"\d+ MB", memory)


# -- writers that fail -----------------------------------------------------------------------------------------------


class Failing(EventWriter):
    """Fails in the calls whose numbers are given, from 0 on."""

    def __init__(self, *when: int) -> None:
        self.when, self.calls, self.closed = when, 0, False

    def write(self) -> None:
        self.calls += 1
        if self.calls - 1 in self.when:
            raise RuntimeError("no such host")

    def close(self) -> None:
        self.closed = True


def test_one_warning_for_a_row_of_failures(told: list[str]) -> None:
    inner = Failing(1, 2, 4)
    tolerant = Tolerant("the service", lambda: inner)
    for _ in range(6):
        tolerant.write()
    tolerant.close()
    warning, again = "the service is not written, training goes on: no such host", "the service is written again"
    assert told == [warning, again, warning, again] and inner.calls == 6 and inner.closed


def test_a_writer_that_cannot_be_made_is_tried_again(told: list[str]) -> None:
    made: list[EventWriter] = []

    def make() -> EventWriter:
        made.append(Failing())
        if len(made) < 3:
            raise OSError("no room")
        return made[-1]

    tolerant = Tolerant("metrics.json", make)
    for _ in range(5):
        tolerant.write()
    assert len(made) == 3 and made[-1].calls == 3  # type: ignore[attr-defined]
    assert told == ["metrics.json is not written, training goes on: no room", "metrics.json is written again"]


def test_an_interruption_is_no_failure() -> None:
    def interrupt() -> EventWriter:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tolerant("x", interrupt).write()


def test_metrics_are_whole_after_the_disk_was_full(tmp_path: Path, told: list[str]) -> None:
    """A limit on the size of files stands for the full disk: it cuts in the middle of a line in the same way."""
    file = tmp_path / "metrics.json"
    writer = Tolerant("metrics.json", lambda: Metrics(file))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with EventStorage(0) as storage:
            for iteration in range(12):
                record(storage, total_loss=iteration / 7)
                if iteration == 4:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, limits[1]))
                if iteration == 8:
                    assert [json.loads(line)["iteration"] for line in file.read_text().splitlines()] == [0, 1, 2, 3]
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                writer.write()
                storage.step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(12))
    told = [line for line in told if line.startswith("metrics.json")]  # a log.txt of another test has no room either
    assert len(told) == 2 and "File too large" in told[0] and told[1] == "metrics.json is written again"


def test_a_run_goes_on_without_a_disk_and_without_a_network(
    classifier_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(writers, "Metrics", lambda path: JSONWriter("/dev/full"))
    monkeypatch.setitem(TRACKERS, "mlflow", Unreachable)
    cfg, data = finalize(classifier_cfg("mobilenet_v1_0.25", "SOLVER.WRITERS", ["mlflow"], "SOLVER.MAX_ITER", 2))
    results = train(Run(cfg, data))
    assert "top1" in results["classification"]
    warnings = [line for line in told if "training goes on" in line]
    assert sorted(line.split()[0] for line in warnings) == ["metrics.json", "mlflow"]
    assert not list(Path(cfg.OUTPUT_DIR).glob("events.*"))  # tensorboard was not asked for


# -- trackers --------------------------------------------------------------------------------------------------------


class Recording(Tracker):
    """A service in memory."""

    name, module = "mlflow", "json"  # one that is installed

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.heard: list[Any] = []
        super().__init__(folder, settings)

    def open(self) -> None:
        self.heard.append("open")

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        self.heard.append((iteration, scalars))

    def finish(self) -> None:
        self.heard.append("finish")


class Unreachable(Recording):
    def open(self) -> None:
        raise ConnectionError("no route to host\nand many lines more")


class Shaky(Recording):
    """Every second call fails."""

    calls = 0

    def log(self, iteration: int, scalars: dict[str, float]) -> None:
        self.calls += 1
        if self.calls % 2:
            raise ConnectionError("try again")
        super().log(iteration, scalars)


class Hanging(Recording):
    def open(self) -> None:
        threading.Event().wait(5)


def deliver(kind: type[Recording], folder: Path) -> Recording:
    """Two writes, the second with what two iterations left."""
    tracker = kind(folder, {})
    with EventStorage(3) as storage:
        record(storage, total_loss=0.5, lr=0.1)
        tracker.write()
        tracker.write()  # nothing new
        storage.step()
        record(storage, total_loss=0.25)
        storage.step()
        record(storage, lr=0.05)
        tracker.write()
    tracker.close()
    return tracker


EXPECTED = ["open", (3, {"total_loss": 0.5, "lr": 0.1}), (4, {"total_loss": 0.25}), (5, {"lr": 0.05}), "finish"]


def test_a_service_hears_each_scalar_once_in_order(tmp_path: Path, told: list[str]) -> None:
    assert deliver(Recording, tmp_path).heard == EXPECTED and told == []


def test_what_failed_is_delivered_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    monkeypatch.setattr(trackers, "RETRY_AFTER", 0.01)
    tracker = Shaky(tmp_path, {})
    with EventStorage(0) as storage:
        for iteration in range(3):
            record(storage, total_loss=float(iteration))
            tracker.write()
            storage.step()
    until = time.monotonic() + 10
    while len(tracker.heard) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    tracker.close()
    assert [entry[0] for entry in tracker.heard[1:-1]] == [0, 1, 2] and tracker.heard[-1] == "finish"
    assert told == ["mlflow cannot be reached, training goes on (metrics.json has everything): try again"]


@pytest.mark.parametrize(
    ("kind", "warning"),
    [(Unreachable, "mlflow cannot be reached, training goes on"), (Hanging, "mlflow does not answer")],
)
def test_a_service_that_is_away_holds_nobody_up(
    kind: type[Recording], warning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    began = time.monotonic()
    heard = deliver(kind, tmp_path).heard
    assert time.monotonic() - began < 3 and heard == []
    assert len(told) == 1 and told[0].startswith(warning)


def test_the_settings_are_what_is_not_the_default(classifier_cfg: Callable[..., CfgNode]) -> None:
    settings = stated(classifier_cfg("mobilenet_v1_0.25", "SOLVER.BASE_LR", 0.25))
    assert settings["SOLVER.BASE_LR"] == "0.25" and settings["MODEL.BACKBONE.VARIANT"] == "mobilenet_v1_0.25"
    assert "SOLVER.GAMMA" not in settings


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_absent_is_told_before_training(
    name: str, classifier_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TRACKERS[name], "module", "not_installed_here")
    with pytest.raises(ValueError, match=rf"got '{name}'; allowed: after pip install 'imgcls\[{name}\]'"):
        finalize(classifier_cfg("mobilenet_v1_0.25", "SOLVER.WRITERS", ["tensorboard", name]))


def test_by_default_there_are_a_line_of_progress_metrics_and_tensorboard(
    classifier_cfg: Callable[..., CfgNode],
) -> None:
    assert [type(writer) for writer in build_writers(classifier_cfg(), 100)] == [ProgressLine, Tolerant, Tolerant]


# -- the services themselves, where their clients are installed ------------------------------------------------------


def two_runs(tracker: type[Tracker], folder: Path) -> None:
    """A run of two iterations, and its resumption for one more."""
    for start, count in ((0, 2), (2, 1)):
        writer = tracker(folder, {"SOLVER.BASE_LR": "0.1"})
        with EventStorage(start) as storage:
            for iteration in range(start, start + count):
                record(storage, **{"classification/top1": 10.0 * iteration})
                writer.write()
                storage.step()
        writer.close()


def test_mlflow_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "my run"
    folder.mkdir()
    two_runs(MLflowTracker, folder)
    client = tracking.MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("imgcls")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params) == ("my run", "FINISHED", {"SOLVER.BASE_LR": "0.1"})
    history = client.get_metric_history(run.info.run_id, "classification/top1")
    assert [(point.step, point.value) for point in history] == [(0, 0.0), (1, 10.0), (2, 20.0)]
    assert told == []


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    two_runs(WandbTracker, tmp_path)
    known = (tmp_path / "wandb_run.txt").read_text().strip()
    files = list(tmp_path.glob(f"wandb/offline-run-*-{known}/run-{known}.wandb"))
    written = b"".join(file.read_bytes() for file in files)
    assert files and b"classification/top1" in written and b"SOLVER.BASE_LR" in written
    assert told == []
