"""What a campaign of a given size consists of, and doing one part of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from faults import damage, mishaps, stopping
from faults.bench import Workshop
from faults.chains import run_chain
from faults.jobs import VARIANTS, Variant
from faults.judging import Reference
from faults.processes import kill_descendants

# Of each kind's share of the kills, and how many of them one run suffers.
KILLS = {"save": (0.40, 4), "moment": (0.18, 4), "iteration": (0.10, 3), "power": (0.20, 3), "fresh": (0.12, 2)}
# Up to so many kills the campaign is a short one: with the first variants only, each of which costs an uninterrupted
# run, and with the first cases of the other kinds.
FEW, FIRST, FIRST_CASES = 60, 3, 1
ALL = 99

Case = Callable[..., list[dict[str, Any]]]
CASES: dict[str, Case] = {
    "signal": stopping.stop,
    "signal, fresh": partial(stopping.stop, fresh=True),
    "dead rank": stopping.lose_rank,
    "dead rank, fresh": partial(stopping.lose_rank, fresh=True),
    "stopped rank": partial(stopping.lose_rank, hang=True),
    "stopped rank, fresh": partial(stopping.lose_rank, hang=True, fresh=True),
    "damage": damage.resumed_all_the_same,
    "not finite": mishaps.not_finite,
    "full disk": mishaps.full_disk,
    "two jobs": mishaps.one_folder,
    "changed config": mishaps.changed_config,
    "other ranks": mishaps.other_ranks,
}
BITS = "bits"


@dataclass(frozen=True)
class Task:
    """A part of a campaign. count: of a chain's kills, of flipped bits, or of another kind's cases at most."""

    number: int
    kind: str
    variant: Variant
    count: int = 1

    @property
    def name(self) -> str:
        """Under which its cases stand in the report."""
        return f"{self.number:03d} {self.kind} {self.variant.name}"


def plan(kills: int, seed: int) -> list[Task]:
    """The parts of a campaign with so many kills; the same ones for the same seed."""
    chance, few = Random(seed), kills <= FEW
    among_all = VARIANTS[:FIRST] if few else VARIANTS
    variants = list(among_all)
    chance.shuffle(variants)
    parts: list[tuple[str, Variant, int]] = []
    turns = cycle(variants)
    for kind, count in shares(kills).items():
        longest = KILLS[kind][1]
        parts += [(kind, next(turns), min(longest, count - done)) for done in range(0, count, longest)]
    single = [variant for variant in among_all if variant.ranks == 1]
    double = [variant for variant in among_all if variant.ranks == 2]
    repeats = max(1, kills // 75)
    parts += [(BITS, VARIANTS[0], 20 if few else 200)]
    for kind in CASES:
        if few and kind.endswith("fresh"):
            continue
        several = kind.startswith(("dead", "stopped"))
        alone = kind in ("other ranks", "damage") or (few and kind in ("two jobs", "changed config"))
        among = double if several else single if alone else double + single
        parts += [(kind, variant, FIRST_CASES if few else ALL) for variant in islice(cycle(among), repeats)]
    return [Task(number, *part) for number, part in enumerate(parts)]


def shares(kills: int) -> dict[str, int]:
    """How many of ``kills`` are of each kind; at least one of each, the rest inside saves."""
    counts = {kind: max(1, round(share * kills)) for kind, (share, _) in KILLS.items()}
    counts["save"] += kills - sum(counts.values())
    return counts


def do(
    task: Task, folder: Path, data: Path, references: dict[Variant, Reference], seed: int, broken: str
) -> list[dict[str, Any]]:
    """The records of one part. What goes wrong in the campaign itself is a problem of its record."""
    shop = Workshop(folder, data, broken, dict(references))
    chance = Random(f"{seed} {task.name}")
    place = task.name.replace(" ", "-").replace(",", "")
    try:
        if task.kind == BITS:
            return damage.bits(shop, task.variant, place, chance, task.count)
        if task.kind in CASES:
            return CASES[task.kind](shop, task.variant, place, chance, task.count)
        records: list[dict[str, Any]] = []
        while len(records) < task.count:
            # A run that was over before all of its kills came is followed by another.
            left = task.count - len(records)
            more = run_chain(shop, task.variant, task.kind, left, f"{place}-{len(records)}", chance)
            if not more:
                raise RuntimeError("no kill came in time")
            records += more
        return records
    except Exception:
        problem = traceback.format_exc().strip()
        return [{"kind": task.kind, **task.variant.described, "point": "the campaign itself", "problems": [problem]}]
    finally:
        kill_descendants()  # of a case that was interrupted
