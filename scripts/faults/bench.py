"""Where cases are made: the pictures, the uninterrupted runs to compare with, and a folder a case."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import jobs, judging
from faults.jobs import RUN, Variant, words
from faults.judging import Reference
from faults.processes import Trainer, fork, start
from faults.sabotage import Sabotage
from faults.tape import of_checkpoint, read_journal

LIMIT = 120.0  # seconds, after which a trainer counts as hung


@dataclass
class Workshop:
    """Where the cases are made: the pictures, the references, and the fault of the product's that is put in."""

    folder: Path
    data: Path
    broken: str = ""
    _references: dict[Variant, Reference] = field(default_factory=dict)

    def reference(self, variant: Variant) -> Reference:
        """The uninterrupted run of ``variant``; made when it is first asked for."""
        if variant not in self._references:
            self._references[variant] = make_reference(self, variant)
        return self._references[variant]

    def bench(self, name: str) -> Path:
        """A new folder for one case."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


class Bench:
    """One case's folder and the trainers that are started in it, one after the other."""

    def __init__(self, shop: Workshop, variant: Variant, name: str) -> None:
        self.shop, self.variant = shop, variant
        self.folder = shop.bench(name)
        self.run, self.trace = self.folder / RUN, self.folder / jobs.TRACE
        self.count = 0

    def words(self, *more: str) -> list[str]:
        """The command line; ``--resume`` with every one but the first."""
        return words(self.variant, self.shop.data, *(["--resume"] if self.count else []), *more)

    def fork(self, sabotage: Sabotage | None = None, *more: str, variant: Variant | None = None) -> Trainer:
        """The next trainer, forked. variant: another number of ranks."""
        sabotage = sabotage or Sabotage(broken=self.shop.broken)
        used = variant or self.variant
        trainer = fork(
            self.words(*more), self.folder, self.count, builtin=used.builtin, ranks=used.ranks, prepare=sabotage
        )
        self.count += 1
        return trainer

    def start(self, *more: str) -> Trainer:
        """The next trainer, a fresh process, which starts its ranks itself."""
        ranks = ["--num-gpus", str(self.variant.ranks)] if self.variant.ranks > 1 else []
        trainer = start(self.words(*more, *ranks), self.folder, self.count, builtin=self.variant.builtin)
        self.count += 1
        return trainer

    def taped(self, **more: Any) -> Sabotage:
        """Sabotage with a tape over the run, whose journal is that of the next trainer alone."""
        return Sabotage(
            run=self.run, journal=self.journal(self.count), gone=self.folder / "gone", broken=self.shop.broken, **more
        )

    def journal(self, number: int) -> Path:
        """Of the trainer with that number, where it has a tape."""
        return self.folder / f"journal{number}.jsonl"

    def done(self) -> int:
        """Iterations that were trained so far, by the trace."""
        lines, _ = judging.json_lines(self.trace)
        return max((line["iteration"] + 1 for line in lines), default=0)


def make_reference(shop: Workshop, variant: Variant) -> Reference:
    """Train without a fault, keeping every checkpoint that there ever was."""
    bench = Bench(shop, variant, f"reference/{variant.name}")
    trainer = bench.fork(bench.taped())
    trainer.wait(LIMIT)
    if trainer.code != 0:
        trainer.kill()
        raise RuntimeError(f"{variant.name} fails without any fault (code {trainer.code}):\n{trainer.stderr[-3000:]}")
    found = judging.checkpoints(bench.run)
    every = [*found.values(), *(judging.read_checkpoint(file) for file in (bench.folder / "gone").glob("*model_*.pth"))]
    journal = read_journal(bench.journal(0))
    return Reference(
        checkpoints=found,
        states={checkpoint.iteration: checkpoint.digests for checkpoint in every if not checkpoint.problem},
        metrics=judging.figures(bench.run / "metrics.json"),
        trace=judging.figures(bench.trace),
        places=[
            (line["iteration"], line["operation"], line["name"])
            for line in journal
            if "name" in line and of_checkpoint(line["name"])
        ],
        seconds=trainer.seconds,
    )
