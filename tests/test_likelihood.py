"""Likelihoods against what Gaussian data and mixtures have in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.tree_util import Partial

import jaxdiff as jd
from jaxdiff import likelihood

MEAN, VAR = np.array([[0.3, -0.5, 0.1]], np.float32), np.array([[0.5, 0.2, 1.5]], np.float32)
WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([[0.8, -0.4], [-0.5, 0.3]]), np.array([0.3, 0.5])
KEY = jax.random.key(0)


def gaussian_data(n, key=1):
    return MEAN + np.sqrt(VAR) * jax.random.normal(jax.random.key(key), (n, 3))


def gaussian_nll(x):
    return np.sum((x - MEAN) ** 2 / VAR / 2 + np.log(2 * np.pi * VAR) / 2, axis=1)


def mixture_data(n):
    k1, k2 = jax.random.split(jax.random.key(2))
    which = jax.random.choice(k1, 2, (n,), p=jnp.asarray(WEIGHTS))
    return jnp.asarray(MEANS, jnp.float32)[which] + jnp.asarray(STDS, jnp.float32)[which][:, None] * jax.random.normal(k2, (n, 2))


def mixture_nll(x, extra_var=0.0):
    x = np.asarray(x, np.float64)
    var = STDS**2 + extra_var
    log = np.log(WEIGHTS) - ((x[:, None] - MEANS) ** 2).sum(-1) / var / 2 - np.log(2 * np.pi * var)
    return -np.log(np.exp(log).sum(1))


def standard_error(each):
    return np.std(each) / np.sqrt(len(each))


@pytest.mark.parametrize("name, schedule", [("cosine", jd.schedules.cosine), ("straight", jd.schedules.straight)])
def test_the_discrete_bound_lies_above_the_entropy_and_tightens_with_more_steps(name, schedule):
    x0 = gaussian_data(4000)
    denoise = oracles.gaussian(MEAN, VAR)
    exact = gaussian_nll(x0)
    gaps, errors = [], []
    for steps in (8, 32, 256):
        # From 0.999: at alpha = 0 the prior term is exactly zero, and nothing is learnt of it.
        levels = jd.grid(schedule, np.geomspace(0.999, 0.001, steps))
        bound = jax.jit(lambda x0, levels=levels: likelihood.elbo(KEY, denoise, x0, levels))(x0)
        each = np.asarray(bound.total) - exact
        gaps.append(each.mean())
        errors.append(standard_error(each))
    assert gaps[0] - 4 * errors[0] > gaps[1] + 4 * errors[1] > gaps[2]
    assert gaps[2] > -4 * errors[2]
    assert gaps[2] < gaps[1] / 6, (gaps, errors)  # eight times as many steps, a gap of order 1 / T


def even(t):
    """A curve even in logsnr, from 13 to -13: the bound's integrand is then nearly flat, and its estimate tight."""
    logsnr = 13 - 26 * t
    return jd.Level(jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr)))


def even_straight(t):
    """The same logsnr on the straight path."""
    logsnr = 13 - 26 * t
    return jd.Level(jax.nn.sigmoid(logsnr / 2), jax.nn.sigmoid(-logsnr / 2))


@pytest.mark.parametrize("schedule", [even, even_straight])
@pytest.mark.parametrize("data", ["gaussian", "mixture"])
def test_the_continuous_bound_of_the_exact_model_is_the_entropy(data, schedule):
    if data == "gaussian":
        x0, denoise = gaussian_data(8000), oracles.gaussian(MEAN, VAR)
        exact = gaussian_nll(x0)
    else:
        x0 = mixture_data(8000)
        denoise = oracles.mixture(*(jnp.asarray(a, jnp.float32) for a in (WEIGHTS, MEANS, STDS)))
        exact = mixture_nll(x0)
    bound = jax.jit(lambda x0: likelihood.continuous_elbo(KEY, denoise, x0, schedule, 0.0, 1.0, 64))(x0)
    each = np.asarray(bound.total) - exact
    assert abs(each.mean()) < 4 * standard_error(each), (each.mean(), standard_error(each))
    assert standard_error(each) < 0.04


def test_few_terms_have_the_mean_of_all():
    x0 = jnp.tile(gaussian_data(1), (20000, 1))
    levels = jd.grid(jd.schedules.cosine, np.linspace(0.99, 0.01, 20))
    every, some = (
        np.asarray(jax.jit(lambda x, n=n: likelihood.elbo(KEY, oracles.gaussian(MEAN, VAR), x, levels, terms=n).total)(x0))
        for n in (0, 5)
    )
    assert abs(every.mean() - some.mean()) < 4 * np.hypot(standard_error(every), standard_error(some))


def test_a_step_s_divergence_is_its_monte_carlo_estimate():
    t, s = (jd.schedules.cosine(jnp.array(u)) for u in (0.5, 0.45))
    n = 200_000
    x0 = jnp.array([[0.7, -0.2]])
    x = jd.diffuse(t, x0, jnp.array([[0.4, -1.1]]))
    p = oracles.gaussian(0.1, 0.5)(x, t)._replace(aux=jnp.array([[0.3, -0.6]]))
    kl = likelihood.step_kl(x0, p, t, s, jd.learned_std)

    def mean(x0, eps):
        return s.alpha * x0 + jnp.sqrt(s.sigma**2 - jd.posterior_std(t, s) ** 2) * eps

    true, model = jd.posterior_std(t, s), jd.learned_std(t, s, p)
    q = mean(x0, (x - t.alpha * x0) / t.sigma)
    draws = q + true * jax.random.normal(KEY, (n, 2))

    def log(x, m, std):
        return -np.square((x - m) / std) / 2 - np.log(std)

    each = np.asarray(log(draws, q, true) - log(draws, mean(p.x0, p.eps), model))
    np.testing.assert_array_less(np.abs(each.mean(0) - np.asarray(kl)[0]), 4 * each.std(0) / np.sqrt(n))


@pytest.mark.parametrize("std", [1e-4, 0.002, 0.03, 1.0, 40.0])
def test_the_discretised_decoder_sums_to_one(std):
    values = jnp.arange(256, dtype=jnp.float32)[:, None] / 127.5 - 1
    decoder = likelihood.discretised_decoder(jnp.array([[-1.0]]), jnp.array([[1.0]]))
    for mean in (-1.2, -1.0, -0.303, 0.0, 0.9999, 3.0):
        p = jd.Prediction(jnp.full((256, 1), mean), None)
        log = decoder(values, values, p, None, jnp.full((256, 1), std))
        assert np.isfinite(log).all() or std < 1e-3  # a mass may be below what float32 holds
        # A ten-thousandth is a few hundred roundings of the mean wide.
        np.testing.assert_allclose(np.exp(np.asarray(log, np.float64)).sum(), 1, rtol=1e-3 if std < 1e-3 else 1e-4)


def test_the_decoder_s_gradient_is_finite_far_out():
    decoder = likelihood.discretised_decoder(jnp.array([[-1.0]]), jnp.array([[1.0]]))
    values = jnp.array([[-1.0], [0.0039216], [1.0]])

    def total(mean, log_std):
        return decoder(values, values, jd.Prediction(mean, None), None, jnp.exp(log_std) * jnp.ones((3, 1))).sum()

    for mean in (-0.9, 0.0, 2.0):
        for log_std in (-5.0, 0.0, 5.0):
            grads = jax.grad(total, (0, 1))(jnp.full((3, 1), mean), jnp.array(log_std))
            assert np.isfinite(grads[0]).all() and np.isfinite(grads[1]), (mean, log_std, grads)


def test_the_bayes_decoder_sums_to_one_and_is_sure_without_noise():
    values = jnp.arange(256, dtype=jnp.float32)[:, None] / 127.5 - 1
    decoder = likelihood.bayes_decoder(jnp.array([[-1.0]]), jnp.array([[1.0]]))
    for sigma in (1e-4, 0.01, 0.5):
        level = jd.Level(jnp.sqrt(1 - sigma**2), jnp.array(sigma))
        log = decoder(values, jnp.full_like(values, values[77, 0] * level.alpha), None, level, None)
        np.testing.assert_allclose(np.exp(np.asarray(log)).sum(), 1, rtol=1e-4)
        assert sigma > 1e-3 or log[77, 0] > -1e-6


@pytest.mark.parametrize(
    "schedule, times",
    [
        (jd.schedules.cosine, np.linspace(0.999, 0.001, 60)),
        (jd.schedules.edm, jd.times.karras(60, hi=1000.0)),
        (jd.schedules.straight, np.linspace(0.999, 0.001, 60)),
    ],
)
def test_the_flow_s_density_is_the_gaussian_s_to_a_hundredth_nat(schedule, times):
    x0 = gaussian_data(64)
    levels = jd.grid(schedule, times)
    log = jax.jit(lambda x: likelihood.log_likelihood(KEY, oracles.gaussian(MEAN, VAR), x, levels, likelihood.exact_trace))(x0)
    np.testing.assert_allclose(-np.asarray(log), gaussian_nll(x0), atol=1e-2)


def test_the_flow_s_density_is_the_mixture_s_to_a_hundredth_nat():
    x0 = mixture_data(256)
    denoise = oracles.mixture(*(jnp.asarray(a, jnp.float32) for a in (WEIGHTS, MEANS, STDS)))
    levels = jd.grid(jd.schedules.cosine, np.linspace(0.9995, 0.001, 100))
    log = jax.jit(lambda x: likelihood.log_likelihood(KEY, denoise, x, levels, likelihood.exact_trace))(x0)
    np.testing.assert_allclose(-np.asarray(log), mixture_nll(x0), atol=1e-2)


def test_hutchinson_s_estimate_has_the_exact_mean():
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.standard_normal((4, 4)), jnp.float32)
    x = jnp.zeros((50_000, 4))
    _, each = likelihood.hutchinson(jax.random.split(KEY, len(x)), lambda x: jnp.sin(x @ a), x)
    _, exact = likelihood.exact_trace(None, lambda x: jnp.sin(x @ a), x[:3])
    np.testing.assert_allclose(exact, np.trace(a), rtol=1e-5)
    assert abs(each.mean() - exact[0]) < 4 * standard_error(each)


def test_the_prior_term_is_the_textbook_divergence():
    x0 = jnp.array([[0.5, -2.0]])
    for level in (jd.Level(jnp.array(0.1), jnp.array(0.995)), jd.Level(jnp.array(1.0), jnp.array(50.0))):
        std = np.hypot(level.alpha, level.sigma)
        wanted = np.sum(np.log(std / level.sigma) + (level.sigma**2 + (level.alpha * x0) ** 2) / (2 * std**2) - 0.5)
        np.testing.assert_allclose(likelihood.prior_kl(x0, level), [wanted], rtol=2e-4, atol=1e-7)


def test_images_get_bits_with_their_standard_error_and_every_estimate_agrees():
    # Pixels that are normal with deviation 40 about 128: close to a Gaussian, whose bits are known.
    rng = np.random.default_rng(3)
    std = 40.0
    images = np.clip(np.round(rng.normal(127.5, std, (512, 4, 4, 1))), 0, 255).astype(np.uint8)
    wanted = 0.5 * np.log2(2 * np.pi * np.e * std**2)
    denoise = oracles.gaussian(0.0, (std / 127.5) ** 2)
    codec = jd.codec.pixels()
    # Down to noise of the width of a value: below, a model that does not know of rounding pays for digits there are none of.
    levels = jd.grid(jd.schedules.cosine, np.geomspace(0.999, 0.004, 200))
    found = {
        "elbo": likelihood.image_elbo(KEY, denoise, codec, images, levels),
        "continuous": likelihood.image_continuous_elbo(KEY, denoise, codec, images, jd.schedules.cosine, 4e-3, 0.999, 256),
        "flow": likelihood.image_log_likelihood(KEY, denoise, codec, images, levels),
    }
    # The flow spreads each value over its width, which loses nothing on so smooth a density.
    assert abs(found["flow"].mean - wanted) < 4 * found["flow"].stderr + 0.01
    for name, bits in found.items():
        assert bits.each.shape == (512,) and 0 < bits.stderr < 0.05, (name, bits.stderr)
        assert wanted - 4 * bits.stderr - 0.01 < bits.mean < wanted + 0.4, (name, bits.mean, wanted)
    np.testing.assert_allclose(found["elbo"].terms.total, found["elbo"].each, rtol=1e-6)


def test_images_on_another_scale_have_the_same_bits():
    images = np.random.default_rng(4).integers(0, 256, (8, 4, 4, 1), dtype=np.uint8)
    levels = jd.grid(jd.schedules.cosine, np.linspace(0.999, 0.001, 30))
    plain = likelihood.image_log_likelihood(KEY, oracles.gaussian(0.0, 0.3), jd.codec.pixels(), images, levels)
    codec = jd.codec.standardised((0.2,), (0.5,))
    scaled = likelihood.image_log_likelihood(KEY, oracles.gaussian(-0.4, 1.2), codec, images, levels)
    np.testing.assert_allclose(plain.each, scaled.each, atol=2e-2)


def test_a_sample_s_figure_does_not_depend_on_its_batch():
    x0, levels = gaussian_data(6), jd.grid(jd.schedules.cosine, np.linspace(0.99, 0.01, 5))
    keys = jd.sample_keys(KEY, 6)
    for f in (
        lambda k, x: likelihood.elbo(k, oracles.gaussian(MEAN, VAR), x, levels, terms=3).total,
        lambda k, x: likelihood.log_likelihood(k, oracles.gaussian(MEAN, VAR), x, levels),
    ):
        np.testing.assert_allclose(f(keys, x0)[2:4], f(keys[2:4], x0[2:4]), rtol=1e-5)


@pytest.mark.parametrize(
    "images, said",
    [
        (np.zeros((2, 4, 4, 1), np.float32), "integers from 0 to 255 .*float32"),
        (np.full((2, 4, 4, 1), 256, np.int32), "0 to 255.*outside"),
        (np.full((2, 4, 4, 1), -1, np.int32), "0 to 255.*outside"),
        ([[0]], "integers from 0 to 255"),
    ],
)
def test_what_is_no_8_bit_image_is_refused(images, said):
    levels = jd.grid(jd.schedules.cosine, np.array([0.9, 0.1]))
    for f in (likelihood.image_elbo, likelihood.image_log_likelihood):
        with pytest.raises(ValueError, match=said):
            f(KEY, oracles.gaussian(0.0, 1.0), jd.codec.pixels(), images, levels)


@pytest.mark.parametrize(
    "levels, said",
    [
        (jd.Level(np.array([0.5, 0.9]), np.array([0.5, 0.0])), "sigma > 0"),
        (jd.Level(np.array([0.9, 0.5]), np.array([0.4, 0.8])), "fall from noise to data"),
        (jd.Level(np.array([0.5, 0.5]), np.array([0.8, 0.8])), "fall from noise to data"),
        (jd.Level(np.array([0.5]), np.array([0.8])), "at least 2 levels"),
    ],
)
def test_a_grid_that_is_none_is_refused(levels, said):
    for f in (likelihood.elbo, likelihood.log_likelihood):
        with pytest.raises(ValueError, match=said):
            f(KEY, oracles.gaussian(0.0, 1.0), jnp.zeros((2, 3)), levels)


def test_integers_and_a_start_without_data_are_refused():
    levels = jd.grid(jd.schedules.cosine, np.array([1.0, 0.5, 0.1]))
    with pytest.raises(ValueError, match="alpha > 0"):
        likelihood.log_likelihood(KEY, oracles.gaussian(0.0, 1.0), jnp.zeros((2, 3)), levels)
    with pytest.raises(ValueError, match="real numbers, got uint8"):
        likelihood.elbo(KEY, oracles.gaussian(0.0, 1.0), jnp.zeros((2, 3), jnp.uint8), levels)


def test_a_second_call_with_other_levels_does_not_compile_again():
    import chex

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def bits(denoise, x0, levels):
        return likelihood.log_likelihood(KEY, denoise, x0, levels)

    for last in (0.01, 0.02):
        bits(
            oracles.gaussian(Partial(jnp.asarray)(0.0), 1.0),
            jnp.zeros((2, 3)),
            jd.grid(jd.schedules.cosine, np.array([0.9, 0.5, last])),
        )
