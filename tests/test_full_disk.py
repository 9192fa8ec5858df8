"""A disk that takes nothing more: the old checkpoint stays good, the log says so, training goes on, and it is saved
when there is room. Real ones where this system lets us have them (a tmpfs in a namespace of our own), limits on the
size of files (``ulimit -f``) and read-only folders beside them."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, lines_of
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from imgcls.checkpoint import is_whole, newest_whole, read_checkpoint, write_checkpoint, writing
from imgcls.engine import ClsTrainer, Run, saving, train
from imgcls.engine.output import writers
from imgcls.engine.output.log_file import LogFile
from imgcls.engine.output.output_dir import mend_lines, release
from imgcls.engine.output.whole_lines import WaitingLines, WholeLines
from imgcls.engine.output.writers import EventFiles, Tolerant
from imgcls.engine.saving import Saving
from imgcls.engine.setup import setup


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """``ulimit -f`` for this process, in bytes; Python ignores the signal and gets EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def content(iteration: int, kilobytes: int = 100) -> dict[str, Any]:
    return {"model": {"weight": torch.full((256 * kilobytes,), float(iteration))}, "iteration": iteration}


def names(folder: Path) -> list[str]:
    """All files but manifests."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".json")


def value(path: Path) -> float:
    return float(read_checkpoint(path)["model"]["weight"][0])


class Disk:
    """In the place of the file system: refuses checkpoints above ``room`` in all, with the error of a full one."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, *, fails: int = errno.ENOSPC) -> None:
        self.folder, self.fails, self.room, self.tried = folder, fails, 1 << 40, 0
        whole_write = writing.write_tensors

        def write(path: Path, content: Any) -> str:
            self.tried += 1
            if sum(file.stat().st_size for file in folder.glob("*.pth")) + 110_000 > self.room:
                raise OSError(f"cannot write {path}") from OSError(fails, os.strerror(fails))
            return whole_write(path, content)

        patch.setattr(writing, "write_tensors", write)
        patch.setattr(saving, "_free", lambda folder: self.room if self.room < 1 << 40 else 1 << 40)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


# -- when what could not be written is tried again -------------------------------------------------------------------


def test_tries_at_doubling_distances_up_to_the_period(tmp_path: Path, disk: Disk) -> None:
    saves = Saving(tmp_path, keep=2, period=6)
    saves.note(0, saves.save(content(0), saving=True))
    disk.room = 0
    tried = []
    for iteration in range(10, 40):
        if iteration == 10 or saves.due_again(iteration):
            tried.append(iteration)
            saves.note(iteration, saves.save(content(iteration), saving=iteration == 10))
    assert tried == [10, 11, 13, 17, 23, 29, 35]
    # With a look at the disk first: nothing was written that would have had no room.
    assert disk.tried == 2 and names(tmp_path) == ["last_checkpoint", "model_0000000.pth"]
    disk.room = 1 << 40
    assert saves.due_again(41)
    saves.note(41, saves.save(content(41), saving=False))
    assert newest_whole(tmp_path) == tmp_path / "model_0000041.pth" and not saves.due_again(50)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000041.pth"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_the_line_says_what_is_needed_and_what_is_good(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, saves = Disk(tmp_path, monkeypatch, fails=code), Saving(tmp_path, keep=1)
    saves.save(content(4), saving=True)
    disk.room = 0
    with lines_of("imgcls.engine.saving") as told:
        assert saves.save(content(9), saving=True)
        saves.note(9, True)
        assert saves.save(content(10), saving=False)  # the same trouble is told once
    assert len(told) == 1 and told[0].startswith("model_0000009.pth of iteration 9 is not saved, it is tried again: ")
    assert "(0.1 MB needed, 0.0 MB free). model_0000004.pth is the newest checkpoint" in told[0]


def test_the_last_good_one_is_never_given_up(tmp_path: Path, disk: Disk) -> None:
    """Room for one: with CHECKPOINT_KEEP 1 it stays. Room for two and two there: the older goes before, not after."""
    saves = Saving(tmp_path, keep=1)
    saves.save(content(0), saving=True)
    disk.room = 150_000
    assert saves.save(content(1), saving=True)
    assert newest_whole(tmp_path) == tmp_path / "model_0000000.pth"
    disk.room = 1 << 40
    pair = Saving(tmp_path, keep=2)
    pair.save(content(2), saving=True)
    disk.room = 250_000
    assert not pair.save(content(3), saving=True)
    assert names(tmp_path) == ["last_checkpoint", "model_0000002.pth", "model_0000003.pth"]
    # But not in favour of a damaged one.
    (tmp_path / "model_0000003.pth").write_bytes(b"torn")
    disk.room = 150_000
    assert pair.save(content(4), saving=True)
    assert names(tmp_path) == ["last_checkpoint", "model_0000002.pth", "model_0000003.pth"]


def test_the_best_waits_in_memory(tmp_path: Path, disk: Disk) -> None:
    """What is written later are the weights of then, not those that training has made of them since."""
    saves, weights = Saving(tmp_path, keep=2), content(5)
    disk.room = 0
    assert saves.save(weights, saving=False, best=True)
    saves.note(5, True)
    weights["model"]["weight"].fill_(6.0)
    disk.room = 1 << 40
    assert saves.due_again(6) and not saves.save({**weights, "iteration": 6}, saving=False)
    assert names(tmp_path) == ["model_best.pth"]  # no periodic one was due
    assert value(tmp_path / "model_best.pth") == 5.0 and is_whole(tmp_path / "model_best.pth")


def test_a_better_one_takes_the_place_of_the_one_that_waits(tmp_path: Path, disk: Disk) -> None:
    saves = Saving(tmp_path, keep=2)
    disk.room = 0
    assert saves.save(content(5), saving=False, best=True) and saves.save(content(7), saving=False, best=True)
    disk.room = 1 << 40
    assert not saves.save(content(8), saving=False)
    assert value(tmp_path / "model_best.pth") == 7.0


@pytest.mark.parametrize("how", ["last", "must"])
def test_what_cannot_wait_is_an_error_after_a_while(how: str, tmp_path: Path, disk: Disk) -> None:
    saves = Saving(tmp_path, keep=2, patience=0.05)
    saves.save(content(3), saving=True)
    disk.room = 0
    with pytest.raises(OSError, match=r"iteration 7 could not be written.*model_0000003.pth is the newest.*--resume"):
        saves.save(content(7), saving=True, **{how: True})
    assert disk.tried >= 2 and newest_whole(tmp_path) == tmp_path / "model_0000003.pth"


def test_room_that_comes_within_the_while(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = Saving(tmp_path, keep=2, patience=30)
    disk.room = 0

    def wait(seconds: float) -> None:
        disk.room = 1 << 40

    monkeypatch.setattr(saving.time, "sleep", wait)
    assert not saves.save(content(7), saving=True, last=True)
    assert names(tmp_path) == ["last_checkpoint", "model_final.pth"]


# -- which ones stay -------------------------------------------------------------------------------------------------


def test_every_so_many_stay_for_good(tmp_path: Path) -> None:
    saves = Saving(tmp_path, keep=2, keep_every=4)
    for iteration in range(1, 12, 2):
        saves.save(content(iteration, 1), saving=True)
    kept = [name for name in names(tmp_path) if name.startswith("model")]
    assert kept == [f"model_{number:07d}.pth" for number in (3, 5, 7, 9, 11)]  # 3, 7 and 11 for good
    # Another period, or none, later: those that were promised stay.
    for iteration in range(13, 18, 2):
        Saving(tmp_path, keep=1).save(content(iteration, 1), saving=True)
    kept = [name for name in names(tmp_path) if name.startswith("model")]
    assert kept == [f"model_{number:07d}.pth" for number in (3, 7, 11, 17)]


def test_one_that_stays_stays_though_its_manifest_was_never_written(tmp_path: Path) -> None:
    """A kill may come between the checkpoint and the manifest, which says that it stays."""
    saves = Saving(tmp_path, keep=1, keep_every=4)
    saves.save(content(3, 1), saving=True)
    first, manifest = tmp_path / "model_0000003.pth", tmp_path / "model_0000003.pth.json"
    before = manifest.read_text()
    manifest.unlink()
    saves.tidy(first)
    assert manifest.read_text() == before and "kept" in before
    for iteration in (5, 9):
        saves.save(content(iteration, 1), saving=True)
    assert [name for name in names(tmp_path) if name.startswith("model")] == [first.name, "model_0000009.pth"]
    (tmp_path / "model_0000009.pth.json").unlink()
    saves.tidy(tmp_path / "model_0000009.pth")
    assert "kept" not in (tmp_path / "model_0000009.pth.json").read_text()


# -- files of lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WholeLines, WaitingLines])
def test_no_line_is_torn(kind: type[WholeLines], tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = kind(path)
    lines.write("one\n")
    with files_up_to(7):
        for text in ("two and more\n", "three\n"):
            with pytest.raises(OSError, match=r"File too large|No space left"):
                lines.write(text)
        assert path.read_text() == "one\n"
    lines.write("four\n")
    lines.close()
    lost = "" if kind is WaitingLines else "one\nfour\n"
    assert path.read_text() == (lost or "one\ntwo and more\nthree\nfour\n")


def test_a_log_without_room_is_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("imgcls.engine.test_full_disk")
    handler = LogFile(tmp_path / "mine.txt")
    above = logging.getLogger("imgcls.engine")
    above.addHandler(handler)
    try:
        with lines_of("imgcls.engine") as told:
            log.info("one")
            with files_up_to((tmp_path / "mine.txt").stat().st_size + 5):
                log.info("two")
                log.info("three")
            log.info("four")
    finally:
        above.removeHandler(handler)
        handler.close()
    assert [line.split(": ", 1)[1] for line in (tmp_path / "mine.txt").read_text().splitlines()] == ["one", "four"]
    assert len([line for line in told if line.startswith("mine.txt is not written, training goes on: ")]) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_tensorboard_begins_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What writes one is a thread that dies of its first error, and says so with a traceback."""
    told_by_threads: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", writers._without_tensorboards(told_by_threads.append))
    made = Tolerant("tensorboard", lambda: EventFiles(str(tmp_path), flush_secs=0))

    def write_until(words: str) -> None:
        for _ in range(200):
            storage.put_scalar("loss", 1.0)
            made.write()
            storage.step()
            if any(words in line for line in told):
                return
            time.sleep(0.02)

    with lines_of("imgcls.engine.output.writers") as told, EventStorage(0) as storage:
        with files_up_to(200):
            write_until("training goes on")
        first = set(tmp_path.glob("events.*"))
        write_until("is written again")
        made.close()
    assert [line.partition(":")[0] for line in told] == [
        "tensorboard is not written, training goes on",
        "tensorboard is written again",
    ]
    assert len(first) == 1 and len(list(tmp_path.glob("events.*"))) == 2 and told_by_threads == []
    fault = threading.ExceptHookArgs((OSError, OSError(), None, threading.Thread()))
    threading.excepthook(fault)
    assert told_by_threads == [fault]  # of any other thread


def test_mending_needs_no_room_where_only_the_end_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    whole = [json.dumps({"iteration": number}) + "\n" for number in range(4)]
    path.write_text("".join(whole) + '{"iterat')
    with files_up_to(0):
        mend_lines(path, 2)
        assert path.read_text() == "".join(whole[:2])
        path_of_two = tmp_path / "two"
        path_of_two.write_text("")  # an empty file needs none either
    path.write_text(whole[0] + "torn\n" + whole[1].rstrip())
    mend_lines(path, 2)
    assert path.read_text() == "".join(whole[:2])
    path.write_text("torn\n" + whole[0])
    with files_up_to(0), pytest.raises(OSError, match=r"cannot write .*metrics\.json"):
        mend_lines(path, 2)
    assert path.read_text() == "torn\n" + whole[0] and names(tmp_path) == ["two"]


# -- runs ------------------------------------------------------------------------------------------------------------


SMALL = (
    *("SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 4, "TEST.IMS_PER_BATCH", 500),
    *("DATALOADER.NUM_WORKERS", 0),
)


@pytest.mark.parametrize("loop", ["plain", "builtin"])
def test_training_goes_on_and_saves_when_there_is_room(
    loop: str, classifier_cfg: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room after iteration 5, where a periodic checkpoint and the best are due: both are there after the next."""
    cfg = classifier_cfg("mobilenet_v1_0.25", *SMALL, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 6)
    folder = Path(cfg.OUTPUT_DIR)
    done: list[int] = []
    whole_file = writing.whole_file

    def write(path: Path, **options: Any) -> Any:
        if path.suffix == ".pth" and done[-1] == 5:
            raise OSError(f"cannot write {path}") from OSError(errno.ENOSPC, "full")
        return whole_file(path, **options)

    finish = Run.finish_iteration

    def finish_iteration(run: Run, iteration: int, *rest: Any) -> None:
        done.append(iteration)
        finish(run, iteration, *rest)
        if iteration == 5:
            assert newest_whole(folder) == folder / "model_0000002.pth" and not (folder / "model_best.pth").exists()

    monkeypatch.setattr(writing, "whole_file", write)
    monkeypatch.setattr(Run, "finish_iteration", finish_iteration)
    cfg, data = setup(cfg)
    with lines_of("imgcls.engine.saving") as told:
        try:
            if loop == "builtin":
                run = ClsTrainer(cfg, data)
                run.train()
            else:
                train(Run(cfg, data))
        finally:
            release(folder)
    assert [line.split()[0] for line in told if "is not saved" in line] == ["model_best.pth", "model_0000005.pth"]
    written = [name for name in names(folder) if name.startswith("model")]
    assert written == ["model_0000002.pth", "model_0000006.pth", "model_best.pth", "model_final.pth"]
    assert all(is_whole(folder / name) for name in written) and not list(folder.glob(".*.tmp"))
    best = read_checkpoint(folder / "model_best.pth")
    assert best["iteration"] == best["best"]["iteration"] and best["iteration"] in (5, 7)
    assert f"saved {folder / 'model_best.pth'} of iteration 5" in told


def test_a_best_that_was_never_written_is_not_on_record(classifier_cfg: Callable[..., CfgNode]) -> None:
    cfg = classifier_cfg("mobilenet_v1_0.25", *SMALL, "SOLVER.MAX_ITER", 4)
    folder = Path(cfg.OUTPUT_DIR)
    train_whole(cfg)
    run = resumed(cfg)
    assert run.best["iteration"] == 3
    best = (folder / "model_best.pth").read_bytes()
    (folder / "model_best.pth").write_bytes(best[: len(best) // 2])  # torn, with a manifest that knows better
    assert resumed(cfg).best == {}
    (folder / "model_best.pth").write_bytes(best)
    # As if the best of iteration 3 had found no room: the file is an older one's.
    older = {**read_checkpoint(folder / "model_best.pth"), "iteration": 1}
    older.pop("digest")
    write_checkpoint(folder / "model_best.pth", older, iteration=1)
    assert resumed(cfg).best == {}
    for part in folder.glob("model_best*"):
        part.unlink()
    assert resumed(cfg).best == {}


def train_whole(cfg: CfgNode) -> None:
    cfg, data = setup(cfg)
    try:
        train(Run(cfg, data))
    finally:
        release(cfg.OUTPUT_DIR)


def resumed(cfg: CfgNode) -> Run:
    cfg, data = setup(cfg, resume=True)
    release(cfg.OUTPUT_DIR)
    run = Run(cfg, data)
    run.start(resume=True)
    return run


# -- a real file system ----------------------------------------------------------------------------------------------

ON_TMPFS = """
mount -t tmpfs -o size=24m tmpfs "$1" && cp -r "$2" "$1/run" && exec "$3" - "$1" "$4"
"""
SCRIPT = """
import logging, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2] + "/tests")
from conftest import tiny_cfg
from imgcls.engine import Run, train
from imgcls.engine.setup import setup

disk = Path(sys.argv[1])
cfg = tiny_cfg(disk / "run", "SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", 0,
               "SOLVER.CHECKPOINT_KEEP", 9, "DATASETS.TEST", (), "DATALOADER.TRACE", str(disk / "run/trace.jsonl"))
cfg, data = setup(cfg, resume=True)
finish = Run.finish_iteration

def finish_iteration(run, iteration, *rest):
    filler = disk / "filler"
    if iteration == 5:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        logging.getLogger("imgcls.engine.test").info("a line that needs a page " + 5000 * "x")
    if iteration == 6:
        filler.unlink()
    finish(run, iteration, *rest)

Run.finish_iteration = finish_iteration
run = Run(cfg, data)
run.start(resume=True)
train(run)
shutil.copytree(disk / "run", str(disk) + ".left")
"""


def test_a_real_full_disk(tmp_path: Path, classifier_cfg: Callable[..., CfgNode]) -> None:
    """Not a byte is left after iteration 5: no traceback, every line whole, and the end is as without that."""
    if sys.platform != "linux" or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no file system of our own to be had here")
    cfg = classifier_cfg("mobilenet_v1_0.25", *SMALL, "DATASETS.TEST", (), "SOLVER.CHECKPOINT_KEEP", 9)
    train_whole(cfg)
    straight, begun = Path(cfg.OUTPUT_DIR), tmp_path / "begun"
    shutil.copytree(straight, begun, ignore=shutil.ignore_patterns("model_final*", "model_0000005*", ".lock"))
    (tmp_path / "disk").mkdir()
    words = ["unshare", "-Urm", "sh", "-c", ON_TMPFS, "sh", tmp_path / "disk", begun, sys.executable, ROOT]
    done = subprocess.run(
        list(map(str, words)),
        input=SCRIPT,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search("Traceback|Logging error|Exception ignored", done.stderr), done.stderr[-3000:]
    assert "model_0000005.pth of iteration 5 is not saved" in done.stdout and "No space left" in done.stdout
    left = tmp_path / "disk.left"
    kept = [name for name in names(left) if name.startswith("model")]
    assert kept == [f"model_{name}.pth" for name in ("0000001", "0000003", "0000006", "final")]
    ours, theirs = (read_checkpoint(folder / "model_final.pth") for folder in (left, straight))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    assert [losses["total_loss"] for losses in records(left / "metrics.json")] == [
        losses["total_loss"] for losses in records(straight / "metrics.json")
    ]
    assert [record["iteration"] for record in records(left / "metrics.json")] == list(range(8))
    assert {record["iteration"] for record in records(left / "trace.jsonl")} >= {4, 5, 7}
    assert (left / "log.txt").read_text().endswith("\n") and "log.txt is not written" in done.stdout


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
