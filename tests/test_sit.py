"""SiT on the straight path: its ODE and SDE samplers give the same distribution, of a mixture that is known in closed form.

The perfect network says the velocity, as a trained one would: unit-scale x and logsnr in, the target `flow` out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian, mixture, network

from jaxdiff import schedules, solvers, targets, times
from jaxdiff.denoiser import denoiser
from jaxdiff.level import Level, posterior_std
from jaxdiff.sampling import prior, sample

WEIGHTS, STDS = np.asarray([0.5, 0.3, 0.2]), np.asarray([0.3, 0.2, 0.4])
MEANS = np.asarray([[2.0, 0.0], [-2.0, 1.6], [-1.0, -2.4]])
N = 4000


def velocity(data):
    return denoiser(network(data, targets.flow), targets.flow)


def by_sigma(t, s, prediction):
    """The deviation of a step of the reverse SDE whose diffusion is w_t = sigma_t, as the authors' code has it by default.

    Noise is lost at the rate w / sigma^2 = 1 / sigma, so that sigma_s / sigma_t of the variance is kept.
    """
    return s.sigma * jnp.sqrt(1 - s.sigma / t.sigma)


SAMPLERS = {
    "ODE, Euler": (solvers.ddim, 250),
    "ODE, Heun": (solvers.heun, 125),
    "SDE, w KL": (lambda d: solvers.ddim(d, 1.0), 250),
    "SDE, w KL, Euler and Maruyama": (solvers.euler_maruyama, 250),
    "SDE, half of w KL": (lambda d: solvers.ddim(d, np.sqrt(0.5)), 250),
    "SDE, w sigma": (lambda d: solvers.line(d, by_sigma), 250),
    "wrong": (solvers.consistency, 250),
}


def grid(n):
    """n levels, even steps in t from pure noise; the last are closer together, as all of them are first order in the logsnr."""
    t = np.concatenate([times.uniform(n)[:-1], np.geomspace(1 / n, 1e-3, 12)])
    return times.grid(schedules.straight, t)


@pytest.fixture(scope="module")
def drawn():
    """Samples [N, 2] of each sampler, float64, each from noise of its own."""
    data = velocity(mixture(*(jnp.asarray(a, jnp.float32) for a in (WEIGHTS, MEANS, STDS))))
    run = jax.jit(sample)

    def draw(i, make, n):
        levels, key = grid(n), jax.random.key(i)
        first = Level(levels.alpha[0], levels.sigma[0])
        return np.asarray(run(key, make(data), prior(jax.random.fold_in(key, 1), first, (N, 2)), levels), np.float64)

    return {name: draw(i, *how) for i, (name, how) in enumerate(SAMPLERS.items())}


def truth(seed):
    rng = np.random.default_rng(seed)
    k = rng.choice(3, N, p=WEIGHTS)
    return MEANS[k] + STDS[k, None] * rng.standard_normal((N, 2))


def distance(a, b):
    """The mean distance between a sample of a and one of b."""
    a, b = (np.asarray(each, np.float32) for each in (a, b))
    return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)).mean(dtype=np.float64)


def energy(a, b):
    """The energy distance of two sets of samples: 0 where their distributions are equal. Source: Szekely and Rizzo 2013, eq. 5."""
    return 2 * distance(a, b) - distance(a, a) - distance(b, b)


RIGHT = [name for name in SAMPLERS if name != "wrong"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_each_sampler_has_the_shares_means_and_covariances_of_the_mixture(name, drawn):
    """4 standard errors at 4,000 samples, and 3% of a deviation (6% of a variance) for the number of steps."""
    x = drawn[name]
    mode = np.linalg.norm(x[:, None] - MEANS, axis=-1).argmin(1)
    for k in range(3):
        own, std = x[mode == k], STDS[k]
        assert abs(len(own) / N - WEIGHTS[k]) < 4 * np.sqrt(WEIGHTS[k] * (1 - WEIGHTS[k]) / N)
        assert (np.abs(own.mean(0) - MEANS[k]) < 4 * std / np.sqrt(len(own)) + 0.03 * std).all()
        error = std**2 * np.sqrt((np.eye(2) + 1) / len(own))
        assert (np.abs(np.cov(own.T) - std**2 * np.eye(2)) < 4 * error + 0.06 * std**2).all()


@pytest.mark.slow
def test_ode_and_sde_samples_cannot_be_told_apart(drawn):
    """Two sets of true samples are 0.0013 apart on average, at most 0.0040 in 100 pairs; the tolerance is twice that.

    A sampler that gives up all of eps for fresh noise at every step, which loses half of the variance, is told by the same.
    """
    within = {name: distance(x, x) for name, x in drawn.items()}
    true = truth(0)

    def apart(a, b):
        return 2 * distance(drawn[a], drawn[b]) - within[a] - within[b]

    from_truth = {name: 2 * distance(x, true) - within[name] - distance(true, true) for name, x in drawn.items()}
    pairs = {(a, b): apart(a, b) for a in RIGHT if a.startswith("ODE") for b in RIGHT if b.startswith("SDE")}
    assert len(pairs) == 8 and max(pairs.values()) < 0.008, pairs
    assert max(from_truth[name] for name in RIGHT) < 0.008, from_truth
    assert min(from_truth["wrong"], *(apart(name, "wrong") for name in RIGHT)) > 0.02
    assert energy(true, truth(1)) < 0.008


def diffusion(std, t, dt=1e-6):
    """w at time t: the variance that a short step adds, over its length."""
    at, to = (schedules.straight(jnp.asarray(each, jnp.float64)) for each in (t, t - dt))
    return float(std(at, to) ** 2 / dt)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_diffusions_are_the_papers(t, x64):
    """w KL = 2 (sigma sigma' - sigma^2 alpha' / alpha) is 2 t / (1 - t) on the straight path; eta multiplies it by eta^2."""
    assert diffusion(posterior_std, t) == pytest.approx(2 * t / (1 - t), rel=1e-4)
    assert diffusion(lambda a, b: by_sigma(a, b, None), t) == pytest.approx(t, rel=1e-4)


def test_eulers_steps_and_heuns_are_those_of_the_velocity(x64):
    """x - dt v and the trapezoid rule, with v = eps - x0 what the network says, at unit scale of its own."""
    data, t, s = gaussian(0.4, 0.3), 0.7, 0.55
    net = network(data, targets.flow)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)))

    def v(x, t):
        scale = np.hypot(1 - t, t)
        return net(x / scale, jnp.asarray(2 * np.log((1 - t) / t)))[0]

    at, to = (schedules.straight(jnp.asarray(each)) for each in (t, s))
    keys = jax.random.split(jax.random.key(0), 3)

    def step(solver):
        return solver.step(keys, solver.init(x), at, to)[0].x

    euler = x - (t - s) * v(x, t)
    np.testing.assert_allclose(step(solvers.ddim(velocity(data))), euler, rtol=1e-9)
    np.testing.assert_allclose(step(solvers.heun(velocity(data))), x - (t - s) * (v(x, t) + v(euler, s)) / 2, rtol=1e-9)
