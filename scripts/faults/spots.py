"""Where a process is to die inside a save: every file operation of a run that was watched."""

from __future__ import annotations

from collections import defaultdict
from random import Random

from faults import judging
from faults.judging import FINAL
from faults.tape import Place

Spot = tuple[str, Place, int]  # a stage, a place, and the number of the operation there


def spots(places: list[Place]) -> list[Spot]:
    """Every operation of every save, with its stage: what is done and to what, e.g. "fsync, manifest of the best one".

    A write is there twice: to die before it and in the middle of it.
    """
    found: list[Spot] = []
    counts: dict[Place, int] = defaultdict(int)
    for place in places:
        iteration, operation, name = place
        number = counts[place]
        counts[place] += 1
        for kind in (operation, "half a write") if operation == "write" else (operation,):
            found.append((f"{kind}, {_sort_of(name, iteration)}", (iteration, kind, name), number))
    return found


def _sort_of(name: str, iteration: int) -> str:
    if name == judging.POINTER:
        return "pointer"
    part, file = ("manifest of ", name.removesuffix(".json")) if name.endswith(".json") else ("", name)
    which = {judging.BEST: "the best one", FINAL: "the last one", f"model_{iteration:07d}.pth": "a periodic one"}
    return part + which.get(file, "a pruned one")


def draw_spots(places: list[Place], count: int, chance: Random) -> list[Spot]:
    """So many spots to die at, each in a later save than the one before; every stage is as likely as any other."""
    iterations = sorted({place[0] for place in places})
    drawn: list[Spot] = []
    behind = -1
    for left in range(count, 0, -1):
        # Leave a save for each of the kills that follow.
        fitting = [spot for spot in spots(places) if behind < spot[1][0] <= iterations[-left]]
        stage = chance.choice(sorted({spot[0] for spot in fitting}))
        drawn.append(chance.choice([spot for spot in fitting if spot[0] == stage]))
        behind = drawn[-1][1][0]
    return drawn
