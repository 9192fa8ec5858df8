"""``--resume PATH``: goes on from a named checkpoint; what cannot be resumed is one clear line, with nothing begun."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_tool
from detectron2.config import CfgNode
from detectron2.utils import comm

from imgcls.checkpoint import checkpoint_to_resume, is_whole, newest_whole, read_checkpoint, write_checkpoint
from imgcls.engine.saving import Saving
from imgcls.engine.setup import decide_device
from imgcls.transfer import convert

CONFIG = ("--config-file", "configs/quick/digits_mobilenet_v1.yaml", "INPUT.TRAIN_SIZE", 32, "INPUT.TEST_SIZE", 32)
SMALL = (
    *("SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.CHECKPOINT_KEEP", 9),
    *("TEST.EVAL_PERIOD", 4, "TEST.EVAL_EPOCHS", 0.0, "SOLVER.LOG_PERIOD", 1, "DATALOADER.NUM_WORKERS", 0),
    *("DATASETS.TEST", "('digits_val',)", "TEST.IMS_PER_BATCH", 500, "SOLVER.WARMUP_ITERS", 1, "MODEL.DEVICE", "cpu"),
)


def train(*words: object, builtin: bool = False) -> Any:
    return run_tool(f"tools/train_net{'_builtin' if builtin else ''}.py", *CONFIG, *SMALL, *words)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(path)["model"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model_*.pth"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six iterations with three checkpoints, and a converted backbone beside it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).resolve().parents[1])
        done = train("--output", folder)
    assert done.returncode == 0, done.stderr
    convert(folder / "model_final.pth", folder.parent / "backbone.pth")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it to spoil."""
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    yield Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))


@pytest.mark.parametrize("builtin", [False, True])
def test_the_run_goes_on_from_the_named_checkpoint(builtin: bool, run: Path, finished: Path) -> None:
    """In its own folder: the later ones give way to those of the new course, which here is the old one bit by bit."""
    assert names(run) == ["model_0000001.pth", "model_0000003.pth", "model_best.pth", "model_final.pth"]
    done = train("--resume", run / "model_0000001.pth", "--output", run, builtin=builtin)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {run / 'model_0000001.pth'} at iteration 2 of 6" in done.stdout
    ours, theirs = weights(run / "model_final.pth"), weights(finished / "model_final.pth")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    aside = names(run / "set_aside_1")
    assert "model_0000003.pth" in aside and "model_final.pth" in aside and "model_0000001.pth" not in aside
    assert all(is_whole(run / "set_aside_1" / name) for name in aside)
    assert newest_whole(run) == run / "model_final.pth" and (run / "model_best.pth").is_file()


def test_a_run_goes_on_in_another_folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    before = names(finished)
    words = ("--resume", finished / "model_0000003.pth", "--output", tmp_path / "new")
    done = train(*words)
    assert done.returncode == 0 and "at iteration 4 of 6" in done.stdout, done.stderr
    assert names(tmp_path / "new") == ["model_best.pth", "model_final.pth"]
    assert names(finished) == before and not (finished / "set_aside_1").exists()
    # The same command again would throw that away: --resume alone goes on with it.
    again = train(*words)
    assert again.returncode == 2 and "holds the results of an earlier job; add --resume to go on" in again.stderr
    assert "nothing is left to train" in train("--resume", "--output", tmp_path / "new").stdout


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


MISTAKES: dict[str, tuple[str, str]] = {
    "absent": (
        "run/model_0000002.pth",
        "does not exist; name a checkpoint (model_0000001.pth, model_0000003.pth, model_best.pth, model_final.pth), or",
    ),
    "a folder": ("run", "is a folder; name a checkpoint (model_0000001.pth, "),
    "torn": ("run/model_0000003.pth", "the file is damaged; name another checkpoint"),
    "a converted backbone": ("backbone.pth", "holds weights but no state of an imgcls run; it cannot be resumed"),
    "no checkpoint at all": ("note.pth", "the file is damaged"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_resumed_is_refused_in_one_line_and_begins_nothing(case: str, run: Path, finished: Path) -> None:
    name, message = MISTAKES[case]
    spoil(run / "model_0000003.pth")
    (run.parent / "backbone.pth").write_bytes((finished.parent / "backbone.pth").read_bytes())
    (run.parent / "note.pth").write_text("no archive")
    done = train("--resume", run.parent / name, "--output", run.parent / "new")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert not (run.parent / "new").exists()


def test_evaluating_a_named_checkpoint(run: Path) -> None:
    done = train("--eval-only", "--resume", run / "model_0000001.pth", "--output", run.parent / "tables")
    assert done.returncode == 0 and "classification/top1" in done.stdout, done.stderr
    assert f"{run / 'model_0000001.pth'}: " in done.stdout


def test_a_detector_asks_for_its_own_state(run: Path, tmp_path: Path) -> None:
    """A classifier's checkpoint is none of a detector's; the twin, a detector's own, is."""
    classifier, detector = run / "model_final.pth", tmp_path / "model_0000004.pth"
    write_checkpoint(detector, {"model": {}, "trainer": {"iteration": 4}, "iteration": 4}, iteration=4)
    state = ("trainer", "iteration")
    assert checkpoint_to_resume(detector, tmp_path, state=state) == detector
    with pytest.raises(ValueError, match="no state of an imgcls run"):
        checkpoint_to_resume(classifier, run, state=state)
    with pytest.raises(ValueError, match="no state of an imgcls run"):
        checkpoint_to_resume(detector, tmp_path)


@pytest.mark.parametrize(
    ("asked", "there", "ranks", "got"),
    [
        ("mps", False, 1, "cpu"),
        ("mps", True, 1, "mps"),
        ("mps", True, 2, "cpu"),
        ("cuda:1", False, 1, "cpu"),
        ("cpu", False, 1, "cpu"),
    ],
)
def test_a_device_that_is_not_here_becomes_the_cpu(
    asked: str,
    there: bool,
    ranks: int,
    got: str,
    monkeypatch: pytest.MonkeyPatch,
    classifier_cfg: Callable[..., CfgNode],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(comm, "get_world_size", lambda: ranks)
    monkeypatch.setattr(logging.getLogger("imgcls"), "propagate", True)
    cfg = classifier_cfg("mobilenet_v1_0.25", "MODEL.DEVICE", asked)
    with caplog.at_level(logging.INFO, "imgcls"):
        decide_device(cfg)
    assert got == cfg.MODEL.DEVICE
    assert (f"MODEL.DEVICE {asked} becomes cpu" in caplog.text) == (got != asked)


@pytest.mark.parametrize("later", ["none", "damaged"])
def test_a_resume_finishes_what_the_kill_of_a_save_left(later: str, finished: Path, tmp_path: Path) -> None:
    """And deletes no good checkpoint while those that would be kept in its place are damaged."""
    folder = tmp_path / "run"
    folder.mkdir()
    for iteration in (1, 3, 5):
        content = read_checkpoint(finished / "model_final.pth")
        write_checkpoint(
            folder / f"model_{iteration:07d}.pth", {**content, "iteration": iteration}, iteration=iteration
        )
    newest = folder / "model_0000005.pth"
    if later == "damaged":
        newest = folder / "model_0000003.pth"
        (folder / "model_0000005.pth").write_bytes(b"torn")
    (folder / "last_checkpoint").write_text("model_0000000.pth")
    for name in (".model_final.pth.json.7.tmp", ".per_class.csv.7.tmp", "mine.tmp"):
        (folder / name).write_text("left")
    assert newest_whole(folder) == newest
    Saving(folder, keep=1).tidy(newest)
    kept = ["model_0000005.pth"] if later == "none" else ["model_0000001.pth", "model_0000003.pth", "model_0000005.pth"]
    assert names(folder) == kept and newest_whole(folder) == newest
    assert (folder / "last_checkpoint").read_text() == newest.name
    assert [path.name for path in folder.glob("*.tmp")] == ["mine.tmp"]
    # A checkpoint of another folder is no reason to delete or point at anything.
    elsewhere = finished / "model_0000003.pth"
    Saving(folder, keep=0).tidy(elsewhere)
    assert names(folder) == kept and (folder / "last_checkpoint").read_text() == newest.name
