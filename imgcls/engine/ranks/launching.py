"""Starting the ranks of a run on this machine, and watching over them until all of them have ended."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType

import torch

from imgcls.engine.ranks.stopping import CODES, TOGETHER, URGENT, name_of

GRACE = 5.0  # seconds from the first rank's fault, in which the others end by themselves, to SIGKILL
LEAVE_WITHIN = 20.0  # the same from the first rank that has ended as it was asked to
NOT_ANSWERED = 124  # exit code when a rank hangs, as that of timeout(1)
_LOOK = 0.1  # seconds between two looks at the ranks
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Looked up here, once: a child may call it between fork and exec, where loading a library could wait for ever.
_prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None

# What a rank says of itself; the launcher reads it when the rank is gone.
RUNNING, DONE, LOST_ANOTHER, WAITED_IN_VAIN = range(4)

Join = Callable[[int, int, str], None]  # of rank, number of ranks, and URL where they meet


class Notes:
    """What the ranks of this machine say of themselves: how they stand, and the iteration that they have begun.

    shared: two numbers for each rank, in memory that the launcher sees. rank: whose notes this process writes.
    """

    def __init__(self, shared: MutableSequence[int], rank: int = 0) -> None:
        self._shared, self._rank = shared, rank

    def of(self, rank: int) -> tuple[int, int]:
        """How ``rank`` stands, and its iteration; -1 before the first."""
        return self._shared[2 * rank], self._shared[2 * rank + 1]

    def of_this(self) -> tuple[int, int]:
        """The same of this process's rank."""
        return self.of(self._rank)

    def stands(self, how: int) -> None:
        """Note how this rank stands: RUNNING, DONE, LOST_ANOTHER or WAITED_IN_VAIN."""
        self._shared[2 * self._rank] = how

    def reached(self, iteration: int) -> None:
        """Note the iteration that this rank begins."""
        self._shared[2 * self._rank + 1] = iteration


# This process's own; where no launcher looks, it serves the rank itself.
notes = Notes([RUNNING, -1])


def launch_ranks(
    main: Callable[[], None],
    join: Join,
    *,
    ranks: int,
    machines: int = 1,
    machine: int = 0,
    url: str = "auto",
    timeout: float = float("inf"),
) -> int:
    """Run ``main()`` in ``ranks`` processes; the exit code of the whole, 0 when all came to their end.

    join: called in each process first, with its rank, the number of ranks on all machines and where they meet.
    machine: the number of this one. url: "auto" for a free port of this machine. timeout: seconds, for the message: how
    long a rank has waited for another that says so.

    SIGTERM, SIGINT and SIGUSR1 are handed on to the ranks. When one ends before its time, the others have GRACE seconds
    and are killed then; one line on stderr says which it was. No rank outlives this process.
    """
    if url == "auto":
        if machines > 1:
            raise ValueError("--dist-url auto is for one machine; give the address of the first: tcp://HOST:PORT")
        url = f"tcp://127.0.0.1:{_free_port()}"
    method = start_method()
    context = multiprocessing.get_context(method)
    shared = context.RawArray("l", [RUNNING, -1] * ranks)
    processes = [
        context.Process(  # type: ignore[attr-defined] # the contexts' common class declares none
            target=_rank,
            args=(main, join, machine * ranks + local, machines * ranks, url, shared, local, os.getpid()),
            name=f"rank {machine * ranks + local}",
        )
        for local in range(ranks)
    ]
    watch = _Watch(processes, Notes(shared), machine * ranks, timeout)
    with watch.handing_on():
        watch.start(method)
        code, why = watch.wait()
    if why:
        print(f"error: {why}", file=sys.stderr, flush=True)
    return code


def start_method() -> str:
    """``fork``, which spares each rank seconds of imports, where nothing can go wrong with it; else ``spawn``.

    A fork copies the locks of threads that it does not copy, so there must be no other, and CUDA forbids it.
    """
    single = os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) == 1
    return "fork" if single and not torch.cuda.is_available() else "spawn"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ------------------------------------------------------------------------------------------------- in a rank's process


def _rank(
    main: Callable[[], None],
    join: Join,
    rank: int,
    world: int,
    url: str,
    shared: MutableSequence[int],
    local: int,
    launcher: int,
) -> None:
    global notes
    notes = Notes(shared, local)
    # Of a terminal's Ctrl-C the launcher hears alone, and hands it on: once is a request, twice an order.
    os.setsid()
    for number in CODES:
        signal.signal(number, signal.SIG_DFL)
    end_with(launcher)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)
    join(rank, world, url)
    main()
    notes.stands(DONE)


def end_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Have this process end when ``parent``, which has started it, is gone.

    number: the signal that the kernel sends then, after an exec too. Elsewhere than on Linux a thread looks every half
    second, for as long as this program runs, and ends it by SIGKILL.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    else:
        threading.Thread(target=_end_when_orphaned, args=(parent,), name="watch over launcher", daemon=True).start()
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _end_when_orphaned(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------- in the launcher


class _Watch:
    """Over the processes of the ranks of this machine.

    first: the rank of the first one. timeout: seconds that a rank waits for another.
    """

    def __init__(self, processes: Sequence[BaseProcess], notes: Notes, first: int, timeout: float) -> None:
        self.processes, self.notes, self.first, self.timeout = processes, notes, first, timeout
        self.codes: dict[int, int] = {}  # of those that have ended, in their order
        self.killed: list[int] = []  # those that did not end by themselves
        self.asked = 0  # the signal that was handed on
        self.ordered = False  # whether another has come since, and the ranks were killed for it
        self._urgent_since = 0.0

    @contextmanager
    def handing_on(self) -> Iterator[None]:
        """Within, signals go to the ranks. Only the main thread can have them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hand_on) for number in CODES}
        # Whoever has started this process may have blocked them, which is inherited.
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, method: str) -> None:
        """Start the processes; a signal that comes meanwhile is theirs when they are ready for it."""
        if method == "spawn":
            # Started with the first process otherwise, which would lift the block again.
            resource_tracker.ensure_running()
        sys.stdout.flush()
        sys.stderr.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, CODES)
        try:
            for process in self.processes:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self.asked:  # by a thread that had not blocked it; twice within TOGETHER is once
            self._send(self.asked)

    def wait(self) -> tuple[int, str]:
        """The exit code of the whole and, where a line is due, what has happened; all processes have ended then."""
        deadline = float("inf")
        while len(self.codes) < len(self.processes):
            time.sleep(_LOOK)
            for local, process in enumerate(self.processes):
                if local not in self.codes and process.exitcode is not None:
                    self.codes[local] = process.exitcode
                    if process.exitcode:
                        _kill_group(process)  # its data workers
                    deadline = min(deadline, time.monotonic() + self._patience(local))
            if time.monotonic() > deadline:
                self.killed += self._running()
                self.kill()
                deadline = float("inf")
        return self._verdict()

    def kill(self) -> None:
        """SIGTERM would ask a rank to save, which one cannot do alone; and it does not end a stopped process."""
        for local in self._running():
            self.processes[local].kill()
            _kill_group(self.processes[local])

    def _running(self) -> list[int]:
        return [local for local in range(len(self.processes)) if local not in self.codes]

    def _patience(self, ended: int) -> float:
        if not self._is_fault(ended):
            return LEAVE_WITHIN if self.codes[ended] else float("inf")
        return GRACE

    def _is_fault(self, local: int) -> bool:
        code = self.codes[local]
        if self.asked and code in (CODES[self.asked], -self.asked):
            return False
        return code != 0 or self.notes.of(local)[0] != DONE

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in URGENT and self._urgent_since and now - self._urgent_since > TOGETHER:
            self.ordered = True
            self.kill()
            return
        if number in URGENT:
            self._urgent_since = self._urgent_since or now
        self.asked = self.asked or number
        self._send(number)

    def _send(self, number: int) -> None:
        for local in self._running():
            process = self.processes[local]
            if process.pid is not None and process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def _verdict(self) -> tuple[int, str]:
        faults = [local for local in self.codes if self._is_fault(local)]
        own = [local for local in faults if local not in self.killed and self.notes.of(local)[0] in (RUNNING, DONE)]
        silent = any(self.notes.of(local)[0] == WAITED_IN_VAIN for local in faults)
        if self.ordered:
            return CODES[self.asked], "a second signal came: the ranks were killed before they had saved"
        if own:
            return self._of_the_first(own)
        if silent:
            return NOT_ANSWERED, self._of_the_silent(faults)
        if self.asked and self.killed:  # none of them at fault but for not having ended
            return CODES[self.asked], f"{self._names(self.killed)} did not end after {name_of(self.asked)}: killed"
        if self.asked:
            return (CODES[self.asked] if any(self.codes.values()) else 0), ""
        return (1, "a rank of another machine has gone, and those of this one with it") if faults else (0, "")

    def _of_the_first(self, own: list[int]) -> tuple[int, str]:
        local = own[0]
        code = self.codes[local]
        if len(own) == len(self.codes) and len(set(self.codes.values())) == 1 and code > 0:
            return code, ""  # all ended alike, and have said why
        at = f" at iteration {self.notes.of(local)[1]}" if self.notes.of(local)[1] >= 0 else ""
        if code > 0:
            how = f"ended with exit code {code}{at}"
        elif code == 0:
            how = f"ended{at} before its work was done"
        else:
            how = f"was ended by {name_of(-code)}{at}{_likely(-code, self._names(self.killed))}"
        others = "the other ranks were ended with it; " if len(self.codes) > 1 else ""
        whole = code if code > 0 else 128 - code if code else 1
        return whole, f"{self._names([local])} {how}; {others}--resume goes on from the last checkpoint"

    def _of_the_silent(self, faults: list[int]) -> str:
        silent = self.killed or [local for local in faults if self.notes.of(local)[0] != WAITED_IN_VAIN] or faults
        return (
            f"{self._names(silent)} did not answer for {self.timeout:g} s (--dist-timeout); "
            "all ranks were ended. --resume goes on from the last checkpoint"
        )

    def _names(self, local: Sequence[int]) -> str:
        numbers = ", ".join(str(self.first + number) for number in sorted(local))
        return f"rank {numbers}" if len(local) == 1 else f"ranks {numbers}"


def _kill_group(process: BaseProcess) -> None:
    # A rank leads a group of its own, in which its data workers are.
    if process.pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _likely(number: int, still_there: str) -> str:
    if number == signal.SIGKILL:
        return ", as the system does when memory runs out"
    if number == signal.SIGABRT and torch.cuda.is_available():
        return f", as NCCL does when another rank does not answer within --dist-timeout (still there: {still_there})"
    return ""
