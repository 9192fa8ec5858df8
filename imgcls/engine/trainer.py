"""ClsTrainer: detectron2's DefaultTrainer over the same run and the same step as the plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn

from imgcls.checkpoint import Resume, SafeCheckpointer, write_checkpoint
from imgcls.engine.run import Run
from imgcls.engine.setup import Data, finalize


class ClsTrainer(DefaultTrainer):
    """Use it as detectron2's: ``trainer = ClsTrainer(cfg); trainer.resume_or_load(); trainer.train()``.

    ``register_hooks`` and overriding ``build_hooks`` or ``build_writers`` work as there. ``__init__`` is our own
    because detectron2's wraps for DDP in a way that fails on CPUs, and brings a training step of its own.
    """

    def __init__(self, cfg: CfgNode, data: Data | None = None) -> None:
        TrainerBase.__init__(self)
        if data is None:
            cfg, data = finalize(cfg)
        self.cfg = cfg
        self.run = self.build_run(cfg, data)
        self.start_iter, self.max_iter = 0, self.run.max_iter
        self._trainer = _Stepper(self.run)
        self.checkpointer = _RunCheckpointer(self.run)
        self.register_hooks(self.build_hooks())

    @property
    def model(self) -> nn.Module:
        """The network, inside DDP where there are several ranks."""
        return self.run.step.model

    @property
    def scheduler(self) -> Any:
        return self.run.step.schedule

    def resume_or_load(self, resume: Resume = True) -> None:
        """As detectron2's; takes the newest whole checkpoint, whatever ``last_checkpoint`` says, or the one named."""
        self.run.start(resume=resume)
        self.start_iter = self.iter = self.run.start_iter

    def build_run(self, cfg: CfgNode, data: Data) -> Run:
        """Override it for a Run of your own."""
        return Run(cfg, data)

    def build_hooks(self) -> list[HookBase]:
        """What detectron2's hooks do, in one; override it to add others."""
        return [_FinishIteration(self.build_writers)]

    def build_writers(self) -> list[EventWriter]:
        """Called when training starts, on every rank; the writers are rank 0's."""
        return self.run.writers()

    def train(self) -> dict[str, Any]:
        """Train and return the last results; TEST.EXPECTED_RESULTS is judged by the command that calls this."""
        with suppress(_EndedEarly):
            TrainerBase.train(self, self.start_iter, self.run.max_iter)
        self._trainer.end()
        self._last_eval_results = self.run.results or self.run.evaluate()
        return self._last_eval_results

    def state_dict(self) -> dict[str, Any]:
        """What detectron2's holds, from the step: iteration, optimizer, schedule, scaler."""
        return {"iteration": self.iter, **self.run.step.state_dict()}


class _Stepper:
    """What DefaultTrainer expects under ``_trainer``: the network, the optimizer, and one step a call."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._batches: Iterator[Any] | None = None
        self.iter = 0

    @property
    def model(self) -> nn.Module:
        return self._run.step.model

    @property
    def optimizer(self) -> Any:
        return self._run.step.optimizer

    def run_step(self) -> None:
        if self._batches is None:
            self._batches = self._run.batches()
        self._run.train_on(next(self._batches), self.iter)

    def end(self) -> None:
        """Let the loader see that nothing follows: it ends its workers and counts what could not be read."""
        next(self._batches or iter(()), None)
        self._batches = None


class _RunCheckpointer(SafeCheckpointer):
    """For hooks that people add: what ``trainer.checkpointer.save`` writes can be resumed like the run's own files."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.model, run.cfg.OUTPUT_DIR)
        self._run = run

    def save(self, name: str, **kwargs: Any) -> None:
        self._run.step.settle()
        iteration = int(kwargs.pop("iteration", get_event_storage().iter))
        content = {**kwargs, **self._run.checkpoint(iteration)}
        if self.save_to_disk:
            write_checkpoint(Path(self.save_dir) / f"{name}.pth", content, iteration=iteration, newest=True)


class _EndedEarly(BaseException):
    """Leaves detectron2's loop between two iterations; no ``Exception``, which that loop would report as a failure."""


class _FinishIteration(HookBase):
    """Evaluation, the line of progress and checkpoints, and the end of a run that stops early.

    detectron2's EvalHook, PeriodicWriter, PeriodicCheckpointer and BestCheckpointer save before they evaluate and
    before the line is written, write the final file before the final evaluation, and forget the best value on resume.

    build: makes the writers when training starts; only then is it known where metrics.json goes on.
    """

    def __init__(self, build: Callable[[], list[EventWriter]]) -> None:
        self._build = build
        self._writers: list[EventWriter] = []

    def before_train(self) -> None:
        self._writers = self._build()
        self.trainer.run.catch_up(self._writers)

    def before_step(self) -> None:
        if self.trainer.iter >= self.trainer.run.max_iter:
            raise _EndedEarly

    def after_step(self) -> None:
        self.trainer.run.finish_iteration(self.trainer.iter, self._writers)
        self.trainer.max_iter = self.trainer.run.max_iter  # which other hooks look at

    def after_train(self) -> None:
        for writer in self._writers:
            writer.close()
