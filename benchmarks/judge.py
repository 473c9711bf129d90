"""What guidance.py and editing.py share: real digits, and a judge of them that has no part in any model.

The judge is a support vector machine on pixels, fitted on real training images alone. How far it can be trusted is measured on the
held-out ones, which no model here was trained on either.
"""

from typing import NamedTuple

import numpy as np
from sklearn.svm import SVC

import jaxdiff as jd

# MNIST's 60,000 would take an hour to fit, and the first ten thousand are enough to judge by.
FITTED = 10_000


class Digits(NamedTuple):
    """Real digits, `train` and held-out `test`, the judge fitted on the former, and its accuracy on the latter."""

    train: jd.data.Dataset
    test: jd.data.Dataset
    judge: SVC
    accuracy: float

    def says(self, images: np.ndarray) -> np.ndarray:
        """The labels that the judge gives images uint8 [N, H, W, 1], [N]."""
        return self.judge.predict(flat(images))


def load(name: str, data_dir: str | None) -> Digits:
    """The set "digits" or "mnist" and its judge, whose accuracy is printed. Of MNIST's held-out images the first 2,000 are kept."""
    train, test = (jd.data.load(name, split, data_dir) for split in ("train", "test"))
    if name != "digits":
        test = test._replace(images=np.asarray(test.images[:2000]), labels=test.labels[:2000])
    gamma = 0.3 if name == "digits" else 0.02
    judge = SVC(C=10, gamma=gamma).fit(flat(train.images[:FITTED]), train.labels[:FITTED])
    accuracy = float(judge.score(flat(test.images), test.labels))
    fitted, n = min(FITTED, len(train.labels)), len(test.labels)
    print(f"judge: a support vector machine fitted on {fitted} real images; accuracy {percent(accuracy, n)} on {n} held-out ones\n")
    return Digits(train, test, judge, accuracy)


def flat(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 1] -> float [N, H W] in [0, 1]."""
    return np.asarray(images).reshape(len(images), -1) / 255


def error(share: float, n: int) -> float:
    """The standard error of a share of n; half a count is added on both sides, as even all of n leave some doubt."""
    p = (share * n + 0.5) / (n + 1)
    return float(np.sqrt(p * (1 - p) / n))


def percent(share: float, n: int) -> str:
    """A share of n as percent, with its standard error."""
    return f"{100 * share:.1f} ± {100 * error(share, n):.1f}%"


def table(*rows: tuple) -> None:
    """Prints rows, the first of them the heads, as a Markdown table."""
    for i, row in enumerate(rows):
        print("| " + " | ".join(map(str, row)) + " |")
        if i == 0:
            print("|---" * len(row) + "|")
    print(flush=True)
