"""Trainers as processes: forked from this one, which has imported everything, or started afresh."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from imgcls.commands.train import main as train_command

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {"plain": "tools/train_net.py", "builtin": "tools/train_net_builtin.py"}
GRACE = 3.0  # seconds that the other ranks have when one has failed, as torchrun gives them some

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

Prepare = Callable[[int], None]  # called in the trainer before the command, with its rank


class Trainer:
    """A training job in a session of its own; ``number`` tells its output files apart from earlier attempts'."""

    waited_for: set[int] = set()  # the jobs' own processes, whose ends are asked for by poll

    def __init__(self, pid: int, folder: Path, number: int) -> None:
        self.pid, self.folder, self.number = pid, folder, number
        self.began = time.perf_counter()
        self.seconds = 0.0
        self.code: int | None = None
        Trainer.waited_for.add(pid)

    @property
    def stdout(self) -> str:
        return self._said("out")

    @property
    def stderr(self) -> str:
        return self._said("err")

    def _said(self, where: str) -> str:
        file = self.folder / f"{where}{self.number}.txt"
        # It may have been killed before it came so far as to make it.
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.seconds = time.perf_counter() - self.began
                Trainer.waited_for.discard(pid)
        return self.code is not None

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the end, or ``until`` is so; whether either came within ``seconds``."""
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            if self.poll() or until():
                return True
            time.sleep(0.003)
        return False

    def kill(self) -> None:
        """SIGKILL to every process of the job at once, as a scheduler has it, and to those that left its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        kill_descendants()
        self.wait(10)
        self.orphans(10)

    def orphans(self, seconds: float = 6.0) -> int:
        """How many processes of the job are still there after so many seconds."""
        deadline = time.perf_counter() + seconds
        while (left := [pid for pid in descendants() if pid != self.pid]) and time.perf_counter() < deadline:
            time.sleep(0.01)
        return len(left)

    def last_line(self) -> str:
        """The last line on stderr: what the user is told."""
        lines = [line for line in self.stderr.strip().splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


def adopt_orphans() -> None:
    """Become the parent of whatever outlives its own parent below this process, so that it can be found and ended."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[int]:
    """The living processes below this one; those that have ended and nobody waits for are waited for here."""
    parents: dict[int, int] = {}
    ended = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        with contextlib.suppress(OSError):
            # The name may hold blanks and brackets: count from the last one. Fields: state, parent.
            state, parent = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:2]
            parents[int(entry)] = int(parent)
            ended += [int(entry)] if state in "ZX" else []
    own = os.getpid()
    below = [pid for pid in parents if _is_below(pid, own, parents)]
    for pid in set(below) & set(ended):
        if parents[pid] == own and pid not in Trainer.waited_for:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
    return [pid for pid in below if pid not in ended]


def kill_descendants() -> None:
    """SIGKILL to every process below this one."""
    for pid in descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_below(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents and parents[pid] != ancestor:
        pid = parents[pid]
    return pid in parents


def fork(
    words: Sequence[str], folder: Path, number: int, *, builtin: bool, ranks: int, prepare: Prepare | None = None
) -> Trainer:
    """Start the command in a child of this process. With two ranks the child starts both and ends them together."""
    sys.stdout.flush()
    sys.stderr.flush()
    port = free_port() if ranks > 1 else 0
    pid = os.fork()
    if pid:
        return Trainer(pid, folder, number)
    os.setsid()
    with _last_resort():
        _redirect(folder, number)
        if ranks == 1:
            _run(words, builtin, 0, prepare)
        os._exit(_lead([_fork_rank(rank, ranks, port, words, builtin, prepare) for rank in range(ranks)]))


@contextlib.contextmanager
def _last_resort() -> Iterator[None]:
    """A child must not come back into the campaign's code, whatever happens."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(70)


def _redirect(folder: Path, number: int) -> None:
    os.chdir(folder)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{name}{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    for request in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(request, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _fork_rank(rank: int, ranks: int, port: int, words: Sequence[str], builtin: bool, prepare: Prepare | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    with _last_resort():
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        _run(words, builtin, rank, prepare)
    raise AssertionError


def _run(words: Sequence[str], builtin: bool, rank: int, prepare: Prepare | None) -> NoReturn:
    """The command, as if it had been typed; ends this process with its exit code."""
    code = 1
    try:
        torch.set_num_threads(1)
        sys.argv = [TOOLS["builtin" if builtin else "plain"], *words]
        if prepare is not None:
            prepare(rank)
        train_command(list(words), builtin=builtin)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _lead(ranks: list[int]) -> int:
    """Wait for the ranks; when one fails, the others have some seconds. The first failure is the job's."""
    failed, deadline = 0, float("inf")
    running = set(ranks)
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            running.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not failed:
                failed, deadline = code, time.perf_counter() + GRACE
        if time.perf_counter() > deadline:
            for other in running:
                os.kill(other, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.002)
    return failed if failed >= 0 else 128 - failed


def free_port() -> int:
    """Of this machine, at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(words: Sequence[str], folder: Path, number: int, *, builtin: bool) -> Trainer:
    """Start the command as people do: ``python tools/train_net.py ...``, a process that imports everything."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(ROOT / TOOLS["builtin" if builtin else "plain"])
    with (folder / f"out{number}.txt").open("ab") as out, (folder / f"err{number}.txt").open("ab") as err:
        process = subprocess.Popen(
            [sys.executable, script, *words],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    process.returncode = 0  # its end is waited for by Trainer; Popen would warn that nobody did
    return Trainer(process.pid, folder, number)
