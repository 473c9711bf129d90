"""What guidance buys and costs:  python benchmarks/guidance.py --workdir=runs/digits --classifier=runs/digits_classifier

For MNIST: --set=mnist --workdir=runs/mnist --classifier=runs/mnist_classifier [--data_dir=DIR]. One model, trained with dropped
labels, is guided in two ways towards labels that are each asked for as often: unconditional and pushed by a noise-aware classifier,
and without one. For each scale it prints two figures, with standard errors, and plots both:

  right      the share that an independent judge (judge.py) gives the label asked for;
  diversity  the mean distance between two images that the judge gives one label, averaged over labels, over that of held-out real
             images. By the judge's label and not the one asked for, so that wrong labels do not pass for diversity.

Needs scikit-learn and matplotlib.
"""

import argparse
import time

import jax
import judge as judges
import matplotlib.pyplot as plt
import numpy as np

import jaxdiff as jd
from jaxdiff import cli

PUSHED = (0.0, 1.0, 2.0, 4.0, 8.0)
FREE = (0.0, 1.0, 1.5, 2.0, 4.0, 8.0)
METHODS = {"classifier": "unconditional model and classifier", "free": "classifier-free"}


def diversity(images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The mean distance between two images of one label, averaged over labels, and its standard error."""
    means, variances = [], []
    for label in np.unique(labels):
        x = judges.flat(images)[labels == label]
        if len(x) < 3:
            continue
        square = (x * x).sum(1)
        away = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * x @ x.T, 0))
        np.fill_diagonal(away, 0)
        each = away.sum(1) / (len(x) - 1)
        means.append(each.mean())
        # Of a mean over pairs: each image is in many of them, twice over.
        variances.append(4 * each.var(ddof=1) / len(x))
    return float(np.mean(means)), float(np.sqrt(np.sum(variances)) / len(means))


def measured(digits: judges.Digits, images: np.ndarray, asked: np.ndarray, real: float) -> tuple[float, float, float, float]:
    """(right, its error, diversity over that of real images, its error)."""
    says = digits.says(images)
    right = float(np.mean(says == asked))
    mean, error = diversity(images, says)
    return right, judges.error(right, len(asked)), mean / real, error / real


def draw(run: jd.Run, classify: jd.Classifier, method: str, scale: float, labels: np.ndarray, args) -> np.ndarray:
    """Samples of the labels, guided in one way. At guidance 0 a model with labels is the unconditional one."""
    how = {"guidance": scale} if method == "free" else {"guidance": 0.0, "classifier": classify, "classifier_scale": scale}
    return run.generate(jax.random.key(args.seed), len(labels), args.steps, args.solver, labels, **how)


def plot(rows: dict[str, list[tuple]], accuracy: float, args) -> None:
    """Both figures against the scale."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for method, told in rows.items():
        scale, right, right_error, ratio, ratio_error = (np.asarray(column) for column in zip(*told))
        axes[0].errorbar(scale, 100 * right, 100 * right_error, marker="o", capsize=3, label=METHODS[method])
        axes[1].errorbar(scale, ratio, ratio_error, marker="o", capsize=3, label=METHODS[method])
    axes[0].axhline(100 * accuracy, color="grey", linestyle=":", label="real held-out images")
    axes[1].axhline(1, color="grey", linestyle=":", label="real held-out images")
    axes[0].set(xlabel="scale", ylabel="label as asked, %", ylim=(0, 103))
    axes[1].set(xlabel="scale", ylabel="within-class distance / real", ylim=(0, None))
    axes[0].legend(loc="lower right", fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(f"{args.set}: {args.num} samples a point, {args.steps} steps of {args.solver}", fontsize=10)
    figure.savefig(f"{args.out}/guidance_{args.set}.png", dpi=110)


def picture(pictures: dict[str, list[tuple[float, np.ndarray]]], real: np.ndarray, args) -> None:
    """Of each method and scale the first sample of each class, real held-out digits above."""
    rows = 1 + max(map(len, pictures.values()))
    figure, axes = plt.subplots(rows, len(pictures), figsize=(11, 0.62 * rows + 0.5), layout="constrained", squeeze=False)
    for column, (method, told) in zip(axes.T, pictures.items()):
        for axis in column:
            axis.axis("off")
        for axis, (name, images) in zip(column, [("real", real), *((f"{scale:g}", images) for scale, images in told)]):
            axis.imshow(jd.pictures.tile(images, 10, smallest=56), interpolation="nearest")
            axis.axis("on")
            axis.set(xticks=[], yticks=[])
            axis.set_ylabel(name, rotation=0, ha="right", va="center")
            axis.spines[:].set_visible(False)
        column[0].set_title(f"{METHODS[method]}, by scale", fontsize=10)
    figure.savefig(f"{args.out}/guidance_{args.set}_samples.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--workdir", default="runs/digits")
    parser.add_argument("--classifier", default="runs/digits_classifier")
    parser.add_argument("--data_dir", default=None)
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", default="dpmpp_2m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="docs/images")
    args = parser.parse_args()
    cli.enable_compile_cache()
    start = time.time()

    digits = judges.load(args.set, args.data_dir)
    mean, error = diversity(digits.test.images, digits.says(digits.test.images))
    print(f"real held-out images: within-class distance {mean:.3f} ± {error:.3f}, to which diversity is relative")
    run, classify = jd.load(args.workdir), jd.load_classifier(args.classifier)
    labels = np.arange(args.num) % run.config.model.classes
    print(
        f"{args.num} samples a row, {args.steps} steps of {args.solver}, model of step {run.step}, classifier of {classify.step}\n"
    )

    rows, pictures = {}, {}
    for method, scales in (("classifier", PUSHED), ("free", FREE)):
        rows[method], pictures[method] = [], []
        for scale in scales:
            images = draw(run, classify, method, scale, labels, args)
            rows[method].append((scale, *measured(digits, images, labels, mean)))
            pictures[method].append((scale, images[:10]))
    said = [
        (METHODS[method], f"{scale:g}", judges.percent(right, args.num), f"{ratio:.3f} ± {ratio_error:.3f}")
        for method, told in rows.items()
        for scale, right, _, ratio, ratio_error in told
    ]
    judges.table(("method", "scale", "label as asked", "diversity / real"), *said)
    plot(rows, digits.accuracy, args)
    first = [np.flatnonzero(digits.test.labels == label)[0] for label in range(10)]
    picture(pictures, digits.test.images[first], args)
    print(f"{time.time() - start:.0f} s on {jax.devices()[0].platform}")


if __name__ == "__main__":
    main()
