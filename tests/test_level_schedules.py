"""Levels and schedules against the formulas and tables they are defined by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules, times
from jaxdiff.level import Level, beta_std, diffuse, logsnr, posterior_std

UNIT = {  # the schedules whose t runs over [0, 1]
    "cosine": schedules.cosine,
    "straight": schedules.straight,
    "linear_beta": schedules.linear_beta(),
}


def ddpm_table(steps=1000, first=1e-4, last=0.02):
    """(beta of rows 1 ... steps, alpha_bar of rows 0 ... steps), float64, row 0 being clean data."""
    beta = np.linspace(first, last, steps)
    return beta, np.concatenate([[1.0], np.cumprod(1 - beta)])


def rows(steps=1000):
    """The levels of a linear-beta table's rows 0 ... steps, as the schedule computes them in the precision in use."""
    t = np.arange(steps + 1) / steps
    return schedules.linear_beta(steps)(jnp.asarray(t))


@pytest.mark.parametrize("shape", [(), (7,), (4, 1, 1, 1)])
@pytest.mark.parametrize("schedule", [*UNIT.values(), schedules.edm], ids=[*UNIT, "edm"])
def test_a_level_has_the_shape_and_dtype_of_its_time(schedule, shape):
    level = schedule(jnp.full(shape, 0.4, jnp.float32))
    assert level.alpha.shape == level.sigma.shape == shape
    assert level.alpha.dtype == level.sigma.dtype == jnp.float32


@pytest.mark.parametrize("schedule", UNIT.values(), ids=UNIT)
def test_noise_rises_from_clean_data_and_alpha_is_never_negative(schedule):
    t = jnp.linspace(0, 1, 4001)
    level = schedule(t)
    assert (level.alpha[0], level.sigma[0]) == (1, 0)
    assert (level.alpha >= 0).all() and (level.sigma <= 1).all()
    assert (jnp.diff(level.sigma) >= 0).all() and (jnp.diff(level.alpha) <= 0).all()
    snr = logsnr(level)
    assert not jnp.isnan(snr).any() and (jnp.diff(snr[1:-1]) < 0).all()
    assert snr[0] == jnp.inf


@pytest.mark.parametrize("schedule", UNIT.values(), ids=UNIT)
def test_float32_schedules_agree_with_the_float64_grid(schedule):
    t = np.linspace(0, 1, 997)
    low, high = schedule(jnp.asarray(t)), times.grid(schedule, t)
    assert low.alpha.dtype == jnp.float32
    np.testing.assert_allclose(low.alpha, high.alpha, atol=5e-7)
    np.testing.assert_allclose(low.sigma, high.sigma, atol=5e-7)


def test_cosine_and_straight_end_in_pure_noise_exactly():
    for schedule in (schedules.cosine, schedules.straight):
        end = schedule(jnp.float32(1))
        assert (end.alpha, end.sigma) == (0, 1)
        assert logsnr(end) == -jnp.inf
    end = UNIT["linear_beta"](jnp.float32(1))
    np.testing.assert_allclose(logsnr(end), np.log(4.0358e-5), rtol=1e-4)  # DDPM section 4: nearly, not exactly, no signal


def test_cosine_is_its_formula(x64):
    t = np.linspace(0, 1, 301)
    level = schedules.cosine(jnp.asarray(t))
    np.testing.assert_allclose(level.alpha, np.cos(np.pi * t / 2), atol=1e-15)
    np.testing.assert_allclose(level.sigma, np.sin(np.pi * t / 2), atol=1e-15)
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, atol=1e-15)


def test_straight_and_edm_are_their_formulas():
    t = jnp.linspace(0, 1, 11)
    np.testing.assert_array_equal(np.stack(schedules.straight(t)), np.stack([1 - t, t]))
    sigma = jnp.asarray([0.002, 1.0, 80.0])
    np.testing.assert_array_equal(np.stack(schedules.edm(sigma)), np.stack([np.ones(3), sigma]))


@pytest.mark.parametrize(("steps", "first", "last"), [(1000, 1e-4, 0.02), (50, 1e-3, 0.3), (1, 0.1, 0.1)])
def test_linear_beta_is_the_cumulative_product(steps, first, last, x64):
    _, alpha_bar = ddpm_table(steps, first, last)
    level = schedules.linear_beta(steps, first, last)(jnp.arange(steps + 1) / steps)
    np.testing.assert_allclose(level.alpha, np.sqrt(alpha_bar), rtol=1e-13)
    np.testing.assert_allclose(level.sigma[1:], np.sqrt(1 - alpha_bar[1:]), rtol=2e-13)
    assert level.sigma[0] == 0


def test_linear_beta_in_float32_has_float32s_digits():
    _, alpha_bar = ddpm_table()
    level = rows()
    assert level.alpha.dtype == jnp.float32
    # log alpha_bar reaches -10, so its half is good to 5e-7, and so is alpha.
    np.testing.assert_allclose(level.alpha, np.sqrt(alpha_bar), rtol=2e-6)
    np.testing.assert_allclose(level.sigma[1:], np.sqrt(1 - alpha_bar[1:]), rtol=2e-6)


def test_linear_beta_between_rows_has_the_geometric_mean(x64):
    schedule = schedules.linear_beta(10, 0.01, 0.2)
    lo, mid, hi = (schedule(jnp.asarray(t)) for t in (0.3, 0.35, 0.4))
    np.testing.assert_allclose(mid.alpha**2, lo.alpha * hi.alpha, rtol=1e-14)
    np.testing.assert_allclose(mid.alpha**2 + mid.sigma**2, 1, rtol=1e-14)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"first": 0.0}, {"first": 0.1, "last": 0.05}, {"last": 1.0}])
def test_linear_beta_refuses_what_is_no_table(bad):
    with pytest.raises(ValueError, match="linear_beta needs"):
        schedules.linear_beta(**bad)


def test_linear_beta_is_a_traced_argument():
    traces = []

    @jax.jit
    def alpha(schedule, t):
        traces.append(1)
        return schedule(t).alpha

    a, b = (alpha(schedules.linear_beta(100, 1e-4, last), 0.5) for last in (0.02, 0.2))
    assert a > b and len(traces) == 1


def test_logsnr_and_diffuse():
    level = Level(jnp.float32(0.6), jnp.float32(0.8))
    np.testing.assert_allclose(logsnr(level), 2 * np.log(0.6 / 0.8), rtol=1e-6)
    x0, eps = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[-1.0, 0.5]])
    np.testing.assert_allclose(diffuse(level, x0, eps), [[-0.2, 1.6]], rtol=1e-6)


@pytest.mark.parametrize(("x64", "rtol"), [(False, 6e-5), (True, 1e-11)], ids=["float32", "float64"], indirect=["x64"])
def test_deviations_are_ddpms_over_the_whole_table(x64, rtol):
    """DDPM eq. 7: beta tilde = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta, and section 3.2's beta, rows 1 ... 1000."""
    beta, alpha_bar = ddpm_table()
    tilde = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * beta
    level = rows()
    s, t = (jax.tree.map(lambda a, cut=cut: a[cut], level) for cut in (slice(None, -1), slice(1, None)))
    small, large = posterior_std(t, s), beta_std(t, s)
    assert small[0] == 0  # the step to clean data
    np.testing.assert_allclose(small[1:], np.sqrt(tilde[1:]), rtol=rtol)
    np.testing.assert_allclose(large, np.sqrt(beta), rtol=rtol)


def test_deviations_of_a_very_short_step_keep_their_digits():
    """In float32, from sigma = 1.0001 to 1: 1 - SNR_t / SNR_s, taken as a difference, is right to three digits only."""
    t = np.float32(1.0001)
    t, s = (schedules.edm(jnp.float32(sigma)) for sigma in (t, 1))
    k = np.sqrt(1 - np.float64(t.sigma) ** -2)
    np.testing.assert_allclose(posterior_std(t, s), k, rtol=2e-6)
    np.testing.assert_allclose(beta_std(t, s), k * np.float64(t.sigma), rtol=2e-6)


def test_deviations_at_the_ends_and_upward():
    noise, half, data = (schedules.cosine(jnp.float32(t)) for t in (1, 0.5, 0))
    np.testing.assert_allclose(posterior_std(noise, half), half.sigma)  # from alpha = 0 the step forgets x
    np.testing.assert_allclose(beta_std(noise, half), 1)
    assert posterior_std(half, data) == 0
    assert posterior_std(half, noise) == beta_std(half, noise) == 0  # an upward interval has no posterior noise
    assert posterior_std(half, half) == 0


def test_deviations_of_straight_and_edm(x64):
    """Away from variance preservation: var(x_s | x_t, x0) = sigma_s^2 (1 - SNR_t / SNR_s), by Gaussian conditioning."""
    for schedule, t, s in ((schedules.straight, 0.7, 0.4), (schedules.edm, 5.0, 2.0)):
        t, s = schedule(jnp.asarray(t)), schedule(jnp.asarray(s))
        # x_t = r x_s + n, with r = alpha_t / alpha_s and var n = sigma_t^2 - r^2 sigma_s^2.
        r = t.alpha / s.alpha
        forward = t.sigma**2 - r**2 * s.sigma**2
        np.testing.assert_allclose(beta_std(t, s), np.sqrt(forward), rtol=1e-13)
        np.testing.assert_allclose(posterior_std(t, s) ** -2, s.sigma**-2 + r**2 / forward, rtol=1e-13)
