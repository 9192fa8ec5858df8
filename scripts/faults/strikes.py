"""The ways to kill a trainer, and what one kill has left."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from faults import judging, power
from faults.bench import LIMIT, Bench
from faults.jobs import ITERATIONS, PERIOD
from faults.judging import Checkpoint, Reference
from faults.processes import Trainer
from faults.sabotage import Death, Sabotage
from faults.spots import Spot, draw_spots, spots
from faults.tape import read_journal

RESUMED = re.compile(r"resuming from \S+ at iteration (\d+)")


def look(bench: Bench, reference: Reference, done: int) -> dict[str, Any]:
    """What a kill has left: whether the newest checkpoint can be relied on, and how much work was lost.

    done: iterations that were trained before it.
    """
    found = judging.checkpoints(bench.run)
    problems = reference.state_problems(found)
    pointer = judging.pointed_at(bench.run)
    if pointer and (pointer not in found or found[pointer].problem):
        problems.append(f"last_checkpoint names {pointer!r}, which is missing or bad")
    newest = judging.newest(found)
    bad_newest = bool(problems) and _is_about_newest(problems, found, pointer)
    expected = newest.iteration + 1 if newest else 0
    lost = max(0, done - expected)
    if lost > PERIOD:
        problems.append(f"{lost} iterations are lost, more than SOLVER.CHECKPOINT_PERIOD {PERIOD}")
    return {"expected": expected, "lost_iterations": lost, "bad_newest": bad_newest, "problems": problems}


def _is_about_newest(problems: list[str], found: dict[str, Checkpoint], pointer: str) -> bool:
    last = max((name for name in found if name != judging.BEST), key=lambda name: found[name].iteration, default="")
    return any(name and name in problem for problem in problems for name in (last, pointer))


def resumed_at(trainer: Trainer) -> int:
    """The iteration that a trainer says it goes on from; 0 when it began anew."""
    found = RESUMED.search(trainer.stdout)
    return int(found[1]) if found else 0


Strike = Callable[[Bench, Random, int], "Blow"]


@dataclass
class Blow:
    """A trainer that was killed, at which point, and with how many iterations done; more: for the record."""

    trainer: Trainer
    point: str
    done: int
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def late(self) -> bool:
        """Whether the trainer had come to its end before it could be killed."""
        return self.trainer.code == 0


def strike_in_save(spot: Spot) -> Strike:
    """SIGKILL at one file operation inside a save."""

    def strike(bench: Bench, chance: Random, attempt: int) -> Blow:
        stage, (iteration, operation, name), number = spot
        trainer = bench.fork(bench.taped(dies_at=((iteration, operation, name), number)))
        end_of(trainer)
        return _blow(trainer, bench, f"{operation} {number} of {name} at iteration {iteration}", stage=stage)

    return strike


def strike_at_iteration(bench: Bench, chance: Random, attempt: int) -> Blow:
    """SIGKILL of one rank right before or behind the step of a random iteration."""
    # Not too far on, so that the kills that follow find something left.
    iteration = min(bench.done() + chance.randrange(ITERATIONS // 2), ITERATIONS - 1)
    death = Death(iteration, chance.randrange(bench.variant.ranks), after=chance.random() < 0.5)
    trainer = bench.fork(Sabotage(death=death, broken=bench.shop.broken))
    end_of(trainer)
    when = "behind" if death.after else "before"
    return _blow(trainer, bench, f"{when} the step of iteration {iteration}, rank {death.rank}")


def strike_at_moment(bench: Bench, chance: Random, attempt: int) -> Blow:
    """SIGKILL of the whole job at a random moment of what is left of it."""
    moment = chance.uniform(0, _left(bench, attempt))
    trainer = bench.fork()
    trainer.wait(moment)
    return _kill(trainer, bench, f"after {moment:.2f} s")


def strike_fresh(bench: Bench, chance: Random, attempt: int) -> Blow:
    """The same of a fresh process: while it trains, or as soon as a checkpoint's temporary file is seen."""
    trainer = bench.start()
    before = bench.done()
    iteration = chance.randrange(before, max(before + 1, ITERATIONS - 6 * (1 + attempt)))
    in_write = chance.random() < 0.5
    trainer.wait(LIMIT, lambda: bench.done() > iteration)
    point = f"iteration {iteration} seen"
    if in_write:
        trainer.wait(LIMIT, lambda: any(bench.run.glob(".model_*")))
        point = "a temporary file seen"
    else:
        trainer.wait(chance.uniform(0, 0.05))
    return _kill(trainer, bench, point)


def strike_power(bench: Bench, chance: Random, attempt: int) -> Blow:
    """The power fails: everything stops at once, and what was not synced is damaged or undone."""
    reference = bench.shop.reference(bench.variant)
    safe = power.sizes_of(bench.run) if bench.run.is_dir() else {}
    journal = bench.journal(bench.count)
    coming = [spot for spot in spots(reference.places) if spot[1][0] >= bench.done()]
    if coming and chance.random() < 0.6:
        blow = strike_in_save(chance.choice(coming))(bench, chance, attempt)
    else:
        moment = chance.uniform(0, _left(bench, attempt))
        trainer = bench.fork(bench.taped())
        trainer.wait(moment)
        blow = _kill(trainer, bench, f"after {moment:.2f} s")
    if bench.run.is_dir() and not blow.late:
        blow.more.update(power.cut(bench.run, read_journal(journal), safe, chance))
    return blow


def _left(bench: Bench, attempt: int) -> float:
    """Seconds that the next trainer may take; fewer with every attempt that came too late."""
    share = 1 - 0.8 * bench.done() / ITERATIONS  # starting takes a fifth of the time
    return bench.shop.reference(bench.variant).seconds * share / (1 + attempt)


def end_of(trainer: Trainer) -> None:
    """Wait for the end, and bring it about where it does not come within LIMIT."""
    if not trainer.wait(LIMIT):
        trainer.kill()


def _kill(trainer: Trainer, bench: Bench, point: str) -> Blow:
    trainer.kill()
    return Blow(trainer, point, bench.done())


def _blow(trainer: Trainer, bench: Bench, point: str, **more: Any) -> Blow:
    """Of a trainer that was to die by itself; what of the job is left behind is counted and ended."""
    left = trainer.orphans()
    trainer.kill()
    return Blow(trainer, point, bench.done(), {**more, **({"orphans": left} if left else {})})


def strikes_of(kind: str, kills: int, reference: Reference, chance: Random) -> list[Strike]:
    """How each kill of a chain is done."""
    if kind == "save":
        return [strike_in_save(spot) for spot in draw_spots(reference.places, kills, chance)]
    strike = {
        "moment": strike_at_moment,
        "iteration": strike_at_iteration,
        "power": strike_power,
        "fresh": strike_fresh,
    }[kind]
    return [strike] * kills
