"""A run's evaluations: the figures of DATASETS.TEST, tables of the classes, and whether they are better than before."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from imgcls.data import Loader, build_test_loader
from imgcls.engine.early_stop import COSTS
from imgcls.engine.ranks import stopping
from imgcls.engine.setup import Data
from imgcls.evaluation import (
    ClassificationEvaluator,
    LogitsEvaluator,
    MultiLabelEvaluator,
    evaluate,
    per_class_text,
    write_tables,
)

logger = logging.getLogger(__name__)


class Evaluating:
    """Evaluates networks on ``data.test``, with one loader for all times."""

    def __init__(self, cfg: CfgNode, data: Data) -> None:
        self._cfg, self._data = cfg, data
        self._loader: Loader | None = None
        self._evaluator: LogitsEvaluator | None = None

    def figures(self, network: nn.Module, evaluator: LogitsEvaluator | None = None) -> dict[str, Any]:
        """``{"classification": figures}``, on every rank; those of ``evaluator`` instead of the usual ones. Collective.

        Empty where there is no such set, and where a signal has cut the evaluation short.
        """
        test = self._data.test
        if test is None:
            return {}
        if self._loader is None:
            self._loader = build_test_loader(self._cfg, test)
        self._evaluator = evaluator or self._new_evaluator(network, len(test))
        results: dict[str, Any] = evaluate(network, self._loader, self._evaluator, leave=stopping.asked)
        if not results:
            logger.info("%s: the evaluation was cut short by a signal", test.name)
            return {}
        told = ", ".join(f"{name} {value:.4f}" for name, value in results["classification"].items())
        logger.info("%s: %s", test.name, told)
        return results

    def _new_evaluator(self, network: Any, images: int) -> LogitsEvaluator:
        classes = len(self._data.classes)
        if network.multi_label:
            return MultiLabelEvaluator(images, classes, network.thresholds)
        return ClassificationEvaluator(images, classes)

    def class_table(self) -> str:
        """The figures of the single classes in the latest evaluation, to read; empty before one."""
        return per_class_text(self._data.classes, self._evaluator.per_class) if self._evaluator else ""

    def write_class_tables(self, folder: Path) -> None:
        """The same as CSV files, with the confusion matrix."""
        if self._evaluator is not None:
            confusion = getattr(self._evaluator, "confusion", None)
            write_tables(folder, self._data.classes, self._evaluator.per_class, confusion)

    def try_to_write_class_tables(self, folder: Path) -> None:
        """:meth:`write_class_tables`, for want of which no training ends."""
        try:
            self.write_class_tables(folder)
        except OSError as error:
            logger.warning("the tables of classes are not written, training goes on: %s", error)


def is_better(metric: str, value: float, best: Mapping[str, Any]) -> bool:
    """Whether ``value`` beats ``best``, a checkpoint's record with ``metric`` and ``value``.

    What is no number never does; a run that is resumed with another metric starts its best anew.
    """
    if math.isnan(value) or best.get("metric") != metric:
        return not math.isnan(value)
    return bool(value < best["value"] if metric in COSTS else value > best["value"])
