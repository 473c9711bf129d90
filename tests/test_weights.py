"""Weights against the papers' formulas, each in the space it was published for, and against each other in all others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian, network

from jaxdiff import schedules, targets, times, weights
from jaxdiff.level import Level, diffuse, logsnr
from jaxdiff.schedules import of_logsnr

TARGETS = {"eps": targets.eps, "x0": targets.x0, "v": targets.v, "flow": targets.flow, "edm": targets.edm(0.5)}
WEIGHTS = {
    "simple": weights.simple,
    "elbo": weights.elbo,
    "sigmoid": weights.sigmoid(-1.0),
    "min_snr": weights.min_snr(5.0),
    "p2": weights.p2(0.5, 2.0),
    "edm": weights.edm(0.5),
}
# Variance preserving, straight, and exploding levels.
LEVELS = {
    "circle": of_logsnr(jnp.linspace(-9.0, 9.0, 13)),
    "straight": schedules.straight(jnp.linspace(0.02, 0.98, 13)),
    "edm": schedules.edm(jnp.geomspace(0.01, 60.0, 13)),
}
RATE = jnp.linspace(0.5, 3.0, 13)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_is_one_loss_whatever_the_network_regresses(name, level, x64):
    """The same wrong denoiser through every target row: the weighted squared errors agree."""
    rng = np.random.default_rng(0)
    level = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64)[:, None], level)
    x0, eps = (jnp.asarray(rng.standard_normal((13, 5))) for _ in range(2))
    x = diffuse(level, x0, eps)
    wrong = gaussian(0.3, 1.7)(x, level)
    losses = {}
    for row, target in TARGETS.items():
        error = targets.regress(target, level, wrong.x0, wrong.eps) - targets.regress(target, level, x0, eps)
        losses[row] = WEIGHTS[name](level, jnp.asarray(RATE, jnp.float64)[:, None], target) * error**2
    for row in TARGETS:
        np.testing.assert_allclose(losses[row], losses["eps"], rtol=1e-5)


@pytest.mark.parametrize("name", TARGETS)
def test_unit_is_one_on_the_networks_own_target_at_every_level(name):
    level = schedules.cosine(jnp.linspace(0, 1, 5))
    np.testing.assert_array_equal(weights.unit(level, RATE, TARGETS[name]), np.ones(5))


def test_edm_is_lambda_on_the_denoised_and_one_on_edms_own_target():
    """EDM table 1: lambda(sigma) = (sigma^2 + sd^2) / (sigma sd)^2, and lambda c_out^2 = 1."""
    level, sd = LEVELS["edm"], 0.5
    sigma = np.asarray(level.sigma, np.float64)
    got = weights.edm(sd)(level, RATE, targets.x0)
    np.testing.assert_allclose(got, (sigma**2 + sd**2) / (sigma * sd) ** 2, rtol=1e-6)
    for level in LEVELS.values():
        np.testing.assert_allclose(weights.edm(sd)(level, RATE, targets.edm(sd)), 1, rtol=2e-6)


def test_min_snr_is_the_papers_three_forms():
    """Hang et al. 2023: min(snr, 5) on x0, min(snr, 5) / snr on eps, min(snr, 5) / (snr + 1) on v."""
    level = LEVELS["circle"]
    snr = np.exp(np.linspace(-9.0, 9.0, 13))
    low = np.minimum(snr, 5)
    for target, want in ((targets.x0, low), (targets.eps, low / snr), (targets.v, low / (snr + 1))):
        np.testing.assert_allclose(weights.min_snr(5)(level, RATE, target), want, rtol=1e-5)


@pytest.mark.parametrize(("gamma", "k"), [(1.0, 1.0), (0.5, 1.0), (2.0, 3.0)])
def test_p2_is_its_formula(gamma, k):
    """Choi et al. 2022, eq. 8: the loss of eps over (k + snr)^gamma."""
    snr = np.exp(np.linspace(-9.0, 9.0, 13))
    got = weights.p2(gamma, k)(LEVELS["circle"], RATE, targets.eps)
    np.testing.assert_allclose(got, (k + snr) ** -gamma, rtol=1e-5)
    np.testing.assert_allclose(
        weights.p2(gamma, k)(LEVELS["circle"], RATE, targets.v), (k + snr) ** -gamma * snr / (1 + snr), rtol=1e-5
    )


def test_elbo_and_sigmoid_are_their_formulas():
    level, snr = LEVELS["circle"], np.linspace(-9.0, 9.0, 13)
    np.testing.assert_allclose(weights.elbo(level, RATE, targets.eps), RATE / 2, rtol=1e-6)
    np.testing.assert_allclose(weights.elbo(level, RATE, targets.x0), RATE / 2 * np.exp(snr), rtol=1e-5)  # VDM eq. 17
    got = weights.sigmoid(-1.0)(level, RATE, targets.eps)
    np.testing.assert_allclose(got, np.asarray(RATE) / 2 / (1 + np.exp(1 + snr)), rtol=1e-5)


def test_simple_is_snr_over_snr_plus_one_on_v():
    """Salimans and Ho 2022, section 4: the weight that is snr on x0, and 1 on eps, is snr / (snr + 1) on v."""
    snr = np.exp(np.linspace(-9.0, 9.0, 13))
    got = weights.simple(LEVELS["circle"], RATE, targets.v)
    np.testing.assert_allclose(got * (1 + snr) / snr, 1, rtol=1e-5)


@pytest.mark.parametrize("name", [*WEIGHTS, "unit"])
@pytest.mark.parametrize("target", TARGETS)
def test_finite_in_float32_where_no_data_is_left_and_where_little_noise_is(name, target):
    """At alpha = 0 the rate is infinite; a weight is not, unless its paper's formula is: eps tells nothing there."""
    t = jnp.asarray([1e-6, 1e-3, 1.0])
    for schedule in (schedules.cosine, schedules.straight):
        rate = weights.rate(schedule, jnp.ones_like, t)
        got = WEIGHTS.get(name, weights.unit)(schedule(t), rate, TARGETS[target])
        assert got.dtype == jnp.float32 and got.shape == (3,) and not jnp.isnan(got).any()
        assert jnp.isfinite(got[:2]).all()
        diverges = target == "eps" and name in ("elbo", "sigmoid", "edm")
        assert jnp.isfinite(got[2]) != diverges
    if name == "min_snr":
        assert got[0] > 0 and (got[2] == 0) == (target != "eps")


def test_x0_with_min_snr_is_gamma_where_no_noise_is():
    clean = Level(jnp.float32(1), jnp.float32(0))
    assert weights.min_snr(5)(clean, jnp.float32(1), targets.x0) == 5
    assert weights.min_snr(5)(clean, jnp.float32(1), targets.eps) == 0


def test_rate_is_the_finite_difference(x64):
    t, step = jnp.asarray([0.0503, 0.3007, 0.7771, 0.9902]), 1e-7  # away from a table's rows, where the slope jumps
    for schedule in (schedules.linear_beta(), schedules.cosine, schedules.straight, schedules.vp(), schedules.sigmoid()):
        got = weights.rate(schedule, lambda t: 2 * t, t)
        slope = (logsnr(schedule(t + step)) - logsnr(schedule(t - step))) / (2 * step)
        np.testing.assert_allclose(got, -slope / (2 * t), rtol=1e-5)


def test_rate_of_the_closed_forms():
    t = jnp.asarray([0.1, 0.5, 0.9])
    np.testing.assert_allclose(
        weights.rate(schedules.cosine, jnp.ones_like, t), 2 * np.pi / np.sin(np.pi * np.asarray(t)), rtol=1e-5
    )
    np.testing.assert_allclose(weights.rate(schedules.ve(0.01, 50.0), jnp.ones_like, t), 2 * np.log(5000), rtol=1e-5)
    for schedule in (schedules.cosine, schedules.straight):
        assert (weights.rate(schedule, jnp.ones_like, jnp.asarray([0.0, 1.0])) == jnp.inf).all()


DRAWS = {
    "uniform": (schedules.vp(), times.draw_uniform(0.01, 1.0)),
    "independent": (schedules.straight, times.draw_independent(0.02, 0.95)),
    "logit_normal": (schedules.straight, times.draw_logit_normal(0.3, 1.2)),
    "log_normal": (schedules.edm, times.draw_log_normal()),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("row", ["eps", "v", "edm"])
def test_the_mean_of_elbo_is_the_bounds_diffusion_part_of_gaussian_data(name, row, x64):
    """Data of variance c: the optimum's squared error of eps is c snr / (1 + c snr), so half its integral over logsnr is
    log((1 + c snr(first)) / (1 + c snr(last))) / 2, for every schedule, draw and target. The midpoint rule on 40,000 times.
    """
    (schedule, draw), c, target = DRAWS[name], 0.7, TARGETS[row]
    edges = np.geomspace(draw.first, draw.last, 40_001) if name == "log_normal" else np.linspace(draw.first, draw.last, 40_001)
    t, width = jnp.asarray((edges[1:] + edges[:-1]) / 2), np.diff(edges)
    level = schedule(t)
    error = targets.determinant(target, level) ** 2 * c / (level.alpha**2 * c + level.sigma**2)
    mean = (draw.density(t) * width * weights.elbo(level, weights.rate(schedule, draw.density, t), target) * error).sum()
    first, last = (1 + c * np.exp(logsnr(schedule(jnp.asarray(end)))) for end in (draw.first, draw.last))
    np.testing.assert_allclose(mean, np.log(first / last) / 2, rtol=1e-4)


def test_elbo_by_monte_carlo_is_the_closed_form(x64):
    """The same through a network, a draw's samples and `regress`; 5 standard errors of the 40,000 losses."""
    schedule, draw, c, n = schedules.vp(), times.draw_uniform(0.01, 1.0), 0.7, 40_000
    k_t, k_x, k_eps = jax.random.split(jax.random.key(0), 3)
    t = draw.sample(k_t, n)[:, None]
    level = schedule(t)
    x0, eps = np.sqrt(c) * jax.random.normal(k_x, (n, 1)), jax.random.normal(k_eps, (n, 1))
    y, _ = network(gaussian(0.0, c), targets.v)(diffuse(level, x0, eps) / jnp.hypot(level.alpha, level.sigma), logsnr(level))
    square = jnp.square(y - targets.regress(targets.v, level, x0, eps))
    each = weights.elbo(level, weights.rate(schedule, draw.density, t), targets.v) * square
    first, last = (1 + c * np.exp(logsnr(schedule(jnp.asarray(end)))) for end in (draw.first, draw.last))
    assert abs(each.mean() - np.log(first / last) / 2) < 5 * each.std() / np.sqrt(n)


@pytest.mark.parametrize(("name", "bad"), [("min_snr", (0,)), ("p2", (-1,)), ("p2", (1, 0)), ("edm", (0,))])
def test_wrong_numbers_are_refused(name, bad):
    with pytest.raises(ValueError, match=f"^{name} needs"):
        getattr(weights, name)(*bad)


def test_a_weight_is_a_traced_argument():
    traces = []

    @jax.jit
    def factor(weight, level):
        traces.append(1)
        return weight(level, jnp.ones(()), targets.eps)

    level = Level(jnp.float32(0.8), jnp.float32(0.6))
    assert factor(weights.min_snr(0.5), level) < factor(weights.min_snr(1.0), level) and len(traces) == 1
