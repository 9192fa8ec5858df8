"""The other ways to lose work: numbers that are not finite, a full disk, two jobs in one place, another config."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from faults import judging
from faults.bench import LIMIT, Bench, Workshop
from faults.damage import copied, fingerprint, killed, refusal_problems
from faults.jobs import ITERATIONS, PERIOD, Variant, make_pictures, words
from faults.judging import Reference
from faults.processes import Trainer, fork, kill_descendants
from faults.records import record
from faults.sabotage import NotFinite, Sabotage
from faults.strikes import resumed_at

NAN_AT = 14  # a checkpoint would be written behind this iteration
ROOM = 4 << 20  # bytes of the small disk


def not_finite(shop: Workshop, variant: Variant, name: str, chance: Random, most: int) -> list[dict[str, Any]]:
    """A loss, and the gradient of a finite loss, that is NaN right where a checkpoint is due, on each rank in turn."""
    found = []
    kinds = [(rank, gradient) for rank in reversed(range(variant.ranks)) for gradient in (True, False)]
    for number, (rank, gradient) in enumerate(kinds[:most]):
        bench, fault = Bench(shop, variant, f"{name}-{number}"), NotFinite(NAN_AT, rank, gradient)
        trainer = bench.fork(Sabotage(not_finite=fault))
        trainer.wait(LIMIT)
        problems = [] if trainer.code == 2 else [f"it ended with {trainer.code} instead of 2"]
        if not re.search(rf"not finite at iteration {NAN_AT}", trainer.stderr):
            problems.append(f"iteration {NAN_AT} is not named: {trainer.last_line()}")
        checkpoints = judging.checkpoints(bench.run)
        problems += shop.reference(variant).state_problems(checkpoints)
        newest = judging.newest(checkpoints)
        if newest is None or newest.iteration != NAN_AT - PERIOD:
            problems.append("the checkpoint before is missing")
        problems += _replay_problems(bench, fault)
        problems += _end_problems(bench)
        what = "gradient of a finite loss" if gradient else "loss"
        point = f"NaN {what} at iteration {NAN_AT} on rank {rank}"
        more: dict[str, Any] = {"bad_newest": bool(checkpoints) and newest is None, "equal": not problems}
        more |= {"resumed_at": NAN_AT - PERIOD + 1, "lost_iterations": PERIOD - 1}
        found.append(record("not finite", variant, point, trainer, problems, **more))
    return found


def _replay_problems(bench: Bench, fault: NotFinite) -> list[str]:
    """``--replay`` has to meet the same samples and the same NaN, and none where the fault is taken away."""
    file = bench.run / f"replay_{NAN_AT:07d}.pth"
    if not file.is_file():
        return [f"{file.name} is missing"]
    expected = bench.shop.reference(bench.variant).trace[NAN_AT]["ids"]
    problems = []
    before = fingerprint(bench.run)
    for sabotage in (Sabotage(not_finite=fault), Sabotage()):
        trainer = bench.fork(sabotage, "--replay", str(file.relative_to(bench.folder)))
        trainer.wait(LIMIT)
        for rank, ids in enumerate(expected):
            if f"samples: {', '.join(map(str, ids))}" not in trainer.stdout:
                problems.append(f"--replay does not name the samples of rank {rank}")
        clean = re.findall(r"gradients that are not: (.*)", trainer.stdout)
        if len(clean) != bench.variant.ranks or all(line == "none" for line in clean) != (not sabotage.not_finite):
            problems.append(f"--replay {'finds' if sabotage.not_finite else 'invents'}: {clean}")
    return problems if fingerprint(bench.run) == before else [*problems, "--replay changed files"]


def _end_problems(bench: Bench, *, extra: bool = False) -> list[str]:
    """Resume without any fault, to the end."""
    trainer = bench.fork()
    trainer.wait(LIMIT)
    problems = [] if trainer.code == 0 else [f"the resume ends with {trainer.code}: {trainer.last_line()}"]
    return problems + bench.shop.reference(bench.variant).end_problems(bench.run, bench.trace, extra=extra)


def full_disk(shop: Workshop, variant: Variant, name: str, chance: Random, most: int) -> list[dict[str, Any]]:
    """No room for a checkpoint: for a while, and to the end of the run."""
    found = [_no_room(shop, variant, f"{name}-{last}", chance, last) for last in (60, 10**9)]
    found.append(_small_disk(shop, variant, f"{name}-disk"))
    return found


def _no_room(shop: Workshop, variant: Variant, name: str, chance: Random, last: int) -> dict[str, Any]:
    """Writes to checkpoints fail with ENOSPC from one on, up to the one numbered ``last``."""
    bench, reference = Bench(shop, variant, name), shop.reference(variant)
    forever = last > 10**6
    first = chance.randint(20, 40)
    trainer = bench.fork(bench.taped(full=(first, last), patience=2.0))
    trainer.wait(LIMIT)
    problems = reference.state_problems(judging.checkpoints(bench.run))
    problems += [f"{file.name} is left" for file in bench.run.glob(".model_*.tmp")]
    if not re.search("No space left on device", trainer.stdout + trainer.stderr):
        problems.append("the full disk is not named")
    if forever and trainer.code != 2:
        problems.append(f"it ended with {trainer.code} instead of 2")
    if not forever:
        problems += [] if trainer.code == 0 else [f"training did not go on: {trainer.last_line()}"]
    problems += _end_problems(bench, extra=True)
    until = "to the end" if forever else "for a while"
    cause = _line_with("No space left", trainer)
    point = f"ENOSPC from write {first} of a checkpoint on, {until}"
    return record("full disk", variant, point, trainer, problems, cause=cause, equal=not problems, bad_newest=False)


def _line_with(part: str, trainer: Trainer) -> str:
    lines = [line for line in (trainer.stdout + trainer.stderr).splitlines() if part in line]
    return re.sub(r"\x1b\[\d+m", "", lines[0]).strip() if lines else trainer.last_line()


def _small_disk(shop: Workshop, variant: Variant, name: str) -> dict[str, Any]:
    """A real small disk, a tmpfs, that something else fills and empties while the job trains.

    Where it cannot be mounted the case says so; ENOSPC from the writes was tried before.
    """
    bench, reference = Bench(shop, variant, name), shop.reference(variant)
    bench.run.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(bench.run)], capture_output=True, check=False
    )
    if mounted.returncode:
        trainer = bench.fork()
        trainer.wait(LIMIT)
        point = "no tmpfs can be mounted here: not tried"
        return record("full disk", variant, point, trainer, [], cause=mounted.stderr.decode().strip())
    try:
        trainer = bench.fork(Sabotage(pause=0.03))
        trainer.wait(LIMIT, lambda: (bench.run / judging.POINTER).is_file())
        ballast = bench.run / "ballast"
        _fill(ballast)
        trainer.wait(LIMIT, lambda: bench.done() >= 18)
        problems = reference.state_problems(judging.checkpoints(bench.run))
        if trainer.poll():
            problems.append(f"training did not go on: it ended with {trainer.code}, {trainer.last_line()}")
        ballast.unlink(missing_ok=True)
        trainer.wait(LIMIT)
        if trainer.code != 0:
            problems.append(f"it ended with {trainer.code}: {trainer.last_line()}")
        if not re.search("No space left on device|is full|no room", trainer.stdout + trainer.stderr):
            problems.append("the full disk is not named")
        _, torn = judging.json_lines(bench.run / "metrics.json")
        end = [] if trainer.code == 0 else _end_problems(bench, extra=True)
        end = end or reference.end_problems(bench.run, bench.trace, extra=True)
        # The lines that found no room are lost; what stands there has to parse.
        problems += [line for line in end if "metrics.json has" not in line] + (["torn lines"] if torn else [])
        cause = _line_with("No space left", trainer)
        point = f"a tmpfs of {ROOM >> 20} MiB, full from iteration 5 to 18"
        return record("full disk", variant, point, trainer, problems, cause=cause, equal=not end, bad_newest=False)
    finally:
        kill_descendants()
        subprocess.run(["umount", "-l", str(bench.run)], check=False)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            return


def one_folder(shop: Workshop, variant: Variant, name: str, chance: Random, most: int) -> list[dict[str, Any]]:
    """A second job on the OUTPUT_DIR of one that runs, and of one that has finished."""
    bench, reference = Bench(shop, variant, name), shop.reference(variant)
    first = bench.fork(Sabotage(pause=0.05))
    first.wait(LIMIT, lambda: bench.done() >= 3)
    found = []
    for more in ((), ("--resume",)):
        second = _again(bench, *more)
        problems = refusal_problems(second, "running|holds the results")
        found.append(record("two jobs", variant, f"beside a running one {' '.join(more)}".strip(), second, problems))
    first.wait(LIMIT)
    end = reference.end_problems(bench.run, bench.trace)
    for one in found:
        one["equal"], one["problems"] = not end, one["problems"] + end
    before = fingerprint(bench.run)
    third = _again(bench)
    problems = refusal_problems(third, r"holds the results .*--resume")
    problems += [] if fingerprint(bench.run) == before else ["files were changed"]
    found.append(record("two jobs", variant, "over a finished one", third, problems, equal=not problems))
    fourth = bench.fork()
    fourth.wait(LIMIT)
    problems = [] if fourth.code == 0 else [f"it ended with {fourth.code}"]
    after = {file: data for file, data in fingerprint(bench.run).items() if file != "config.yaml"}
    problems += [] if after == {f: data for f, data in before.items() if f != "config.yaml"} else ["files were changed"]
    found.append(record("two jobs", variant, "a finished one resumed", fourth, problems, equal=not problems))
    return found


def _again(bench: Bench, *more: str) -> Trainer:
    """The command of the first trainer, as if typed once more."""
    typed = words(bench.variant, bench.shop.data, *more)
    trainer = fork(typed, bench.folder, bench.count, builtin=bench.variant.builtin, ranks=bench.variant.ranks)
    bench.count += 1
    trainer.wait(LIMIT)
    return trainer


def changed_config(shop: Workshop, variant: Variant, name: str, chance: Random, most: int) -> list[dict[str, Any]]:
    """What a resume is told otherwise: refused by the key's name, or shown, never passed over."""
    template = killed(shop, variant, name)
    more_classes = shop.folder / "more_classes"
    if not more_classes.is_dir():
        make_pictures(more_classes)
        for split in ("train", "val"):
            shutil.copytree(more_classes / split / "cat", more_classes / split / "dog")
    refused = {
        "SOLVER.IMS_PER_BATCH": ("SOLVER.IMS_PER_BATCH", "12"),
        "SOLVER.MAX_ITER": ("SOLVER.MAX_ITER", "7"),
        "SOLVER.OPTIMIZER": ("SOLVER.OPTIMIZER", "Adam"),
        "SEED": ("SEED", "4"),
        "NUM_CLASSES": ("--data", str(more_classes)),
    }
    found = []
    for number, (key, change) in enumerate([*refused.items()][:most]):
        bench = copied(template, f"{name}-{number}")
        before = fingerprint(bench.run)
        trainer = bench.fork(None, *change)
        trainer.wait(LIMIT)
        problems = refusal_problems(trainer, key)
        problems += [] if fingerprint(bench.run) == before else ["files were changed"]
        point = f"{change[0]} changed on resume"
        found.append(record("changed config", variant, point, trainer, problems, equal=None))
    return [*found, _shown(copied(template, f"{name}-shown"), shop.reference(variant))]


def _shown(bench: Bench, reference: Reference) -> dict[str, Any]:
    """Another rate on resume: the log shows it, and it counts from there on."""
    trainer = bench.fork(None, "SOLVER.BASE_LR", "0.0123")
    trainer.wait(LIMIT)
    shown = "SOLVER.BASE_LR" in trainer.stdout and "0.0123" in trainer.stdout
    problems = [] if trainer.code == 0 else [f"it ended with {trainer.code}"]
    problems += [] if shown else ["SOLVER.BASE_LR is not shown"]
    ours, theirs = (
        [line["lr"] for line in lines if line["iteration"] >= 20]
        for lines in (judging.figures(bench.run / "metrics.json"), reference.metrics)
    )
    if not ours or any(rate == other for rate, other in zip(ours, theirs, strict=True)):
        problems.append("the rate has not changed")
    cause = _line_with("SOLVER.BASE_LR", trainer)
    point = "SOLVER.BASE_LR changed on resume"
    return record("changed config", bench.variant, point, trainer, problems, cause=cause)


def other_ranks(shop: Workshop, variant: Variant, name: str, chance: Random, most: int) -> list[dict[str, Any]]:
    """Killed on two ranks, resumed on one, and the other way round: the same set of samples in every step."""
    found = []
    for ranks, then in ((2, 1), (1, 2)):
        used = replace(variant, ranks=ranks)
        bench = killed(shop, used, f"{name}-{ranks}")
        trainer = bench.fork(variant=replace(variant, ranks=then))
        trainer.wait(LIMIT)
        problems = [] if trainer.code == 0 else [f"it ended with {trainer.code}: {trainer.last_line()}"]
        ours = [_samples(line) for line in judging.figures(bench.trace)]
        expected = [_samples(line) for line in shop.reference(used).trace]
        problems += [] if ours == expected and len(ours) == ITERATIONS else ["the samples of a step differ"]
        point = f"killed on {ranks}, resumed on {then}"
        more = {"equal": not problems, "resumed_at": resumed_at(trainer)}
        found.append(record("other ranks", used, point, trainer, problems, **more))
    return found


def _samples(line: dict[str, Any]) -> tuple[int, list[int]]:
    """The iteration of a line of the trace, and the samples of all ranks together."""
    return line["iteration"], sorted(number for rank in line["ids"] for number in rank)
