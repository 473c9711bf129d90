"""Objectives against the bound they estimate, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.tree_util import Partial
from tiny import config

import jaxdiff as jd
from jaxdiff import data, experiment, likelihood, objectives, schedules, times
from jaxdiff.training import init_state, make_optimizer, make_step

STEPS = 20
TABLE = schedules.linear_beta(STEPS, 1e-3, 0.3)
VALUES = (jnp.array([[-1.0]]), jnp.array([[1.0]]))


def problem(net, target=jd.targets.eps, schedule=TABLE, steps=STEPS, ends=(1 / STEPS, 1.0), curve=None, density=jnp.ones_like):
    return objectives.Problem(net, target, schedule, jnp.ones_like, density, steps, ends, VALUES, 1.0, curve)


def linear(params, x, seen):
    """A network of two numbers a row: the first makes the mean, the second the variance."""
    return params["mean"] * x + 0.1 * seen.reshape(-1, 1) * params["mean"], params["variance"] * x


def batch(n, key=0):
    k0, k1, k2 = jax.random.split(jax.random.key(key), 3)
    x0 = jnp.round(jax.random.uniform(k0, (n, 3), minval=0, maxval=255)) / 127.5 - 1
    return x0, jax.random.normal(k1, x0.shape), jax.random.randint(k2, (n, 1), 1, STEPS + 1) / STEPS


PARAMS = {"mean": jnp.array(0.3), "variance": jnp.array(0.2)}


def test_the_hybrid_loss_leaves_the_mean_the_gradient_of_simple_exactly():
    x0, eps, t = batch(64)
    assert (t == 1 / STEPS).any()  # the decoder's row is in it

    def grad(objective):
        return jax.grad(lambda p: objective.loss(problem(Partial(linear, p)), x0, eps, t)[0].mean())(PARAMS)

    hybrid, simple, vlb = (grad(o) for o in (objectives.hybrid(0.5), objectives.simple(), objectives.vlb()))
    assert hybrid["mean"] == simple["mean"] != 0
    assert simple["variance"] == 0
    np.testing.assert_allclose(hybrid["variance"], 0.5 * vlb["variance"], rtol=1e-5)
    assert vlb["mean"] != simple["mean"]


def test_the_hybrid_loss_is_simple_plus_its_share_of_vlb():
    x0, eps, t = batch(64)
    p = problem(Partial(linear, PARAMS))
    (hybrid, told), (simple, _), (vlb, _) = (
        o.loss(p, x0, eps, t) for o in (objectives.hybrid(0.1), objectives.simple(), objectives.vlb())
    )
    np.testing.assert_allclose(hybrid, simple + 0.1 * vlb, rtol=1e-6)
    np.testing.assert_allclose(told["vlb"], vlb, rtol=1e-6)


def test_the_rows_of_vlb_add_up_to_the_discrete_bound():
    n = 20_000
    x0 = jnp.tile(batch(1)[0], (n, 1))
    eps = jax.random.normal(jax.random.key(5), x0.shape)
    p = problem(Partial(linear, PARAMS))
    rows = np.stack([np.asarray(objectives.vlb().loss(p, x0, eps, jnp.full((n, 1), i / STEPS))[0]) for i in range(1, STEPS + 1)])
    levels = times.grid(TABLE, times.strided(STEPS, STEPS))
    denoise = jd.denoiser(Partial(linear, PARAMS), jd.targets.eps)
    found = likelihood.elbo(jax.random.key(6), denoise, x0, levels, likelihood.learned, likelihood.discretised_decoder(*VALUES))
    whole = np.asarray(likelihood.bits_per_dim(found.diffusion + found.decoder, 3))
    error = np.hypot(rows.mean(0).std(), whole.std()) / np.sqrt(n)
    assert abs(rows.mean() - whole.mean()) < 4 * error, (rows.mean(), whole.mean(), error)
    assert error < 0.02 * rows.mean()


def test_importance_sampled_vlb_has_the_mean_of_uniform_rows():
    x0, eps, _ = batch(1)
    p = problem(Partial(linear, PARAMS))
    each = np.array([float(objectives.vlb().loss(p, x0, eps, jnp.full((1, 1), i / STEPS))[0][0]) for i in range(1, STEPS + 1)])
    adaptive = times.draw_importance(STEPS, history=1)
    t = jnp.arange(1, STEPS + 1) / STEPS
    draw = adaptive.draw(adaptive.update(adaptive.init(), t, jnp.asarray(each, jnp.float32)))
    density = np.asarray(draw.density(t))
    np.testing.assert_allclose((density / STEPS).sum(), 1, rtol=1e-5)
    np.testing.assert_allclose((density / STEPS * each / density).sum(), each.mean(), rtol=1e-5)
    # In proportion to the loss, the weighted loss hardly varies.
    assert (density / STEPS * (each / density) ** 2).sum() - each.mean() ** 2 < 0.05 * each.var()


def log_uniform(t):
    """Times even in their logarithm, and their density."""
    return 0.001 * 999.0**t, lambda t: 1 / (t * np.log(999.0))


@pytest.mark.parametrize("drawn", [lambda u: (0.001 + 0.998 * u, lambda t: jnp.ones_like(t) / 0.998), log_uniform])
def test_the_continuous_bound_as_an_objective_is_the_likelihood_s_whatever_is_drawn(drawn):
    n = 20_000
    x0 = jnp.tile(batch(1)[0], (n, 1))
    eps = jax.random.normal(jax.random.key(1), x0.shape)
    t, density = drawn(times.draw_uniform().sample(jax.random.key(2), n)[:, None])
    oracle = oracles.network(oracles.gaussian(0.0, 0.3), jd.targets.v)
    p = problem(oracle, jd.targets.v, schedules.cosine, 0, (0.001, 0.999), density=density)
    each, told = jax.jit(lambda: objectives.bound().loss(p, x0, eps, t))()
    levels = times.grid(schedules.cosine, np.array([0.999, 0.001]))
    found = jax.jit(
        lambda: likelihood.continuous_elbo(
            jax.random.key(3),
            oracles.gaussian(0.0, 0.3),
            x0[:5000],
            levels,
            128,
            likelihood.bayes_decoder(*VALUES),
        )
    )()
    whole = np.asarray(likelihood.bits_per_dim(found.total, 3))
    error = np.hypot(each.std() / np.sqrt(n), whole.std() / np.sqrt(len(whole)))
    assert abs(each.mean() - whole.mean()) < 4 * error, (each.mean(), whole.mean(), error)
    np.testing.assert_allclose(sum(told.values()), each, rtol=1e-5)


def test_a_learned_curve_s_ends_follow_the_bound_and_its_interior_the_variance():
    learned = schedules.learned(-4.0, 5.0, features=8)
    curve = learned.init(jax.random.key(0))
    x0, eps, _ = batch(32)
    t = jnp.linspace(0.03, 0.97, 32)[:, None]
    net = Partial(linear, PARAMS)

    def loss(curve):
        return objectives.bound().loss(problem(net, schedule=learned.at(curve), steps=0, ends=(0.0, 1.0), curve=curve), x0, eps, t)

    def plain(curve):
        """The same bound, by automatic differentiation through everything."""
        return objectives.bound().loss(problem(net, schedule=learned.at(curve), steps=0, ends=(0.0, 1.0)), x0, eps, t)

    np.testing.assert_allclose(loss(curve)[0], plain(curve)[0], rtol=1e-4)
    found = jax.grad(lambda c: loss(c)[0].mean())(curve)
    by_bound = jax.grad(lambda c: plain(c)[0].mean())(curve)
    np.testing.assert_allclose(found["ends"], by_bound["ends"], rtol=1e-3)

    squared = jax.grad(lambda c: jnp.square(plain(c)[1]["diffusion"] * np.log(2)).mean())(curve)
    for layer in ("l2", "l3"):
        for name in curve[layer]:
            np.testing.assert_allclose(found[layer][name], squared[layer][name], rtol=2e-2, atol=2e-4)
    assert np.abs(squared["l2"]["w"]).max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"process.loss": "vlb", "process.schedule": "linear_beta(50)", "process.draw": "draw_importance(50, history=2)"},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"process.loss": "hybrid(0.001)", "process.schedule": "cosine_beta(50)", "process.draw": "draw_table(50)"},
                {
                    "process.loss": "bound",
                    "process.schedule": "learned(-6.0, 8.0, features=16)",
                    "process.draw": "draw_uniform(0.0, 1.0)",
                },
                {"process.weight": "elbo", "process.draw": "draw_uniform(0.1, 0.9)"},
                {
                    "process.schedule": "edm",
                    "process.target": "edm(0.5)",
                    "process.draw": "draw_log_normal(-1.2, 1.2)",
                    "process.data_std": 0.5,
                },
            )
        ),
    ],
)  # fmt: skip
def test_every_objective_trains_and_its_loss_falls(changes):
    c = config(**{"model.dropout": 0.0, **changes})
    built, optimizer = experiment.build(c), make_optimizer(c.optimizer)
    state = jax.jit(lambda key: init_state(built, optimizer, c.training.ema, key))(jax.random.key(0))
    step, digits = jax.jit(make_step(built, optimizer)), data.load("digits")
    batch = data.batch_at(digits, 1, 0, 256)
    # The same times and noise before and after: an estimate of the bound from one term an image is mostly noise.
    example = built.prepare(built.extra, jax.random.key(7), batch)
    loss = jax.jit(lambda params: built.loss(params, built.extra, jax.random.key(8), example)[0].mean())
    before = loss(state.params)
    for i in range(60):
        state, told = step(jax.random.key(0), state, data.batch_at(digits, 0, i, 32))
        assert told["finite"]
    assert loss(state.params) < 0.9 * before
    if "importance" in c.process.draw:
        assert (state.extra.counts > 0).all() and int(state.extra.counts.sum()) == 60 * 32


VLB = {"process.loss": "vlb", "process.schedule": "linear_beta(20)", "process.draw": "draw_table(20)"}
LEARNED = {"process.loss": "bound", "process.schedule": "learned(-6.0, 8.0, features=16)"}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"process.loss": "vlb"}, "needs a table of at least 2 steps"),
        ({"process.loss": "hybrid(-1)"}, "at least 0"),
        ({"process.loss": "simpel"}, "did you mean 'simple'"),
        ({"process.loss": "Problem"}, "unknown"),
        ({"process.weight": "min_snr"}, "needs brackets"),
        ({"process.weight": "min_snr(0)"}, "gamma > 0"),
        ({"process.schedule": "learned(-6.0, 8.0)"}, "does not train a learned schedule"),
        ({"process.draw": "draw_table(0)"}, "draw_table needs a whole number of steps, at least 1, got steps=0"),
        ({"process.schedule": "linear_beta(0)"}, "steps >= 1"),
        ({"process.schedule": "ve(50.0, 0.01)"}, "ve needs 0 < lo < hi, got lo=50.0, hi=0.01"),
        ({"data.augment": "flip"}, "unknown"),
        ({"process.loss": "bound", "process.target": "eps", "process.draw": "draw_uniform(0.001, 1.0)"}, "says nothing at t = 1"),
        ({"process.loss": "bound", "process.draw": "draw_uniform(0.001, 1.0)"}, "needs a finite logsnr at t = 1"),
        ({"process.loss": "bound", "process.draw": "draw_table(20)"}, "'bound' needs continuous times"),
        (
            {**LEARNED, "process.draw": "draw_uniform(0.1, 0.9)"},
            "'draw_uniform.0.1, 0.9.' is not of all times of a learned schedule",
        ),
        ({"process.loss": "bound", "process.weight": "elbo"}, "process.weight='elbo' would do nothing"),
        ({**VLB, "process.weight": "min_snr(5)"}, "process.weight='min_snr.5.' would do nothing"),
        ({**VLB, "data.augment": "edm(0.12)"}, "takes pixels off the 256 values"),
        ({"process.loss": "bound", "data.augment": "edm(0.12)"}, "takes pixels off the 256 values"),
        (
            {"process.weight": "elbo", "process.target": "eps", "process.draw": "draw_table(20)"},
            "process.weight='elbo' of process.target='eps' is not finite at t = 1",
        ),
        ({"process.weight": "edm(0.5)", "process.target": "eps", "process.draw": "draw_uniform(0.1, 1.0)"}, "not finite at t = 1"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_computed(changes, said):
    with pytest.raises(jd.InputError, match=said):
        experiment.build(config(**changes))
