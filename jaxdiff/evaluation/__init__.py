"""Evaluation: figures of a trained model on data it has not seen."""

from jaxdiff.evaluation.accuracy import accuracy_by_level
from jaxdiff.evaluation.bits import METRICS, Settings, estimator, evaluate

__all__ = ["METRICS", "Settings", "accuracy_by_level", "estimator", "evaluate"]
