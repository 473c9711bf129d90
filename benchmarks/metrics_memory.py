"""Streams 50,000 features of 2,048 through the moments and measures the peak memory:  python benchmarks/metrics_memory.py

The features are made a batch at a time and never all kept: what the peak holds beyond the program itself is the sums (two
matrices of 32 MiB) and a batch.
"""

import resource
import time

import numpy as np
from absl import app, flags

from jaxdiff.evaluation import distances

FLAGS = flags.FLAGS
flags.DEFINE_integer("num", 50_000, "Features.")
flags.DEFINE_integer("width", 2048, "Numbers in a feature.")
flags.DEFINE_integer("batch", 250, "Features at a time.")


def main(_) -> None:
    random = np.random.default_rng(0)
    before, start, busy = peak(), time.perf_counter(), 0.0
    sums = distances.moments_begin(FLAGS.width)
    for first in range(0, FLAGS.num, FLAGS.batch):
        features = random.random((min(FLAGS.batch, FLAGS.num - first), FLAGS.width), np.float32)
        began = time.perf_counter()
        sums = distances.moments_add(sums, features)
        busy += time.perf_counter() - began
    found = distances.moments_end(sums)
    total = time.perf_counter() - start
    print(f"{found.n} x {FLAGS.width} features, {FLAGS.batch} at a time: {busy:.1f} s of sums, {total:.1f} s in all")
    print(f"peak memory {peak():.0f} MiB, {peak() - before:.0f} MiB of it since the start")
    print(f"(all at once they are {FLAGS.num * FLAGS.width * 8 / 2**20:.0f} MiB in float64)")
    exact = 1 / 12  # the variance of a uniform number
    print(f"mean variance {np.trace(found.cov) / FLAGS.width:.6f}, expected {exact:.6f}")
    start = time.perf_counter()
    print(f"distance from itself {distances.frechet(found, found):.2e}, in {time.perf_counter() - start:.1f} s")
    print(f"peak memory with the distance {peak():.0f} MiB")


def peak() -> float:
    """The most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    app.run(main)
