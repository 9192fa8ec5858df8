"""The output directory: refused when it holds results or belongs to a running job, and then left as it is."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import portalocker
import pytest

from imgcls.engine.output.output_dir import LOCK, claim, mend_metrics, release

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "run"
    yield made
    release(made)


def fingerprint(folder: Path) -> str:
    """Names, bytes and times of all that lies in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.name} {path.stat().st_mtime_ns} {path.stat().st_size}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- results of before


@pytest.mark.parametrize("result", ["model_0000004.pth", "model_final.pth", "last_checkpoint", "metrics.json"])
def test_results_are_not_overwritten(result: str, folder: Path) -> None:
    folder.mkdir()
    (folder / result).write_text("an earlier job's")
    (folder / "log.txt").write_text("its log")
    before = fingerprint(folder)
    with pytest.raises(ValueError, match=rf"OUTPUT_DIR {folder} holds the results of an earlier job; add --resume"):
        claim(folder, resume=False)
    assert fingerprint(folder) == before
    claim(folder, resume=True)
    assert (folder / result).read_text() == "an earlier job's"


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"OUTPUT_DIR .*/file/run takes no files \(.*\); choose another OUTPUT_DIR"):
        claim(tmp_path / "file" / "run", resume=False)


def test_the_fingerprint_would_notice(folder: Path) -> None:
    """The twin: a lock file is enough to change it."""
    folder.mkdir()
    before = fingerprint(folder)
    claim(folder, resume=False)
    assert fingerprint(folder) != before


def test_a_folder_that_is_not_there_is_made(folder: Path) -> None:
    claim(folder / "deeper", resume=False)
    assert (folder / "deeper").is_dir()
    release(folder / "deeper")


def test_other_files_do_not_matter(folder: Path) -> None:
    folder.mkdir()
    for name in ("notes.txt", "config.yaml", "model.txt"):
        (folder / name).write_text("mine")
    claim(folder, resume=False)
    assert (folder / LOCK).exists() and (folder / "notes.txt").read_text() == "mine"


def test_a_file_in_its_place_is_refused(folder: Path) -> None:
    folder.write_text("not a folder")
    with pytest.raises(ValueError, match=rf"OUTPUT_DIR {folder} is a file; choose another OUTPUT_DIR"):
        claim(folder, resume=True)
    assert folder.read_text() == "not a folder"


# ------------------------------------------------------------------------------------------------------- two writers


def hold(folder: Path, ready: Any) -> None:
    claim(folder, resume=True)
    ready.set()
    time.sleep(60)


def hold_with_a_worker(folder: Path, ready: Any, pids: Any) -> None:
    claim(folder, resume=True)
    worker = FORK.Process(target=time.sleep, args=(60,))
    worker.start()
    pids.put(worker.pid)
    ready.set()
    time.sleep(60)


def started(target: Any, *args: Any) -> Any:
    process = FORK.Process(target=target, args=args)
    process.start()
    return process


@pytest.mark.parametrize("resume", [False, True])
def test_a_running_jobs_folder_is_refused_until_it_is_killed(resume: bool, folder: Path) -> None:
    ready = FORK.Event()
    first = started(hold, folder, ready)
    try:
        assert ready.wait(20)
        before = fingerprint(folder)
        with pytest.raises(ValueError, match=rf"OUTPUT_DIR {folder} belongs to a job that is running; wait for it"):
            claim(folder, resume=resume)
        assert fingerprint(folder) == before
    finally:
        first.kill()  # SIGKILL: it cannot clean up
        first.join()
    claim(folder, resume=resume)


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EAGAIN"])
def test_a_file_system_without_locks(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Clusters have such; that is no other job, and no reason not to train."""

    def refuse(*_: object) -> None:
        raise OSError(getattr(errno, name), name)

    monkeypatch.setattr(portalocker.portalocker, "LOCKER", refuse)
    if name == "EAGAIN":  # as of a lock that somebody holds
        with pytest.raises(ValueError, match="belongs to a job that is running"):
            claim(folder, resume=False)
        return
    monkeypatch.setattr(logging.getLogger("imgcls"), "propagate", True)
    with caplog.at_level(logging.WARNING, "imgcls"):
        claim(folder, resume=False)
    assert f"OUTPUT_DIR {folder} cannot be locked: see to it that no other job writes there" in caplog.text


def test_a_worker_that_outlives_its_job_does_not_hold_the_lock(folder: Path) -> None:
    """Data workers notice some seconds later that their parent was killed; whoever restarts the job is faster."""
    ready, pids = FORK.Event(), FORK.Queue()
    first = started(hold_with_a_worker, folder, ready, pids)
    assert ready.wait(20)
    worker = pids.get()
    try:
        first.kill()
        first.join()
        os.kill(worker, 0)  # it lives
        claim(folder, resume=True)
    finally:
        os.kill(worker, 9)


def test_a_forked_child_does_not_give_the_lock_away(folder: Path) -> None:
    """The twin: neither the fork nor the end of the child releases what the parent holds."""
    claim(folder, resume=False)
    child = started(time.sleep, 0)
    child.join()
    refused = FORK.Queue()
    second = started(try_to_claim, folder, refused)
    second.join()
    assert "belongs to a job that is running" in refused.get()


def try_to_claim(folder: Path, refused: Any) -> None:
    try:
        claim(folder, resume=True)
        refused.put("it was given away")
    except ValueError as error:
        refused.put(str(error))


def test_one_job_may_claim_twice_and_release(folder: Path) -> None:
    claim(folder, resume=False)
    claim(folder.parent / "." / "run", resume=False)  # the same folder by another name
    release(folder)
    release(folder)
    refused = FORK.Queue()
    second = started(try_to_claim, folder, refused)
    second.join()
    assert refused.get() == "it was given away"


# ----------------------------------------------------------------------------------------------------------- metrics


def lines(*iterations: int) -> list[str]:
    return [json.dumps({"iteration": iteration, "total_loss": 0.5}) for iteration in iterations]


def test_lines_that_will_be_written_again_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("\n".join(lines(0, 4, 9, 10, 14)) + "\n")
    mend_metrics(tmp_path, 10)
    assert (tmp_path / "metrics.json").read_text() == "\n".join(lines(0, 4, 9)) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("torn", ['{"iteration": 9, "total_lo', "\0\0\0\0", "{", '"text"', "3", "[]", "\udcff\udcfe"])
def test_a_torn_last_line_is_dropped(torn: str, tmp_path: Path) -> None:
    """The next record would be glued to it, and both were lost."""
    path = tmp_path / "metrics.json"
    path.write_bytes(("\n".join(lines(0, 4)) + "\n" + torn).encode("utf-8", "surrogateescape"))
    mend_metrics(tmp_path, 100)
    with path.open("a") as file:
        file.write(lines(5)[0] + "\n")
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [0, 4, 5]


def test_a_whole_last_line_gets_its_end(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("\n".join(lines(0, 4)))
    mend_metrics(tmp_path, 5)
    assert (tmp_path / "metrics.json").read_text() == "\n".join(lines(0, 4)) + "\n"


def test_absent_metrics_stay_absent_and_a_run_from_the_start_keeps_none(tmp_path: Path) -> None:
    mend_metrics(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.json").write_text("\n".join(lines(0, 4)) + "\n")
    mend_metrics(tmp_path, 0)
    assert (tmp_path / "metrics.json").read_text() == ""
