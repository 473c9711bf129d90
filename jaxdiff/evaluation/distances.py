"""Distances between two sets of images, by their features: NumPy on the host, float64, in blocks of bounded memory.

Features are rows [n, d]; nothing here knows which network made them.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from jaxdiff.errors import InputError

Array = np.ndarray

# Numbers in a block of distances: 2^24 of float64 are 128 MiB, whatever the number of rows.
BLOCK = 2**24


class Sums(NamedTuple):
    """What is kept of the features seen so far: how many, a shift near their mean, the sum and the outer products about it."""

    n: int
    shift: Array  # [d]
    total: Array  # [d]
    outer: Array  # [d, d]


class Moments(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of n features; n is None where a file does not say."""

    n: int | None
    mean: Array
    cov: Array


class Kernel(NamedTuple):
    """A kernel distance: mean and standard deviation over `subsets` of `size` features of either set."""

    mean: float
    std: float
    subsets: int
    size: int


def moments_begin(d: int) -> Sums:
    """No features yet."""
    return Sums(0, np.zeros(d), np.zeros(d), np.zeros((d, d)))


def moments_add(sums: Sums, features: Array) -> Sums:
    """The sums with features [B, d] more.

    They are about the first batch's mean: sums of squares of numbers far from zero would lose the digits that the covariance is of.
    """
    features = np.asarray(features, np.float64)
    shift = sums.shift if sums.n or not len(features) else features.mean(0)
    x = features - shift[None, :]
    return Sums(sums.n + len(x), shift, sums.total + x.sum(0), sums.outer + x.T @ x)


def moments_end(sums: Sums) -> Moments:
    """The moments of all features added. Raises InputError for fewer than two, which have no covariance."""
    if sums.n < 2:
        raise InputError(f"{sums.n} image(s) have no covariance; give at least 2")
    offset = sums.total / sums.n
    cov = (sums.outer - sums.n * np.outer(offset, offset)) / (sums.n - 1)
    return Moments(sums.n, sums.shift + offset, cov)


def moments(features: Array) -> Moments:
    """The moments of features [n, d]. Raises InputError for fewer than two."""
    sums = moments_begin(features.shape[1])
    for _, part in _pieces(features):
        sums = moments_add(sums, part)
    return moments_end(sums)


def shortage(n: int | None, d: int) -> str:
    """A line where n features are too few for a regular covariance of d, else ""."""
    if n is None or n > d:
        return ""
    return f"n={n} is not above {d} features: the covariance is singular and the distance biased upward"


def frechet(a: Moments, b: Moments) -> float:
    """The squared 2-Wasserstein distance of two Gaussians with these moments, |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)).

    The last trace is the nuclear norm of R' S where C = R R' and C' = S S': it needs no square root of a product that rounding
    makes indefinite, so covariances may be singular. Source: Dowson and Landau 1982; Heusel et al. 2017, equation 6.
    """
    r, s = _root(a.cov), _root(b.cov)
    between = np.linalg.svd(r.T @ s, compute_uv=False).sum()
    # The traces are of the roots' products too: what rounding made negative, as in a file of float32, is then nowhere.
    return float(np.square(a.mean - b.mean).sum() + np.square(r).sum() + np.square(s).sum() - 2 * between)


def _root(cov: Array) -> Array:
    """R with R R' = cov. Eigenvalues that are rounding alone are 0: a square root of 1e-16 would be 1e-8."""
    values, vectors = np.linalg.eigh(np.asarray(cov, np.float64))
    smallest = len(values) * np.finfo(np.float64).eps * values.max()
    return vectors * np.sqrt(np.where(values > smallest, values, 0.0))[None, :]


def inception_score(logits: Array, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of exp(mean of KL(p(y|x) || p(y))), from logits [n, classes].

    The rows are shuffled first, since images often come class by class, as torch-fidelity does it: by `RandomState(2020)`. Raises
    InputError for fewer images than splits. Source: Salimans et al. 2016, section 4.
    """
    if len(logits) < splits:
        raise InputError(f"an inception score of {splits} splits needs as many images at least, got {len(logits)}")
    order = np.random.RandomState(seed).permutation(len(logits))
    ends = np.arange(splits + 1) * len(logits) // splits
    scores = [_score(np.asarray(logits[order[i:j]], np.float64)) for i, j in itertools.pairwise(ends)]
    return float(np.mean(scores)), float(np.std(scores))


def _score(logits: Array) -> float:
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(0)
    log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))  # a class of no probability adds nothing
    return float(np.exp((p * (log_p - log_marginal[None, :])).sum(1).mean()))


def kernel_distance(samples: Array, reference: Array, subsets: int = 100, size: int = 1000, seed: int = 2020) -> Kernel:
    """The unbiased squared maximum mean discrepancy under (x'y / d + 1)^3, over random subsets of `size`, or of the smaller set's.

    Each subset is drawn without replacement from `RandomState(seed)`, of the samples first: with 1,000 and 2020 these are
    torch-fidelity's. Subsets overlap, so their standard deviation is no standard error. Raises InputError for fewer than two
    images. Source: Binkowski et al. 2018, section 3 and appendix.
    """
    size = min(size, len(samples), len(reference))
    if size < 2:
        raise InputError(f"a kernel distance needs at least 2 images of either set, got {len(samples)} and {len(reference)}")
    subsets = 1 if size == len(samples) == len(reference) else subsets  # all are the whole set
    random = np.random.RandomState(seed)

    def one() -> float:
        x, y = (np.asarray(a[random.choice(len(a), size, replace=False)], np.float64) for a in (samples, reference))
        return _mmd(x, y)

    each = [one() for _ in range(subsets)]
    return Kernel(float(np.mean(each)), float(np.std(each)), subsets, size)


def _mmd(x: Array, y: Array) -> float:
    n, d = x.shape

    def kernel(a: Array, b: Array) -> Array:
        inner = a @ b.T / d + 1
        return inner * inner * inner  # NumPy's general power takes ten times as long

    within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y))) / (n * (n - 1))
    return float(within - 2 * kernel(x, y).mean())


def precision_recall(reference: Array, samples: Array, k: int = 3) -> tuple[float, float]:
    """(precision, recall): the share of samples inside the reference's balls, and of the reference inside the samples'.

    A set's balls reach from each of its points to its k-th nearest neighbour. Raises InputError for k points or fewer. Source:
    Kynkaanniemi et al. 2019, equations 1 and 2.
    """
    of_reference, of_samples = radii(reference, k), radii(samples, k)
    precise, recalled = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for rows, squared in _squared_distances(reference, samples):
        precise |= (squared <= of_reference[rows, None]).any(0)
        recalled[rows] = (squared <= of_samples[None, :]).any(1)
    return float(precise.mean()), float(recalled.mean())


def density_coverage(reference: Array, samples: Array, k: int = 5) -> tuple[float, float]:
    """(density, coverage): in how many of the reference's balls a sample is, over k, and the share of those balls with a sample.

    The balls are `precision_recall`'s. Raises InputError for k points or fewer. Source: Naeem et al. 2020, equations 3 and 5.
    """
    of_reference = radii(reference, k)
    inside, covered = 0, 0
    for rows, squared in _squared_distances(reference, samples):
        within = squared <= of_reference[rows, None]
        inside += int(within.sum())
        covered += int(within.any(1).sum())
    return inside / (k * len(samples)), covered / len(reference)


def radii(features: Array, k: int) -> Array:
    """The squared distance of each row of [n, d] to its k-th nearest other row, [n]. Raises InputError unless k < n."""
    if not 0 < k < len(features):
        raise InputError(f"the {k} nearest neighbours of an image need at least {k + 1} images, got {len(features)}")
    found = np.empty(len(features))
    for rows, squared in _squared_distances(features, features):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = 0.0  # itself, the 0-th; rounding may say otherwise
        found[rows] = np.partition(squared, k, axis=1)[:, k]
    return found


def nearest(features: Array, among: Array, k: int = 1) -> tuple[Array, Array]:
    """(rows int [n, k], distances [n, k]) of the k nearest rows of `among` [m, d] to each of `features` [n, d], nearest first."""
    if not 0 < k <= len(among):
        raise InputError(f"{k} nearest images were asked for among {len(among)}")
    parts = []
    for _, squared in _squared_distances(features, among):
        rows = np.argpartition(squared, k - 1, axis=1)[:, :k]
        found = np.take_along_axis(squared, rows, axis=1)
        order = np.argsort(found, axis=1, kind="stable")
        parts.append((np.take_along_axis(rows, order, axis=1), np.sqrt(np.take_along_axis(found, order, axis=1))))
    rows, far = (np.concatenate(each) for each in zip(*parts))
    return rows, far


def _squared_distances(a: Array, b: Array) -> Iterator[tuple[slice, Array]]:
    """(rows of a, their squared distances to all of b [rows, m]), block by block.

    Both are taken about b's mean, so that |x|^2 + |y|^2 - 2 x'y keeps its digits where features lie far from zero.
    """
    centre = np.mean(b, axis=0, dtype=np.float64, keepdims=True)
    lengths = np.concatenate([np.square(part - centre).sum(1) for _, part in _pieces(b)])
    step = max(1, BLOCK // len(b))
    starts = range(0, len(a), step)
    for start in tqdm(starts, desc="distances", unit="block", leave=False, disable=len(starts) < 10):
        x = np.asarray(a[start : start + step], np.float64) - centre
        squared = np.square(x).sum(1)[:, None] + lengths[None, :]
        for columns, part in _pieces(b):
            squared[:, columns] -= 2 * (x @ (part - centre).T)
        yield slice(start, start + len(x)), np.maximum(squared, 0, out=squared)


def _pieces(rows: Array, size: int = 4096) -> Iterator[tuple[slice, Array]]:
    """Some rows at a time, float64, with where they are: features are kept in float32, and all at once would be thrice as much."""
    for start in range(0, len(rows), size):
        where = slice(start, min(start + size, len(rows)))
        yield where, np.asarray(rows[where], np.float64)
