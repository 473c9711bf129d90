"""Solvers: identities with the published algorithms, written out plainly, and measured orders of convergence."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import flow, gaussian, known, ones, zeros

from jaxdiff import schedules, solvers, targets, times
from jaxdiff.denoiser import denoiser
from jaxdiff.level import Level, Prediction, beta_std, posterior_std, with_x0
from jaxdiff.sampling import sample, solve
from jaxdiff.solvers import wrappers

BETA = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.concatenate([[1.0], np.cumprod(1 - BETA)])


def step(solver, x, t, s):
    """One step in float64, and the prediction."""
    keys = jax.random.split(jax.random.key(0), x.shape[0])
    state, p = jax.jit(solver.step)(keys, solver.init(jnp.asarray(x)), t, s)
    return np.asarray(state.x), p


def level_rows(rows):
    """The linear-beta table's rows as float64 levels [N, 1], one a sample."""
    a = ALPHA_BAR[rows][:, None]
    return Level(jnp.asarray(np.sqrt(a)), jnp.asarray(np.sqrt(1 - a)))


def denoised_gaussian(x, alpha, sigma, mean=0.4, var=0.3):
    """E[x0 | x] of data N(mean, var), in NumPy."""
    return mean + alpha * var / (alpha**2 * var + sigma**2) * (x - alpha * mean)


# --- DDPM and DDIM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim(eta=1)", "ddpm small", "ddpm large"])
def test_one_step_is_ddpms_posterior_at_every_row(name, x64):
    """DDPM eqs. 6 and 7 for all of t = 1000 ... 2 and the last step t = 1, whose posterior is a point."""
    i = np.arange(1, 1001)
    rng = np.random.default_rng(0)
    x, x0 = rng.standard_normal((2, 1000, 3))
    bar, before, beta = (a[:, None] for a in (ALPHA_BAR[i], ALPHA_BAR[i - 1], BETA))
    mean = np.sqrt(before) * beta / (1 - bar) * x0 + np.sqrt(1 - beta) * (1 - before) / (1 - bar) * x
    small = np.sqrt((1 - before) / (1 - bar) * beta)
    make = {
        "ddim(eta=1)": lambda noise: solvers.ddim(known(jnp.asarray(x0)), 1.0, noise),
        "ddpm small": lambda noise: solvers.ddpm(known(jnp.asarray(x0)), noise=noise),
        "ddpm large": lambda noise: solvers.ddpm_large(known(jnp.asarray(x0)), noise=noise),
    }[name]
    t, s = level_rows(i), level_rows(i - 1)
    still, _ = step(make(zeros), x, t, s)
    moved, _ = step(make(ones), x, t, s)
    np.testing.assert_allclose(still, mean, rtol=1e-9, atol=1e-9)
    std = np.sqrt(beta) if name == "ddpm large" else small
    np.testing.assert_allclose(moved - still, np.broadcast_to(std, x.shape), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_strided_step_is_ddims_equation(eta, x64):
    """DDIM eqs. 12 and 16, on jumps of many rows."""
    i, j = np.asarray([1000, 800, 500, 21]), np.asarray([800, 500, 21, 1])
    rng = np.random.default_rng(1)
    x, x0 = rng.standard_normal((2, 4, 3))
    bar, before = ALPHA_BAR[i][:, None], ALPHA_BAR[j][:, None]
    eps = (x - np.sqrt(bar) * x0) / np.sqrt(1 - bar)
    std = eta * np.sqrt((1 - before) / (1 - bar)) * np.sqrt(1 - bar / before)
    mean = np.sqrt(before) * x0 + np.sqrt(1 - before - std**2) * eps
    t, s = level_rows(i), level_rows(j)
    still, p = step(solvers.ddim(known(jnp.asarray(x0)), eta, zeros), x, t, s)
    moved, _ = step(solvers.ddim(known(jnp.asarray(x0)), eta, ones), x, t, s)
    np.testing.assert_allclose(still, mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(moved - still, np.broadcast_to(std, x.shape), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(p.eps, eps, rtol=1e-10, atol=1e-10)


def test_noise_is_standard_normal_and_each_samples_own():
    """What a step adds is its key's own normal draw times the deviation."""
    t, s = (schedules.cosine(jnp.float32(a)) for a in (0.6, 0.5))
    keys = jax.random.split(jax.random.key(3), 4)
    solver = solvers.ddpm(known(jnp.zeros(())), beta_std)
    state, _ = solver.step(keys, solver.init(jnp.zeros((4, 2, 3))), t, s)
    want = np.stack([jax.random.normal(key, (2, 3)) for key in keys]) * np.asarray(beta_std(t, s))
    np.testing.assert_allclose(state.x, want, rtol=1e-5, atol=1e-6)


def test_line_separates_the_mean_from_the_noise(x64):
    """`std` shapes the mean and `add` the noise; `add` is `std` unless given, and may read the prediction."""
    t, s = (schedules.straight(jnp.asarray(a)) for a in (0.8, 0.5))
    d = known(jnp.full((1, 2), 0.3))
    x = np.asarray([[1.0, -2.0]])
    mean, _ = step(solvers.line(d, posterior_std, noise=zeros), x, t, s)
    same, _ = step(solvers.line(d, posterior_std, noise=ones), x, t, s)
    np.testing.assert_allclose(same - mean, posterior_std(t, s), rtol=1e-9)
    learned, _ = step(solvers.line(d, posterior_std, lambda t, s, p: p.x0**2, ones), x, t, s)
    np.testing.assert_allclose(learned - mean, 0.09, rtol=1e-9)
    all_noise, _ = step(solvers.line(d, lambda t, s, p: s.sigma * (1 + 1e-12), noise=zeros), x, t, s)
    np.testing.assert_allclose(all_noise, s.alpha * 0.3)  # a hair more than all of eps is all of it, not NaN


def test_ddim_without_eta_ignores_its_key():
    levels = times.grid(schedules.cosine, times.uniform(5))
    x = jax.random.normal(jax.random.key(0), (3, 4))
    d = gaussian(0.4, 0.3)
    a, b = (sample(jax.random.key(k), solvers.ddim(d), x, levels) for k in (1, 2))
    np.testing.assert_array_equal(a, b)
    a, b = (sample(jax.random.key(k), solvers.ddim(d, 1.0), x, levels) for k in (1, 2))
    assert (jnp.abs(a - b) > 1e-4).all()


# --- flow matching, EDM, DPM-Solver++ -------------------------------------------------------------------------------------


def test_euler_on_the_straight_path_is_flow_matchings(x64):
    """x + (s - t) u with the marginal velocity u = E[eps - x0 | x], started at alpha = 0 exactly and ended at s = 0.1."""
    mean, var = 0.4, 0.3
    x = np.random.default_rng(2).standard_normal((5, 3))
    grid = times.uniform(10)

    def net(u, snr):
        sigma = 1 / (1 + jnp.exp(snr / 2))
        z = u * jnp.hypot(1 - sigma, sigma)
        x0 = mean + (1 - sigma) * var / ((1 - sigma) ** 2 * var + sigma**2) * (z - (1 - sigma) * mean)
        eps = sigma / ((1 - sigma) ** 2 * var + sigma**2) * (z - (1 - sigma) * mean)
        return eps - x0, None

    d = denoiser(net, targets.flow)
    state, _ = solve(jax.random.key(0), solvers.ddim(d), jnp.asarray(x), schedules.straight(jnp.asarray(grid)))
    for t, s in itertools.pairwise(grid):
        x0 = denoised_gaussian(x, 1 - t, t, mean, var)
        velocity = (x - x0) / t if t < 1 else x - x0  # (x - x0) / t = eps - x0
        x = x + (s - t) * velocity
    np.testing.assert_allclose(state.x, x, rtol=1e-6, atol=1e-6)  # the network's logsnr stops at 30
    final = sample(jax.random.key(0), solvers.ddim(d), state.x, schedules.straight(jnp.asarray([0.1])))
    np.testing.assert_allclose(final, x - 0.1 * (x - denoised_gaussian(x, 0.9, 0.1, mean, var)) / 0.1, rtol=1e-6, atol=1e-6)


def counted(denoise):
    """The denoiser, and a list that grows by one at each of its evaluations at run time."""
    calls = []

    def counting(x, level):
        jax.debug.callback(lambda: calls.append(1))
        return denoise(x, level)

    return counting, calls


@pytest.mark.parametrize("pad", [0, 7])
def test_heun_is_edms_algorithm(pad, x64):
    """EDM algorithm 1 on its own schedule (algorithm 2 without churn): 18 levels and sigma = 0, 35 evaluations, padded or not."""
    x = np.random.default_rng(3).standard_normal((4, 3)) * 80
    sigma = times.karras(18)
    counting, calls = counted(gaussian(0.4, 0.3))
    levels = schedules.edm(jnp.asarray(np.pad(sigma, (0, pad), mode="edge")))
    got = sample(jax.random.key(0), solvers.heun(counting), jnp.asarray(x), levels)
    jax.effects_barrier()
    assert len(calls) == 35

    t = np.append(sigma, 0.0)
    for i in range(18):
        d = (x - denoised_gaussian(x, 1, t[i])) / t[i]
        ahead = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_ahead = (ahead - denoised_gaussian(ahead, 1, t[i + 1])) / t[i + 1]
            ahead = x + (t[i + 1] - t[i]) * (d + d_ahead) / 2
        x = ahead
    np.testing.assert_allclose(got, x, rtol=1e-10, atol=1e-10)


def test_one_step_solvers_evaluate_once_a_level():
    for make in (solvers.ddim, solvers.ddpm, solvers.dpmpp_2m):
        counting, calls = counted(gaussian(0.4, 0.3))
        sample(jax.random.key(0), make(counting), jnp.ones((2, 3)), times.grid(schedules.cosine, times.uniform(6), 9))
        jax.effects_barrier()
        assert len(calls) == 6


def dpmpp_2m_plain(x, alpha, sigma, eta=0.0, **data):
    """DPM-Solver++(2M), algorithm 2 of Lu et al. 2022, from (alpha[0], sigma[0]); then one first-order step to sigma = 0.

    With eta = 1 and unit noise, its SDE form: the same D, with exp(-2h) in place of exp(-h).
    """
    lam = np.log(alpha) - np.log(sigma)
    before = np.zeros_like(x)
    for i in range(1, len(lam)):
        denoised = denoised_gaussian(x, alpha[i - 1], sigma[i - 1], **data)
        h = lam[i] - lam[i - 1]
        if i == 1:
            d = denoised
        else:
            r = (lam[i - 1] - lam[i - 2]) / h
            d = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * before
        if eta == 0:
            x = sigma[i] / sigma[i - 1] * x - alpha[i] * (np.exp(-h) - 1) * d
        else:
            noise = sigma[i] * np.sqrt(1 - np.exp(-2 * h)) * 1.0
            x = sigma[i] / sigma[i - 1] * np.exp(-h) * x + alpha[i] * (1 - np.exp(-2 * h)) * d + noise
        before = denoised
    return denoised_gaussian(x, alpha[-1], sigma[-1], **data)


@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ODE", "SDE"])
@pytest.mark.parametrize("curve", ["vp", "edm", "straight"])
def test_dpmpp_2m_is_the_published_recursion(curve, eta, x64):
    """On grids with unequal steps, so that r is not 1, none more than twice as long as the one before."""
    schedule, t = {
        "vp": (schedules.linear_beta(), times.strided(1000, 12, "trailing")),
        "edm": (schedules.edm, times.karras(12)),
        "straight": (schedules.straight, np.linspace(0.95, 0.05, 12)),
    }[curve]
    levels = schedule(jnp.asarray(t))
    alpha, sigma = (np.asarray(a) for a in levels)
    x = np.random.default_rng(4).standard_normal((4, 3)) * np.hypot(alpha[0], sigma[0])
    d = gaussian(0.4, 0.3)
    want = dpmpp_2m_plain(x, alpha, sigma, eta)
    got = sample(jax.random.key(0), solvers.dpmpp_2m(d, eta, ones), jnp.asarray(x), levels)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_dpmpp_2m_from_pure_noise_takes_first_order_steps_until_it_has_history(x64):
    """At alpha = 0 half-logsnr is -inf: the first two intervals are DDIM's, the third is second order, all finite."""
    t, run = np.asarray([1.0, 0.8, 0.6, 0.4]), jax.jit(solve)
    x = jnp.asarray(np.random.default_rng(5).standard_normal((4, 3)))
    d = gaussian(0.4, 0.3)

    def ends(make, n):
        return run(jax.random.key(0), make(d), x, schedules.cosine(jnp.asarray(np.pad(t[:n], (0, 4 - n), mode="edge"))))[0].x

    for n in (2, 3):
        np.testing.assert_allclose(ends(solvers.dpmpp_2m, n), ends(solvers.ddim, n), rtol=1e-12)
    assert (jnp.abs(ends(solvers.dpmpp_2m, 4) - ends(solvers.ddim, 4)) > 1e-4).all()
    assert jnp.isfinite(ends(solvers.dpmpp_2m, 4)).all()


def test_order_one_line_is_ddim_and_ddpm_is_its_name(x64):
    levels = schedules.cosine(jnp.asarray(times.uniform(7)))
    x = jnp.asarray(np.random.default_rng(6).standard_normal((4, 3)))
    d = gaussian(0.4, 0.3)

    def run(solver):
        return np.asarray(sample(jax.random.key(1), solver, x, levels))

    # To the last place: two programs, which a compiler may round differently.
    np.testing.assert_allclose(run(solvers.line(d)), run(solvers.ddim(d)), rtol=1e-14)
    np.testing.assert_allclose(run(solvers.ddim(d, 1.0)), run(solvers.ddpm(d)), rtol=1e-12)
    np.testing.assert_array_equal(run(solvers.ddpm(d, beta_std)), run(solvers.ddpm_large(d)))
    assert (np.abs(run(solvers.ddpm_large(d)) - run(solvers.ddpm(d))) > 1e-6).all()


# --- orders of convergence ------------------------------------------------------------------------------------------------


def user_defined(t):
    """A curve of nobody's: sub-VP, sigma = 1 - alpha^2, with alpha = exp(-3 t^2)."""
    return Level(jnp.exp(-3 * t**2), -jnp.expm1(-6 * t**2))


LONG = ("dpmpp_2m", "dpmpp_3m", "dpmpp_3m_corrected", "unipc")


@pytest.mark.filterwarnings("ignore:divide by zero")  # the logsnr of alpha = 0
@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ODE", "SDE"])
@pytest.mark.parametrize("name", LONG)
def test_a_multistep_solver_does_not_extrapolate_far_beyond_what_it_knows(name, eta, x64):
    """Song et al.'s even grid ends with a step seven times as long in half-logsnr as the one before.

    Data of variance 0.25, from which the published recursion comes out at 0.33 (ODE) and 0.51 (SDE), one of third order at 21.
    """
    if name == "unipc" and eta:
        pytest.skip("UniPC has no SDE form")
    options = {} if name == "unipc" else {"eta": eta}
    levels, rng = times.grid(schedules.cosine, times.linear(20)), np.random.default_rng(0)
    lam = np.log(np.float64(levels.alpha)) - np.log(np.float64(levels.sigma))
    assert lam[-1] - lam[-2] > 4 * (lam[-2] - lam[-3])
    x = levels.alpha[0] * 0.5 + np.hypot(levels.alpha[0] * 0.5, levels.sigma[0]) * rng.standard_normal((4000, 1))
    got = np.asarray(sample(jax.random.key(0), getattr(solvers, name)(gaussian(0.5, 0.25), **options), jnp.asarray(x), levels))
    assert abs(got.mean() - 0.5) < 0.03 and 0.22 < got.var() < 0.32
    if name == "dpmpp_2m" and not eta:
        centred = dpmpp_2m_plain(x - levels.alpha[0] * 0.5, *(np.float64(a) for a in levels), 0.0, mean=0.0, var=0.25)
        assert centred.var() > 0.32


CURVES = {  # schedule, and n -> a grid of n smooth steps
    "linear_beta": (schedules.linear_beta(), lambda n: np.linspace(1.0, 0.04, n + 1)),
    "cosine": (schedules.cosine, lambda n: np.linspace(0.97, 0.03, n + 1)),
    "straight": (schedules.straight, lambda n: 1 / (1 + np.exp(np.linspace(-4, 4, n + 1)))),
    "edm": (schedules.edm, lambda n: times.karras(n + 1, 0.02, 20.0)),
    "user": (user_defined, lambda n: np.linspace(1.0, 0.15, n + 1)),
}


def measured_order(make, curve, steps, history=0):
    """log2 of how much the error at the last level falls from `steps` to 2 `steps`, on anisotropic Gaussian data.

    The first `history` steps begin on the exact path, so that what a multistep solver remembers is exact; its first steps, of lower
    order, would else cap what is measured.
    """
    schedule, grid = CURVES[curve]
    mean, var = np.asarray([[0.5, -0.2, 0.0]]), np.asarray([[0.2, 1.5, 4.0]])
    solver, errors = make(gaussian(mean, var)), []
    keys, step = jax.random.split(jax.random.key(0), 4), jax.jit(solver.step)
    for n in (steps, 2 * steps):
        levels = [jax.tree.map(lambda a, i=i: a[i], schedule(jnp.asarray(grid(n)))) for i in range(n + 1)]
        x = np.random.default_rng(7).standard_normal((4, 3)) * np.asarray(jnp.hypot(*levels[0]))
        exact = [jnp.asarray(flow(mean, var, x, levels[0], level)) for level in (*levels[: history + 1], levels[-1])]
        state = solver.init(exact[0])
        for i in range(n):
            if 0 < i <= history:
                state = state._replace(x=exact[i], **({"before": exact[i - 1]} if hasattr(state, "before") else {}))
            state, _ = step(keys, state, levels[i], levels[i + 1])
        errors.append(np.sqrt(np.mean((np.asarray(state.x) - exact[-1]) ** 2)))
    return np.log2(errors[0] / errors[1])


def of_order(make, order):
    return lambda d: make(d, order=order)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(
    ("make", "order"),
    [
        (solvers.ddim, 1),
        (lambda d: solvers.euler_maruyama(d, 0.0), 1),
        (solvers.dpmpp_2m, 2),
        (solvers.heun, 2),
        (solvers.dpm2, 2),
        (solvers.dpmpp_2s, 2),
    ],
    ids=["ddim", "euler_maruyama", "dpmpp_2m", "heun", "dpm2", "dpmpp_2s"],
)
def test_measured_order_of_convergence(make, order, curve, x64):
    assert (
        abs(measured_order(make, curve, 96 if curve == "linear_beta" else 128, 1 if make is solvers.dpmpp_2m else 0) - order) < 0.15
    )


@pytest.mark.parametrize("curve", ["edm", "user"])
@pytest.mark.parametrize(
    ("make", "order", "history"),
    [
        (solvers.dpmpp_3m_corrected, 3, 2),
        *((of_order(solvers.deis, k), k, k - 1) for k in (1, 2, 3, 4)),
        *((of_order(solvers.lms, k), k, k - 1) for k in (1, 2, 3, 4)),
        # The corrector adds one order, as its paper proves.
        *((of_order(solvers.unipc, k), k + 1, k) for k in (1, 2, 3)),
    ],
    ids=["3m", *(f"deis{k}" for k in (1, 2, 3, 4)), *(f"lms{k}" for k in (1, 2, 3, 4)), *(f"unipc{k}" for k in (1, 2, 3))],
)
def test_measured_order_of_multistep_solvers_with_exact_history(make, order, history, curve, x64):
    assert abs(measured_order(make, curve, 128, history) - order) < 0.15


@pytest.mark.parametrize("curve", ["edm", "user"])
def test_dpmpp_3m_as_published_is_not_of_third_order(curve, x64):
    assert 1.4 < measured_order(solvers.dpmpp_3m, curve, 128, 2) < 2.2


@pytest.mark.parametrize("make", [of_order(solvers.deis, 5), of_order(solvers.lms, 0), of_order(solvers.unipc, 4)])
def test_an_order_that_there_is_not_is_refused(make):
    with pytest.raises(ValueError, match=r"has order 1 to [34], got [045]"):
        make(gaussian(0.0, 1.0))


def test_averages_under_an_exponential_are_the_phi_functions(x64):
    """phi_1, phi_2, phi_3 of Hochbruck and Ostermann, in extended precision, at exponents small and large."""
    from jaxdiff.solvers.base import POINTS, under_exponential

    for z in (1e-3, 0.1, 1.0, -2.0, 8.0, 25.0):
        r = (np.arange(100000, dtype=np.longdouble) + 0.5) / 100000
        density = np.exp(z * (r - (z > 0)))
        w = np.asarray(under_exponential(jnp.asarray(z)))
        for power in (1, 2, 3):
            assert abs(w @ POINTS**power - float((density * r**power).sum() / density.sum())) < 1e-8, (z, power)


# --- wrappers and stochastic solvers --------------------------------------------------------------------------------------


STOCHASTIC = {  # a solver, the levels that make its bias small, and how near its deviation then is
    "ddpm": (solvers.ddpm, 400, 0.02),
    "ddpm_large": (solvers.ddpm_large, 400, 0.02),
    "ddpm_learned": (lambda d: solvers.ddpm_learned(lambda x, t: d(x, t)._replace(aux=0.5)), 400, 0.02),
    "ddim, eta": (lambda d: solvers.ddim(d, 0.5), 400, 0.02),
    "euler_ancestral": (solvers.euler_ancestral, 400, 0.02),
    "dpm2_ancestral": (solvers.dpm2_ancestral, 400, 0.02),
    "dpmpp_2s": (lambda d: solvers.dpmpp_2s(d, 1.0), 400, 0.02),
    "dpmpp_2s_ancestral": (solvers.dpmpp_2s_ancestral, 400, 0.02),
    "dpmpp_2m": (lambda d: solvers.dpmpp_2m(d, 1.0), 200, 0.02),
    "dpmpp_3m": (lambda d: solvers.dpmpp_3m(d, 1.0), 200, 0.02),
    "dpmpp_3m_corrected": (lambda d: solvers.dpmpp_3m_corrected(d, 1.0), 100, 0.02),
    "churned": (solvers.churned, 100, 0.02),
    "churned dpmpp_2m": (lambda d: solvers.churned(d, solvers.dpmpp_2m, 0.05, (0.0, 100.0), 1.0), 200, 0.02),
    "corrected": (lambda d: solvers.corrected(d, solvers.ddim, 0.1), 400, 0.02),
    "euler_maruyama": (solvers.euler_maruyama, 800, 0.02),
    "annealed_langevin": (lambda d: solvers.annealed_langevin(d, 0.05, 20), 300, 0.03),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_have_the_datas_mean_and_covariance(name):
    make, steps, tolerance = STOCHASTIC[name]
    mean, var = jnp.asarray([[0.5, -1.0]]), jnp.asarray([[0.3, 2.0]])
    levels = times.grid(schedules.edm, times.karras(steps, 0.01, 60.0))
    x = 60.0 * jax.random.normal(jax.random.key(1), (10000, 2))
    got = np.asarray(jax.jit(sample)(jax.random.key(2), make(gaussian(mean, var)), x, levels), np.float64)
    covariance = np.cov(got.T)
    np.testing.assert_allclose(got.mean(0), mean[0], atol=0.05)
    # A variance of 10,000 samples is known to 1.4%.
    np.testing.assert_allclose(np.diag(covariance), var[0], rtol=2 * tolerance + 0.03)
    assert abs(covariance[0, 1]) < 0.04


def key_itself(key, shape, dtype):
    """For a solver's `noise`: the number that stands where a key should, so that keys of 0 and 1 say which row has noise."""
    return jnp.full(shape, key, dtype)


def distribution(solver, levels, mean, var):
    """(mean, variance) [1, D] of what a solver of one draw a step makes of Gaussian data, begun exactly, at the last level: exact.

    All is affine in the start and in each step's noise. The rows begin at the mean, one deviation above it, and one a step at the
    mean with noise of 1 in that step alone: how far a row ends from the first is its source's part of the deviation.
    """
    n = levels.alpha.size - 1
    first, before, after = (jax.tree.map(lambda a, cut=cut: a[cut], levels) for cut in (0, slice(None, -1), slice(1, None)))
    start = jnp.tile(first.alpha * mean, (n + 2, 1)).at[1].add(jnp.sqrt(first.alpha**2 * var + first.sigma**2)[0])

    def move(state, inputs):
        noisy, t, s = inputs
        return solver.step(noisy, state, t, s)[0], None

    state, _ = jax.lax.scan(move, solver.init(start), (jnp.eye(n, n + 2, 2), before, after))
    return state.x[:1], jnp.square(state.x[1:] - state.x[:1]).sum(0, keepdims=True)


def bias(make, curve, n):
    """How far the deviation after n steps is from the noisy data's, as a share of it, [1, 3]; the mean must be right by itself."""
    mean, var = np.asarray([[0.5, -1.0, 0.2]]), np.asarray([[0.01, 0.3, 2.0]])
    schedule, grid = CURVES[curve]
    levels = schedule(jnp.asarray(grid(n)))
    got, variance = jax.jit(lambda: distribution(make(levels, mean, var), levels, mean, var))()
    np.testing.assert_allclose(got, levels.alpha[-1] * mean, atol=1e-9)
    return np.sqrt(np.asarray(variance / (levels.alpha[-1] ** 2 * var + levels.sigma[-1] ** 2))) - 1


def saying(aux):
    """A Gaussian's denoiser that also says `aux` of its variance, -1 the small one and 1 the large."""
    return lambda levels, mean, var: lambda x, t: gaussian(mean, var)(x, t)._replace(aux=aux(levels, var, t))


def best(levels, var, t):
    """The aux that a network learns of Gaussian data on this grid: of the variance of q(x_s | x_t), x0 unknown."""
    s = jax.tree.map(lambda a: a[jnp.argmin(jnp.abs(levels.sigma - t.sigma)) + 1], levels)
    small, large = posterior_std(t, s), beta_std(t, s)
    of_x0 = s.alpha - jnp.sqrt(s.sigma**2 - small**2) * t.alpha / t.sigma
    unknown = var * t.sigma**2 / (t.alpha**2 * var + t.sigma**2)
    return 2 * jnp.log(jnp.sqrt(small**2 + of_x0**2 * unknown) / small) / jnp.log(large / small) - 1


def plain(levels, mean, var):
    return gaussian(mean, var)


ONE_DRAW_A_STEP = {  # a solver and the denoiser it is shown
    "ddpm": (solvers.ddpm, plain),
    "ddpm_large": (solvers.ddpm_large, plain),
    # Halfway the two deviations' biases all but cancel, and what is left is of second order.
    "ddpm_learned, nearer the large": (solvers.ddpm_learned, saying(lambda levels, var, t: 0.5)),
    "ddim(eta=0.5)": (lambda d, noise: solvers.ddim(d, 0.5, noise), plain),
    "euler_ancestral": (lambda d, noise: solvers.euler_ancestral(d, noise=noise), plain),
    "euler_maruyama": (lambda d, noise: solvers.euler_maruyama(d, noise=noise), plain),
}


@pytest.mark.parametrize("curve", ["cosine", "edm"])
@pytest.mark.parametrize("name", ONE_DRAW_A_STEP)
def test_the_bias_of_the_deviation_halves_as_the_steps_double(name, curve, x64):
    make, denoise = ONE_DRAW_A_STEP[name]
    few, many = (bias(lambda *data: make(denoise(*data), noise=key_itself), curve, n) for n in (400, 800))
    assert (np.abs(many) < 0.01).all()
    np.testing.assert_allclose(few / many, 2, atol=0.1)


@pytest.mark.parametrize("n", [3, 20])
def test_ddpm_with_the_variance_a_network_would_learn_is_exact_in_any_number_of_steps(n, x64):
    """The reverse step of Gaussian data is a Gaussian: with its own mean and variance nothing is lost."""
    for curve in ("cosine", "edm"):
        learned = bias(lambda *data: solvers.ddpm_learned(saying(best)(*data), key_itself), curve, n)
        np.testing.assert_allclose(learned, 0, atol=1e-9)
        small = bias(lambda *data: solvers.ddpm(plain(*data), noise=key_itself), curve, n)
        assert (np.abs(small) > 1e-3).all()


def test_a_wrapped_solver_forgets_what_it_remembered():
    d = gaussian(0.4, 0.3)
    t, s, u = (Level(jnp.ones(()), jnp.asarray(a)) for a in (3.0, 2.0, 1.0))
    x, keys = jnp.ones((2, 3)), jax.random.split(jax.random.key(0), 2)
    inner = solvers.dpmpp_2m(d)
    for wrapped in (
        wrappers.ancestral(inner, 1.0),
        wrappers.langevin(inner, d, 0.1),
        wrappers.churn(inner, 0.1),
    ):
        state, _ = wrapped.step(keys, wrapped.init(x), t, s)
        assert type(state) is type(inner.init(x))
        after, _ = wrapped.step(keys, state, s, u)
        again, _ = wrapped.step(keys, wrapped.init(state.x), s, u)
        np.testing.assert_array_equal(after.x, again.x)
    plain, _ = inner.step(keys, inner.step(keys, inner.init(x), t, s)[0], s, u)
    forgetful, _ = inner.step(keys, inner.init(inner.step(keys, inner.init(x), t, s)[0].x), s, u)
    assert (jnp.abs(plain.x - forgetful.x) > 1e-4).all()


def test_churn_leaves_levels_outside_its_range_alone():
    d = gaussian(0.4, 0.3)
    levels = times.grid(schedules.edm, times.karras(6, 0.1, 10.0))
    x = jax.random.normal(jax.random.key(0), (3, 4))

    def run(between):
        return sample(jax.random.key(1), wrappers.churn(solvers.heun(d), 0.3, between), x, levels)

    np.testing.assert_array_equal(run((20.0, 30.0)), sample(jax.random.key(1), solvers.heun(d), x, levels))
    assert (run((0.0, 30.0)) != run((20.0, 30.0))).all()


def test_consistency_sampling_of_a_consistency_function_is_exact():
    """Of the flow's own end point as x0, every step ends on the data's distribution."""
    mean, var = 0.5, 0.3
    origin = Level(jnp.ones(()), jnp.zeros(()))
    ends = jax.tree_util.Partial(lambda x, level: with_x0(x, level, flow_jnp(mean, var, x, level, origin)))
    levels = times.grid(schedules.edm, [80.0, 5.0, 0.5])
    x = 80.0 * jax.random.normal(jax.random.key(0), (20000, 1))
    got = sample(jax.random.key(1), solvers.consistency(ends), x, levels)
    np.testing.assert_allclose([got.mean(), got.var()], [mean, var], rtol=0.04)


def flow_jnp(mean, var, x, t, s):
    stretch = jnp.sqrt((s.alpha**2 * var + s.sigma**2) / (t.alpha**2 * var + t.sigma**2))
    return s.alpha * mean + stretch * (x - t.alpha * mean)


# --- the adaptive solver --------------------------------------------------------------------------------------------------


def test_adaptive_reaches_the_accuracy_it_is_asked_for_and_each_sample_takes_its_own_steps(x64):
    mean, var = jnp.asarray([[0.5, -0.2]]), jnp.asarray([[0.2, 1.5]])
    levels = schedules.edm(jnp.asarray([40.0, 0.02]))
    x = 40 * np.random.default_rng(3).standard_normal((5, 2)) * np.asarray([[1.0], [1.0], [1.0], [1.0], [5.0]])
    t, s = (jax.tree.map(lambda a, i=i: np.asarray(a)[i], levels) for i in (0, 1))
    exact, errors, evaluations = flow(mean, var, x, t, s), [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        solver = solvers.adaptive(gaussian(mean, var), tolerance, tolerance)
        state, _ = jax.jit(solve)(jax.random.key(0), solver, jnp.asarray(x), levels)
        errors.append(float(np.abs(np.asarray(state.x) - exact).max()))
        evaluations.append(np.asarray(state.evaluations))
        one, _ = jax.jit(solve)(jax.random.key(0), solver, jnp.asarray(x[1:2]), levels)
        np.testing.assert_allclose(one.x, state.x[1:2], rtol=1e-9)  # alone as among others
        assert one.evaluations[0] == state.evaluations[1]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4
    assert (evaluations[2] > evaluations[0]).all() and (np.unique(evaluations[1]).size > 1) and (evaluations[0] % 3 == 0).all()


def test_adaptive_ends_whatever_the_denoiser_says(x64):
    nan = jax.tree_util.Partial(lambda x, level: Prediction(x * jnp.nan, x * jnp.nan))
    levels = schedules.edm(jnp.asarray([40.0, 0.02]))
    state, _ = jax.jit(solve)(jax.random.key(0), solvers.adaptive(nan, most=20), jnp.ones((2, 3)), levels)
    assert jnp.isnan(state.x).all() and (state.evaluations <= 3 * 21).all()


def test_adaptive_starts_from_pure_noise():
    d = gaussian(0.4, 0.3)
    levels = times.grid(schedules.cosine, [1.0, 0.01])
    x = jax.random.normal(jax.random.key(0), (5000, 1))
    got = sample(jax.random.key(1), solvers.adaptive(d), x, levels)
    np.testing.assert_allclose([got.mean(), got.var()], [0.4, 0.3 * x.var()], rtol=0.06)
