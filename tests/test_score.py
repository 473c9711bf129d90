"""Score matching losses against each other; the stochastic differential equations against Gaussian data and published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import flow, gaussian

from jaxdiff import schedules, score
from jaxdiff.level import Level, diffuse, logsnr

# Data N(MEAN, COV) in two dimensions, a level, and a linear score -(A x - b) that is not the true one.
MEAN, COV = np.asarray([0.5, -1.0]), np.asarray([[1.0, 0.6], [0.6, 0.8]])
LEVEL = Level(0.8, 0.6)
PARAMS = {"A": jnp.asarray([[0.9, -0.3], [0.2, 1.4]]), "b": jnp.asarray([0.3, -0.2])}


def linear(params, x):
    return -(x @ params["A"].T - params["b"][None])


def noisy():
    """(mean, precision) of the data at LEVEL."""
    return LEVEL.alpha * MEAN, np.linalg.inv(LEVEL.alpha**2 * COV + LEVEL.sigma**2 * np.eye(2))


def true_score(x):
    mean, precision = noisy()
    return -(x - mean[None]) @ precision


def exact_gradient():
    """Of half the expected squared distance of `linear` from the noisy data's score, in NumPy: with e(x) = s(x) - true(x) linear
    in x, the gradients are -E[e x'] and E[e]."""
    mean, precision = noisy()
    slope = -np.asarray(PARAMS["A"], np.float64) + precision
    shift = np.asarray(PARAMS["b"], np.float64) - precision @ mean
    off = slope @ mean + shift
    return {"A": -(slope @ np.linalg.inv(precision) + np.outer(off, mean)), "b": off}


def samples(key, n):
    """Data x0 and its noise, [n, 2] each."""
    k_x, k_eps = jax.random.split(key)
    x0 = MEAN[None] + jax.random.normal(k_x, (n, 2)) @ np.linalg.cholesky(COV).T
    return x0, jax.random.normal(k_eps, (n, 2))


LOSSES = {
    "explicit": lambda key, s, x0, eps: score.explicit_score_matching(s, true_score, moved(x0, eps)),
    "denoising": lambda key, s, x0, eps: score.denoising_score_matching(None, s, x0, LEVEL, eps),
    "implicit": lambda key, s, x0, eps: score.implicit_score_matching(s, moved(x0, eps)),
    "sliced": lambda key, s, x0, eps: score.sliced_score_matching(key, s, moved(x0, eps), projections=2),
}


def moved(x0, eps):
    return diffuse(LEVEL, x0, eps)


@pytest.mark.parametrize("name", LOSSES)
def test_every_criterion_has_the_gradient_of_explicit_score_matching(name, x64):
    """50 batches of 2,000 samples: the mean gradient is within 4 standard errors of the closed form, in all 6 entries."""

    @jax.jit
    def gradient(key):
        k_data, k_sign = jax.random.split(key)
        return jax.grad(lambda params: LOSSES[name](k_sign, lambda x: linear(params, x), *samples(k_data, 2000)).mean())(PARAMS)

    many = jax.lax.map(gradient, jax.random.split(jax.random.key(1), 50))
    want = exact_gradient()
    for entry in ("A", "b"):
        error = np.asarray(many[entry].std(0)) / np.sqrt(49)
        assert (abs(np.asarray(many[entry].mean(0)) - want[entry]) < 4 * error).all()
        assert (error < 0.02).all()


def test_denoising_differs_from_explicit_by_a_constant_and_is_least_at_the_true_score(x64):
    """Vincent 2011: the constant is half the expected squared length of -eps / sigma less that of the score."""
    x0, eps = samples(jax.random.key(0), 400_000)

    def loss(s):
        return float(score.denoising_score_matching(None, s, x0, LEVEL, eps).mean())

    constant = (2 / LEVEL.sigma**2 - np.trace(noisy()[1])) / 2
    np.testing.assert_allclose(loss(true_score), constant, rtol=0.01)
    assert loss(true_score) < loss(lambda x: 1.05 * true_score(x)) < loss(lambda x: linear(PARAMS, x))
    drawn = score.denoising_score_matching(jax.random.key(5), true_score, x0, LEVEL)
    assert drawn.shape == (400_000,)
    np.testing.assert_allclose(drawn.mean(), constant, rtol=0.01)


def bent(x):
    """A score whose Jacobian is neither diagonal nor symmetric, of samples [B, 2, 3]."""
    y = x.reshape(x.shape[0], -1)
    return (jnp.sin(y) * jnp.roll(y, 1, axis=1) - y**3).reshape(x.shape)


def test_implicit_score_matching_has_the_exact_trace():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 3)), jnp.float32)
    got = score.implicit_score_matching(bent, x)
    for i in range(5):
        jacobian = jax.jacobian(lambda one: bent(one[None])[0])(x[i]).reshape(6, 6)
        np.testing.assert_allclose(got[i], jnp.trace(jacobian) + (bent(x)[i] ** 2).sum() / 2, rtol=1e-5)


def test_sliced_score_matching_estimates_it_and_more_projections_do_so_better():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 3)), jnp.float32)
    keys, want = jax.random.split(jax.random.key(0), 2000), score.implicit_score_matching(bent, x)
    one, eight = (jax.vmap(lambda key, n=n: score.sliced_score_matching(key, bent, x, projections=n))(keys) for n in (1, 8))
    for got in (one, eight):
        assert (abs(got.mean(0) - want) < 4.5 * got.std(0) / np.sqrt(2000) + 1e-4).all()
    np.testing.assert_allclose((eight.std(0) / one.std(0)), 8**-0.5, rtol=0.15)


def test_the_score_of_a_denoiser_is_the_gradient_of_the_log_density():
    mean, var = 0.3, 1.7
    level = jax.tree.map(lambda a: a.reshape(4, 1), schedules.straight(jnp.asarray([0.1, 0.4, 0.7, 1.0])))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)

    def log_density(x):
        return (-((x - level.alpha * mean) ** 2) / (2 * (level.alpha**2 * var + level.sigma**2))).sum()

    got = score.score_of(gaussian(mean, var), level)(x)
    np.testing.assert_allclose(got, jax.grad(log_density)(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got, score.score(gaussian(mean, var)(x, level), level))


def beta(t):
    return 0.1 + t * 19.9


# score_sde's drift over x, and its diffusion (Song et al. 2021, eqs. 30, 32 and 27; straight by its own derivative).
PUBLISHED = {
    "vp": (schedules.vp(), lambda t: -beta(t) / 2, lambda t: np.sqrt(beta(t))),
    "ve": (schedules.ve(0.01, 50.0), lambda t: 0.0, lambda t: 0.01 * 5000**t * np.sqrt(2 * np.log(5000))),
    "subvp": (
        schedules.subvp(),
        lambda t: -beta(t) / 2,
        lambda t: np.sqrt(beta(t) * (1 - np.exp(-2 * (0.1 * t + 19.9 * t**2 / 2)))),
    ),
    "straight": (schedules.straight, lambda t: -1 / (1 - t), lambda t: np.sqrt(2 * t / (1 - t))),
    "edm": (schedules.edm, lambda t: 0.0, lambda t: np.sqrt(2 * t)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_forward_sde_is_the_published_one(name, x64):
    schedule, slope, noise = PUBLISHED[name]
    drift, diffusion = score.forward_sde(schedule)
    x = jnp.asarray([[1.0, -2.0], [0.5, 3.0]])
    for t in (1e-3, 0.2, 0.5, 0.99):
        np.testing.assert_allclose(drift(x, jnp.asarray(t)), slope(t) * x, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(diffusion(jnp.asarray(t)), noise(t), rtol=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_g_squared_is_minus_sigma_squared_times_the_slope_of_logsnr(name, x64):
    schedule, t = PUBLISHED[name][0], jnp.asarray(0.37)
    _, slope = jax.jvp(lambda t: logsnr(schedule(t)), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(score.forward_sde(schedule)[1](t) ** 2, -(schedule(t).sigma ** 2) * slope, rtol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_reverse_sde_is_its_equation(name, eta, x64):
    """Song et al. 2021, eq. 6 at eta = 1 and eq. 13 at eta = 0: f - (1 + eta^2) / 2 g^2 score, and eta g."""
    schedule, denoise, t = PUBLISHED[name][0], gaussian(0.4, 0.5), jnp.asarray(0.6)
    x = jnp.asarray([[1.0, -2.0], [0.5, 3.0]])
    f, g = score.forward_sde(schedule)
    drift, diffusion = score.reverse_sde(denoise, schedule, eta)
    want = f(x, t) - (1 + eta**2) / 2 * g(t) ** 2 * score.score_of(denoise, schedule(t))(x)
    np.testing.assert_allclose(drift(x, t), want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(diffusion(t), eta * g(t), rtol=1e-12)


MADE = {"vp": (schedules.vp(), 1e-3, 1.0), "ve": (schedules.ve(0.01, 10.0), 0.0, 1.0), "straight": (schedules.straight, 0.02, 0.9)}


@pytest.mark.parametrize("name", MADE)
def test_the_flow_without_noise_is_the_closed_form(name, x64):
    """400 steps of the classical Runge-Kutta rule, t falling along t^2 where the schedules bend most."""
    schedule, end, start = MADE[name]
    mean, var = 0.4, 0.3
    drift, diffusion = score.reverse_sde(gaussian(mean, var), schedule, eta=0.0)
    assert diffusion(jnp.asarray(0.5)) == 0
    x = start_x = jnp.asarray([[1.5, -0.7, 0.1]])

    def step(x, ends):
        t, h = ends[0], ends[1] - ends[0]
        a = drift(x, t)
        b = drift(x + h / 2 * a, t + h / 2)
        c = drift(x + h / 2 * b, t + h / 2)
        return x + h / 6 * (a + 2 * b + 2 * c + drift(x + h * c, t + h)), None

    grid = end + (start - end) * jnp.linspace(1, 0, 401) ** 2
    x, _ = jax.lax.scan(step, x, jnp.stack([grid[:-1], grid[1:]], 1))
    want = flow(mean, var, start_x, schedule(jnp.asarray(start)), schedule(jnp.asarray(end)))
    np.testing.assert_allclose(x, want, rtol=1e-6)


def euler_maruyama(key, drift, diffusion, x, grid):
    def step(x, inputs):
        key, t, s = inputs
        noise = jax.random.normal(key, x.shape, x.dtype)
        return x + (s - t) * drift(x, t) + jnp.sqrt(jnp.abs(s - t)) * diffusion(t) * noise, None

    keys = jax.random.split(key, len(grid) - 1)
    return jax.lax.scan(step, x, (keys, grid[:-1], grid[1:]))[0]


def noisy_gaussian(key, n, level, mean, var):
    return level.alpha * mean + jnp.sqrt(level.alpha**2 * var + level.sigma**2) * jax.random.normal(key, (n, 1))


@pytest.mark.parametrize("eta", [0.6, 1.0])
@pytest.mark.parametrize("name", MADE)
def test_the_reverse_sde_takes_noise_to_the_data(name, eta):
    """Euler-Maruyama, 800 steps, 40,000 samples of N(0.4, 0.3): within 4 standard errors and 1% for the steps' bias."""
    schedule, end, start = MADE[name]
    mean, var, n = 0.4, 0.3, 40_000
    drift, diffusion = score.reverse_sde(gaussian(mean, var), schedule, eta)
    k_start, k_steps = jax.random.split(jax.random.key(0))
    x = noisy_gaussian(k_start, n, schedule(jnp.float32(start)), mean, var)
    x = jax.jit(euler_maruyama)(k_steps, drift, diffusion, x, end + (start - end) * jnp.linspace(1, 0, 801) ** 2)
    low = schedule(jnp.float32(end))
    std = float(jnp.sqrt(low.alpha**2 * var + low.sigma**2))
    np.testing.assert_allclose(x.mean(), low.alpha * mean, atol=4 * std / np.sqrt(n) + 0.01 * std)
    np.testing.assert_allclose(x.std(), std, rtol=4 / np.sqrt(2 * n) + 0.01)


@pytest.mark.parametrize("name", MADE)
def test_the_forward_sde_takes_data_to_the_schedules_level(name):
    """The same rule upward: alpha of the data and sigma of the noise."""
    schedule, first, last = MADE[name]
    mean, var, n = 0.4, 0.3, 40_000
    drift, diffusion = score.forward_sde(schedule)
    k_start, k_steps = jax.random.split(jax.random.key(0))
    x = noisy_gaussian(k_start, n, schedule(jnp.float32(first)), mean, var)
    high = schedule(jnp.float32(last))
    x = jax.jit(euler_maruyama)(k_steps, drift, diffusion, x, jnp.linspace(first, last, 801))
    std = float(jnp.sqrt(high.alpha**2 * var + high.sigma**2))
    np.testing.assert_allclose(x.mean(), high.alpha * mean, atol=4 * std / np.sqrt(n) + 0.01 * std)
    np.testing.assert_allclose(x.std(), std, rtol=4 / np.sqrt(2 * n) + 0.02)


def test_diffrax_integrates_the_drift_as_it_is():
    """Any solver of differential equations takes the pair: diffrax's Tsit5 on the flow gives the closed form."""
    diffrax = pytest.importorskip("diffrax", reason="optional: pip install diffrax")
    schedule, end, start = MADE["vp"]
    mean, var = 0.4, 0.3
    drift, _ = score.reverse_sde(gaussian(mean, var), schedule, eta=0.0)
    x = jnp.asarray([[1.5, -0.7, 0.1]])
    done = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, args: drift(x, jnp.asarray(t))),
        diffrax.Tsit5(),
        t0=start,
        t1=end,
        dt0=-1e-3,
        y0=x,
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
    )
    want = flow(mean, var, x, schedule(jnp.float32(start)), schedule(jnp.float32(end)))
    np.testing.assert_allclose(done.ys[-1], want, rtol=1e-3)
