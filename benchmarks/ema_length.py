"""Quality against the length of the average, from one run:  python benchmarks/ema_length.py [--workdir=runs/ema --out=FILE.png]

The workdir is that of a run that stored power averages:

    python train.py --config=configs/digits.py --workdir=runs/ema --config.training.snapshot_every=100 \\
        --config.training.ema='(0.995,"power(0.05)","power(0.07)","power(0.1)")'

Prints how far the average of width 0.07, put together from the snapshots of 0.05 and 0.1, is from the one that was tracked
directly, and draws the two figures of digits_quality.py for widths that were never stored. Needs scikit-learn and matplotlib.
"""

import argparse

import jax
import matplotlib.pyplot as plt
import numpy as np
from digits_quality import flat, within_class_distance
from sklearn.svm import SVC

import jaxdiff as jd
from jaxdiff import cli
from jaxdiff import run as runs
from jaxdiff.training import posthoc

WIDTHS = (0.01, 0.02, 0.035, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28)


def distance(a, b) -> float:
    """|a - b| / |b| over all parameters."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    off = sum(float(np.square(np.asarray(x, np.float64) - np.asarray(y)).sum()) for x, y in pairs)
    return float(np.sqrt(off / sum(float(np.square(np.asarray(y, np.float64)).sum()) for _, y in pairs)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", default="runs/ema")
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", default="docs/images/ema_length.png")
    args = parser.parse_args()
    cli.enable_compile_cache()

    tracked = jd.load(args.workdir, "power(0.07)")
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tracked.params)
    stored = ("power(0.05)", "power(0.1)")

    def reconstructed(width):
        return posthoc.reconstruct(args.workdir, tracked.config, abstract, f"power({width})", tracked.step, stored)

    off = distance(reconstructed(0.07), tracked.params)
    print(f"width 0.07 put together from {' and '.join(stored)}: {off:.1e} from the tracked one")
    for name in stored:
        print(f"  {name} itself is {distance(jd.load(args.workdir, name).params, tracked.params):.1e} from it")

    train = jd.data.load("digits", "train")
    classifier = SVC(C=10, gamma=0.3).fit(flat(train.images), train.labels)
    real = within_class_distance(train.images, train.labels)
    experiment, labels = jd.experiment.build(tracked.config), np.arange(args.num) % 10
    rows = []
    print("width   label as asked   distance ratio")
    for width in WIDTHS:
        run = runs.of(tracked.config, experiment, jax.device_put(reconstructed(width)), tracked.step)
        images = run.generate(jax.random.key(0), args.num, args.steps, label=labels, guidance=tracked.config.sampling.guidance)
        rows.append(
            (width, float(np.mean(classifier.predict(flat(images)) == labels)), within_class_distance(images, labels) / real)
        )
        print("{:5.3f}   {:14.4f}   {:14.3f}".format(*rows[-1]), flush=True)

    widths, agreed, ratio = zip(*rows)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    axes[0].plot(widths, agreed, marker="o")
    axes[0].set(xlabel="width of the average, share of the training", ylabel="label as asked", xscale="log")
    axes[1].plot(widths, ratio, marker="o")
    axes[1].set(xlabel="width of the average, share of the training", ylabel="within-class distance / real", xscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main()
