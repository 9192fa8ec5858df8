"""Runs the launcher once for each case named, and prints a JSON line of how each ended: test_launching.py reads it.

In a process of its own, which starts its ranks by fork: what it patches is patched in the ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from imgcls.commands import train
from imgcls.engine import Run, starting
from imgcls.engine.output import provenance
from imgcls.engine.ranks import launching
from imgcls.engine.ranks.distributed import launch


def work(args: argparse.Namespace) -> None:
    """Ranks that talk to each other for ever; rank 1 does what the case says."""
    launching.notes.reached(3)
    if comm.get_rank() == 1:
        CASES[args.case]()
    while args.case not in ("fine", "all exit 2"):
        comm.all_gather(comm.get_rank())
    if args.case == "all exit 2":
        sys.exit(2)


def ask_launcher(number: int = signal.SIGTERM) -> None:
    os.kill(os.getppid(), number)


def ignore_and_ask() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ask_launcher()
    ask_launcher()  # at the same time: counts once
    time.sleep(0.5)
    ask_launcher()
    time.sleep(60)


def ignore_one() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ask_launcher()
    time.sleep(60)


def raise_error() -> None:
    raise RuntimeError("of its own")


def loop() -> None:
    while True:
        pass


CASES: dict[str, Callable[[], Any]] = {
    "fine": lambda: None,
    "all exit 2": lambda: None,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit 7": lambda: sys.exit(7),
    "exit 0": lambda: sys.exit(0),
    "raise": raise_error,
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": loop,
    "SIGTERM to launcher": ask_launcher,
    "SIGINT to launcher": lambda: ask_launcher(signal.SIGINT),
    "SIGUSR1 to launcher": lambda: ask_launcher(signal.SIGUSR1),
    "SIGTERM twice": ignore_and_ask,
    "SIGTERM ignored": ignore_one,
    "for ever": lambda: print("rank 1 talks", file=sys.stderr, flush=True),
}


def run_case(case: str) -> int:
    args = argparse.Namespace(case=case, num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", dist_timeout=1.5)
    return code_of(lambda: launch(work, args))


def run_training(words: str) -> int:
    """``training OUT ITERATION DEED ...``: what rank 1 does at that iteration, and the command's words."""
    out, iteration, deed, *rest = words.split()
    usual, own = Run.record, starting.take_own_statistics
    if "averaged" in out:  # the must-fail twin: every rank goes on with the average
        starting.take_own_statistics = lambda networks, of_ranks: None

    def record(self: Run, at: int, losses: Any) -> None:
        if at == int(iteration) and comm.get_rank() == 1:
            CASES[deed.replace("_", " ")]()
        usual(self, at, losses)

    Run.record = record  # type: ignore[method-assign]
    try:
        return code_of(lambda: train.main(["--num-gpus", "2", "--output", out, *rest], builtin="builtin" in out))
    finally:
        Run.record, starting.take_own_statistics = usual, own  # type: ignore[method-assign]


def code_of(action: Callable[[], None]) -> int:
    try:
        action()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def children_left() -> list[str]:
    """The processes, this one apart, that carry our mark in their environment."""
    mark = f"LAUNCH_CASES={os.environ['LAUNCH_CASES']}".encode()
    left = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if entry.name != str(os.getpid()) and mark in (entry / "environ").read_bytes().split(b"\0"):
                left.append(entry.name)
    return left


def main() -> None:
    if "LAUNCH_METHOD" in os.environ:
        launching.start_method = lambda: os.environ["LAUNCH_METHOD"]
    launching.GRACE, launching.LEAVE_WITHIN, launching.TOGETHER = 1.5, 3.0, 0.2
    provenance.collect_env_info = lambda: ""  # seconds for each training
    for case in sys.argv[1:]:
        began = time.monotonic()
        code = run_case(case) if case in CASES else run_training(case.removeprefix("training "))
        seconds = time.monotonic() - began
        end = time.monotonic() + 3
        while (left := children_left()) and time.monotonic() < end:
            time.sleep(0.05)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        name, how = case.split(" SOLVER")[0], launching.start_method()
        told = json.dumps({"case": name, "code": code, "seconds": seconds, "left": left, "how": how})
        print(told, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
