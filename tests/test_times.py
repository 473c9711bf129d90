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
