"""Metrics, the evaluators, thresholds and tables of single classes."""

from imgcls.evaluation.evaluator import (
    ClassificationEvaluator,
    LogitsEvaluator,
    MultiLabelEvaluator,
    evaluate,
)
from imgcls.evaluation.tables import per_class_text, write_tables
from imgcls.evaluation.thresholds import ThresholdTuner, tune

__all__ = [
    "ClassificationEvaluator",
    "LogitsEvaluator",
    "MultiLabelEvaluator",
    "ThresholdTuner",
    "evaluate",
    "per_class_text",
    "tune",
    "write_tables",
]
