"""Image data: sources decoded once into uint8 memory maps, and batches that are a pure function of the step."""

from jaxdiff.data.augment import either_flip, random_flip
from jaxdiff.data.batches import batch_at
from jaxdiff.data.dataset import Dataset, load, of_config, statistics

__all__ = ["Dataset", "batch_at", "either_flip", "load", "of_config", "random_flip", "statistics"]
