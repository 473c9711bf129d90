"""Evaluation: figures of a trained model on data it has not seen."""

from jaxdiff.evaluation.bits import METRICS, Settings, estimator, evaluate

__all__ = ["METRICS", "Settings", "estimator", "evaluate"]
