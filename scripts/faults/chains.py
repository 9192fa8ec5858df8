"""Chains of kills: a job is killed, looked at, resumed, killed again, and at last left to finish and compared."""

from __future__ import annotations

from random import Random
from typing import Any

from faults.bench import Bench, Workshop
from faults.jobs import Variant
from faults.processes import Trainer
from faults.records import record
from faults.strikes import Blow, end_of, look, resumed_at, strikes_of

ATTEMPTS = 4


def run_chain(
    shop: Workshop, variant: Variant, kind: str, kills: int, name: str, chance: Random
) -> list[dict[str, Any]]:
    """The records of a chain's kills; a kill that comes too late is tried again with an earlier moment."""
    reference = shop.reference(variant)
    strikes = strikes_of(kind, kills, reference, chance)
    bench = Bench(shop, variant, name)
    records: list[dict[str, Any]] = []
    for strike in strikes:
        for attempt in range(ATTEMPTS):
            blow = strike(bench, chance, attempt)
            if records or not blow.late:
                break
            bench = Bench(shop, variant, name)
        _close(records, blow.trainer)
        if blow.late:
            break  # the run has come to its end early
        records.append(_record(variant, kind, blow, look(bench, reference, blow.done)))
    trainer = bench.fork()
    end_of(trainer)
    _close(records, trainer)
    problems = [] if trainer.code == 0 else [f"the last resume ends with {trainer.code}: {trainer.last_line()}"]
    problems += reference.end_problems(bench.run, bench.trace)
    for one in records:
        one["equal"] = not problems
        one["problems"] += problems
    return records


def _record(variant: Variant, kind: str, blow: Blow, seen: dict[str, Any]) -> dict[str, Any]:
    code = blow.trainer.code or 0
    problems = seen.pop("problems")
    orphans = blow.more.get("orphans", 0)
    if orphans:
        problems.append(f"{orphans} processes were still there after 6 s")
    if code not in (-9, 137):
        problems.append(f"it ended with {code}, not by the kill: {blow.trainer.last_line()}")
    return record(
        kind, variant, blow.point, blow.trainer, problems, cause="SIGKILL", done=blow.done, **blow.more, **seen
    )


def _close(records: list[dict[str, Any]], following: Trainer) -> None:
    """Note where the trainer behind the latest kill went on, which ought to be the newest sound checkpoint."""
    if not records or "expected" not in records[-1]:
        return
    latest = records[-1]
    latest["resumed_at"] = resumed_at(following)
    expected = latest.pop("expected")
    reached = "resuming from" in following.stdout or "starting at iteration 0" in following.stdout
    if reached and latest["resumed_at"] != expected:
        latest["problems"].append(f"resumed at iteration {latest['resumed_at']}, not at {expected}")
    if not reached:
        latest["resumed_at"] = None  # it was killed before it came so far
