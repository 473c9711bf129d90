"""Running solvers: keys, padding, trace counts, memory, and the distribution of what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from oracles import ancestral_std, flow, gaussian, mixture, network

from jaxdiff import guidance, schedules, solvers, targets, times
from jaxdiff.denoiser import denoiser
from jaxdiff.level import Level
from jaxdiff.sampling import prior, sample, sample_keys, solve

SOLVERS = {
    "ddpm": solvers.ddpm,
    "ddpm_large": solvers.ddpm_large,
    "ddim": solvers.ddim,
    "ddim(eta=1)": Partial(solvers.ddim, eta=1.0),
    "dpmpp_2m": solvers.dpmpp_2m,
    "dpmpp_2m(eta=1)": Partial(solvers.dpmpp_2m, eta=1.0),
    "heun": solvers.heun,
}
ETA = {"ddpm": 1.0, "ddpm_large": 1.0, "ddim": 0.0, "ddim(eta=1)": 1.0}  # the rows of first order
jitted = jax.jit(sample)


def at(levels, i):
    return jax.tree.map(lambda a: a[i], levels)


# --- keys -----------------------------------------------------------------------------------------------------------------


def test_keys_do_not_depend_on_the_batch():
    def data(keys):
        return np.asarray(jax.random.key_data(keys))

    key = jax.random.key(5)
    np.testing.assert_array_equal(data(sample_keys(key, 3)), data(sample_keys(key, 16))[:3])
    np.testing.assert_array_equal(data(sample_keys(sample_keys(key, 4), 4)), data(sample_keys(key, 4)))
    np.testing.assert_array_equal(data(sample_keys(jax.random.PRNGKey(5), 4)), data(sample_keys(key, 4)))
    legacy = jax.random.key_data(sample_keys(key, 4))
    np.testing.assert_array_equal(data(sample_keys(legacy, 4)), legacy)
    assert len(np.unique(data(sample_keys(key, 50)), axis=0)) == 50
    for keys in (sample_keys(key, 3), legacy):
        with pytest.raises(ValueError, match="each of the 5 samples"):
            sample_keys(keys, 5)


def test_a_sample_is_the_same_alone_and_in_any_batch():
    key = jax.random.key(7)
    levels = times.grid(schedules.cosine, times.uniform(8))
    solver = solvers.ddpm(gaussian(0.4, 0.3))
    draw = jax.jit(lambda key, n: sample(key, solver, prior(key, at(levels, 0), (n, 2, 3)), levels), static_argnums=1)

    def run(key, n):
        return np.asarray(draw(key, n))

    full = run(key, 16)
    np.testing.assert_allclose(run(key, 3), full[:3], atol=1e-5)
    np.testing.assert_allclose(run(key, 1), full[:1], atol=1e-5)
    np.testing.assert_allclose(run(sample_keys(key, 16)[4:7], 3), full[4:7], atol=1e-5)  # as another host would draw it
    assert np.abs(full[0] - full[1]).min() > 1e-6 and np.abs(run(jax.random.key(8), 3) - full[:3]).min() > 1e-6


@pytest.mark.parametrize(("schedule", "t"), [(schedules.cosine, 1.0), (schedules.cosine, 0.5), (schedules.edm, 80.0)])
def test_prior_has_the_noisy_datas_deviation(schedule, t):
    level = schedule(jnp.float32(t))
    x = prior(jax.random.key(0), level, (4000, 5), data_std=0.5)
    assert x.dtype == jnp.float32
    want = np.hypot(level.alpha * 0.5, level.sigma)
    np.testing.assert_allclose(x.mean(), 0, atol=5 * want / np.sqrt(20000))
    np.testing.assert_allclose(x.std(), want, rtol=5 / np.sqrt(2 * 20000))


def test_prior_takes_the_noise_of_the_solver():
    def centred(key, shape, dtype):
        return (z := jax.random.normal(key, shape, dtype)) - z.mean()

    x = prior(jax.random.key(0), Level(jnp.float32(0), jnp.float32(1)), (4, 8), noise=centred)
    np.testing.assert_allclose(x.mean(1), 0, atol=1e-6)


# --- solve ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_solve_is_the_loop_it_stands_for(name):
    """State and predictions equal a Python loop over steps, whose key is sample i's folded with the step's number."""
    key = jax.random.key(1)
    levels = times.grid(schedules.straight, np.asarray([0.9, 0.6, 0.5, 0.2]))
    denoise = gaussian(0.4, 0.3)
    solver = SOLVERS[name](denoise)
    x = jax.random.normal(key, (2, 3))
    state, predictions = jax.jit(solve)(key, solver, x, levels)

    one, step = solver.init(x), jax.jit(solver.step)
    for n in range(3):
        keys = jax.vmap(lambda k, n=n: jax.random.fold_in(k, n))(sample_keys(key, 2))
        seen = denoise(one.x, at(levels, n))
        np.testing.assert_allclose(predictions.x0[n], seen.x0, atol=1e-5)
        np.testing.assert_allclose(predictions.eps[n], seen.eps, atol=1e-5)
        one, _ = step(keys, one, at(levels, n), at(levels, n + 1))
    np.testing.assert_allclose(state.x, one.x, atol=1e-5)
    x0 = jitted(key, solver, x, levels)
    np.testing.assert_allclose(x0, denoise(state.x, at(levels, -1)).x0, atol=1e-5)
    assert predictions.x0.shape == (3, 2, 3) and type(state)._fields[0] == "x"


@pytest.mark.parametrize("name", SOLVERS)
def test_padding_changes_no_bit(name):
    key = jax.random.key(2)
    solver = SOLVERS[name](gaussian(0.4, 0.3))
    x = jax.random.normal(key, (3, 4))
    short, padded = (times.grid(schedules.cosine, times.uniform(6), length) for length in (None, 11))
    (a, p), (b, q) = (jax.jit(solve)(key, solver, x, levels) for levels in (padded, short))
    for left, right in zip(a, b):  # x, and a multistep solver's history
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(p.x0[:5], q.x0)
    assert (p.x0[5:] == 0).all() and (p.eps[5:] == 0).all()


def conditional(params, label, x, snr):
    return params["scale"] * x + params["table"][label] + 0.01 * snr, None


def test_one_trace_serves_every_number_of_steps_seed_eta_scale_label_and_parameters():
    traces = []

    @jax.jit
    def run(key, solver, x, levels):
        traces.append(1)
        return sample(key, solver, x, levels)

    def solver(eta=0.5, scale=2.0, label=1, gain=0.1):
        params = {"scale": jnp.float32(gain), "table": jnp.arange(4.0)}
        cond, uncond = (denoiser(Partial(conditional, params, n), targets.v) for n in (label, 0))
        return solvers.ddim(guidance.classifier_free(cond, uncond, scale), eta)

    def grid(n):
        return times.grid(schedules.cosine, times.uniform(n), 50)

    x = jax.random.normal(jax.random.key(0), (2, 3))
    base = run(jax.random.key(0), solver(), x, grid(10))
    others = [
        run(jax.random.key(0), solver(), x, grid(20)),
        run(jax.random.key(0), solver(), x, grid(50)),
        run(jax.random.key(1), solver(), x, grid(10)),
        run(jax.random.key(0), solver(eta=1.0), x, grid(10)),
        run(jax.random.key(0), solver(scale=3.0), x, grid(10)),
        run(jax.random.key(0), solver(label=2), x, grid(10)),
        run(jax.random.key(0), solver(gain=0.2), x, grid(10)),
    ]
    assert len(traces) == 1
    assert all(jnp.isfinite(other).all() and (jnp.abs(other - base) > 1e-6).any() for other in others)


def test_dropped_predictions_are_not_stored():
    """Under jit the scan keeps the stacked predictions only where the caller does: memory does not grow with the steps."""
    solver, x = solvers.ddpm(gaussian(0.4, 0.3)), jnp.zeros((8, 32, 32))

    def size(f, n):
        levels = times.grid(schedules.cosine, times.uniform(n))
        memory = jax.jit(f).lower(jax.random.key(0), solver, x, levels).compile().memory_analysis()
        if memory is None:
            pytest.skip("this backend does not analyse memory")
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    assert size(sample, 201) - size(sample, 11) < x.nbytes / 2
    stored = size(solve, 201) - size(solve, 11)
    assert stored >= 190 * 2 * x.nbytes  # and where it does, they are: x0 and eps


@pytest.mark.parametrize("repeat", [2, 4])
def test_a_level_repeated_anywhere_is_skipped(repeat):
    t = np.asarray([0.9, 0.7, 0.4, 0.1])
    d, x = gaussian(0.4, 0.3), jax.random.normal(jax.random.key(0), (2, 3))
    plain, doubled = (times.grid(schedules.straight, grid) for grid in (t, np.repeat(t, repeat)))
    for make in (solvers.dpmpp_2m, solvers.heun):
        np.testing.assert_allclose(*(jitted(jax.random.key(0), make(d), x, grid) for grid in (plain, doubled)), rtol=1e-6)


def test_an_upward_grid_inverts_a_downward_one(x64):
    """Down, then up the same levels, returns to x, and to the exact flow in between; faster for the better integrator."""
    mean, var = np.asarray([[0.5, -0.2]]), np.asarray([[0.2, 1.5]])
    d, x = gaussian(mean, var), jnp.asarray(np.random.default_rng(0).standard_normal((5, 2)))
    levels = schedules.cosine(jnp.linspace(0.98, 0.02, 201))
    run, errors = jax.jit(lambda solver, x, levels: solve(jax.random.key(0), solver, x, levels)[0].x), {}
    for name in ("ddim", "heun", "dpmpp_2m"):
        solver = SOLVERS[name](d)
        down = run(solver, x, levels)
        np.testing.assert_allclose(down, flow(mean, var, x, at(levels, 0), at(levels, -1)), atol=0.03)
        errors[name] = float(jnp.abs(run(solver, down, jax.tree.map(lambda a: a[::-1], levels)) - x).max())
    assert errors["ddim"] < 0.05 and errors["heun"] < 1e-3 and errors["dpmpp_2m"] < 1e-2


# --- what comes out -------------------------------------------------------------------------------------------------------

STARTS = {
    "cosine": (schedules.cosine, times.uniform(40)),
    "straight": (schedules.straight, times.uniform(40)),
    "linear_beta": (schedules.linear_beta(), times.strided(1000, 40, "trailing")),
    "edm": (schedules.edm, times.karras(40)),
}
ROWS = {"eps": targets.eps, "x0": targets.x0, "v": targets.v, "flow": targets.flow, "edm": targets.edm(0.5)}


@pytest.mark.parametrize(
    ("solver", "target"),
    [(name, "v") for name in SOLVERS] + [("heun", target) for target in ROWS if target != "v"],
)
def test_samples_from_the_very_first_level_are_right_in_float32(solver, target):
    """From t = 1 (sigma = 80) exactly, through a network: the mean and deviation each should have, to 5 standard errors."""
    mean, std = 0.4, 0.5
    key = jax.random.key(4)
    built = denoiser(network(gaussian(mean, std**2), ROWS[target], 0.5), ROWS[target], 0.5)
    for name, (schedule, t) in STARTS.items():
        levels = times.grid(schedule, t)
        if target == "eps" and levels.alpha[0] == 0:
            continue  # singular: no network can say what x0 is
        x = prior(key, at(levels, 0), (64, 64), 0.5)
        x0 = np.asarray(jitted(key, SOLVERS[solver](built), x, levels))
        assert x0.dtype == np.float32 and np.isfinite(x0).all(), name
        want = std
        if solver in ETA:
            start = levels.alpha[0] ** 2 * std**2 + levels.sigma[0] ** 2
            want = ancestral_std(std**2, levels, start, ETA[solver], solver == "ddpm_large")
        slack = 0 if solver in ETA else 0.04  # for the second-order solvers' 40 steps
        assert abs(x0.mean() - mean) < 5 * want / 64 + slack * std, name
        assert abs(x0.std() / want - 1) < 5 / np.sqrt(2 * 4096) + slack, name


@pytest.mark.parametrize("solver", ["ddpm", "ddpm_large", "ddim(eta=1)", "dpmpp_2m(eta=1)"])
def test_samples_have_the_gaussians_mean_and_covariance(solver):
    """Correlated data in three dimensions through its own denoiser: 4 standard errors at 8192 samples, 100 steps."""
    factor = np.asarray([[0.8, 0.0, 0.0], [0.5, 0.6, 0.0], [-0.3, 0.2, 0.9]])
    mean = np.asarray([0.5, -1.0, 0.2])
    values, vectors = np.linalg.eigh(factor @ factor.T)
    rotated = gaussian(np.float32(mean @ vectors)[None], np.float32(values)[None])
    turn = jnp.asarray(vectors, jnp.float32)

    def denoise(x, level):
        return jax.tree.map(lambda a: a @ turn.T, rotated(x @ turn, level))

    n, key = 8192, jax.random.key(11)
    levels = times.grid(schedules.cosine, times.uniform(100))
    x = np.asarray(jitted(key, SOLVERS[solver](denoise), prior(key, at(levels, 0), (n, 3)), levels), np.float64)
    slack = 0.03 if solver not in ETA else 0.0
    if solver in ETA:
        values = np.asarray([ancestral_std(v, levels, 1.0, 1.0, solver == "ddpm_large") ** 2 for v in values])
    cov = (vectors * values) @ vectors.T
    assert (np.abs(x.mean(0) - mean) < 4 * np.sqrt(np.diag(cov) / n)).all()
    # the standard error of a covariance's entry is sqrt((c_ii c_jj + c_ij^2) / n)
    error = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / n)
    assert (np.abs(np.cov(x.T) - cov) < 4 * error + slack * np.abs(cov)).all()


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m", "heun"])
def test_samples_of_a_mixture_have_its_weights_means_and_deviations(name):
    """Three separated modes in the plane: 4 standard errors at 8192 samples, and 2% for the number of steps."""
    weights, stds = np.asarray([0.5, 0.3, 0.2]), np.asarray([0.1, 0.2, 0.15])
    means = np.asarray([[1.0, 0.0], [-1.0, 0.8], [-0.5, -1.2]])
    d = mixture(*(jnp.asarray(a, jnp.float32) for a in (weights, means, stds)))
    n, key = 8192, jax.random.key(12)
    levels = times.grid(schedules.cosine, 2 / np.pi * np.arctan(np.exp(np.linspace(6, -5, 320 if name == "ddim" else 80))))
    x = np.asarray(jitted(key, SOLVERS[name](d), prior(key, at(levels, 0), (n, 2)), levels), np.float64)
    mode = np.linalg.norm(x[:, None] - means, axis=-1).argmin(1)
    for k in range(3):
        own = x[mode == k]
        # Once a mode is chosen, its samples are those of its own Gaussian.
        want = ancestral_std(stds[k] ** 2, levels, 1.0, ETA[name]) if name in ETA else stds[k]
        slack = 0.02
        assert abs(len(own) / n - weights[k]) < 4 * np.sqrt(weights[k] * (1 - weights[k]) / n)
        assert (np.abs(own.mean(0) - means[k]) < 4 * want / np.sqrt(len(own)) + slack * want).all()
        assert (np.abs(own.std(0) / want - 1) < 4 / np.sqrt(2 * len(own)) + slack).all()
