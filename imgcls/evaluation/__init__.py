"""Metrics and the evaluator."""

from imgcls.evaluation.evaluator import ClassificationEvaluator, evaluate

__all__ = ["ClassificationEvaluator", "evaluate"]
