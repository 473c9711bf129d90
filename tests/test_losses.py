"""The denoising loss against its formula, and the closed-form optimum against its closed-form value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian, network

from jaxdiff import losses, schedules, targets
from jaxdiff.denoiser import clip_logsnr
from jaxdiff.level import diffuse, logsnr

ROWS = {"eps": targets.eps, "x0": targets.x0, "v": targets.v, "flow": targets.flow, "edm": targets.edm(0.5)}
RNG = np.random.default_rng(0)
X0, EPS = (jnp.asarray(RNG.standard_normal((4, 2, 2, 3)), jnp.float32) for _ in range(2))
LEVEL = schedules.cosine(jnp.asarray([0.1, 0.4, 0.7, 1.0]).reshape(4, 1, 1, 1))


def halve(x, snr):
    return 0.5 * x, None


@pytest.mark.parametrize("name", ROWS)
def test_loss_is_its_formula(name):
    def weight(level):
        return 1 + level.sigma**2

    got = losses.denoising_loss(None, halve, ROWS[name], X0, LEVEL, EPS, weight, data_std=0.5)
    a, b = (np.asarray(c) for c in ROWS[name](LEVEL))
    alpha, sigma = (np.asarray(c) for c in LEVEL)
    said = 0.5 * (alpha * X0 + sigma * EPS) / np.sqrt(0.25 * alpha**2 + sigma**2)
    want = ((1 + sigma**2) * (said - (a * X0 + b * EPS)) ** 2).mean((1, 2, 3))
    assert got.shape == (4,)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    one = losses.denoising_loss(None, halve, ROWS[name], X0, jax.tree.map(lambda c: c[1, 0, 0, 0], LEVEL), EPS, weight, 0.5)
    np.testing.assert_allclose(one[1], want[1], rtol=1e-5)


def test_the_key_is_used_only_where_eps_is_not_given():
    def loss(key, eps=None):
        return losses.denoising_loss(key, halve, targets.eps, X0, LEVEL, eps)

    np.testing.assert_array_equal(loss(None, EPS), loss(jax.random.key(1), EPS))
    assert (loss(jax.random.key(1)) != loss(jax.random.key(2))).all()
    np.testing.assert_array_equal(loss(jax.random.key(1)), loss(None, jax.random.normal(jax.random.key(1), X0.shape)))


def test_unit_weight_is_the_default():
    np.testing.assert_array_equal(losses.unit_weight(LEVEL), np.ones_like(LEVEL.sigma))
    args = (None, halve, targets.v, X0, LEVEL, EPS)
    np.testing.assert_array_equal(losses.denoising_loss(*args), losses.denoising_loss(*args, losses.unit_weight))


def test_the_network_is_shown_unit_scale_x_and_logsnr():
    seen = []

    def net(x, snr):
        seen.append((x, snr))
        return x, None

    level = schedules.edm(jnp.asarray([0.01, 0.5, 3.0, 80.0]).reshape(4, 1, 1, 1))
    losses.denoising_loss(None, net, targets.x0, X0, level, EPS, data_std=0.5)
    losses.denoising_loss(None, clip_logsnr(net, -2.0, 2.0), targets.x0, X0, level, EPS, data_std=0.5)
    x = np.asarray(diffuse(level, X0, EPS)) / np.sqrt(0.25 + np.asarray(level.sigma) ** 2)
    for got, _ in seen:
        np.testing.assert_allclose(got, x, rtol=1e-5)
    np.testing.assert_allclose(seen[0][1], logsnr(level), rtol=1e-6)
    np.testing.assert_allclose(seen[1][1], np.clip(logsnr(level), -2, 2), rtol=1e-6)
    assert seen[0][1].shape == (4, 1, 1, 1)


def off_by_a_tenth(net):
    return lambda x, snr: (net(x, snr)[0] + 0.1, None)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("t", [0.2, 0.6, 0.9])
def test_the_closed_form_optimum_has_the_closed_form_loss(name, t, x64):
    """Gaussian data of variance c: the target's variance given x is det^2 c / (alpha^2 c + sigma^2). 5 standard errors."""
    mean, var, n = 0.4, 0.25, 20_000
    level = schedules.straight(jnp.asarray(t))
    x0 = mean + np.sqrt(var) * jnp.asarray(np.random.default_rng(1).standard_normal((n, 4)))
    net = network(gaussian(mean, var), ROWS[name], np.sqrt(var))
    loss = losses.denoising_loss(jax.random.key(0), net, ROWS[name], x0, level, data_std=np.sqrt(var))
    det = float(targets.determinant(ROWS[name], level))
    want = det**2 * var / (level.alpha**2 * var + level.sigma**2)
    np.testing.assert_allclose(loss.mean(), want, rtol=5 * np.sqrt(2 / (4 * n)))
    loss = losses.denoising_loss(jax.random.key(0), off_by_a_tenth(net), ROWS[name], x0, level, data_std=np.sqrt(var))
    np.testing.assert_allclose(loss.mean(), want + 0.01, rtol=7 * np.sqrt(2 / (4 * n)))


def test_a_bfloat16_network_is_compared_in_float32():
    low, exact = (
        losses.denoising_loss(None, lambda x, snr, dtype=dtype: (x.astype(dtype), None), targets.eps, X0, LEVEL, EPS)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, exact, rtol=0.03, atol=1e-3)
