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


def ends(name):
    """The two ends of a path from logsnr -13 to 13, variance preserving or straight."""
    logsnr = jnp.array([-13.0, 13.0])
    if name == "circle":
        return jd.schedules.of_logsnr(logsnr)
    return jd.Level(jax.nn.sigmoid(logsnr / 2), jax.nn.sigmoid(-logsnr / 2))


@pytest.mark.parametrize("name", ["circle", "straight"])
@pytest.mark.parametrize("data", ["gaussian", "mixture"])
def test_the_continuous_bound_of_the_exact_model_is_the_entropy(data, name):
    if data == "gaussian":
        x0, denoise = gaussian_data(8000), oracles.gaussian(MEAN, VAR)
        exact = gaussian_nll(x0)
    else:
        x0 = mixture_data(8000)
        denoise = oracles.mixture(*(jnp.asarray(a, jnp.float32) for a in (WEIGHTS, MEANS, STDS)))
        exact = mixture_nll(x0)
    bound = jax.jit(lambda x0: likelihood.continuous_elbo(KEY, denoise, x0, ends(name), 64))(x0)
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


def test_few_terms_of_a_long_table_vary_little_more_than_all():
    """A few first rows carry most of this bound; drawn no more often than the others, they make it vary several times as much."""
    x0 = jnp.tile(gaussian_data(1), (500, 1))
    levels = jd.grid(jd.schedules.cosine_beta(1000), jd.times.strided(1000, 1000))
    every, some = (
        np.asarray(jax.jit(lambda x, n=n: likelihood.elbo(KEY, oracles.gaussian(MEAN, VAR), x, levels, terms=n).diffusion)(x0))
        for n in (0, 60)
    )
    assert some.std() < 1.5 * every.std(), (every.std(), some.std())
    assert abs(every.mean() - some.mean()) < 4 * np.hypot(standard_error(every), standard_error(some))


def log_normal(x, mean, std):
    return -np.square((x - mean) / std) / 2 - np.log(std)


@pytest.mark.parametrize("std", [jd.posterior_std, jd.beta_std, jd.learned_std], ids=["small", "large", "learned"])
@pytest.mark.parametrize("t, s", [(0.5, 0.45), (0.9, 0.2), (0.1, 0.05), (0.999, 0.99)])
def test_a_step_s_divergence_is_its_monte_carlo_estimate(t, s, std):
    t, s = (jd.schedules.cosine(jnp.array(u)) for u in (t, s))
    n = 200_000
    x0 = jnp.array([[0.7, -0.2]])
    x = jd.diffuse(t, x0, jnp.array([[0.4, -1.1]]))
    p = oracles.gaussian(0.1, 0.5)(x, t)._replace(aux=jnp.array([[0.3, -0.6]]))
    kl = likelihood.step_kl(x0, p, t, s, std)

    def mean(x0, eps):
        return s.alpha * x0 + jnp.sqrt(s.sigma**2 - jd.posterior_std(t, s) ** 2) * eps

    true, model = jd.posterior_std(t, s), std(t, s, p)
    q = mean(x0, (x - t.alpha * x0) / t.sigma)
    draws = q + true * jax.random.normal(KEY, (n, 2))
    each = np.asarray(log_normal(draws, q, true) - log_normal(draws, mean(p.x0, p.eps), model))
    np.testing.assert_array_less(np.abs(each.mean(0) - np.asarray(kl)[0]), 4 * each.std(0) / np.sqrt(n) + 1e-6)


@pytest.mark.parametrize("level", [jd.Level(0.1, 0.995), jd.Level(0.6, 0.8), jd.Level(1.0, 3.0)])
def test_the_prior_s_divergence_is_its_monte_carlo_estimate(level):
    x0, data_std, n = np.array([0.7, -1.2]), 0.5, 200_000
    draws = level.alpha * x0 + level.sigma * np.random.default_rng(0).standard_normal((n, 2))
    prior = np.hypot(level.alpha * data_std, level.sigma)
    each = (log_normal(draws, level.alpha * x0, level.sigma) - log_normal(draws, 0, prior)).sum(1)
    found = likelihood.prior_kl(jnp.asarray(x0[None], jnp.float32), jd.Level(*map(jnp.float32, level)), data_std)
    assert abs(each.mean() - float(found[0])) < 4 * standard_error(each)


@pytest.mark.parametrize("variance", [likelihood.small, likelihood.large], ids=["small", "large"])
def test_both_fixed_variances_of_a_table_bound_the_entropy(variance):
    """Their decoder has the deviation of the step before the last, so data finer than that costs more than `fixed` does."""
    x0, levels = gaussian_data(4000), jd.grid(jd.schedules.cosine, np.geomspace(0.999, 0.001, 64))
    denoise = oracles.gaussian(MEAN, VAR)
    found, fixed = (jax.jit(lambda x, v=v: likelihood.elbo(KEY, denoise, x, levels, v))(x0) for v in (variance, likelihood.fixed))
    each = np.asarray(found.total) - gaussian_nll(x0)
    assert 4 * standard_error(each) < each.mean() < 30
    by_hand = jd.beta_std if variance is likelihood.large else jd.posterior_std
    only = likelihood.Variance(by_hand, likelihood.fixed.last)
    step = jax.jit(lambda x: likelihood.elbo(KEY, denoise, x, levels, only))(x0)
    np.testing.assert_allclose(found.diffusion, step.diffusion, rtol=1e-5)
    assert (found.decoder != fixed.decoder).all() and (found.diffusion == fixed.diffusion).all() == (by_hand is jd.posterior_std)


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


@pytest.mark.parametrize("deviations", [0.17, 1.0, 2.49, 2.51, 5.0, 60.0, 1000.0])
@pytest.mark.parametrize("at", [-200.0, 0.3, 77.0, 128.5, 254.8, 500.0])
def test_the_bayes_decoder_is_bayes_rule_over_all_values(deviations, at):
    """Against float64 over all 256 values: noise far below a step, around where the window ends, and far above; it sums to one."""
    values = jnp.arange(256, dtype=jnp.float32)[:, None] / 127.5 - 1
    decoder = likelihood.bayes_decoder(jnp.array([[-1.0]]), jnp.array([[1.0]]))
    alpha, ratio = 0.9, deviations / 127.5
    level = jd.Level(jnp.float32(alpha), jnp.float32(alpha * ratio))
    x = jnp.full_like(values, alpha * (at / 127.5 - 1))
    log = np.asarray(jax.jit(decoder)(values, x, None, level, None), np.float64)
    scaled = (np.float64(x) / np.float64(level.alpha) + 1) * 127.5
    wanted = -np.square((scaled - np.arange(256)[:, None]) / (np.float64(level.sigma / level.alpha) * 127.5)) / 2
    wanted -= wanted.max() + np.log(np.exp(wanted - wanted.max()).sum())
    near = wanted > -30  # what is rarer than that has no weight
    # In float32 the place of x among the values has an error of 1e-5 steps, which counts in units of the noise's variance.
    np.testing.assert_allclose(log[near], wanted[near], atol=3e-4 / min(deviations, 1) ** 2)
    np.testing.assert_allclose(np.exp(log).sum(), 1, rtol=1e-5)


def test_the_bayes_decoder_keeps_no_value_for_the_gradient():
    decoder = likelihood.bayes_decoder(jnp.array([[-1.0]]), jnp.array([[1.0]]))
    x = jnp.zeros((64, 1024))

    def total(x, log_sigma):
        return decoder(x, x, None, jd.Level(jnp.float32(1), jnp.exp(log_sigma)), None).sum()

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(x, jnp.float32(-5)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 60 * x.nbytes
    grads = compiled(x, jnp.float32(-5))
    assert np.isfinite(grads[0]).all() and np.isfinite(grads[1])


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
        "continuous": likelihood.image_continuous_elbo(KEY, denoise, codec, images, levels, 256),
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
    for f in (likelihood.image_elbo, likelihood.image_continuous_elbo, likelihood.image_log_likelihood):
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
    for f in (likelihood.log_likelihood, likelihood.continuous_elbo):
        with pytest.raises(ValueError, match="alpha > 0"):
            f(KEY, oracles.gaussian(0.0, 1.0), jnp.zeros((2, 3)), levels)
    with pytest.raises(ValueError, match="real numbers, got uint8"):
        likelihood.elbo(KEY, oracles.gaussian(0.0, 1.0), jnp.zeros((2, 3), jnp.uint8), levels)


def test_a_schedule_that_is_not_monotone_is_refused_by_its_grid():
    def bent(t):
        return jd.schedules.of_logsnr(10 - 20 * t + 4 * jnp.sin(20 * t))

    levels = jd.grid(bent, np.linspace(1.0, 0.0, 65))
    for f in (likelihood.elbo, likelihood.continuous_elbo, likelihood.log_likelihood):
        with pytest.raises(ValueError, match="fall from noise to data"):
            f(KEY, oracles.gaussian(0.0, 1.0), jnp.zeros((2, 3)), levels)


@pytest.mark.parametrize("f, least", [(likelihood.elbo, 0), (likelihood.continuous_elbo, 1)])
def test_terms_are_a_whole_number(f, least):
    levels = jd.grid(jd.schedules.cosine, np.linspace(0.9, 0.1, 5))
    for terms in (-1, 2.5, True, least - 1):
        with pytest.raises(ValueError, match=f"whole number of terms, at least {least}, got {terms}"):
            f(KEY, oracles.gaussian(0.0, 1.0), jnp.zeros((2, 3)), levels, terms=terms)


def test_more_terms_than_there_are_steps_are_all_of_them():
    x0, levels = gaussian_data(5), jd.grid(jd.schedules.cosine, np.linspace(0.9, 0.1, 5))
    every, more = (likelihood.elbo(KEY, oracles.gaussian(MEAN, VAR), x0, levels, terms=n).total for n in (0, 9))
    np.testing.assert_array_equal(every, more)


def test_within_jit_what_is_known_is_checked_and_what_is_not_must_be_uint8():
    wrong = jd.Level(np.array([0.9, 0.5]), np.array([0.4, 0.8]))
    for levels in (wrong, jax.device_put(wrong)):
        with pytest.raises(ValueError, match="fall from noise to data"):
            jax.jit(lambda x, levels=levels: likelihood.elbo(KEY, oracles.gaussian(0.0, 1.0), x, levels).total)(jnp.zeros((2, 3)))
    levels = jd.grid(jd.schedules.cosine, np.array([0.9, 0.1]))

    def bits(images):
        return likelihood.image_elbo(KEY, oracles.gaussian(0.0, 1.0), jd.codec.pixels(), images, levels).mean

    with pytest.raises(ValueError, match=r"inside jit .* uint8 alone, got int32"):
        jax.jit(bits)(jnp.zeros((2, 4, 4, 1), jnp.int32))
    images = np.full((2, 4, 4, 1), 9)
    np.testing.assert_allclose(jax.jit(bits)(images.astype(np.uint8)), bits(images), rtol=1e-5)


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
