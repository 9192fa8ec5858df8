"""Signals to the launcher alone, and ranks that die or hang: who ends, how soon, with which word and which code."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from faults.bench import LIMIT, Bench, Workshop
from faults.jobs import ITERATIONS, Variant
from faults.processes import Trainer
from faults.records import record
from faults.sabotage import Sabotage
from faults.strikes import look, resumed_at

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 143}
SAVES_WITHIN, DIES_WITHIN = 30.0, 10.0  # seconds
TIMEOUT, ANSWERS_WITHIN = 6.0, 26.0  # seconds: --dist-timeout, and until all have ended
PAUSE = 0.03  # seconds that an iteration takes longer, so that a signal meets one


def launch(bench: Bench, *more: str, fresh: bool = False) -> Trainer:
    """The command with its own launcher, ``--num-gpus``; this process starts that and nothing else."""
    if fresh:
        return bench.start(*more)
    ranks = bench.variant.ranks
    options = (*more, "--num-gpus", str(ranks)) if ranks > 1 else more
    return bench.fork(Sabotage(pause=PAUSE), *options, variant=replace(bench.variant, ranks=1))


def stop(
    shop: Workshop, variant: Variant, name: str, chance: Random, most: int, *, fresh: bool = False
) -> list[dict[str, Any]]:
    """Each of the three signals to the launcher of one run, at random moments; it goes on where it was told to stop."""
    bench, reference = Bench(shop, variant, name), shop.reference(variant)
    records: list[dict[str, Any]] = []
    for sent in chance.sample(sorted(CODES), min(most, len(CODES))):
        at = bench.done() + chance.randint(1, 9)
        trainer = launch(bench, fresh=fresh)
        trainer.wait(LIMIT, partial(_reached, bench, at))
        time.sleep(chance.uniform(0, PAUSE))
        if trainer.poll():
            break
        os.kill(trainer.pid, getattr(signal, sent))
        latest = stopped(bench, trainer, sent, reference)
        _resumes_where_it_stopped(records, trainer)  # the one before
        records.append(latest)
    trainer = bench.fork()
    trainer.wait(LIMIT)
    _resumes_where_it_stopped(records, trainer)
    problems = [] if trainer.code == 0 else [f"the last resume ends with {trainer.code}: {trainer.last_line()}"]
    problems += reference.end_problems(bench.run, bench.trace, extra=True)
    for one in records:
        one["problems"] += problems
        one["equal"] = not problems
    return records


def _reached(bench: Bench, iterations: int) -> bool:
    return bench.done() >= iterations


def stopped(bench: Bench, trainer: Trainer, sent: str, reference: Any) -> dict[str, Any]:
    """What became of a job that was sent a signal."""
    began = time.perf_counter()
    ended = trainer.wait(SAVES_WITHIN)
    seconds = time.perf_counter() - began
    orphans = trainer.orphans(2.0)
    trainer.kill()
    done = bench.done()
    seen = look(bench, reference, done)
    problems = seen.pop("problems")
    if not ended:
        problems.append(f"it has not ended {SAVES_WITHIN:g} s after {sent}")
    elif trainer.code != CODES[sent]:
        problems.append(f"it ended with {trainer.code} instead of {CODES[sent]}: {trainer.last_line()}")
    if seen["lost_iterations"]:
        problems.append(f"{seen['lost_iterations']} iterations are lost")
    if orphans:
        problems.append(f"{orphans} processes are left")
    told = re.search(r"stopped by .*", trainer.stdout)
    point = f"{sent} to the launcher with {done} iterations done"
    cause = told[0].strip() if told else ""
    return record("signal", bench.variant, point, trainer, problems, cause=cause, seconds=seconds, signal=sent, **seen)


def _resumes_where_it_stopped(records: list[dict[str, Any]], trainer: Trainer) -> None:
    """Note in the last of ``records`` where ``trainer``, which followed it, went on."""
    if records:
        records[-1]["resumed_at"] = resumed_at(trainer)
        expected = records[-1].pop("expected")
        if records[-1]["resumed_at"] != expected:
            records[-1]["problems"].append(f"resumed at {records[-1]['resumed_at']}, not at {expected}")


def lose_rank(
    shop: Workshop, variant: Variant, name: str, chance: Random, most: int, *, hang: bool = False, fresh: bool = False
) -> list[dict[str, Any]]:
    """One rank is killed, or stopped so that it never answers again; all have to end, and the launcher says which."""
    bench, reference = Bench(shop, variant, name), shop.reference(variant)
    rank, at = chance.randrange(variant.ranks), chance.randint(2, ITERATIONS // 2)
    trainer = launch(bench, *(("--dist-timeout", f"{TIMEOUT:g}") if hang else ()), fresh=fresh)
    trainer.wait(LIMIT, partial(_reached, bench, at))
    ranks = children(trainer.pid)
    began = time.perf_counter()
    if rank < len(ranks):
        os.kill(ranks[rank], signal.SIGSTOP if hang else signal.SIGKILL)
    within = ANSWERS_WITHIN if hang else DIES_WITHIN
    ended = trainer.wait(within)
    seconds = time.perf_counter() - began
    orphans = trainer.orphans(max(0.5, min(within - seconds, DIES_WITHIN)))
    trainer.kill()
    seen = look(bench, reference, bench.done())
    problems = seen.pop("problems")
    named = re.compile(rf"rank {rank}\b")
    if len(ranks) != variant.ranks:
        problems.append(f"the launcher has {len(ranks)} children instead of {variant.ranks}")
    if not ended:
        problems.append(f"it has not ended after {within:g} s")
    elif not trainer.code or trainer.code < 0:
        problems.append(f"it ended with {trainer.code}")
    if not named.search(trainer.last_line()):
        problems.append(f"rank {rank} is not named: {trainer.last_line()}")
    if orphans:
        problems.append(f"{orphans} processes are left")
    following = bench.fork()
    following.wait(LIMIT)
    seen["resumed_at"] = resumed_at(following)
    if seen["resumed_at"] != seen.pop("expected"):
        problems.append(f"resumed at {seen['resumed_at']}")
    end = reference.end_problems(bench.run, bench.trace)
    what = "SIGSTOP" if hang else "SIGKILL"
    kind, point = "stopped rank" if hang else "dead rank", f"{what} of rank {rank} at iteration {at}"
    more = {"cause": trainer.last_line(), "seconds": seconds, "signal": what, "equal": not end, **seen}
    return [record(kind, variant, point, trainer, problems + end, **more)]


def children(parent: int) -> list[int]:
    """The children of a process, in the order in which they were started; Python's own helpers are left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                found.append((int(fields[19]), int(entry.name)))  # when it was started, in clock ticks
        except OSError:
            continue
    return [pid for _, pid in sorted(found)]
