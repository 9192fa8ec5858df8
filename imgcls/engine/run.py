"""One training run: everything that the two loops share, so that they cannot drift apart."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from torch import Tensor, nn

import imgcls
from imgcls.checkpoint import Resume
from imgcls.data import build_train_loader, mix
from imgcls.engine import starting
from imgcls.engine.early_stop import COSTS, EarlyStop
from imgcls.engine.evaluating import Evaluating, is_better
from imgcls.engine.freezing import Freezing
from imgcls.engine.machine.compiling import compile_copy, compile_network
from imgcls.engine.output.output_dir import mend_metrics
from imgcls.engine.output.trace import Trace, open_trace
from imgcls.engine.output.writers import Stopwatch, build_writers, scalars_at
from imgcls.engine.precise_bn import recompute_statistics, statistics_due
from imgcls.engine.ranks import launching, stopping
from imgcls.engine.ranks.distributed import first_rank_does, wrap_for_ranks
from imgcls.engine.ranks.rank_statistics import statistics_of_ranks, take_own_statistics
from imgcls.engine.ranks.sharding import Sharded
from imgcls.engine.ranks.sync_norms import synchronise_norms
from imgcls.engine.replay import keep
from imgcls.engine.saving import Saving
from imgcls.engine.setup import Data
from imgcls.engine.step import NonFinite, TrainStep
from imgcls.engine.teacher import build_distillation
from imgcls.evaluation import LogitsEvaluator, ThresholdTuner
from imgcls.layers import average_running_statistics
from imgcls.solver import build_optimizer, build_schedule
from imgcls.solver.schedules import PlateauMultiplier, apply_current
from imgcls.structures import LoadReport

logger = logging.getLogger(__name__)


class Run:
    """Network, step, data, checkpoints and results of one training run, from a finalized config.

    A loop takes ``batches()`` and calls ``train_on`` and ``finish_iteration`` for each, inside an EventStorage.
    """

    def __init__(self, cfg: CfgNode, data: Data) -> None:
        self.cfg, self.data = cfg, data
        torch.manual_seed(mix(cfg.SEED, -1))
        self.model = build_model(cfg)
        synchronise_norms(cfg, self.model)
        compile_network(cfg, self.model)
        if data.train is not None:
            self.model.distillation = build_distillation(cfg, data.classes)
            self.freezing = Freezing.from_cfg(cfg, self.model, data.images)
        # An early stop lowers max_iter to where the run ended.
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.early_stop = EarlyStop.from_cfg(cfg)
        self.best: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self._folder = Path(cfg.OUTPUT_DIR)
        self.evaluating, self.saving = Evaluating(cfg, data), Saving.from_cfg(cfg)
        self._config = cfg.dump()
        self._step: TrainStep | None = None
        self._sharded: Sharded | None = None
        self._trace: Trace | None = None
        # What the line of the latest iteration has already, while a signal keeps its evaluation from being made.
        self.owed: dict[str, Any] = {}
        self._statistics_of_ranks: list[list[Tensor]] = []  # of the latest iteration, where they go on unaveraged
        self._stopped_by, self._finished = 0, -1  # the signal obeyed, the iteration that was finished last

    # -- where the weights come from ---------------------------------------------------------------------------------

    def start(self, *, resume: Resume) -> None:
        """Go on from the checkpoint named or the newest whole one, or begin with ``MODEL.WEIGHTS``. Collective."""
        starting.start(self, resume)
        if self._sharded is not None:  # somebody has looked at the step before
            self._sharded.scatter()

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
            self._sharded = Sharded.from_cfg(self.cfg, self.model)
            trained = self._sharded.network if self._sharded is not None else self.model
            optimizer = build_optimizer(self.cfg, trained)
            schedule = build_schedule(self.cfg, optimizer)
            wrapped = trained if self._sharded is not None else wrap_for_ranks(trained)
            self._step = TrainStep.from_cfg(self.cfg, wrapped, optimizer, schedule)
            if self._step.average is not None:
                compile_copy(self.cfg.MODEL.COMPILE, self._step.average.network)
            # Only now, so that the optimizer and the step hold what is trained later too.
            self.freezing.follow(self._step, self.start_iter)
        return self._step

    @property
    def network(self) -> nn.Module:
        """What is evaluated and handed over: the average of the weights once there is one, otherwise the network."""
        average = self._step.average if self._step is not None else None
        return average.network if average is not None and average.begun else self.model

    @property
    def networks(self) -> list[nn.Module]:
        """The network that is trained, and the average of its weights once there is one."""
        return [self.model] if self.network is self.model else [self.model, self.network]

    def batches(self) -> Iterator[Any]:
        """This rank's batches of iterations ``start_iter`` .. ``max_iter`` - 1; takes the time that waiting costs.

        After a signal (:mod:`~imgcls.engine.ranks.stopping`) and the checkpoint that it asked for they end with
        ``Stopped``.
        """
        if self.data.train is None:
            raise ValueError("this run has no training data; it was set up to evaluate only")
        self._trace = open_trace(self.cfg.DATALOADER.TRACE, self.start_iter)
        if self.start_iter >= self.max_iter:
            return
        self._clock, waiting = Stopwatch(), Stopwatch()
        self._finished = self.start_iter - 1
        loader = self.train_loader()
        with stopping.deferred():
            try:
                for batch in stopping.patient(loader):
                    self._data_time = waiting.lap()
                    yield batch
                    if self._stopped_by:
                        self._leave()
                    if self.early_stop.over:
                        return
                    waiting.lap()
            except (ValueError, OSError):
                # Data that do not come keep no run from saving; a rank among others cannot save alone.
                if not stopping.asked() or comm.get_world_size() > 1:
                    raise
                self._save_and_leave(stopping.asked())

    def _save_and_leave(self, asked: int) -> None:
        """Obey the signal ``asked`` between two iterations."""
        if self._finished >= self.start_iter:
            with self._fault_kept():
                self.step.settle()
            self._save(self._finished, True, False, must=True)
        self._stopped_by = asked
        self._leave()

    def _leave(self) -> NoReturn:
        name = stopping.name_of(self._stopped_by)
        logger.info("stopped by %s after iteration %d; --resume goes on", name, self._finished)
        raise stopping.Stopped(self._stopped_by)

    def train_loader(self) -> Iterable[Any]:
        """Where this rank's batches come from; a Run of your own may take them from elsewhere."""
        assert self.data.train is not None  # batches() has looked
        return build_train_loader(self.cfg, self.data.train, start=self.start_iter)

    def train_on(self, batch: Any, iteration: int) -> None:
        """One step, and its record. Collective."""
        launching.notes.reached(iteration)
        self.step.signal = stopping.asked()
        with self._fault_kept():
            self.freezing.follow(self.step, iteration)
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
        epoch = (iteration + 1) * self.cfg.SOLVER.IMS_PER_BATCH / self.data.images
        storage.put_scalar("epoch", epoch, smoothing_hint=False)
        storage.put_scalar("images_per_second", self.cfg.SOLVER.IMS_PER_BATCH / max(seconds, 1e-9))

    def due(self, period: int, iteration: int) -> bool:
        """Whether something done every ``period`` iterations (0: never) and after the last one is due now."""
        return iteration + 1 == self.max_iter or (period > 0 and (iteration + 1) % period == 0)

    def evaluation_due(self, iteration: int) -> bool:
        """Whether DATASETS.TEST, if there is one, is evaluated after ``iteration``."""
        return self.data.test is not None and self.due(self.cfg.TEST.EVAL_PERIOD, iteration)

    def write_due(self, iteration: int) -> bool:
        """Whether a line is written; at each evaluation too, for detectron2's writers keep the latest values only."""
        return not self.owed and self._line_due(iteration)

    def _line_due(self, iteration: int) -> bool:
        return self.due(self.cfg.SOLVER.LOG_PERIOD, iteration) or self.evaluation_due(iteration)

    def finish_iteration(self, iteration: int, writers: Sequence[EventWriter] = ()) -> None:
        """Evaluate, write the line and save if due. Collective.

        In this order: a checkpoint holds the results of its own iteration, and a resumed run goes on with the line of
        the next. A signal to any rank has them save what they have; an evaluation that it cuts short is made after
        ``--resume``.
        """
        evaluating = self.evaluation_due(iteration)
        saving = self._saving_due(iteration) or self.saving.due_again(iteration)
        self._finished = iteration
        if not (evaluating or saving or self.step.agreed_signal):
            self._write(writers, iteration)
            return
        with self._fault_kept():
            self.step.settle()
        self._gather()
        asked = self.step.agreed_signal
        # At an iteration that the uninterrupted run, or one with room on its disk, passes by nothing may change.
        passing = not (evaluating or self._saving_due(iteration))
        self._statistics_of_ranks = statistics_of_ranks(self.networks) if passing else []
        for network in self.networks:
            average_running_statistics(network)
        # A signal leaves no time for either; what was cut short begins with the statistics.
        precise = not passing and statistics_due(self.cfg, self.step.average)
        cut_short = (asked and (evaluating or precise)) or (precise and not self._recompute_statistics())
        improved = self._evaluate_at(iteration) if evaluating and not cut_short else False
        if cut_short or (evaluating and not self.results):
            self.results, self.owed = {}, scalars_at(iteration)
            asked = asked or max(comm.all_gather(stopping.asked()))
        self._write(writers, iteration)
        self._save(iteration, self._saving_due(iteration) or bool(asked), improved, must=bool(asked))
        take_own_statistics(self.networks, self._statistics_of_ranks)
        if iteration + 1 < self.max_iter or self.owed:
            self._stopped_by = asked
        self._clock.lap()

    def _write(self, writers: Sequence[EventWriter], iteration: int) -> None:
        if self.write_due(iteration):
            for writer in writers:
                writer.write()

    def _gather(self) -> None:
        """Give the network the weights that were trained where these are cut up over the ranks. Collective."""
        if self._sharded is not None:
            self._sharded.gather()

    def _saving_due(self, iteration: int) -> bool:
        node = self.cfg.SOLVER
        return self.due(node.CHECKPOINT_PERIOD, iteration) or self.due(node.CHECKPOINT_KEEP_EVERY, iteration)

    def catch_up(self, writers: Sequence[EventWriter]) -> None:
        """Make the evaluation (or statistics) that a signal cut short before the run was resumed. Collective."""
        if not self.owed:
            return
        iteration, storage = self.start_iter - 1, get_event_storage()
        storage.iter = iteration
        for name, (value, smoothing) in self.owed.items():
            storage.put_scalar(name, value, smoothing_hint=smoothing)
        with stopping.deferred():
            cut_short = statistics_due(self.cfg, self.step.average) and not self._recompute_statistics()
            evaluating = self.evaluation_due(iteration)
            improved = self._evaluate_at(iteration) if evaluating and not cut_short else False
            if cut_short or (evaluating and not self.results):  # again; the checkpoint still says so
                self._stopped_by, self._finished = max(comm.all_gather(stopping.asked())), iteration
                self._leave()
            self.owed = {}
            self._write(writers, iteration)
            self._save(iteration, True, improved)
        storage.iter = self.start_iter

    def writers(self) -> list[EventWriter]:
        """The writers of rank 0, none elsewhere; continues ``metrics.json`` where the checkpoint left it."""
        if not comm.is_main_process():
            return []
        self._folder.mkdir(parents=True, exist_ok=True)
        mend_metrics(self._folder, self.start_iter)
        return build_writers(self.cfg, self.data.images)

    # -- evaluating and saving ---------------------------------------------------------------------------------------

    def evaluate(self, evaluator: LogitsEvaluator | None = None) -> dict[str, Any]:
        """:meth:`Evaluating.figures` of :attr:`network`, which become :attr:`results`. Collective."""
        self.results = self.evaluating.figures(self.network, evaluator)
        return self.results

    def tune_thresholds(self) -> dict[str, Any]:
        """Give the network the thresholds that do best on DATASETS.TEST; the figures with them there. Collective."""
        assert self.data.test is not None  # set up to evaluate
        tuner = ThresholdTuner(len(self.data.test), len(self.data.classes))
        results = self.evaluate(tuner)
        self.model.thresholds = tuple(tuner.thresholds.tolist())
        return results

    def _recompute_statistics(self) -> bool:
        """Give :attr:`network` precise statistics; False where a signal has cut that short. Collective."""
        return recompute_statistics(self.cfg, self.network, self.data.train, leave=stopping.asked)

    def _evaluate_at(self, iteration: int) -> bool:
        if not self.evaluate():
            return False
        figures = self.results["classification"]
        storage: EventStorage = get_event_storage()
        storage.put_scalars(**{f"classification/{k}": v for k, v in figures.items()}, smoothing_hint=False)
        metric = self.cfg.TEST.METRIC
        improved = is_better(metric, figures[metric], self.best)
        if isinstance(self.step.schedule, PlateauMultiplier):
            self.step.schedule.evaluated(-figures[metric] if metric in COSTS else figures[metric])
            apply_current(self.step.schedule)
        self.early_stop.evaluated(figures[metric], iteration)
        if self.early_stop.over and iteration + 1 < self.max_iter:
            logger.info("%s; the run ends after iteration %d", self.early_stop.told(), iteration)
            self.max_iter = iteration + 1
        if iteration + 1 == self.max_iter:
            logger.info("classes:\n%s", self.evaluating.class_table())
        if improved:
            self.best = {"metric": metric, "value": figures[metric], "iteration": iteration}
        return improved

    def _save(self, iteration: int, saving: bool, improved: bool, *, must: bool = False) -> None:
        """Write what is due; must: no later iteration can make up for it. Collective.

        What rank 0 writes was brought together before.
        """
        needed = saving or improved or self.saving.due_again(iteration)
        content = self.checkpoint(iteration) if needed else {}
        write = partial(self._write_files, content, iteration, saving=saving, best=improved, must=must)
        self.saving.note(iteration, first_rank_does(write))

    def _write_files(self, content: dict[str, Any], iteration: int, **what: bool) -> bool:
        """On rank 0; whether something is owing for want of room."""
        if self.evaluation_due(iteration) and not self.owed:
            self.evaluating.try_to_write_class_tables(self._folder)
        last = iteration + 1 == self.max_iter and not self.owed
        return self.saving.save(content, last=last, **what) if content else self.saving.owing

    def _metrics_at(self, iteration: int) -> dict[str, float]:
        """The figures of exactly these weights; nothing when they were not evaluated."""
        return dict(self.results["classification"]) if self.results and self.evaluation_due(iteration) else {}

    def checkpoint(self, iteration: int) -> dict[str, Any]:
        """Everything a later process needs: plain Python values and tensors, loadable with ``weights_only``.

        Collective; whole on rank 0.
        """
        self._gather()
        return {
            "model": self.network.state_dict(),
            **({} if self.network is self.model else {"live": self.model.state_dict()}),
            **self.step.state_dict(),
            "iteration": iteration,
            "best": self.best,
            "early_stop": self.early_stop.state_dict(),
            "metrics": self._metrics_at(iteration),
            "evaluation_due": self.owed,
            "statistics_of_ranks": self._statistics_of_ranks,
            "config": self._config,
            "images": self.data.images,
            "seed": self.cfg.SEED,
            "classes": list(self.data.classes),
            "contract": self.model.contract.to_dict(),
            "architecture": starting.architecture_of(self.model.backbone),
            "imgcls_version": imgcls.__version__,
        }
