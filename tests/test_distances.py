"""Distances of features: closed forms, hand-made sets with known answers, and that cutting work into blocks changes nothing."""

import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.evaluation import distances
from jaxdiff.evaluation.distances import Moments, frechet, moments_add, moments_begin, moments_end


def features(n, d, seed=0, mean=0.0):
    """Correlated rows far from zero, where `mean` says so."""
    random = np.random.default_rng(seed)
    return mean + random.normal(size=(n, d)) @ random.normal(size=(d, d))


def covariance(d, rank, seed):
    factor = np.random.default_rng(seed).normal(size=(d, rank))
    return factor @ factor.T


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_streamed_moments_are_those_of_all_rows_at_once_whatever_the_batch(size):
    x = features(400, 12, mean=1e5)  # about zero, the sums of squares would lose ten digits
    sums = moments_begin(12)
    for start in range(0, 400, size):
        sums = moments_add(sums, x[start : start + size])
    got = moments_end(sums)
    assert got.n == 400
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(got.cov, np.cov(x.T), rtol=1e-10, atol=1e-10)


def test_an_empty_batch_is_nothing_and_one_row_has_no_covariance():
    x = features(5, 3)
    sums = moments_add(moments_add(moments_begin(3), x[:0]), x)
    np.testing.assert_allclose(moments_end(sums).cov, np.cov(x.T), rtol=1e-12)
    with pytest.raises(InputError, match=r"1 image\(s\) have no covariance; give at least 2"):
        distances.moments(x[:1])


def test_frechet_of_commuting_gaussians_is_the_distance_of_means_and_deviations():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    a, b = np.array([1.0, 4.0, 9.0, 0.25, 0.0, 2.0]), np.array([4.0, 1.0, 0.0, 0.5, 3.0, 2.0])
    mean_a, mean_b = np.arange(6.0), np.ones(6)
    found = frechet(Moments(9, mean_a, rotation @ np.diag(a) @ rotation.T), Moments(9, mean_b, rotation @ np.diag(b) @ rotation.T))
    exact = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert found == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("rank", [20, 5])
def test_frechet_of_gaussians_that_do_not_commute_is_the_length_of_the_optimal_map(rank):
    """N(0, C) goes to N(0, A C A) by x -> A x for A positive semidefinite, optimally (Brenier): tr((A - 1) C (A - 1))."""
    c, move = covariance(20, rank, 0), covariance(20, 20, 1) / 20
    other = move @ c @ move
    assert np.abs(c @ other - other @ c).max() > 1
    exact = np.trace((move - np.eye(20)) @ c @ (move - np.eye(20)))
    assert frechet(Moments(9, np.zeros(20), c), Moments(9, np.zeros(20), other)) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("n", [500, 50, 2])
def test_a_set_has_no_frechet_distance_from_itself_even_with_a_singular_covariance(n):
    found = distances.moments(np.abs(features(n, 300)))
    assert abs(frechet(found, found)) < 1e-12 * np.trace(found.cov) < 1e-6
    shifted = found._replace(mean=found.mean + 1)
    assert frechet(found, shifted) == pytest.approx(300, rel=1e-9)


def test_covariances_that_a_file_rounded_to_float32_have_no_distance_from_themselves():
    """Rounding makes half of the eigenvalues that are 0 negative: with the traces as they are the distance would be below -1e-5."""
    found = distances.moments(np.abs(features(50, 300)))
    rounded = found._replace(cov=found.cov.astype(np.float32).astype(np.float64))
    assert np.linalg.eigvalsh(rounded.cov).min() < -1e-7 * np.trace(rounded.cov) / 300
    assert abs(frechet(rounded, rounded)) < 1e-12 * np.trace(rounded.cov)


def test_too_few_images_for_a_covariance_is_said():
    line = distances.shortage(1000, 2048)
    assert line == "n=1000 is not above 2048 features: the covariance is singular and the distance biased upward"
    assert np.linalg.matrix_rank(distances.moments(features(20, 20)).cov) == 19 and distances.shortage(20, 20)
    assert np.linalg.matrix_rank(distances.moments(features(21, 20)).cov) == 20 and not distances.shortage(21, 20)
    assert distances.shortage(None, 20) == ""


def test_the_inception_score_is_between_one_class_and_all():
    certain = 1e3 * np.eye(8)[np.arange(4000) % 8]
    assert distances.inception_score(certain, splits=1) == (pytest.approx(8, rel=1e-12), 0.0)
    mean, std = distances.inception_score(certain)
    assert 7.9 < mean < 8 and 0 < std < 0.05  # a tenth of the images has not quite as many of each class
    assert distances.inception_score(np.full((4000, 8), 3.0)) == (pytest.approx(1, abs=1e-12), pytest.approx(0, abs=1e-12))
    assert distances.inception_score(1e3 * np.eye(8)[np.zeros(40, int)])[0] == pytest.approx(1)
    with pytest.raises(InputError, match="needs as many images at least, got 9"):
        distances.inception_score(certain[:9])


def test_the_inception_score_of_two_images_in_closed_form():
    """p = (q, 1 - q) and its mirror image: the marginal is even, and the score exp(log 2 - H(q))."""
    q = 0.9
    logits = np.log([[q, 1 - q], [1 - q, q]])
    entropy = -(q * np.log(q) + (1 - q) * np.log(1 - q))
    assert distances.inception_score(logits + 50, splits=1)[0] == pytest.approx(np.exp(np.log(2) - entropy), rel=1e-12)


def test_the_kernel_distance_is_its_definition_for_a_few_rows():
    x, y = features(4, 3, 0), features(4, 3, 1)
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / 12
    exact = within - 2 * sum(k(a, b) for a in x for b in y) / 16
    found = distances.kernel_distance(x, y)
    assert found.mean == pytest.approx(exact, rel=1e-10)
    assert found[1:] == (0.0, 1, 4)  # one subset: each would be all of both


def test_the_kernel_distance_is_unbiased_and_finds_a_shift():
    """Over independent sets of one distribution its mean is 0 within four standard errors, though sets are small."""
    random = np.random.default_rng(0)
    each = [distances.kernel_distance(*random.normal(size=(2, 20, 4))).mean for _ in range(400)]
    assert abs(np.mean(each)) < 4 * np.std(each) / 20, np.mean(each)
    # The kernel's expectation in closed form: E (x'y/d + 1)^3 for normal x, y about the means m and m'.
    shifted = [distances.kernel_distance(a + 1, b).mean for a, b in random.normal(size=(400, 2, 20, 4))]
    many = random.normal(size=(2, 1_000_000, 4))
    k = lambda a, b: np.mean(((a * b).sum(1) / 4 + 1) ** 3)  # noqa: E731
    exact = k(many[0] + 1, many[1] + 1) + k(*many) - 2 * k(many[0] + 1, many[1])
    assert np.mean(shifted) == pytest.approx(exact, abs=4 * np.std(shifted) / 20 + 0.02)


def test_the_subsets_of_a_kernel_distance_are_reproducible():
    x, y = features(60, 3, 0), features(50, 3, 1)
    first = distances.kernel_distance(x, y, subsets=10, size=20)
    assert first == distances.kernel_distance(x, y, subsets=10, size=20) and first[2:] == (10, 20) and first.std > 0
    assert first != distances.kernel_distance(x, y, subsets=10, size=20, seed=1)
    assert distances.kernel_distance(x, y).size == 50
    with pytest.raises(InputError, match="at least 2 images of either set, got 1 and 50"):
        distances.kernel_distance(x[:1], y)


# On a line: the reference at 0, 1, 2, 10, the samples at 1.5, 3.5, 30, 31. Nearest neighbours' distances, k = 1: 1, 1, 1, 8 and
# 2, 2, 1, 1; so 1.5 and 3.5 (in 10's ball) are inside the reference's, 30 and 31 are not; 0, 1, 2 are inside 1.5's or 3.5's.
REFERENCE, SAMPLES = np.array([[0.0], [1], [2], [10]]), np.array([[1.5], [3.5], [30], [31]])


def test_precision_recall_density_and_coverage_of_a_set_made_by_hand():
    assert distances.precision_recall(REFERENCE, SAMPLES, k=1) == (0.5, 0.75)
    # 1.5 is in the balls of 1 and 2; 3.5 in 10's, whose ball begins at 2: of 4 balls 3 hold a sample, and 3 holdings of 4 samples.
    assert distances.density_coverage(REFERENCE, SAMPLES, k=1) == (0.75, 0.75)
    # k = 2: the reference's radii are 2, 1, 2, 9 and the balls of 0, 1 and 2 hold 1.5, those of 2 and 10 3.5; 10's holds 1.5 too.
    assert distances.density_coverage(REFERENCE, SAMPLES, k=2) == (6 / 8, 1.0)
    assert distances.precision_recall(REFERENCE, SAMPLES, k=2) == (0.5, 1.0)


def test_a_set_with_itself_is_precise_and_recalled_and_one_far_away_is_not():
    x = features(50, 5, mean=100.0)
    assert distances.precision_recall(x, x) == (1.0, 1.0)
    density, coverage = distances.density_coverage(x, x)
    # Every ball holds its centre and k others.
    assert density == pytest.approx(6 / 5) and coverage == 1.0
    assert distances.precision_recall(x, x + 1e3) == (0.0, 0.0) and distances.density_coverage(x, x + 1e3) == (0.0, 0.0)
    with pytest.raises(InputError, match="the 3 nearest neighbours of an image need at least 4 images, got 3"):
        distances.precision_recall(x, x[:3])


def test_images_that_are_equal_have_balls_of_no_size():
    same = np.ones((6, 2))
    assert distances.radii(same, 3).tolist() == [0] * 6
    assert distances.precision_recall(same, same) == (1.0, 1.0)
    assert distances.precision_recall(same, same + 1e-3) == (0.0, 0.0)


def test_blocks_change_nothing(monkeypatch):
    a, b = features(57, 6, 0, mean=50.0).astype(np.float32), features(43, 6, 1, mean=50.0).astype(np.float32)
    figures = (distances.precision_recall, distances.density_coverage, distances.nearest)
    whole = [f(a, b) for f in figures]
    monkeypatch.setattr(distances, "BLOCK", 100)  # one or two rows at a time
    for f, was in zip(figures, whole):
        for x, y in zip(f(a, b), was):
            np.testing.assert_allclose(x, y, rtol=1e-9)


def test_the_nearest_rows_are_found_with_their_distances():
    rows, far = distances.nearest(SAMPLES, REFERENCE, 3)
    assert rows[0].tolist() in ([1, 2, 0], [2, 1, 0]) and rows[1].tolist() == [2, 1, 0] and rows[3].tolist() == [3, 2, 1]
    np.testing.assert_allclose(far[[1, 3]], [[1.5, 2.5, 3.5], [21, 29, 30]], rtol=1e-12)
    a, b = features(30, 4, 0, mean=1e3), features(20, 4, 1, mean=1e3)
    exact = np.linalg.norm(a[:, None] - b[None], axis=2)
    rows, far = distances.nearest(a, b, 20)
    np.testing.assert_allclose(far, np.sort(exact, 1), rtol=1e-9)
    np.testing.assert_array_equal(rows, np.argsort(exact, 1))
    with pytest.raises(InputError, match="5 nearest images were asked for among 4"):
        distances.nearest(SAMPLES, REFERENCE, 5)
