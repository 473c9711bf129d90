"""Grids and draws of times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules, times
from jaxdiff.level import Level


def test_uniform():
    np.testing.assert_array_equal(times.uniform(4), [1, 0.75, 0.5, 0.25])
    np.testing.assert_array_equal(times.uniform(1), [1])
    assert times.uniform(3).dtype == np.float64


def test_karras_is_its_equation():
    """EDM eq. 5, entry by entry; N = 18 is the paper's CIFAR-10 grid."""
    n, lo, hi, rho = 18, 0.002, 80.0, 7.0
    sigma = times.karras(n)
    for i in range(n):
        want = (hi ** (1 / rho) + i / (n - 1) * (lo ** (1 / rho) - hi ** (1 / rho))) ** rho
        np.testing.assert_allclose(sigma[i], want, rtol=1e-12)
    assert (np.diff(times.karras(7, 0.1, 3, rho=3)) < 0).all()


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": 5, "lo": 0.0}, {"n": 5, "lo": 2.0, "hi": 1.0}])
def test_karras_refuses(bad):
    with pytest.raises(ValueError):
        times.karras(**bad)


def test_strided_spacings_by_hand():
    """Rows i of a ten-row table, noisiest first."""

    def rows(n, spacing):
        return (10 * times.strided(10, n, spacing)).round(9).tolist()

    assert rows(5, "leading") == [9, 7, 5, 3, 1]
    assert rows(5, "trailing") == [10, 8, 6, 4, 2]
    assert rows(4, "linspace") == [10, 7, 4, 1]
    assert rows(3, "leading") == [7, 4, 1]  # 10 // 3 is 3
    assert rows(3, "trailing") == [10, 7, 3]
    # floor(linspace(0, sqrt(8), 5)^2) = 0, 0, 2, 4, 8 (or 7): DDIM appendix D.2, with the repeated row gone
    assert rows(5, "quadratic") in ([9, 5, 3, 1], [8, 5, 3, 1])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_as_many_strided_times_as_rows_is_every_row(spacing):
    np.testing.assert_array_equal(times.strided(1000, 1000, spacing), times.uniform(1000))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
@pytest.mark.parametrize("n", [1, 2, 7, 10, 50, 333, 999])
def test_strided_times_are_rows_that_fall(spacing, n):
    t = times.strided(1000, n, spacing)
    rows = t * 1000
    np.testing.assert_allclose(rows, rows.round(), atol=1e-9)
    assert (np.diff(t) < 0).all() and t[0] <= 1 and t[-1] >= 1 / 1000
    assert len(t) == n or (spacing == "quadratic" and len(t) < n)
    if spacing in ("trailing", "linspace") and n > 1:
        assert t[0] == 1
    if spacing in ("leading", "linspace", "quadratic"):
        np.testing.assert_allclose(t[-1], 1 / 1000)


def test_strided_refuses():
    with pytest.raises(ValueError, match="unknown spacing 'odd'; allowed: leading, linspace, quadratic, trailing"):
        times.strided(10, 5, "odd")
    with pytest.raises(ValueError, match="more than"):
        times.strided(10, 11)
    with pytest.raises(ValueError, match="at least 1"):
        times.strided(10, 0)


def test_grid_is_the_schedule_in_float64_rounded_once():
    t = times.uniform(1000)
    levels = times.grid(schedules.linear_beta(), t)
    assert levels.alpha.dtype == levels.sigma.dtype == np.float32
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[::-1]
    np.testing.assert_allclose(levels.alpha, np.sqrt(alpha_bar), rtol=6.1e-8)  # half a unit in the last place
    np.testing.assert_allclose(levels.sigma, np.sqrt(1 - alpha_bar), rtol=6.1e-8)


def test_grid_pads_with_its_last_level():
    levels = times.grid(schedules.cosine, times.uniform(3), length=6)
    assert levels.alpha.shape == levels.sigma.shape == (6,)
    short = times.grid(schedules.cosine, times.uniform(3))
    np.testing.assert_array_equal(levels.sigma[:3], short.sigma)
    np.testing.assert_array_equal(levels.sigma[3:], short.sigma[[2, 2, 2]])
    np.testing.assert_array_equal(levels.alpha[3:], short.alpha[[2, 2, 2]])
    assert not jax.config.jax_enable_x64


def test_grid_refuses():
    with pytest.raises(ValueError, match="more than the maximum 2"):
        times.grid(schedules.cosine, times.uniform(3), length=2)
    with pytest.raises(ValueError, match="not finite"):
        times.grid(lambda t: Level(1 / (1 - t), t), times.uniform(3))


@pytest.mark.parametrize(
    ("draw", "mean", "var"),
    [
        # the rows 1/10 ... 10/10: mean 11/20, variance (100 - 1) / 12 / 100
        (times.draw_table(10), 0.55, 99 / 1200),
        (times.draw_uniform(), 0.5, 1 / 12),
        (times.draw_uniform(0.2, 0.6), 0.4, 0.16 / 12),
        (times.draw_independent(0.2, 0.6), 0.4, 0.16 / 12),
    ],
)
def test_draws_have_their_range_and_moments(draw, mean, var):
    t = np.asarray(jax.vmap(lambda key: draw.sample(key, 8))(jax.random.split(jax.random.key(0), 4000)), np.float64)
    assert t.min() >= draw.first - 1e-7 and t.max() <= draw.last + 1e-7
    assert t.min() < draw.first + 2e-3 and t.max() > draw.last - 2e-3
    # 4 standard errors of the mean of one column; the columns of a stratified draw are not independent.
    np.testing.assert_allclose(t.mean(0), mean, atol=4 * np.sqrt(var / 4000))
    np.testing.assert_allclose(t.var(0), var, rtol=0.08)


def test_table_draws_are_all_the_rows():
    t = times.draw_table(10).sample(jax.random.key(1), 2000)
    assert t.dtype == jnp.float32
    np.testing.assert_allclose(np.unique(t), np.arange(1, 11) / 10, rtol=1.2e-7)


def test_uniform_draws_are_stratified():
    """Exactly one time in each n-th of the range, whatever the key."""
    for seed in range(5):
        t = times.draw_uniform(1.0, 3.0).sample(jax.random.key(seed), 16)
        assert sorted(np.floor((t - 1) / 2 * 16).astype(int).tolist()) == list(range(16))
    assert jnp.abs(times.draw_uniform().sample(jax.random.key(0), 4) - t[:4]).max() > 0


NORMAL = {
    "log_normal": times.draw_log_normal(),
    "log_normal_0_0.5": times.draw_log_normal(0.0, 0.5),
    "logit_normal": times.draw_logit_normal(),
    "logit_normal_0.5_1.6": times.draw_logit_normal(0.5, 1.6),
}
CONTINUOUS = {
    "uniform": times.draw_uniform(0.2, 0.6),
    "independent": times.draw_independent(1.0, 3.0),
    **NORMAL,
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_densities_integrate_to_one(name, x64):
    """By the midpoint rule on 100,000 times, even in the logit of the place in the range: its error is below 1e-6."""
    draw = CONTINUOUS[name]
    place = 1 / (1 + np.exp(-np.linspace(-25, 25, 100_001)))
    edges = draw.first + (draw.last - draw.first) * place
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    np.testing.assert_allclose((np.asarray(draw.density(jnp.asarray(middle))) * width).sum(), 1, atol=2e-6)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_samples_have_the_density(name, x64):
    """Pearson's chi-square of 200,000 times in 40 bins, one of each batch of 4 so that they are independent.

    A chi-square of 39 degrees has mean 39 and deviation 8.8; 39 + 5 * 8.8 = 83.
    """
    draw, n, bins = CONTINUOUS[name], 200_000, 40
    t = np.asarray(jax.vmap(lambda key: draw.sample(key, 4)[2])(jax.random.split(jax.random.key(7), n)))
    fine = draw.first + (draw.last - draw.first) / (1 + np.exp(-np.linspace(-25, 25, 400_001)))
    share = np.asarray(draw.density(jnp.asarray((fine[1:] + fine[:-1]) / 2))) * np.diff(fine)
    below = np.concatenate([[0], np.cumsum(share)])
    edges = np.interp(np.linspace(0, below[-1], bins + 1), below, fine)
    count, _ = np.histogram(t, np.concatenate([[-np.inf], edges[1:-1], [np.inf]]))
    assert ((count - n / bins) ** 2 / (n / bins)).sum() < 83


def test_normal_draws_are_the_papers():
    """EDM table 1: ln sigma has mean -1.2 and deviation 1.2; SD3 eq. 19: the logit of t has mean m and deviation s.

    Of 20,000 stratified times the mean is right to 1e-4 and the deviation to 1e-3; the cut at 5 takes 1.5e-5 of the deviation.
    """
    t = np.asarray(times.draw_log_normal().sample(jax.random.key(0), 20_000), np.float64)
    np.testing.assert_allclose([np.log(t).mean(), np.log(t).std()], [-1.2, 1.2], atol=2e-3)
    t = np.asarray(times.draw_logit_normal(0.5, 1.6).sample(jax.random.key(0), 20_000), np.float64)
    np.testing.assert_allclose([(np.log(t) - np.log1p(-t)).mean(), (np.log(t) - np.log1p(-t)).std()], [0.5, 1.6], atol=2e-3)
    np.testing.assert_allclose(times.draw_log_normal()[1:3], np.exp([-7.2, 4.8]))
    np.testing.assert_allclose(times.draw_logit_normal()[1:3], 1 / (1 + np.exp([5, -5])))
    np.testing.assert_allclose(times.draw_log_normal().density(jnp.exp(-1.2)), np.exp(1.2) / (1.2 * np.sqrt(2 * np.pi)), rtol=2e-6)
    np.testing.assert_allclose(times.draw_logit_normal().density(jnp.float32(0.5)), 4 / np.sqrt(2 * np.pi), rtol=2e-6)


@pytest.mark.parametrize("draw", [*NORMAL.values(), times.draw_logit_normal(0.0, 6.0)], ids=[*NORMAL, "beyond float32"])
def test_normal_draws_and_their_density_stay_finite_at_the_ends(draw):
    t = draw.sample(jax.random.key(0), 2**20)
    assert t.dtype == jnp.float32 and t.min() >= np.float32(draw.first) and t.max() <= np.float32(draw.last)
    assert t.min() < 10 * draw.first
    ends = draw.density(jnp.asarray([draw.first, draw.last], jnp.float32))
    assert (jnp.isfinite(ends) & (ends > 0)).all() and jnp.isfinite(draw.density(t)).all()


@pytest.mark.parametrize("bad", [{"std": 0.0}, {"std": -1.0}, {"mean": float("inf")}, {"std": float("nan")}])
@pytest.mark.parametrize("name", ["draw_log_normal", "draw_logit_normal"])
def test_normal_draws_refuse(name, bad):
    with pytest.raises(ValueError, match=f"^{name} needs a finite mean"):
        getattr(times, name)(**bad)


def test_stratified_draws_lower_the_variance_of_a_mean():
    """Of 32 values of t^2, over 2,000 keys: independent times leave 4/45 / 32; the strata 1/12 / 32^2, that of their one offset."""
    keys = jax.random.split(jax.random.key(3), 2000)
    spread = [
        float(jnp.var(jax.vmap(lambda key, draw=draw: jnp.square(draw.sample(key, 32)).mean())(keys)))
        for draw in (times.draw_uniform(), times.draw_independent())
    ]
    np.testing.assert_allclose(spread, [1 / 12 / 32**2, 4 / 45 / 32], rtol=0.15)


def test_a_tables_density_is_one_and_a_draw_is_a_traced_argument():
    np.testing.assert_array_equal(times.draw_table(10).density(jnp.asarray([0.1, 1.0])), [1, 1])
    traces = []

    @jax.jit
    def at(draw, key):
        traces.append(1)
        return draw.sample(key, 3), draw.density(jnp.ones(3))

    key = jax.random.key(0)
    for mean in (0.0, 1.0):
        draw = times.draw_log_normal(mean)
        for got, want in zip(at(draw, key), (draw.sample(key, 3), draw.density(jnp.ones(3)))):
            np.testing.assert_allclose(got, want, rtol=1e-5)
    assert len(traces) == 1


def filled(adaptive, losses):
    """The history of an adaptive draw in which every row has the losses [steps, history]."""
    steps = losses.shape[0]
    history, update = adaptive.init(), jax.jit(adaptive.update)
    for column in losses.T:
        history = update(history, jnp.arange(1, steps + 1) / steps, column)
    return history


def test_importance_is_its_equation():
    """Improved DDPM eq. 18 with a uniform share; 100,000 draws of 16 rows, chi-square 15 + 5 * 5.5."""
    losses = jnp.asarray(np.random.default_rng(0).lognormal(0, 1, (16, 3)), jnp.float32)
    adaptive = times.draw_importance(16, history=3, uniform=0.1)
    draw = adaptive.draw(filled(adaptive, losses))
    size = np.sqrt((np.asarray(losses) ** 2).mean(1))
    p = 0.9 * size / size.sum() + 0.1 / 16
    t = jnp.arange(1, 17) / 16
    np.testing.assert_allclose(draw.density(t), 16 * p, rtol=1e-6)
    assert (draw.first, draw.last, draw.steps) == adaptive[3:] == (1 / 16, 1.0, 16)
    drawn = np.asarray(jax.vmap(lambda key: draw.sample(key, 4)[1])(jax.random.split(jax.random.key(0), 100_000)))
    count = np.bincount(np.round(drawn * 16).astype(int) - 1, minlength=16)
    assert ((count - 1e5 * p) ** 2 / (1e5 * p)).sum() < 42
    np.testing.assert_array_equal(np.unique(drawn), t)


def test_importance_weights_leave_the_mean_as_uniform_rows_have_it():
    """Summed over the rows exactly, and over 1,000 batches of 64 within 5 standard errors, which are small."""
    steps = 1000
    loss = jnp.asarray(10.0 ** np.random.default_rng(1).uniform(-3, 1, steps), jnp.float32)
    adaptive = times.draw_importance(steps, history=2)
    draw = adaptive.draw(filled(adaptive, jnp.stack([loss, loss], 1)))
    t = jnp.arange(1, steps + 1) / steps
    density = np.asarray(draw.density(t), np.float64)
    np.testing.assert_allclose(density.mean(), 1, rtol=1e-6)
    np.testing.assert_allclose((density / steps * np.asarray(loss) / density).sum(), np.asarray(loss, np.float64).mean(), rtol=1e-6)

    def mean(key):
        t = draw.sample(key, 64)
        return (loss[jnp.round(t * steps).astype(int) - 1] / draw.density(t)).mean()

    means = np.asarray(jax.vmap(mean)(jax.random.split(jax.random.key(2), 1000)), np.float64)
    assert abs(means.mean() - np.asarray(loss, np.float64).mean()) < 5 * means.std() / np.sqrt(1000) + 1e-5
    # Rows in exact proportion to their loss would leave nothing; the uniform share and the rare rows leave a little.
    assert means.std() < 0.05 * np.asarray(loss).std() / np.sqrt(64)


def test_importance_is_uniform_until_every_row_has_its_history():
    adaptive = times.draw_importance(4, history=2)
    rows = jnp.arange(1, 5) / 4
    history = adaptive.init()
    assert history.losses.shape == (4, 2) and history.losses.dtype == jnp.float32 and history.counts.dtype == jnp.int32
    for t, each, warm in ((rows, [1.0, 2.0, 3.0, 4.0], False), (rows[1:], [2.0, 3.0, 4.0], False), (rows[:1], [1.0], True)):
        history = adaptive.update(history, t, jnp.asarray(each))
        density = np.asarray(adaptive.draw(history).density(rows))
        want = 0.999 * np.asarray([1, 2, 3, 4]) / 2.5 + 0.001 if warm else np.ones(4)
        np.testing.assert_allclose(density, want, rtol=1e-6)


def test_losses_of_zero_leave_the_draw_uniform():
    adaptive = times.draw_importance(4, history=1)
    history = adaptive.update(adaptive.init(), jnp.arange(1, 5) / 4, jnp.zeros(4))
    np.testing.assert_array_equal(adaptive.draw(history).density(jnp.arange(1, 5) / 4), np.ones(4))


def test_history_is_what_recording_one_by_one_would_leave():
    """Rows that occur several times in a batch, some more often than their history is long, against a plain loop."""
    rng, steps, depth = np.random.default_rng(0), 7, 3
    adaptive = times.draw_importance(steps, depth)
    history, update = adaptive.init(), jax.jit(adaptive.update)
    kept = [[] for _ in range(steps)]
    for batch in range(6):
        rows = rng.integers(0, steps if batch != 3 else 1, 12)
        each = rng.uniform(0, 1, 12).astype(np.float32)
        history = update(history, jnp.asarray((rows + 1) / steps, jnp.float32), jnp.asarray(each))
        for row, value in zip(rows, each):
            kept[row].append(value)
        for row in range(steps):
            assert sorted(history.losses[row].tolist()) == sorted([*([0.0] * depth), *map(float, kept[row])][-depth:])
        assert history.counts.tolist() == [len(values) for values in kept]


def test_every_row_of_a_table_is_found_again():
    adaptive = times.draw_importance(1000, 1)
    history = adaptive.update(adaptive.init(), jnp.arange(1, 1001, dtype=jnp.float32) / 1000, jnp.arange(1000.0))
    np.testing.assert_array_equal(history.losses[:, 0], np.arange(1000))


@pytest.mark.parametrize("steps", [0, -3, 2.5, True])
def test_a_table_of_no_whole_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"^draw_table needs a whole number of steps, at least 1, got steps={steps}$"):
        times.draw_table(steps)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"steps": 2.5}, {"history": 0}, {"history": 1.5}, {"uniform": -0.1}, {"uniform": 1.1}]
)
def test_importance_refuses(bad):
    with pytest.raises(ValueError, match="draw_importance needs"):
        times.draw_importance(**bad)
