"""One training run: everything that the two loops share, so that they cannot drift apart."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from torch import Tensor, nn

import imgcls
from imgcls.checkpoint import Resume
from imgcls.data import Loader, build_test_loader, build_train_loader, mix
from imgcls.engine import starting
from imgcls.engine.distributed import first_rank_does, wrap_for_ranks
from imgcls.engine.output_dir import mend_metrics
from imgcls.engine.replay import keep
from imgcls.engine.saving import Saving
from imgcls.engine.setup import Data
from imgcls.engine.step import NonFinite, TrainStep
from imgcls.engine.trace import Trace, open_trace
from imgcls.engine.writers import Stopwatch, build_writers
from imgcls.evaluation import (
    ClassificationEvaluator,
    LogitsEvaluator,
    MultiLabelEvaluator,
    ThresholdTuner,
    evaluate,
    per_class_text,
    write_tables,
)
from imgcls.layers import average_running_statistics
from imgcls.solver import build_optimizer, build_schedule
from imgcls.solver.schedules import PlateauMultiplier, apply_current
from imgcls.structures import LoadReport

logger = logging.getLogger(__name__)

# Of TEST.METRIC: the smaller the better.
COSTS = ("loss",)


class Run:
    """Network, step, data, checkpoints and results of one training run, from a finalized config.

    A loop takes ``batches()`` and calls ``train_on`` and ``finish_iteration`` for each, inside an EventStorage.
    """

    def __init__(self, cfg: CfgNode, data: Data) -> None:
        self.cfg, self.data = cfg, data
        torch.manual_seed(mix(cfg.SEED, -1))
        self.model = build_model(cfg)
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.best: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self._folder = Path(cfg.OUTPUT_DIR)
        self._saving = Saving(self._folder, keep=cfg.SOLVER.CHECKPOINT_KEEP)
        self._test_loader: Loader | None = None
        self._evaluator: LogitsEvaluator | None = None
        self._step: TrainStep | None = None
        self._trace: Trace | None = None

    # -- where the weights come from ---------------------------------------------------------------------------------

    def start(self, *, resume: Resume) -> None:
        """Go on from the checkpoint named or the newest whole one, or begin with ``MODEL.WEIGHTS``. Collective."""
        starting.start(self, resume)

    def load_initial(self, path: str) -> LoadReport:
        """Weights to begin with (a classifier's checkpoint or a converted backbone); a misfit is a ``ValueError``."""
        return starting.load_initial(self, path)

    def resume_from(self, path: Path) -> None:
        """Take over a run's checkpoint, and with it its place in the run; a misfit is a ``ValueError``."""
        starting.resume_from(self, path)

    # -- what a loop uses --------------------------------------------------------------------------------------------

    @property
    def step(self) -> TrainStep:
        """The training step; built when first asked for, since evaluation alone needs no optimizer."""
        if self._step is None:
            self.model.train()
            optimizer = build_optimizer(self.cfg, self.model)
            schedule = build_schedule(self.cfg, optimizer)
            self._step = TrainStep.from_cfg(self.cfg, wrap_for_ranks(self.model), optimizer, schedule)
        return self._step

    @property
    def network(self) -> nn.Module:
        """What is evaluated and handed over: the average of the weights where one is kept, otherwise the network."""
        return self._step.ema.network if self._step is not None and self._step.ema is not None else self.model

    def batches(self) -> Iterator[Any]:
        """This rank's batches of iterations ``start_iter`` .. ``max_iter`` - 1; takes the time that waiting costs."""
        if self.data.train is None:
            raise ValueError("this run has no training data; it was set up to evaluate only")
        self._trace = open_trace(self.cfg.DATALOADER.TRACE, self.start_iter)
        self._clock, waiting = Stopwatch(), Stopwatch()
        for batch in build_train_loader(self.cfg, self.data.train, start=self.start_iter):
            self._data_time = waiting.lap()
            yield batch
            waiting.lap()

    def train_on(self, batch: Any, iteration: int) -> None:
        """One step, and its record. Collective."""
        with self._fault_kept():
            losses = self.step(batch, iteration)
        if self._trace is not None:
            self._trace.write(iteration, batch)
        self.record(iteration, losses)

    @contextmanager
    def _fault_kept(self) -> Iterator[None]:
        """Numbers that are not finite leave the state before their step in a file. Collective."""
        try:
            yield
        except NonFinite as fault:
            first_rank_does(partial(keep, self._folder, self.checkpoint(fault.iteration - 1), fault))
            raise

    def record(self, iteration: int, losses: dict[str, Tensor]) -> None:
        """Put losses (mean over the ranks), learning rate and times into the event storage. Collective when due."""
        seconds = self._clock.lap()
        storage = get_event_storage()
        storage.put_scalar("time", seconds)
        storage.put_scalar("data_time", self._data_time)
        if not self.write_due(iteration):
            return
        means = {name: float(value) for name, value in comm.reduce_dict(losses).items()}
        storage.put_scalars(**means, total_loss=sum(means.values()), smoothing_hint=False)
        storage.put_scalar("lr", self.step.last_lr, smoothing_hint=False)
        epoch = (iteration + 1) * self.cfg.SOLVER.IMS_PER_BATCH / len(self.data.train)  # type: ignore[arg-type]
        storage.put_scalar("epoch", epoch, smoothing_hint=False)
        storage.put_scalar("images_per_second", self.cfg.SOLVER.IMS_PER_BATCH / max(seconds, 1e-9))

    def due(self, period: int, iteration: int) -> bool:
        """Whether something done every ``period`` iterations (0: never) and after the last one is due now."""
        return iteration + 1 == self.max_iter or (period > 0 and (iteration + 1) % period == 0)

    def evaluation_due(self, iteration: int) -> bool:
        return self.data.test is not None and self.due(self.cfg.TEST.EVAL_PERIOD, iteration)

    def write_due(self, iteration: int) -> bool:
        """Whether a line is written; at each evaluation too, for detectron2's writers keep the latest values only."""
        return self.due(self.cfg.SOLVER.LOG_PERIOD, iteration) or self.evaluation_due(iteration)

    def finish_iteration(self, iteration: int) -> None:
        """Evaluate and save if due, in this order: a checkpoint holds the results of its own iteration. Collective."""
        evaluating = self.evaluation_due(iteration)
        saving = self.due(self.cfg.SOLVER.CHECKPOINT_PERIOD, iteration)
        if not (evaluating or saving):
            return
        with self._fault_kept():
            self.step.settle()
        average_running_statistics(self.model)
        if self.network is not self.model:
            average_running_statistics(self.network)
        improved = self._evaluate_at(iteration) if evaluating else False
        first_rank_does(lambda: self._save(iteration, saving, improved))
        self._clock.lap()

    def writers(self) -> list[EventWriter]:
        """The writers of rank 0, none elsewhere; continues ``metrics.json`` where the checkpoint left it."""
        if not comm.is_main_process():
            return []
        self._folder.mkdir(parents=True, exist_ok=True)
        mend_metrics(self._folder, self.start_iter)
        return build_writers(self.cfg, len(self.data.train))  # type: ignore[arg-type]

    # -- evaluating and saving ---------------------------------------------------------------------------------------

    def evaluate(self, evaluator: LogitsEvaluator | None = None) -> dict[str, Any]:
        """The figures of DATASETS.TEST, on every rank; those of ``evaluator`` instead of the usual ones. Collective."""
        if self.data.test is None:
            return {}
        if self._test_loader is None:
            self._test_loader = build_test_loader(self.cfg, self.data.test)
        self._evaluator = evaluator or self._new_evaluator()
        self.results = evaluate(self.network, self._test_loader, self._evaluator)
        figures = self.results["classification"]
        logger.info("%s: %s", self.data.test.name, ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        return self.results

    def _new_evaluator(self) -> LogitsEvaluator:
        expected, classes = len(self.data.test), len(self.data.classes)  # type: ignore[arg-type]
        if self.model.multi_label:
            return MultiLabelEvaluator(expected, classes, self.model.thresholds)
        return ClassificationEvaluator(expected, classes)

    def tune_thresholds(self) -> dict[str, Any]:
        """Give the network the thresholds that do best on DATASETS.TEST; the figures with them there. Collective."""
        tuner = ThresholdTuner(len(self.data.test), len(self.data.classes))  # type: ignore[arg-type]
        results = self.evaluate(tuner)
        self.model.thresholds = tuple(tuner.thresholds.tolist())
        return results

    def class_table(self) -> str:
        """The figures of the single classes in the latest evaluation, to read; empty before one."""
        return per_class_text(self.data.classes, self._evaluator.per_class) if self._evaluator else ""

    def write_class_tables(self, folder: Path) -> None:
        """The same as CSV files, with the confusion matrix."""
        if self._evaluator is not None:
            confusion = getattr(self._evaluator, "confusion", None)
            write_tables(folder, self.data.classes, self._evaluator.per_class, confusion)

    def _evaluate_at(self, iteration: int) -> bool:
        figures = self.evaluate()["classification"]
        storage: EventStorage = get_event_storage()
        storage.put_scalars(**{f"classification/{k}": v for k, v in figures.items()}, smoothing_hint=False)
        metric = self.cfg.TEST.METRIC
        improved = self._improved(metric, figures[metric])
        if isinstance(self.step.schedule, PlateauMultiplier):
            self.step.schedule.evaluated(-figures[metric] if metric in COSTS else figures[metric])
            apply_current(self.step.schedule)
        if iteration + 1 == self.max_iter:
            logger.info("classes:\n%s", self.class_table())
        if improved:
            self.best = {"metric": metric, "value": figures[metric], "iteration": iteration}
        return improved

    def _improved(self, metric: str, value: float) -> bool:
        # What is no number never is the best; a run that is resumed with another metric starts its best anew.
        if math.isnan(value) or self.best.get("metric") != metric:
            return not math.isnan(value)
        return value < self.best["value"] if metric in COSTS else value > self.best["value"]

    def _save(self, iteration: int, saving: bool, improved: bool) -> None:
        if self.evaluation_due(iteration):
            self.write_class_tables(self._folder)
        if saving or improved:
            last = iteration + 1 == self.max_iter
            self._saving.save(self.checkpoint(iteration), saving=saving, last=last, best=improved)

    def _metrics_at(self, iteration: int) -> dict[str, float]:
        """The figures of exactly these weights; nothing when they were not evaluated."""
        return dict(self.results["classification"]) if self.results and self.evaluation_due(iteration) else {}

    def checkpoint(self, iteration: int) -> dict[str, Any]:
        """Everything a later process needs: plain Python values and tensors, loadable with ``weights_only``."""
        return {
            "model": self.network.state_dict(),
            **({} if self.network is self.model else {"live": self.model.state_dict()}),
            **self.step.state_dict(),
            "iteration": iteration,
            "best": self.best,
            "metrics": self._metrics_at(iteration),
            "seed": self.cfg.SEED,
            "classes": list(self.data.classes),
            "contract": self.model.contract.to_dict(),
            "architecture": starting.architecture_of(self.model.backbone),
            "imgcls_version": imgcls.__version__,
        }
