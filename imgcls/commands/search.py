"""The search of a sweep: which trials run, what each reports, and what becomes of it.

Optuna proposes values and judges what is reported; everything is in its database as soon as it is known. A trial that
the database knows as running when a search begins was interrupted with the one before: its training is resumed.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from imgcls.commands.search_space import Dimension, overrides
from imgcls.commands.trial import LEAVE_WITHIN, Training
from imgcls.engine.output.output_dir import claim, release

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

LOOK_EVERY = 0.5  # seconds between two looks at the trainings
WEIGHTS = ("*.pth", "*.pth.json", "last_checkpoint")


@dataclass
class Running:
    """A trial whose training runs. slot: its number among the trainings at the same time."""

    trial: Trial
    training: Training
    slot: int
    began: float


class Search:
    """Runs trials of ``study`` over ``space`` with the config ``base``, ``jobs`` at a time, each in ``folder/trials``.

    keep_weights: False: only the best trial's checkpoints stay. after_each: called when a trial is over.
    """

    def __init__(
        self,
        study: Study,
        space: list[Dimension],
        folder: Path,
        base: Path,
        *,
        jobs: int,
        keep_weights: bool,
        after_each: Callable[[], None],
    ) -> None:
        self.study, self.space, self.folder, self.base = study, space, folder, base
        self.jobs, self.keep_weights, self.after_each = jobs, keep_weights, after_each
        self.leave_with = 0  # exit code; a signal handler sets it, the search then ends in order where it can
        self._running: list[Running] = []
        self._gpus = _gpus()

    def run(self, trials: int) -> None:
        """Go on until ``trials`` trials are over, those of earlier calls included."""
        interrupted = deque(trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name == "RUNNING")
        try:
            while True:
                while len(self._running) < self.jobs and (interrupted or self._begun() < trials):
                    self._begin(interrupted.popleft() if interrupted else None)
                if not self._running:
                    return
                time.sleep(LOOK_EVERY)
                if self.leave_with:
                    raise SystemExit(self.leave_with)
                for running in list(self._running):
                    self._look_at(running)
        finally:
            # After an interruption: the database still says that these run, so the next search takes them up again.
            for running in self._running:
                running.training.stop()
            for running in self._running:
                running.training.stopped()

    def folder_of(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04d}"

    def _begun(self) -> int:
        return sum(trial.state.name != "WAITING" for trial in self.study.get_trials(deepcopy=False))

    def _begin(self, interrupted: FrozenTrial | None) -> None:
        from optuna.trial import Trial

        trial = Trial(self.study, interrupted._trial_id) if interrupted else self.study.ask()
        values = {dimension.key: dimension.suggest(trial) for dimension in self.space}
        folder = self.folder_of(trial.number)
        if interrupted:
            _wait_until_free(folder)
        slot = min(set(range(self.jobs)) - {running.slot for running in self._running})
        words = ["--config-file", str(self.base), *(["--resume"] if interrupted else []), "--output", str(folder)]
        training = Training(folder, [*words, *overrides(values)], self._share_of(slot))
        self._running.append(Running(trial, training, slot, time.monotonic()))
        print(f"trial {trial.number} {'goes on' if interrupted else 'begins'}: {in_words(values)}", flush=True)

    def _share_of(self, slot: int) -> dict[str, str]:
        """Environment in which trainings side by side do not take each other's cores and GPUs."""
        share = {}
        if self.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            share["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        if len(self._gpus) > 1:
            share["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        return share

    def _look_at(self, running: Running) -> None:
        """Report what is new; end the trial if it is over, or not worth going on with."""
        going_on = running.training.running()  # asked first: what it wrote before it ended is read below
        figures = running.training.evaluations()
        known = self.study.get_trials(deepcopy=False)[running.trial.number].intermediate_values
        for step, figure in enumerate(figures, start=1):
            if step not in known:
                running.trial.report(figure, step)
                if going_on and running.trial.should_prune():
                    running.training.stop()
                    running.training.stopped()
                    self._end(running, "PRUNED", f"pruned at evaluation {step}: {figure:.4f}")
                    return
        if not going_on:
            self._judge(running, [figure for figure in figures if not math.isnan(figure)])

    def _judge(self, running: Running, figures: list[float]) -> None:
        reason = running.training.failure() or ("" if figures else "no evaluation gave a number")
        if reason:
            running.trial.set_user_attr("reason", reason)
            self._end(running, "FAIL", f"failed: {reason}")
            return
        value = max(figures) if self.study.direction.name == "MAXIMIZE" else min(figures)
        self._end(running, "COMPLETE", f"reached {value:.4f}", value)

    def _end(self, running: Running, state: str, told: str, value: float | None = None) -> None:
        from optuna.trial import TrialState

        running.trial.set_user_attr("seconds", time.monotonic() - running.began)
        self.study.tell(running.trial, value, TrialState[state])
        self._running.remove(running)
        best = best_of(self.study)
        print(f"trial {running.trial.number} {told}{', the best' if best == running.trial.number else ''}", flush=True)
        self.after_each()
        if not self.keep_weights:
            self._sweep_out(best)

    def _sweep_out(self, best: int | None) -> None:
        over = [trial.number for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        for number in over:
            for pattern in WEIGHTS if number != best else ():
                for file in self.folder_of(number).glob(pattern):
                    file.unlink()


def best_of(study: Study) -> int | None:
    """Number of the best trial that came to its end; None before there is one."""
    done = ranked(study)
    return done[0].number if done else None


def ranked(study: Study) -> list[FrozenTrial]:
    """The trials that came to their end, the best first."""
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    sign = -1 if study.direction.name == "MAXIMIZE" else 1
    return sorted(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number))


def in_words(values: dict[str, Any]) -> str:
    """``SOLVER.BASE_LR 0.0512, SOLVER.OPTIMIZER SGD``."""
    return ", ".join(f"{key} {shown(value)}" for key, value in values.items())


def shown(value: Any) -> str:
    """A number short enough for a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _wait_until_free(folder: Path) -> None:
    """Let the training of an interrupted search leave: it is told to when the search is killed, and saves first."""
    until = time.monotonic() + LEAVE_WITHIN
    while True:
        try:
            claim(folder, resume=True)
        except ValueError:
            if time.monotonic() > until:
                raise
            time.sleep(LOOK_EVERY)
        else:
            release(folder)
            return


def _gpus() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
