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
    "cosine_beta": schedules.cosine_beta(),
    "scaled_linear_beta": schedules.scaled_linear_beta(),
    "sigmoid": schedules.sigmoid(),
    "sigmoid_steep": schedules.sigmoid(0.0, 3.0, 0.3),
    "vp": schedules.vp(),
    "subvp": schedules.subvp(),
}
CURVE = schedules.learned(-13.3, 5.0)
PARAMS = CURVE.init(jax.random.key(0))
SHIFTED = schedules.shifted(schedules.cosine, 0.25)
OTHERS = {"edm": schedules.edm, "ve": schedules.ve(), "learned": CURVE.at(PARAMS), "shifted": SHIFTED}


def ddpm_table(steps=1000, first=1e-4, last=0.02):
    """(beta of rows 1 ... steps, alpha_bar of rows 0 ... steps), float64, row 0 being clean data."""
    beta = np.linspace(first, last, steps)
    return beta, np.concatenate([[1.0], np.cumprod(1 - beta)])


def rows(steps=1000):
    """The levels of a linear-beta table's rows 0 ... steps, as the schedule computes them in the precision in use."""
    t = np.arange(steps + 1) / steps
    return schedules.linear_beta(steps)(jnp.asarray(t))


@pytest.mark.parametrize("shape", [(), (7,), (4, 1, 1, 1)])
@pytest.mark.parametrize("schedule", [*UNIT.values(), *OTHERS.values()], ids=[*UNIT, *OTHERS])
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


@pytest.mark.parametrize("schedule", [*UNIT.values(), SHIFTED], ids=[*UNIT, "shifted"])
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


@pytest.mark.parametrize(("steps", "first", "last"), [(1000, 0.00085, 0.012), (50, 1e-3, 0.3), (1, 0.1, 0.1)])
def test_scaled_linear_beta_is_its_table(steps, first, last, x64):
    beta = np.linspace(first**0.5, last**0.5, steps) ** 2
    level = schedules.scaled_linear_beta(steps, first, last)(jnp.arange(1, steps + 1) / steps)
    np.testing.assert_allclose(level.alpha, np.sqrt(np.cumprod(1 - beta)), rtol=1e-13)
    np.testing.assert_allclose(level.sigma, np.sqrt(1 - np.cumprod(1 - beta)), rtol=2e-13)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"first": 0.0}, {"first": 0.1, "last": 0.05}, {"last": 1.0}])
def test_scaled_linear_beta_refuses_what_is_no_table(bad):
    with pytest.raises(ValueError, match="scaled_linear_beta needs"):
        schedules.scaled_linear_beta(**bad)


@pytest.mark.parametrize("steps", [1000, 50, 4000])
def test_cosine_beta_is_its_table(steps, x64):
    """Improved DDPM eq. 17: beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, at most 0.999, and its product again."""
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    assert beta[-1] == 0.999 and beta[-2] < 0.999
    level = schedules.cosine_beta(steps)(jnp.arange(steps + 1) / steps)
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    np.testing.assert_allclose(level.alpha, np.sqrt(alpha_bar), rtol=1e-11)
    np.testing.assert_allclose(level.sigma, np.sqrt(1 - alpha_bar), rtol=1e-11, atol=1e-15)
    # Up to the clipped last row it is the cosine itself, whose offset at t = 0 is divided away.
    np.testing.assert_allclose(level.alpha[:-1] ** 2, (f / f[0])[:-1], rtol=1e-9)


@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.3), (-3.0, 3.0, 0.1), (0.0, 3.0, 1.1)])
def test_sigmoid_is_its_formula(start, end, tau, x64):
    """Jabri et al. 2022, algorithm 3: gamma = (v_end - v) / (v_end - v_start), and alpha = sqrt(gamma)."""
    t = np.linspace(0, 1, 401)
    low, v, high = (1 / (1 + np.exp(-m / tau)) for m in (start, start + t * (end - start), end))
    level = schedules.sigmoid(start, end, tau)(jnp.asarray(t))
    np.testing.assert_allclose(level.alpha**2, (high - v) / (high - low), atol=2e-15)
    np.testing.assert_allclose(level.sigma**2, (v - low) / (high - low), atol=2e-15)


@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01])
def test_sigmoid_keeps_its_digits_at_both_ends_in_float32(tau):
    """Relative to float64, where differences of the logistic function have none left; tau = 0.01 overflows nowhere."""
    schedule, t = schedules.sigmoid(tau=tau), np.asarray([1e-6, 1e-4, 0.01, 0.5, 0.99, 1 - 2.0**-20], np.float32)
    low, high = schedule(jnp.asarray(t)), times.grid(schedule, t)
    # The exponents reach 3 / tau, and their rounding is relative to that.
    np.testing.assert_allclose(low.alpha, high.alpha, rtol=1e-6 + 3e-7 / tau, atol=1e-37)
    np.testing.assert_allclose(low.sigma, high.sigma, rtol=1e-6 + 3e-7 / tau, atol=1e-37)
    ends = schedule(jnp.asarray([0.0, 1.0]))
    assert ends.alpha.tolist() == [1, 0] and ends.sigma.tolist() == [0, 1]


def test_vp_subvp_and_ve_are_their_kernels(x64):
    """Song et al. 2021, eqs. 29 to 33."""
    t = np.linspace(0, 1, 101)
    log = -0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1
    vp, sub = schedules.vp()(jnp.asarray(t)), schedules.subvp()(jnp.asarray(t))
    np.testing.assert_allclose(vp.alpha, np.exp(log), rtol=1e-14)
    np.testing.assert_allclose(sub.alpha, np.exp(log), rtol=1e-14)
    np.testing.assert_allclose(vp.sigma**2, 1 - np.exp(2 * log), atol=1e-15)
    np.testing.assert_allclose(sub.sigma, 1 - np.exp(2 * log), atol=1e-15)
    ve = schedules.ve(0.01, 50)(jnp.asarray(t))
    np.testing.assert_allclose(ve.sigma, 0.01 * 5000**t, rtol=1e-13)
    assert (ve.alpha == 1).all()


def test_vp_is_the_limit_of_linear_beta(x64):
    """A table of beta(t) / steps, steps -> infinity (Song et al. 2021, appendix B)."""
    t, steps = jnp.linspace(0, 1, 11), 100_000
    table = schedules.linear_beta(steps, 0.1 / steps, 20 / steps)
    np.testing.assert_allclose(table(t).alpha, schedules.vp()(t).alpha, rtol=2e-3)


@pytest.mark.parametrize("ratio", [0.25, 64 / 96, 3.0])
@pytest.mark.parametrize("schedule", [schedules.cosine, schedules.straight, schedules.ve(), schedules.linear_beta(100)])
def test_shifted_moves_logsnr_and_keeps_the_length(schedule, ratio, x64):
    """Hoogeboom et al. 2023, eq. 5."""
    t = jnp.linspace(0.01, 0.99, 99)
    before, after = schedule(t), schedules.shifted(schedule, ratio)(t)
    np.testing.assert_allclose(logsnr(after), logsnr(before) + 2 * np.log(ratio), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.hypot(*after), np.hypot(*before), rtol=1e-14)


def test_shifted_keeps_the_ends_and_is_undone_by_its_inverse():
    snr = logsnr(SHIFTED(jnp.linspace(0, 1, 4001)))
    assert snr[0] == jnp.inf and snr[-1] == -jnp.inf and (jnp.diff(snr[1:-1]) < 0).all()
    for schedule in (schedules.cosine, schedules.straight):
        ends = schedules.shifted(schedule, 64 / 96)(jnp.asarray([0.0, 1.0]))
        assert ends.alpha.tolist() == [1, 0] and ends.sigma.tolist() == [0, 1]
        back = schedules.shifted(schedules.shifted(schedule, 0.25), 4.0)(jnp.asarray([0.1, 0.5, 0.9]))
        np.testing.assert_allclose(np.stack(back), np.stack(schedule(jnp.asarray([0.1, 0.5, 0.9]))), rtol=1e-6)


def test_of_logsnr_has_that_logsnr():
    snr = jnp.linspace(-40, 40, 81)
    level = schedules.of_logsnr(snr)
    np.testing.assert_allclose(logsnr(level), snr, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, rtol=1e-6)
    assert schedules.of_logsnr(-jnp.inf) == (0, 1) and schedules.of_logsnr(jnp.inf) == (1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_a_learned_schedule_falls_strictly_between_its_ends(seed):
    params = CURVE.init(jax.random.key(seed))
    t = jnp.linspace(0, 1, 1001)
    share = schedules.interior(params, t)
    assert share.dtype == jnp.float32 and share[0] == 0 and share[-1] == 1 and (jnp.diff(share) > 0).all()
    level = CURVE.at(params)(t)
    np.testing.assert_allclose(logsnr(level), 5.0 - 18.3 * share, atol=1e-5)
    assert (jnp.diff(logsnr(level)) < 0).all()
    np.testing.assert_allclose([logsnr(level)[0], logsnr(level)[-1]], [5.0, -13.3], rtol=1e-6)
    np.testing.assert_array_equal(params["ends"], np.float32([5.0, -13.3]))


def test_a_learned_schedule_stays_monotone_whatever_its_parameters():
    """Far from where it begins, steep and flat: never rising, in float32."""
    shapes = jax.eval_shape(schedules.learned(-10, 10, 64).init, jax.random.key(0))
    for seed in range(8):
        rng = np.random.default_rng(seed)
        params = jax.tree.map(lambda a, rng=rng: jnp.asarray(8 * rng.standard_normal(a.shape), jnp.float32), shapes)
        share = schedules.interior(params, jnp.linspace(0, 1, 1001))
        assert jnp.isfinite(share).all() and share[0] == 0 and share[-1] == 1
        assert (jnp.diff(share) > -1e-6).all()


def test_interior_is_the_networks_rise(x64):
    """VDM appendix H: f = l1(t) + l3(sigmoid(l2(l1(t)))), its weights positive, in plain NumPy."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS)

    def f(t):
        w1, w2, w3 = (np.log1p(np.exp(params[name]["w"])) for name in ("l1", "l2", "l3"))
        h = w1 * t + params["l1"]["b"]
        return h + (w3 / (1 + np.exp(-(w2 * h + params["l2"]["b"])))).mean()

    for t in (0.1, 0.37, 0.9):
        np.testing.assert_allclose(schedules.interior(PARAMS, jnp.asarray(t)), (f(t) - f(0)) / (f(1) - f(0)), rtol=1e-6)


def test_a_learned_schedule_has_gradients_for_all_its_parameters():
    """The interior's own parameters do not move its ends, and the two ends move the level in proportion to the share."""
    slope = jax.jit(jax.grad(lambda params, t: logsnr(CURVE.at(params)(t))))
    middle, end = slope(PARAMS, 0.3), slope(PARAMS, 1.0)
    assert all(jnp.isfinite(a).all() and jnp.abs(a).max() > 0 for a in jax.tree.leaves(middle))
    share = schedules.interior(PARAMS, 0.3)
    np.testing.assert_allclose(middle["ends"], [1 - share, share], rtol=1e-4)
    assert all(jnp.abs(a).max() < 1e-6 for name in ("l1", "l2", "l3") for a in jax.tree.leaves(end[name]))
    _, rise = jax.jvp(lambda t: schedules.interior(PARAMS, t), (jnp.ones(()),), (jnp.ones(()),))
    assert rise > 0


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("cosine_beta", {"steps": 0}),
        ("cosine_beta", {"s": -0.1}),
        ("cosine_beta", {"largest": 1.0}),
        ("sigmoid", {"tau": 0.0}),
        ("sigmoid", {"start": 3.0}),
        ("vp", {"beta_min": -1.0}),
        ("vp", {"beta_min": 0.0, "beta_max": 0.0}),
        ("subvp", {"beta_min": 30.0}),
        ("ve", {"lo": 0.0}),
        ("ve", {"lo": 2.0, "hi": 2.0}),
        ("shifted", {"schedule": schedules.cosine, "ratio": 0.0}),
        ("shifted", {"schedule": schedules.cosine, "ratio": float("nan")}),
        ("shifted", {"schedule": CURVE, "ratio": 0.5}),
        ("learned", {"lo": 1.0, "hi": 1.0}),
        ("learned", {"lo": float("-inf"), "hi": 1.0}),
        ("learned", {"lo": 0.0, "hi": 1.0, "features": 0}),
    ],
)
def test_wrong_numbers_are_refused_in_one_line(name, bad):
    with pytest.raises(ValueError, match=f"^{name} needs .*$"):
        getattr(schedules, name)(**bad)


def test_shifted_refuses_a_schedule_without_its_brackets():
    with pytest.raises(ValueError, match="shifted needs a schedule"):
        schedules.shifted(schedules.vp, 0.5)(0.5)


def test_made_schedules_are_traced_arguments():
    traces = []

    @jax.jit
    def alpha(schedule, t):
        traces.append(1)
        return schedule(t).alpha

    a, b = (alpha(schedules.shifted(schedules.vp(0.1, most), ratio), 0.5) for most, ratio in ((20.0, 1.0), (10.0, 2.0)))
    assert a < b and len(traces) == 1


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
