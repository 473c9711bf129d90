"""Are the digits digits?  python benchmarks/digits_quality.py --workdir=runs/digits [--num=1000 --steps=50]

For 1,000 class-conditional samples at several guidance scales, prints two figures. (1) How many a classifier of real digits gives
the label that was asked for; it is fitted on the training split and must reach 0.98 on the held-out one. (2) The mean distance
between samples of one class, over that between real digits of the class: below 1 the samples are too alike (collapse), above 1
too noisy. Needs scikit-learn; takes a minute on 2 CPU cores.
"""

import argparse

import jax
import numpy as np
from sklearn.svm import SVC

import jaxdiff as jd
from jaxdiff import cli


def flat(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 8, 8, 1] -> float [N, 64] in [0, 1]."""
    return np.asarray(images).reshape(len(images), -1) / 255


def within_class_distance(images: np.ndarray, labels: np.ndarray) -> float:
    """The Euclidean distance between two different images of one class, averaged over pairs, then over classes."""
    means = []
    for label in np.unique(labels):
        x = flat(images)[labels == label]
        distance = np.sqrt(np.maximum(((x[:, None] - x[None]) ** 2).sum(-1), 0))
        means.append(distance.sum() / (len(x) * (len(x) - 1)))
    return float(np.mean(means))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", default="runs/digits")
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--solver", default="ddim")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.05, 1.1, 1.25])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cli.enable_compile_cache()

    train, test = jd.data.load("digits", "train"), jd.data.load("digits", "test")
    classifier = SVC(C=10, gamma=0.3).fit(flat(train.images), train.labels)
    accuracy = classifier.score(flat(test.images), test.labels)
    enough = "at least" if accuracy >= 0.98 else "BELOW"
    print(f"classifier: accuracy {accuracy:.4f} on {len(test.labels)} real held-out digits, {enough} 0.98")
    real = within_class_distance(train.images, train.labels)
    held_out = within_class_distance(test.images, test.labels) / real
    print(f"real digits: within-class distance {real:.3f} (held-out over training digits: {held_out:.3f})")

    run = jd.load(args.workdir)
    labels = np.arange(args.num) % run.config.model.classes
    print(f"{args.num} samples at step {run.step}, {args.solver}, {args.steps} steps, seed {args.seed}")
    print("guidance  label as asked  distance ratio")
    for guidance in args.guidance:
        images = run.generate(jax.random.key(args.seed), args.num, args.steps, args.solver, labels, guidance)
        agreed = float(np.mean(classifier.predict(flat(images)) == labels))
        print(f"{guidance:8.2f}  {agreed:14.4f}  {within_class_distance(images, labels) / real:14.3f}", flush=True)


if __name__ == "__main__":
    main()
