"""Data workers that die, hang or find no room: one line within the timeout, and no process is left."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Done, write_image_folder
from detectron2.config import CfgNode

import imgcls
from imgcls.data import build_test_loader, build_train_loader
from imgcls.data.datasets import ArraySource, FolderSource
from imgcls.data.mapper import ClsMapper
from imgcls.data.watch import Watch
from imgcls.data.workers import is_worker_end, start_worker
from imgcls.engine.step import TrainStep

TIMEOUT = 2  # seconds that a batch may take; the default is 50
LOAD = 8  # seconds that a busy machine may need for what takes half a second on an idle one
BUILDERS = {"training": build_train_loader, "evaluation": build_test_loader}


@pytest.fixture
def cfg() -> CfgNode:
    """Four pictures a batch, two workers."""
    made = imgcls.get_config("Base-ClsNet.yaml")
    made.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu", "SEED", 3, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 50),
            *("INPUT.TRAIN_SIZE", 16, "INPUT.TEST_SIZE", 16, "INPUT.TEST_RESIZE", 16),
            *("INPUT.TRAIN_TRANSFORMS", [["resize"]], "TEST.IMS_PER_BATCH", 4),
            *("DATALOADER.NUM_WORKERS", 2, "DATALOADER.TIMEOUT", TIMEOUT),
        ]
    )
    return made


@pytest.fixture
def source() -> ArraySource:
    return ArraySource("many", np.zeros((200, 16, 16), np.uint8), np.zeros(200, np.int64), ["only"])


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = _children()
    yield
    gc.collect()  # a trainer and its hooks know each other; a process of its own would just end
    deadline = time.monotonic() + 2
    while _children() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _children() - before == set()


def _children() -> set[int]:
    """Processes whose parent is this one, and that are no zombies."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended since
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(status.parent.name))
    return found


def workers() -> list[int]:
    alive = _children()
    return sorted(child.pid for child in multiprocessing.active_children() if child.pid in alive)


# torch's signal handler raises wherever this process is, which may be in a finalizer.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_ends_or_hangs(how: signal.Signals, kind: str, cfg: CfgNode, source: ArraySource) -> None:
    """A stopped one has sent messages whose pixels are fetched from it, where torch's timeout does not reach."""
    batches = iter(BUILDERS[kind](cfg, source))
    next(batches)
    started = time.monotonic()
    os.kill(workers()[0], how)
    with pytest.raises((ValueError, RuntimeError)) as told:
        list(batches)
    took = time.monotonic() - started
    batches.close()  # type: ignore[attr-defined]  # a generator
    if how is signal.SIGKILL:
        # torch's signal handler, when it comes first, raises between two statements of this very test.
        assert is_worker_end(told.value) or "the data workers failed: " in str(told.value)
        assert took < TIMEOUT + LOAD
    else:
        assert re.search("the data workers failed: (no batch came in|DataLoader timed out after) 2", str(told.value))
        assert TIMEOUT * 0.9 < took < TIMEOUT + LOAD
    assert "\n" not in str(told.value)


class Slow(ArraySource):
    """A batch of four of these takes four tenths of the timeout."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(0.1 * TIMEOUT)
        return super().__getitem__(index)


@pytest.mark.parametrize("stopped", ["all", "the workers"])
def test_a_job_that_is_suspended_goes_on(stopped: str, cfg: CfgNode) -> None:
    """Ctrl-Z and fg: the time between does not count, unless the workers alone stood still."""
    cfg.DATALOADER.NUM_WORKERS = 1
    source = Slow("slow", np.zeros((16, 16, 16), np.uint8), np.zeros(16, np.int64), ["only"])
    child = os.fork()
    if not child:  # a process group of its own, as a shell makes
        os.setpgid(0, 0)
        batches = iter(build_test_loader(cfg, source))
        next(batches)
        for worker in multiprocessing.active_children() if stopped == "the workers" else ():
            os.kill(worker.pid, signal.SIGSTOP)  # type: ignore[arg-type]  # it has begun
        try:
            os._exit(len(list(batches)))
        except ValueError as error:
            os._exit(100 + ("the data workers failed" in str(error)))
    try:
        if stopped == "all":
            time.sleep(0.6 * TIMEOUT)  # in the second batch
            os.killpg(child, signal.SIGSTOP)
            time.sleep(1.5 * TIMEOUT)
            os.killpg(child, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (3 if stopped == "all" else 101)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def test_without_a_timeout_nothing_watches() -> None:
    called: list[int] = []
    with Watch(0, lambda: called.append(1)):
        time.sleep(0.05)
    short = Watch(0.1, lambda: called.append(2))
    with short:
        time.sleep(0.01)
    time.sleep(0.2)  # between two waits it does not matter how long
    assert not called and not short.fired
    with short:
        time.sleep(0.3)
    assert 2 in called and short.fired
    short.close()


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_bad_file_ends_the_pass_at_once(kind: str, cfg: CfgNode, tmp_path: Path) -> None:
    """Workers that have much left to do, and those of evaluation, which would stay, are gone soon."""
    folder = FolderSource(write_image_folder(tmp_path, {"ant": 100, "bee": 60}, side=8))
    Path(folder.path(5)).write_bytes(b"")
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot read the image .*/005\.png: it is empty"):
        list(BUILDERS[kind](cfg, folder))
    assert workers() == []
    assert time.monotonic() - started < LOAD  # torch left alone waits 5 seconds for each of two workers


@pytest.mark.parametrize("workers", [0, 1])
def test_no_memory_in_a_worker(
    workers: int, cfg: CfgNode, source: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ClsMapper, "__call__", fail)
    cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(ValueError, match=r"not the memory to read sample \d+ of many; lower DATALOADER\.NUM_WORKERS"):
        list(build_train_loader(cfg, source))


def test_a_mistake_in_a_transform_keeps_its_traceback(
    cfg: CfgNode, source: ArraySource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: what is no fault of the workers is not blamed on them."""

    def fail(*_: Any) -> None:
        raise RuntimeError("the size of tensor a must match")

    monkeypatch.setattr(ClsMapper, "__call__", fail)
    with pytest.raises(RuntimeError, match=r"(?s)Original Traceback.*the size of tensor a must match"):
        list(build_train_loader(cfg, source))


# ---------------------------------------------------------------------------------- scarce files and shared memory


def in_a_process(action: Callable[[], None], seconds: float) -> str:
    """What ``action`` raises in a forked process of its own, or "done"; "hung" when it does not end in time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        os.setsid()
        try:
            action()
            sender.send("done")
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {error}")

    process = context.Process(target=run)
    process.start()
    sender.close()
    said = receiver.recv() if receiver.poll(seconds) else "hung"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    return said


def leave_files(number: int) -> None:
    """Let this process open ``number`` files more."""
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + number, lowest + number))


@pytest.mark.parametrize("at_once", [True, False])
def test_no_files_to_open(at_once: bool, cfg: CfgNode, source: ArraySource) -> None:
    """Before the workers start, and when they have long been sending."""

    def action() -> None:
        if at_once:
            leave_files(2)
        batches = iter(build_train_loader(cfg, source))
        next(batches)
        leave_files(0)
        list(batches)

    said = in_a_process(action, 20)
    assert re.match("ValueError: the data workers failed: .*ulimit -n" if not at_once else "OSError: .*Too many", said)


def test_enough_files_to_open(cfg: CfgNode, source: ArraySource) -> None:
    """The twin of the test before."""

    def action() -> None:
        leave_files(400)
        list(build_train_loader(cfg, source))

    assert in_a_process(action, 20) == "done"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small /dev/shm takes root")
@pytest.mark.parametrize("kind", BUILDERS)
def test_full_shared_memory(kind: str, cfg: CfgNode) -> None:
    """64 pictures of 112 pixels take 2.4 MB, more than the file system has."""
    cfg.merge_from_list([*("SOLVER.IMS_PER_BATCH", 64, "TEST.IMS_PER_BATCH", 64, "INPUT.TRAIN_SIZE", 112)])
    cfg.merge_from_list([*("INPUT.TEST_SIZE", 112, "INPUT.TEST_RESIZE", 112)])
    source = ArraySource("many", np.zeros((200, 112, 112), np.uint8), np.zeros(200, np.int64), ["only"])

    def action() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        new_mounts, private, recursive = 0x20000, 1 << 18, 1 << 14  # CLONE_NEWNS, MS_PRIVATE, MS_REC
        assert libc.unshare(new_mounts) == 0
        assert libc.mount(None, b"/", None, private | recursive, None) == 0
        assert libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=2m") == 0, os.strerror(ctypes.get_errno())
        list(BUILDERS[kind](cfg, source))

    said = in_a_process(action, 20)
    assert re.match(r"ValueError: the data workers failed: .*/dev/shm is full \(\d MiB free\)", said), said


def _starts_late(pids: Any) -> None:
    """A worker whose parent is gone before it can look who that is."""
    parent = os.getppid()
    pids.put(os.getpid())
    while os.getppid() == parent:
        time.sleep(0.01)
    start_worker(0)
    time.sleep(60)


def _parent_of_one(pids: Any) -> None:
    multiprocessing.get_context("fork").Process(target=_starts_late, args=(pids,)).start()
    time.sleep(60)


def test_a_worker_whose_parent_dies_first_ends_too() -> None:
    context = multiprocessing.get_context("fork")
    pids = context.Queue()
    parent = context.Process(target=_parent_of_one, args=(pids,))
    parent.start()
    worker = pids.get(timeout=20)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + LOAD
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = _runs(worker)
    if left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def training(tmp_path: Path) -> list[object]:
    """The words of a short training run."""
    data = write_image_folder(tmp_path / "data", {"ant": 40, "bee": 40}, side=16)
    return [
        *("tools/train_net.py", "--data", data, "--variant", "mobilenet_v1_0.25", "--output", tmp_path / "run"),
        *("MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_EPOCHS", 0.0, "SOLVER.MAX_ITER", 40),
        *("SOLVER.WARMUP_EPOCHS", 0.0, "DATALOADER.NUM_WORKERS", 2, "DATALOADER.TIMEOUT", TIMEOUT),
    ]


@pytest.mark.parametrize("script", ["tools/train_net.py", "tools/train_net_builtin.py"])
def test_a_worker_that_dies_during_a_step(
    script: str, training: list[object], tool: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its death is raised by a signal handler far from the loader, and is one line all the same."""
    usual = TrainStep._losses

    def step(self: TrainStep, batch: Any) -> Any:
        os.kill(workers()[0], signal.SIGKILL)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:  # the handler ends this
            time.sleep(0.01)
        return usual(self, batch)

    monkeypatch.setattr(TrainStep, "_losses", step)
    done = tool(script, *training[1:])
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"error: the data workers failed: DataLoader worker \(pid \d+\) is killed by signal: Killed", last)
    assert "Traceback" not in done.stderr + done.stdout


def test_a_worker_that_stops_during_training(
    training: list[object], tool: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, usual = os.getpid(), ClsMapper.__call__

    def stop(self: ClsMapper, sample: dict[str, Any], draw: Any) -> Any:
        if os.getpid() != parent and draw.index % 7 == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return usual(self, sample, draw)

    monkeypatch.setattr(ClsMapper, "__call__", stop)
    started = time.monotonic()
    done = tool(*training)
    assert done.returncode == 2
    assert "error: the data workers failed: " in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr + done.stdout
    assert time.monotonic() - started < TIMEOUT + LOAD
