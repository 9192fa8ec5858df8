"""One training run: everything that the two loops share, so that they cannot drift apart."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
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
from imgcls.checkpoint import (
    BEST,
    FINAL,
    Resume,
    checkpoint_to_resume,
    load_weights,
    prune,
    read_checkpoint,
    require_state,
    set_aside_newer,
    sweep,
    write_checkpoint,
)
from imgcls.data import Loader, build_test_loader, build_train_loader, mix
from imgcls.engine.distributed import first_rank_does, wrap_for_ranks
from imgcls.engine.output_dir import mend_metrics
from imgcls.engine.replay import keep
from imgcls.engine.setup import Data
from imgcls.engine.step import NonFinite, TrainStep
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
from imgcls.modeling import Trunk, fit_to_input
from imgcls.solver import build_optimizer, build_schedule
from imgcls.solver.schedules import PlateauMultiplier, apply_current
from imgcls.structures import LoadReport, PreprocessingContract

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
        self._test_loader: Loader | None = None
        self._evaluator: LogitsEvaluator | None = None
        self._step: TrainStep | None = None

    # -- where the weights come from ---------------------------------------------------------------------------------

    def start(self, *, resume: Resume) -> None:
        """Go on from the checkpoint named or the newest whole one, or begin with ``MODEL.WEIGHTS``. Collective."""
        checkpoint = checkpoint_to_resume(resume, self._folder)
        if checkpoint is not None:
            self.resume_from(checkpoint)
            if not isinstance(resume, bool):
                first_rank_does(partial(set_aside_newer, checkpoint, self._folder))
                # What the record speaks of may lie in another folder, or belong to the course that was left.
                self.best = self.best if (self._folder / BEST).is_file() else {}
            return
        if resume:
            logger.warning("--resume: %s has no checkpoint, starting at iteration 0", self._folder)
        if self.cfg.MODEL.WEIGHTS:
            self.load_initial(self.cfg.MODEL.WEIGHTS)

    def load_initial(self, path: str) -> LoadReport:
        """Weights to begin with (a classifier's checkpoint or a converted backbone); a misfit is a ``ValueError``."""
        content = read_checkpoint(path)
        weights = dict(content["model"])
        notes = content.get("imgcls", {})
        if content.get("matching_heuristics"):
            weights = {f"backbone.{name}": tensor for name, tensor in weights.items()} | notes.get("classifier", {})
        if isinstance(self.model.backbone, Trunk):
            weights = fit_to_input(weights, self.model.backbone, "backbone.")
        if not hasattr(self.model.head, "auxiliary"):
            # They serve training only; MODEL.HEAD.AUX_WEIGHT 0 leaves them out.
            weights = {name: value for name, value in weights.items() if not name.startswith("head.auxiliary.")}
        self._require_same_contract(content, path)
        if self.data.train is None and content.get("thresholds"):
            # Training would make them another network's.
            self.model.thresholds = tuple(content["thresholds"])
        reset = self.cfg.MODEL.HEAD.RESET
        if reset:
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
        else:
            self._require_same_classes({**notes, **content}, path)
        report = load_weights(self.model, weights, may_be_new=lambda name: reset and name.startswith("head."))
        report.require_complete(
            path,
            "For another data set set MODEL.HEAD.RESET True (a new head); for another network change "
            "MODEL.BACKBONE.VARIANT or MODEL.WEIGHTS",
        )
        logger.info("%s: %s", path, report.summary())
        return report

    def resume_from(self, path: Path) -> None:
        """Take over a run's checkpoint, and with it its place in the run; a misfit is a ``ValueError``."""
        content = read_checkpoint(path, check_digest=False)
        require_state(content, path)
        self._require_same_classes(content, str(path))
        self._require_same_contract(content, str(path))
        # Where an average is kept, "model" is the average: what was evaluated, and what is handed over.
        load_weights(self.model, content.get("live", content["model"])).require_complete(
            str(path), "--resume needs the config that the run began with (config.yaml in its OUTPUT_DIR)"
        )
        self.step.load_state_dict(content)
        if self.step.ema is not None and "live" in content:
            self.step.ema.load_state_dict(content["model"], content["ema_updates"])
        self.best = dict(content["best"])
        self.start_iter = int(content["iteration"]) + 1
        logger.info("resuming from %s at iteration %d of %d", path, self.start_iter, self.max_iter)
        if self.start_iter >= self.max_iter:
            logger.warning(
                "nothing is left to train: %s has done %d iterations, SOLVER.MAX_ITER is %d",
                path.name,
                self.start_iter,
                self.max_iter,
            )

    def _require_same_classes(self, content: dict[str, Any], path: str) -> None:
        theirs = content.get("classes")
        if theirs and tuple(theirs) != self.data.classes:
            raise ValueError(
                f"{path} knows {len(theirs)} classes ({', '.join(theirs[:5])}, ...), the data has "
                f"{len(self.data.classes)} ({', '.join(self.data.classes[:5])}, ...). Change DATASETS.TRAIN, or set "
                "MODEL.HEAD.RESET True to train a new head"
            )

    def _require_same_contract(self, content: dict[str, Any], path: str) -> None:
        notes = {**content, **content.get("imgcls", {})}
        contract, theirs = notes.get("contract"), notes.get("architecture")
        differences = []
        if contract and len(contract["pixel_mean"]) == len(self.cfg.MODEL.PIXEL_MEAN):
            # Another number of channels has its own mean and std.
            differences = PreprocessingContract.from_dict(contract).differences(self.cfg)
        ours = _architecture(self.model.backbone)
        # Of a network whose stems differ in stride alone the tensors would fit, and mean something else.
        if theirs and ours and theirs["stem"] != ours["stem"]:
            differences.append(
                f"MODEL.BACKBONE.STEM is {ours['stem']!r} in the config, the weights need {theirs['stem']!r}"
            )
        if differences:
            raise ValueError(f"{path} does not fit the config: {'; '.join(differences)}. Change these keys")

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
        self._clock, waiting = Stopwatch(), Stopwatch()
        for batch in build_train_loader(self.cfg, self.data.train, start=self.start_iter):
            self._data_time = waiting.lap()
            yield batch
            waiting.lap()

    def train_on(self, batch: Any, iteration: int) -> None:
        """One step, and its record. Collective. Numbers that are not finite leave the state before them in a file."""
        try:
            losses = self.step(batch, iteration)
        except NonFinite as fault:
            first_rank_does(partial(keep, self._folder, self.checkpoint(iteration - 1), fault))
            raise
        self.record(iteration, losses)

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
        average_running_statistics(self.model)
        if self.network is not self.model:
            average_running_statistics(self.network)
        improved = self._evaluate_at(iteration) if evaluating else False
        first_rank_does(lambda: self._save_all(iteration, saving, improved))
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

    def _save_all(self, iteration: int, saving: bool, improved: bool) -> None:
        if self.evaluation_due(iteration):
            self.write_class_tables(self._folder)
        if not (saving or improved):
            return
        content = self.checkpoint(iteration)
        sweep(self._folder)
        if saving:
            name = FINAL if iteration + 1 == self.max_iter else f"model_{iteration:07d}.pth"
            write_checkpoint(self._folder / name, content, iteration=iteration, newest=True)
            prune(self._folder, self.cfg.SOLVER.CHECKPOINT_KEEP)
            logger.info("saved %s", self._folder / name)
        if improved:
            write_checkpoint(self._folder / BEST, content, iteration=iteration)

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
            "architecture": _architecture(self.model.backbone),
            "imgcls_version": imgcls.__version__,
        }


def _architecture(backbone: nn.Module) -> dict[str, str]:
    # A backbone that somebody else registered trains as well as ours; only handing it over needs to know its row.
    return backbone.architecture.to_dict() if isinstance(backbone, Trunk) else {}
