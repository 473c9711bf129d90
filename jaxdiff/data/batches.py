"""Batches as a pure function of the step: nothing to save, so resuming a run needs its step number only."""

import functools

import numpy as np

from jaxdiff.data.dataset import Dataset
from jaxdiff.errors import InputError


def batch_at(
    dataset: Dataset, seed: int, step: int, batch_size: int, process: int = 0, processes: int = 1
) -> dict[str, np.ndarray]:
    """Batch number `step` of an endless shuffled stream: ``{"image": uint8 [b, H, W, C], "label": int32 [b]}``.

    The stream is one permutation of the N examples after another, each drawn from (seed, epoch), so every example comes
    exactly once an epoch, none is dropped, and a batch may span epochs. With several processes each takes contiguous
    b = batch_size / processes rows; joined in process order they are the batch that a single process gets.

    Raises InputError where batch_size is not a positive multiple of processes, or an argument is out of range.
    """
    rows = rows_at(len(dataset.labels), seed, step, batch_size, process, processes)
    # A plain view of the memory map: indexing np.memmap itself pays for its subclass at every batch.
    return {"image": np.asarray(dataset.images).take(rows, axis=0), "label": dataset.labels[rows]}


def rows_at(n: int, seed: int, step: int, batch_size: int, process: int = 0, processes: int = 1) -> np.ndarray:
    """Which of n examples `batch_at` takes, int [b]. Raises InputError as it does."""
    if processes < 1 or not 0 <= process < processes:
        raise InputError(f"process {process} of {processes}: process must be from 0 to processes - 1")
    if batch_size < 1 or batch_size % processes:
        raise InputError(f"batch_size {batch_size} is not a positive multiple of the {processes} processes")
    if seed < 0 or step < 0:
        raise InputError(f"seed {seed} and step {step} must not be negative")
    share = batch_size // processes
    start = step * batch_size + process * share
    return _rows(n, seed, start, start + share)


def _rows(n: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Example numbers at the positions start ... stop - 1 of the stream."""
    epochs = range(start // n, (stop - 1) // n + 1)
    return np.concatenate([_order(n, seed, e)[max(start - e * n, 0) : stop - e * n] for e in epochs])


@functools.lru_cache(maxsize=4)  # two epochs in a batch, for a training and an evaluation set
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n examples in one epoch.

    Sorting raw Philox words, because NumPy keeps SeedSequence and raw streams fixed for ever but not
    `Generator.permutation` (NEP 19): a run resumed under another NumPy must meet the same batches. spawn_key and not
    [seed, epoch], which would be padded into one list of words where different pairs can meet.
    """
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order
