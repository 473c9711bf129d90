"""Image data: sources decoded once into uint8 memory maps, and batches that are a pure function of the step."""

from jaxdiff.data.augment import random_flip
from jaxdiff.data.batches import batch_at
from jaxdiff.data.dataset import Dataset, load, statistics

__all__ = ["Dataset", "batch_at", "load", "random_flip", "statistics"]
