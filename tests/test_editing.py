"""Editing: of Gaussian data with a full covariance all conditional distributions are known, and so what an edit should give."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from oracles import flow, gaussian, known, ones, zeros

from jaxdiff import editing, schedules, solvers, times
from jaxdiff.level import Level, Prediction
from jaxdiff.sampling import prior, sample, sample_keys, solve

jitted = jax.jit(sample)
predicted = jax.jit(lambda denoise, x, level: denoise(x, level))


def at(levels, i):
    return jax.tree.map(lambda a: a[i], levels)


def level_at(schedule, t):
    """The level of one time as NumPy scalars, for formulas in NumPy."""
    return jax.tree.map(np.asarray, schedule(jnp.asarray(t)))


def correlated(mean, cov):
    """The denoiser of data N(mean, cov), of x's entries in their order: mean [D], cov [D, D], x [B, ...] of D entries a sample."""
    values, vectors = np.linalg.eigh(cov)
    return Partial(_correlated, *(jnp.asarray(a, float) for a in (mean, vectors, values)))


def _correlated(mean, vectors, values, x, level):
    total = level.alpha**2 * values + level.sigma**2
    off = (x.reshape(len(x), -1) - level.alpha * mean[None]) @ vectors
    x0 = mean[None] + (off * (level.alpha * values / total)[None]) @ vectors.T
    eps = (off * (level.sigma / total)[None]) @ vectors.T
    return Prediction(x0.reshape(x.shape), eps.reshape(x.shape))


def matrix(f, shape):
    """The matrix of a linear f: [1, *shape] -> [1, ...]."""
    columns = [np.asarray(f(jnp.asarray(e.reshape(1, *shape)))).ravel() for e in np.eye(int(np.prod(shape)))]
    return np.stack(columns, 1)


def conditional(mean, cov, a, y):
    """The mean and covariance of N(mean, cov) given A x = y."""
    gain = cov @ a.T @ np.linalg.pinv(a @ cov @ a.T, rcond=1e-10)
    return mean + gain @ (y - a @ mean), cov - gain @ a @ cov


def given_x(mean, cov, x, level):
    """The mean and covariance of x0 ~ N(mean, cov) given x at a level."""
    gain = level.alpha * cov @ np.linalg.inv(level.alpha**2 * cov + level.sigma**2 * np.eye(len(mean)))
    return mean + gain @ (x - level.alpha * mean), cov - gain @ (level.alpha * cov)


def markov(shape, correlation=0.8):
    """A mean and a covariance of `shape` entries in a row, no two deviations alike."""
    n = int(np.prod(shape))
    i, rng = np.arange(n), np.random.default_rng(5)
    std = rng.uniform(0.6, 1.3, n)
    return rng.uniform(-0.5, 0.5, n), correlation ** np.abs(i[:, None] - i) * np.outer(std, std)


# --- replacement and RePaint ----------------------------------------------------------------------------------------------

FOUR = {"mean": np.asarray([0.5, -0.3, 0.2, 0.0]), "std": np.asarray([1.0, 0.8, 1.2, 0.9])}
FOUR["cov"] = 0.8 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4))) * np.outer(FOUR["std"], FOUR["std"])
ENDS = np.asarray([[2.0, 0.0, 0.0, -1.0]]), np.asarray([[1.0, 0.0, 0.0, 1.0]])  # the image, and the mask: both ends are known


@pytest.mark.parametrize("make", [solvers.ddpm, solvers.ddim, solvers.dpmpp_2m, solvers.heun])
def test_known_pixels_come_back_exactly_and_the_others_are_made(make):
    levels, key = times.grid(schedules.cosine, times.uniform(8)), jax.random.key(0)
    image, mask = jax.random.normal(key, (1, 4, 3, 2)), np.arange(12).reshape(4, 3, 1) % 2
    x = prior(jax.random.key(1), at(levels, 0), (5, 4, 3, 2))
    made = jitted(key, editing.replacement(make(gaussian(0.4, 0.3)), image, mask), x, levels)
    there = np.broadcast_to(mask == 1, made.shape)
    np.testing.assert_array_equal(np.asarray(made)[there], np.broadcast_to(image, made.shape)[there])
    assert (np.abs(made - image)[~there] > 1e-6).all() and np.isfinite(made).all()


def test_a_step_of_replacement_is_repaints_equation(x64):
    """Known pixels are q(x_s | known), the others the solver's own step; soft mask values mix the two."""
    t, s = (schedules.cosine(jnp.asarray(a)) for a in (0.7, 0.5))
    rng = np.random.default_rng(0)
    image, x = rng.standard_normal((2, 3, 4))
    keys, inner = jax.random.split(jax.random.key(0), 3), solvers.ddpm(gaussian(0.4, 0.3), noise=ones)
    own, _ = inner.step(keys, inner.init(jnp.asarray(x)), t, s)
    for mask in ([[1.0, 0.0, 0.25, 1.0]], [[0.0] * 4], [[1.0] * 4]):
        solver = editing.replacement(inner, image, np.asarray(mask), ones)
        state, p = solver.step(keys, solver.init(jnp.asarray(x)), t, s)
        want = np.asarray(mask) * (s.alpha * image + s.sigma) + (1 - np.asarray(mask)) * own.x
        np.testing.assert_allclose(state.x, want, rtol=1e-12)
        np.testing.assert_allclose(t.alpha * p.x0 + t.sigma * p.eps, x, rtol=1e-12)


def test_the_known_pixels_noise_is_fresh():
    """Not the noise of the step itself, and each sample's own."""
    t, s = (schedules.cosine(jnp.float32(a)) for a in (0.7, 0.5))
    keys, inner = sample_keys(jax.random.key(0), 2), solvers.ddpm(known(jnp.zeros(())))
    drawn = []
    for mask in (0.0, 1.0):
        solver = editing.replacement(inner, jnp.zeros((1, 4000)), jnp.full((1, 1), mask))
        drawn.append(np.asarray(solver.step(keys, solver.init(jnp.zeros((2, 4000))), t, s)[0].x))
    plain = np.asarray(inner.step(keys, inner.init(jnp.zeros((2, 4000))), t, s)[0].x)
    np.testing.assert_allclose(drawn[1].std(1), s.sigma, rtol=0.06)
    for a, b in [(drawn[0][0], drawn[1][0]), (drawn[1][0], drawn[1][1]), (drawn[0][0], drawn[0][1])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
    assert plain.std() > 0.1  # the step had noise


def test_replacement_forgets_a_multistep_history(x64):
    """Without any known pixel 2M still takes first-order steps, each from a fresh start: DDIM's."""
    levels = schedules.cosine(jnp.linspace(0.9, 0.1, 9))
    d, x = gaussian(0.4, 0.3), jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)))
    got = jitted(jax.random.key(0), editing.replacement(solvers.dpmpp_2m(d), jnp.zeros((1, 3)), jnp.zeros((1, 3))), x, levels)
    np.testing.assert_allclose(got, jitted(jax.random.key(0), solvers.ddim(d), x, levels), rtol=1e-10)
    assert (np.abs(got - jitted(jax.random.key(0), solvers.dpmpp_2m(d), x, levels)) > 1e-4).all()


def test_repaint_levels_go_up_and_down_as_the_paper_has_it():
    """Written out for 7 levels; for the paper's 250 its published schedule has 2160 single steps up, here 216 of ten each."""
    names = Level(np.arange(7.0), 10 + np.arange(7.0))
    got = editing.repaint_levels(names, jump=2, times=2)
    np.testing.assert_array_equal(got.alpha, [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 4, 5, 6])
    np.testing.assert_array_equal(got.sigma, got.alpha + 10)
    padded = jax.tree.map(lambda a: np.pad(a, (0, 4), mode="edge"), names)
    for other in (editing.repaint_levels(padded, 2, 2), editing.repaint_levels(jax.tree.map(jnp.asarray, names), 2, 2)):
        np.testing.assert_array_equal(other.alpha, got.alpha)
    np.testing.assert_array_equal(editing.repaint_levels(names, 3, 1).alpha, names.alpha)

    long = times.grid(schedules.linear_beta(), times.strided(1000, 250))
    rises = np.diff(editing.repaint_levels(long).sigma) > 0
    assert (rises.size + 1, rises.sum(), (~rises).sum() + 1) == (2626, 216, 2410)


@pytest.mark.parametrize("schedule", [schedules.cosine, schedules.straight, schedules.edm])
def test_an_upward_interval_is_the_forward_process(schedule, x64):
    """q(x_s | x_t) for s noisier than t, and so the marginal of t becomes that of s; the prediction there is zero."""
    t, s = (schedule(jnp.asarray(a)) for a in (0.3, 0.8))
    x, keys = jnp.asarray([[0.5, -2.0]]), jax.random.split(jax.random.key(0), 1)
    still, moved = (editing.resampling(solvers.dpmpp_2m(gaussian(0.4, 0.3)), noise) for noise in (zeros, ones))
    state, p = still.step(keys, still.init(x), t, s)
    std = moved.step(keys, moved.init(x), t, s)[0].x - state.x
    np.testing.assert_allclose(state.x, s.alpha / t.alpha * x, rtol=1e-12)
    np.testing.assert_allclose(std**2, s.sigma**2 - (s.alpha / t.alpha * t.sigma) ** 2 + 0 * x, rtol=1e-10)
    assert (p.x0 == 0).all() and (p.eps == 0).all()
    before, _ = still.step(keys, still.init(x), s, t)
    assert not jnp.isnan(before.lam) and jnp.isnan(still.step(keys, before, t, s)[0].lam)  # upwards history is forgotten
    own = solvers.dpmpp_2m(gaussian(0.4, 0.3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), before, own.step(keys, own.init(x), s, t)[0])


def test_resampling_leaves_a_downward_grid_alone():
    """Also one that starts at alpha = 0."""
    levels, key = times.grid(schedules.cosine, times.uniform(8)), jax.random.key(0)
    x, solver = jax.random.normal(key, (3, 4)), solvers.heun(gaussian(0.4, 0.3))
    np.testing.assert_allclose(*(jitted(key, each, x, levels) for each in (solver, editing.resampling(solver))), rtol=1e-5)


def inpainted(levels, noise, x, resample=True):
    """Samples of the four correlated numbers, of which both ends are known."""
    solver = editing.replacement(solvers.ddpm(correlated(FOUR["mean"], FOUR["cov"]), noise=noise), *ENDS, noise)
    return np.asarray(jitted(jax.random.key(0), editing.resampling(solver, noise) if resample else solver, x, levels))


def test_repaint_comes_nearer_to_the_conditional_mean_than_replacement(x64):
    """Every step is affine in x and in noise of mean zero, so a run without noise gives the mean of the samples exactly."""
    free = ENDS[1][0] == 0
    want = conditional(FOUR["mean"], FOUR["cov"], np.eye(4)[~free], ENDS[0][0][~free])[0]
    levels = times.grid(schedules.cosine, times.uniform(100))

    def error(levels, resample=True):
        return np.abs(inpainted(levels, zeros, jnp.zeros((1, 4)), resample)[0] - want)[free].max()

    errors = [error(levels, False), *(error(editing.repaint_levels(levels, 10, times)) for times in (1, 3, 10, 20))]
    # Measured: 0.180 0.180 0.112 0.053 0.034, where the conditional deviations are 0.43 and 0.64.
    np.testing.assert_allclose(errors[0], errors[1], rtol=1e-6)
    assert 0.17 < errors[0] < 0.19
    assert all(after < 0.75 * before for before, after in itertools.pairwise(errors[1:]))
    assert errors[-1] < 0.04


def test_repaint_has_the_conditional_deviation_and_correlation():
    """To 6%, of which 2.5% is chance; replacement alone is 16 and 24% too wide."""
    free = ENDS[1][0] == 0
    cov = conditional(FOUR["mean"], FOUR["cov"], np.eye(4)[~free], ENDS[0][0][~free])[1][np.ix_(free, free)]
    levels = times.grid(schedules.cosine, times.uniform(100))
    x = prior(jax.random.key(1), at(levels, 0), (4000, 4))
    painted, replaced = (
        np.cov(inpainted(grid, jax.random.normal, x, resample)[:, free].T)
        for grid, resample in ((editing.repaint_levels(levels, 10, 10), True), (levels, False))
    )
    assert (np.abs(np.sqrt(np.diag(painted) / np.diag(cov)) - 1) < 0.075).all()
    assert (np.sqrt(np.diag(replaced) / np.diag(cov)) > 1.1).all()
    assert abs(painted[0, 1] / np.sqrt(painted[0, 0] * painted[1, 1]) - cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1])) < 0.06


# --- operators ------------------------------------------------------------------------------------------------------------

OPERATORS = {  # the operator, one image's shape
    "mask": (lambda: editing.mask_operator(np.asarray([[[1], [0], [1]], [[0], [0], [1]]])), (2, 3, 2)),
    "soft mask": (lambda: editing.mask_operator(np.linspace(0, 1, 6).reshape(2, 3, 1)), (2, 3, 2)),
    "average of a line": (lambda: editing.average(3), (6, 2)),
    "average": (lambda: editing.average(2), (4, 2, 2)),
    "average of a volume": (lambda: editing.average(2), (2, 4, 2, 1)),
    "grey": (lambda: editing.grey(), (2, 2, 3)),
    "grey of its own weights": (lambda: editing.grey((0.299, 0.587, 0.114)), (2, 2, 3)),
    "blur of a line": (lambda: editing.blur(1.0, (8, 1)), (8, 1)),
    "blur": (lambda: editing.blur(0.6, (4, 5, 2)), (4, 5, 2)),
    "blur that loses": (lambda: editing.blur(1.5, (6, 5, 1), 0.1), (6, 5, 1)),
    "blur of a volume": (lambda: editing.blur(0.5, (2, 3, 4, 1)), (2, 3, 4, 1)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_pseudo_inverses_satisfy_penroses_four_conditions(name, x64):
    make, shape = OPERATORS[name]
    operator = make()
    a = matrix(operator.forward, shape)
    p = matrix(operator.pseudo, np.shape(operator.forward(jnp.zeros((1, *shape))))[1:])
    for left, right in [(a @ p @ a, a), (p @ a @ p, p), ((a @ p).T, a @ p), ((p @ a).T, p @ a)]:
        np.testing.assert_allclose(left, right, atol=1e-12)
    assert 0 < np.linalg.matrix_rank(a) <= len(a) and np.isfinite(p).all()


def test_operators_measure_what_they_say(x64):
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 3))
    blocks = [[x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in (0, 2, 4)] for i in (0, 2)]
    np.testing.assert_allclose(editing.average(2).forward(jnp.asarray(x)), np.moveaxis(np.asarray(blocks), 2, 0), rtol=1e-12)
    np.testing.assert_allclose(editing.grey().forward(jnp.asarray(x))[..., 0], x.mean(-1), rtol=1e-10)
    weighted = x @ np.asarray([0.3, 0.6, -0.2])
    np.testing.assert_allclose(editing.grey((0.3, 0.6, -0.2)).forward(jnp.asarray(x))[..., 0], weighted, rtol=1e-10)

    def circular(x, axis, std):
        weights = [np.exp(-(min(i, x.shape[axis] - i) ** 2) / (2 * std**2)) for i in range(x.shape[axis])]
        return sum(w * np.roll(x, i, axis) for i, w in enumerate(weights)) / sum(weights)

    blurred = editing.blur(0.5, x.shape[1:], 1e-6).forward(jnp.asarray(x))
    np.testing.assert_allclose(blurred, circular(circular(x, 1, 0.5), 2, 0.5), rtol=1e-9)
    lost = editing.blur(1.5, (6, 5, 1), 0.1)
    assert np.linalg.matrix_rank(matrix(lost.forward, (6, 5, 1))) < 30
    assert np.abs(matrix(lost.pseudo, (6, 5, 1))).sum(1).max() < 30  # nothing is amplified more than tenfold


# --- measurements as denoisers --------------------------------------------------------------------------------------------


def problem(name, scale=1.0, seed=0):
    """An operator, its matrix, a correlated Gaussian (its mean and covariance), a batch of x and one measurement y for all."""
    make, shape = OPERATORS[name]
    operator, rng = make(), np.random.default_rng(seed)
    mean, cov = markov(shape)
    x = scale * rng.standard_normal((3, *shape))
    y = operator.forward(jnp.asarray(rng.multivariate_normal(mean, cov).reshape(1, *shape)))
    return operator, matrix(operator.forward, shape), mean, cov, jnp.asarray(x), y


@pytest.mark.parametrize(
    ("name", "make"), [*((name, solvers.heun) for name in OPERATORS), ("average", solvers.ddpm), ("blur", solvers.dpmpp_2m)]
)
def test_the_null_space_keeps_the_measurement(name, make):
    """A x0 = y to 1e-5 in float32, at every step and at the end, and the rest of x0 is the denoiser's."""
    operator, a, mean, cov, x, y = problem(name)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    plain, levels = correlated(mean, cov), times.grid(schedules.cosine, times.uniform(10))
    held = editing.null_space(plain, operator, y)
    made = jitted(jax.random.key(0), make(held), x, levels)
    np.testing.assert_allclose(operator.forward(made), jnp.broadcast_to(y, (3, *y.shape[1:])), atol=1e-5)
    free = np.linalg.matrix_rank(a, 1e-4) < a.shape[1]
    assert (jnp.abs(made[0] - made[1]) > 1e-3).any() == free  # the measurement fixes nothing else

    level = at(levels, 4)
    p, q = predicted(held, x, level), plain(x, level)
    np.testing.assert_allclose(operator.forward(p.x0), jnp.broadcast_to(y, (3, *y.shape[1:])), atol=1e-5)
    np.testing.assert_allclose(level.alpha * p.x0 + level.sigma * p.eps, x, atol=1e-5)
    other = np.eye(a.shape[1]) - np.linalg.pinv(a, rcond=1e-5) @ a
    np.testing.assert_allclose(*(np.asarray(each.x0).reshape(3, -1) @ other for each in (p, q)), atol=1e-5)


def both(p, x):
    return np.stack([np.asarray(a).reshape(len(x), -1) for a in (p.x0, p.eps)])


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("t", [0.95, 0.5, 0.05])
def test_of_isotropic_data_the_posterior_is_exact(name, t, x64):
    """Of N(m, v I) the mean and score given x and y, from the full covariances: by the pseudo-inverse and by the null space."""
    operator, a, mean, _, x, y = problem(name)
    std, level = 0.6, level_at(schedules.cosine, t)
    d = correlated(mean, std**2 * np.eye(len(mean)))
    posterior = (given_x(mean, std**2 * np.eye(len(mean)), each.ravel(), level) for each in np.asarray(x))
    x0 = np.stack([conditional(*each, a, np.asarray(y).ravel())[0] for each in posterior])
    want = np.stack([x0, (np.asarray(x).reshape(3, -1) - level.alpha * x0) / level.sigma])
    for made in (editing.pseudo_inverse(d, operator, y, std), editing.null_space(d, operator, y)):
        np.testing.assert_allclose(both(predicted(made, x, level), x), want, rtol=1e-8, atol=1e-8)
    other = predicted(editing.pseudo_inverse(d, operator, y, 0.5), x, level)
    assert np.abs(both(other, x) - want).max() > 1e-6  # another data_std is felt


@pytest.mark.parametrize("name", ["mask", "average", "grey", "blur"])
def test_gradients_go_through_the_denoiser(name, x64):
    """Of correlated data: x0's derivative is alpha Cov (alpha^2 Cov + sigma^2)^-1, so both shifts are products of matrices."""
    operator, a, mean, cov, x, y = problem(name)
    level, v, scale = level_at(schedules.linear_beta(), 0.4), 0.7**2, 1.7
    d, flat = correlated(mean, cov), np.asarray(x).reshape(3, -1)
    x0 = np.stack([given_x(mean, cov, each, level)[0] for each in flat])
    jacobian = level.alpha * cov @ np.linalg.inv(level.alpha**2 * cov + level.sigma**2 * np.eye(len(mean)))
    residual = np.asarray(y).ravel() - x0 @ a.T
    r2 = level.sigma**2 * v / (level.alpha**2 * v + level.sigma**2)
    guided = editing.pseudo_inverse(d, operator, y, 0.7)
    by_inverse = level.sigma**2 / (level.alpha * r2) * residual @ np.linalg.pinv(a, rcond=1e-10).T @ jacobian
    by_error = scale * level.alpha * residual @ a @ jacobian
    shifts = [(guided, by_inverse), (editing.reconstruction(d, operator, y, scale), by_error)]
    for made, shift in shifts:
        p = both(predicted(made, x, level), x)
        np.testing.assert_allclose(p[0], x0 + shift, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(level.alpha * p[0] + level.sigma * p[1], flat, rtol=1e-9, atol=1e-9)
        assert np.abs(shift).max() > 1e-2


def test_reconstruction_is_exact_where_theory_says_so(x64):
    """Of N(m, v I) and known pixels the exact scale is 1 + (sigma / alpha)^2 / v: 1 where v is large."""
    operator, _, mean, _, x, y = problem("mask")
    level = schedules.cosine(jnp.asarray(0.6))
    for v in (0.5, 1e9):
        d, exact = correlated(mean, v * np.eye(len(mean))), 1 + (level.sigma / level.alpha) ** 2 / v
        want = editing.null_space(d, operator, y)(x, level)
        for scale in (exact, jnp.full((3, 1, 1, 1), exact), *([1.0] if v > 1e6 else [])):
            got = editing.reconstruction(d, operator, y, scale)(x, level)
            np.testing.assert_allclose(both(got, x), both(want, x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(both(editing.reconstruction(d, operator, y, 0.0)(x, level), x), both(d(x, level), x), atol=1e-9)
    mixed = editing.reconstruction(d, operator, y, jnp.asarray([0.0, exact, 0.0]).reshape(3, 1, 1, 1))(x, level)
    np.testing.assert_allclose(both(mixed, x)[:, 1], both(want, x)[:, 1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(both(mixed, x)[:, 2], both(d(x, level), x)[:, 2], atol=1e-9)


def test_pseudo_inverse_says_nothing_at_alpha_zero():
    """Also where an imperfect denoiser's derivative does."""
    operator, _, _, _, x, y = problem("average")

    def denoise(x, level):
        return Prediction(0.1 * x, x)

    for alpha, moves in ((0.0, False), (1e-3, True)):
        level = Level(jnp.float32(alpha), jnp.float32(1))
        got = editing.pseudo_inverse(denoise, operator, y)(x, level)
        assert (got.x0 != 0.1 * x).any() == moves and jnp.isfinite(got.x0).all() and jnp.isfinite(got.eps).all()


def test_aux_passes_through():
    operator, _, _, _, x, y = problem("mask")
    level = schedules.cosine(jnp.float32(0.5))

    def says(x, level):
        return gaussian(0.4, 0.3)(x, level)._replace(aux={"variance": 2 * x})

    for make in (editing.null_space, editing.reconstruction, editing.pseudo_inverse):
        np.testing.assert_array_equal(make(says, operator, y)(x, level).aux["variance"], 2 * x)


def test_measurements_bring_samples_nearer_to_their_conditional_mean(x64):
    """The four correlated numbers of which both ends are known; the mean of the samples, exactly, as for RePaint."""
    free = ENDS[1][0] == 0
    want = conditional(FOUR["mean"], FOUR["cov"], np.eye(4)[~free], ENDS[0][0][~free])[0]
    levels, d = times.grid(schedules.cosine, times.uniform(100)), correlated(FOUR["mean"], FOUR["cov"])
    operator, y = editing.mask_operator(ENDS[1]), ENDS[0]

    def error(denoise):
        made = jitted(jax.random.key(0), solvers.ddpm(denoise, noise=zeros), jnp.zeros((1, 4)), levels)[0]
        return np.abs(made - want)[free].max()

    made = [editing.null_space(d, operator, y), editing.reconstruction(d, operator, y, 1.0), editing.pseudo_inverse(d, operator, y)]
    errors = [error(each) for each in made]
    assert max(errors) < 0.5 * error(d)


# --- images as starting points --------------------------------------------------------------------------------------------


def test_sdedit_is_noising_and_sampling(x64):
    """From alpha x0 + sigma noise along the whole grid, whatever the solver then draws."""
    levels = times.grid(schedules.cosine, 0.6 * times.uniform(12), 20)
    x0, d = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2))), gaussian(0.4, 0.3)
    for noise, fresh in ((zeros, 0), (ones, 1)):
        got = editing.sdedit(jax.random.key(0), solvers.ddim(d), x0, levels, noise)
        start = levels.alpha[0] * x0 + levels.sigma[0] * fresh
        np.testing.assert_allclose(got, sample(jax.random.key(1), solvers.ddim(d), start, levels), rtol=1e-6)
    a, b = (editing.sdedit(jax.random.key(k), solvers.ddim(d), x0, levels) for k in (0, 1))
    assert (np.abs(a - b) > 1e-4).all() and (np.abs(a[0] - a[1]) > 1e-4).all()


@pytest.mark.parametrize("make", [solvers.ddpm, solvers.ddim])
def test_sdedit_leaves_as_much_of_the_image_as_the_strength_says(make):
    """Of N(0, 1) data the flow ends where it starts and the reverse process forgets as much as the forward one: known distances."""
    x0, levels = jax.random.normal(jax.random.key(0), (500, 8)), times.grid(schedules.cosine, times.uniform(400))
    run = jax.jit(editing.sdedit)
    for strength in (0.0025, 0.1, 0.5, 1.0):
        part = editing.from_strength(levels, strength)
        moved = jnp.sqrt(jnp.square(run(jax.random.key(1), make(gaussian(0.0, 1.0)), x0, part) - x0).mean())
        # One level is no step: then only the denoiser's own shrinking of the noise is left, alpha sigma, for either.
        want = np.sqrt(2 - 2 * part.alpha[0] ** (2 if make is solvers.ddpm else 1)) if strength > 0.01 else levels.sigma[-1]
        np.testing.assert_allclose(moved, want, rtol=0.05)
    assert levels.sigma[-1] < 0.004


def test_from_strength_keeps_the_least_noisy_levels_and_the_length():
    levels = Level(np.arange(10.0), np.arange(10.0))
    padded = jax.tree.map(lambda a: np.pad(a, (0, 5), mode="edge"), levels)
    for strength, first in [(1.0, 0), (0.6, 4), (0.5, 5), (0.1, 9), (1e-9, 9)]:
        for grid in (levels, padded, jax.tree.map(jnp.asarray, padded)):
            got = editing.from_strength(grid, strength)
            assert isinstance(got.alpha, np.ndarray) and got.alpha.shape == grid.alpha.shape
            np.testing.assert_array_equal(got.alpha, np.minimum(first + np.arange(len(grid.alpha)), 9))
            np.testing.assert_array_equal(got.sigma, got.alpha)
    one = Level(np.ones(3), np.ones(3))
    np.testing.assert_array_equal(editing.from_strength(one, 0.5).alpha, one.alpha)


MEAN, VAR = np.asarray([[0.5, -0.2, 0.0]]), np.asarray([[0.2, 1.5, 4.0]])


def steps(n):
    """n smooth steps from almost noise to noise of deviation 1e-5, below which the start of `invert` errs by 1e-10."""
    return schedules.cosine(2 / np.pi * jnp.arctan(jnp.exp(jnp.linspace(5.0, np.log(1e-5), n + 1))))


@pytest.mark.parametrize(("make", "orders"), [(solvers.ddim, (1, 1)), (solvers.heun, (2, 3)), (solvers.dpmpp_2m, (2, 2))])
def test_inversion_finds_the_noise_at_the_solvers_order(make, orders, x64):
    """The probability flow's own, and the image again on the way back, where the trapezoid rule undoes its own leading error."""
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    solver, invert, errors = make(gaussian(MEAN, VAR)), jax.jit(editing.invert), []
    for n in (256, 512):
        levels = steps(n)
        x = invert(solver, x0, levels)
        ends = [jax.tree.map(lambda a, i=i: np.asarray(a)[i], levels) for i in (-1, 0)]
        exact = flow(MEAN, VAR, ends[0].alpha * np.asarray(x0), *ends)
        again = jitted(jax.random.key(0), solver, x, levels)
        errors.append([np.abs(x - exact).max(), np.abs(again - x0).max()])
    assert (np.abs(np.log2(np.divide(*errors)) - orders) < 0.15).all(), errors
    assert max(errors[-1]) < (0.1 if make is solvers.ddim else 2e-3), errors


def test_inversion_begins_at_the_scaled_image_and_skips_padding(x64):
    levels, x0 = times.grid(schedules.cosine, times.uniform(6)), jnp.asarray([[0.3, -1.2]])
    one = editing.invert(solvers.ddim(gaussian(0.4, 0.3)), x0, jax.tree.map(lambda a: a[-1:], levels))
    np.testing.assert_allclose(one, levels.alpha[-1] * x0, rtol=1e-12)
    padded = times.grid(schedules.cosine, times.uniform(6), 9)
    for solver in (solvers.ddim(gaussian(0.4, 0.3)), solvers.dpmpp_2m(gaussian(0.4, 0.3)), solvers.ddim(gaussian(0.4, 0.3), 1.0)):
        a, b = (editing.invert(solver, x0, each) for each in (levels, padded))
        np.testing.assert_allclose(a, b, rtol=1e-12)
    rising = jax.tree.map(lambda a: a[::-1], levels)
    up, _ = solve(jax.random.key(3), solvers.ddim(gaussian(0.4, 0.3)), levels.alpha[-1] * x0, rising)
    np.testing.assert_allclose(editing.invert(solvers.ddim(gaussian(0.4, 0.3), 1.0), x0, levels), up.x, rtol=1e-12)


def test_interpolation_follows_the_arc():
    """Of right angles, equal lengths and equal steps; each sample by its own angle."""
    a, b = jnp.asarray([[[1.0, 0.0]], [[0.0, 2.0]]]), jnp.asarray([[[0.0, 1.0]], [[2.0, 0.0]]])
    got = np.asarray(editing.interpolate(a, b, 5))
    angle = np.linspace(0, np.pi / 2, 5)
    np.testing.assert_allclose(got[:, 0, 0], np.stack([np.cos(angle), np.sin(angle)], 1), atol=1e-6)
    np.testing.assert_allclose(got[:, 1, 0], 2 * np.stack([np.sin(angle), np.cos(angle)], 1), atol=1e-6)

    a, b = (jax.random.normal(jax.random.key(k), (3, 4, 5)) for k in (0, 1))
    got = np.asarray(editing.interpolate(a, b, 7))
    np.testing.assert_array_equal(got[0], a)
    np.testing.assert_array_equal(got[-1], b)
    for i in range(3):
        u, v = (np.asarray(each[i], np.float64) for each in (a, b))
        theta = np.arccos((u * v).sum() / np.linalg.norm(u) / np.linalg.norm(v))
        want = [(np.sin((1 - w) * theta) * u + np.sin(w * theta) * v) / np.sin(theta) for w in np.linspace(0, 1, 7)]
        np.testing.assert_allclose(got[:, i], want, atol=1e-5)


def test_interpolation_is_a_line_at_angle_zero():
    a = jax.random.normal(jax.random.key(0), (2, 6))
    np.testing.assert_allclose(editing.interpolate(a, a, 4), jnp.stack(4 * [a]), rtol=1e-6)
    line = np.linspace(1, 3, 4)[:, None, None] * np.asarray(a)
    np.testing.assert_allclose(editing.interpolate(a, 3 * a, 4), line, rtol=1e-5)
    np.testing.assert_allclose(editing.interpolate(a, a * (1 + 1e-6), 4), jnp.stack(4 * [a]), rtol=1e-5)
    np.testing.assert_allclose(editing.interpolate(0 * a, a, 3)[1], a / 2, rtol=1e-6)


# --- how it runs ----------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_same_alone_and_in_any_batch():
    levels, d = times.grid(schedules.cosine, times.uniform(12)), gaussian(0.4, 0.3)
    keys, image, mask = sample_keys(jax.random.key(0), 3), jnp.ones((1, 4)), np.asarray([1.0, 0.0, 0.0, 1.0])
    painter, grid = editing.resampling(editing.replacement(solvers.ddpm(d), image, mask)), editing.repaint_levels(levels, 4, 3)
    x = prior(jax.random.key(1), at(levels, 0), (3, 4))
    x0, edit = jax.random.normal(jax.random.key(2), (3, 4)), jax.jit(editing.sdedit)

    def painted(rows):
        return np.asarray(jitted(keys[rows], painter, x[rows], grid))

    def edited(rows):
        return np.asarray(edit(keys[rows], solvers.ddpm(d), x0[rows], levels))

    for run in (painted, edited):
        full = run(slice(None))
        for i in range(3):
            np.testing.assert_allclose(run(slice(i, i + 1)), full[i : i + 1], atol=1e-5)
        assert (np.abs(full[0] - full[1])[1:3] > 1e-4).all()


def test_one_trace_serves_every_image_mask_scale_measurement_and_strength():
    shape, d = (4, 4, 3), gaussian(0.4, 0.3)
    x, levels = jax.random.normal(jax.random.key(0), (2, *shape)), times.grid(schedules.cosine, times.uniform(6))
    y = jnp.ones((2, 2, 2, 3))

    def painter(value=0.5, mask=0.6, eta=1.0):
        image, mask = jnp.full((1, *shape), value), jnp.full((1, 4, 4, 1), mask)
        return editing.resampling(editing.replacement(solvers.ddim(d, eta), image, mask))

    makers = {
        "painted": [painter(), painter(0.1), painter(mask=0.3), painter(eta=0.5)],
        "averaged": [solvers.heun(editing.null_space(d, editing.average(2), value * y)) for value in (0.1, 0.9)],
        "reconstructed": [
            solvers.heun(editing.reconstruction(d, editing.average(2), value * y, scale)) for value, scale in ((1, 1.0), (2, 3.0))
        ],
        "coloured": [solvers.heun(editing.pseudo_inverse(d, editing.grey(w), x[..., :1])) for w in ((1, 1, 1), (0.2, 0.3, 0.5))],
        "masked": [solvers.heun(editing.null_space(d, editing.mask_operator(jnp.full(shape, m)), x)) for m in (0.0, 1.0)],
        "sharpened": [solvers.heun(editing.null_space(d, editing.blur(std, shape), x)) for std in (0.5, 1.0)],
    }
    for name, made in makers.items():
        chex.clear_trace_counter()
        run = jax.jit(chex.assert_max_traces(sample, n=1))
        results = [run(jax.random.key(0), solver, x, levels) for solver in made]
        assert all((jnp.abs(other - results[0]) > 1e-6).any() for other in results[1:]), name

    chex.clear_trace_counter()
    edit = jax.jit(chex.assert_max_traces(editing.sdedit, n=1))
    parts = [edit(jax.random.key(0), solvers.ddim(d), x, editing.from_strength(levels, strength)) for strength in (0.3, 0.6, 1.0)]
    assert (jnp.abs(parts[0] - parts[1]) > 1e-6).any()


def test_masks_and_scales_may_be_traced():
    """Nothing is known of their values then, so nothing is refused."""
    x, level = jnp.ones((1, 3)), schedules.cosine(jnp.float32(0.5))

    @jax.jit
    def run(mask, scale):
        operator = editing.mask_operator(mask)
        return editing.reconstruction(gaussian(0.4, 0.3), operator, x, scale)(x, level).x0

    assert jnp.isnan(run(jnp.ones((1, 3)), jnp.nan)).all() and jnp.isfinite(run(jnp.ones((1, 3)), 1.0)).all()


X = np.zeros((2, 4, 4, 3), np.float32)
LEVELS = Level(np.linspace(0.1, 0.9, 9), np.linspace(0.9, 0.1, 9))
D = gaussian(0.4, 0.3)
HALF = Level(jnp.float32(0.6), jnp.float32(0.8))
ERRORS = {
    "mask of another shape": (lambda: editing.replacement(solvers.ddim(D), X, np.ones((1, 4, 5, 1))), "does not fit an image"),
    "mask below": (lambda: editing.replacement(solvers.ddim(D), X, np.full((4, 4, 1), -0.1)), "outside"),
    "mask above": (lambda: editing.replacement(solvers.ddim(D), X, np.full((4, 4, 1), 1.5)), "outside"),
    "mask not a number": (lambda: editing.mask_operator(np.full((4, 4, 1), np.nan)), "outside"),
    "mask that x does not fit": (
        lambda: sample(jax.random.key(0), editing.replacement(solvers.ddim(D), X[:1, :, :, :1], np.ones((4, 4, 5))), X, LEVELS),
        "does not fit",
    ),
    "known that x does not fit": (
        lambda: sample(jax.random.key(0), editing.replacement(solvers.ddim(D), np.zeros((3, 4, 4, 3)), np.ones((4, 1))), X, LEVELS),
        "known of shape",
    ),
    "mask with more axes than x": (lambda: editing.mask_operator(np.ones((1, 1, 1, 1, 1))).forward(X), "mask of shape"),
    "y of another shape": (
        lambda: editing.null_space(D, editing.average(2), np.zeros((2, 4, 4, 3)))(jnp.asarray(X), HALF),
        "y of shape",
    ),
    "y with too many channels": (
        lambda: editing.pseudo_inverse(D, editing.grey(), np.zeros((2, 4, 4, 3)))(jnp.asarray(X), HALF),
        "y of shape",
    ),
    "scale not a number": (lambda: editing.reconstruction(D, editing.average(2), X, np.nan), "finite scale"),
    "scale infinite": (lambda: editing.reconstruction(D, editing.average(2), X, np.asarray([1.0, np.inf])), "finite scale"),
    "data_std zero": (lambda: editing.pseudo_inverse(D, editing.average(2), X, 0.0), "data_std"),
    "factor zero": (lambda: editing.average(0), "positive integer"),
    "factor negative": (lambda: editing.average(-2), "positive integer"),
    "factor of a half": (lambda: editing.average(1.5), "positive integer"),
    "factor that does not divide": (lambda: editing.average(3).forward(jnp.asarray(X)), "does not divide"),
    "grey without weights": (lambda: editing.grey((0, 0, 0)), "weight"),
    "grey of an infinite weight": (lambda: editing.grey((1, np.inf, 0)), "weight"),
    "grey of two channels": (lambda: editing.grey((1, 2)).forward(jnp.asarray(X)), "2 weights"),
    "blur of nothing": (lambda: editing.blur(0.0, (4, 4, 3)), "std > 0"),
    "blur that keeps all": (lambda: editing.blur(1.0, (4, 4, 3), 0.0), "threshold"),
    "blur of another shape": (lambda: editing.blur(1.0, (4, 5, 3)).forward(jnp.asarray(X)), "does not fit"),
    "strength zero": (lambda: editing.from_strength(LEVELS, 0.0), "strength=0"),
    "strength above": (lambda: editing.from_strength(LEVELS, 1.01), "strength=1.01"),
    "strength not a number": (lambda: editing.from_strength(LEVELS, np.nan), "strength=nan"),
    "no jump": (lambda: editing.repaint_levels(LEVELS, 0), "jump=0"),
    "a jump as long as the grid": (lambda: editing.repaint_levels(LEVELS, 9), "1 <= jump < 9"),
    "no times": (lambda: editing.repaint_levels(LEVELS, 2, 0), "times=0"),
    "one point": (lambda: editing.interpolate(jnp.asarray(X), jnp.asarray(X), 1), "n=1"),
    "two shapes": (lambda: editing.interpolate(jnp.asarray(X), jnp.asarray(X[:1]), 3), "one shape"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_are_refused_in_one_line(name):
    call, says = ERRORS[name]
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
