"""Averages over training are what their profiles say, and stored ones combine to averages that were never tracked."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import InputError
from jaxdiff.training import averages

WIDTHS = [0.01, 0.05, 0.1, 0.2, 12**-0.5]


def profile(t, count, std):
    """p at times t, 0 after `count` updates; with quadrature points t in [0, T]."""
    gamma = averages.exponent(std)
    return np.where(t <= count, (gamma + 1) * np.minimum(t / count, 1) ** gamma / count, 0)


def midpoints(total, n):
    return (np.arange(n) + 0.5) * total / n


def discrete(count, std):
    """The weight of each of `count` updates: the profile's integral over (t - 1, t]."""
    return np.diff((np.arange(count + 1) / count) ** (averages.exponent(std) + 1))


def track(decay, path):
    """Every average [T, ...] of a path [T, ...], by the recursion, from a start that has nothing to do with the path."""

    @jax.jit
    def run(path):
        def update(average, inputs):
            step, params = inputs
            kept = decay(step)
            average = kept * average + (1 - kept) * params
            return average, average

        steps = jnp.arange(len(path), dtype=jnp.int32)
        return jax.lax.scan(update, jnp.full_like(path[0], 1e3), (steps, path))[1]

    return np.asarray(run(jnp.asarray(path)))


def walk(seed, count, size):
    """A random walk away from a start of its own size, with noise of every step on top."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=size) + np.cumsum(rng.normal(size=(count, size)), 0) / count**0.5 + 0.3 * rng.normal(size=(count, size))


@pytest.mark.parametrize("std, gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_the_paper(std, gamma):
    assert averages.exponent(std) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("std", WIDTHS)
@pytest.mark.parametrize("total", [1.0, 700.0])
def test_the_width_is_the_deviation_of_the_profile_over_its_length(std, total):
    t = midpoints(total, 200_000)
    p = profile(t, total, std) * total / len(t)
    assert p.sum() == pytest.approx(1, rel=1e-6)
    mean = (p * t).sum()
    assert np.sqrt((p * (t - mean) ** 2).sum()) / total == pytest.approx(std, rel=1e-6)


def test_an_exponent_solves_its_equation_over_the_whole_range():
    for std in [1e-200, *np.geomspace(1e-8, averages.WIDEST, 200)]:
        gamma = averages.exponent(std)
        assert gamma >= 0
        assert (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5 == pytest.approx(std, rel=1e-13)
    assert averages.exponent(averages.WIDEST) == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("std", WIDTHS)
def test_the_recursion_is_the_sum_with_the_weights_of_the_profile(x64, std):
    path = walk(0, 300, 5)
    tracked = track(averages.power(std), path)
    assert tracked.dtype == np.float64
    for count in (1, 2, 17, 300):
        np.testing.assert_allclose(tracked[count - 1], discrete(count, std) @ path[:count], rtol=0, atol=1e-12)


@pytest.mark.parametrize("std", WIDTHS)
def test_the_first_update_forgets_the_start_and_later_ones_hold_to_the_last_place_in_float32(std):
    decay = jax.jit(averages.power(std))
    assert decay(jnp.int32(0)) == 0
    for count in (2, 1000, 1_000_000):
        kept = decay(jnp.int32(count - 1))
        assert kept.dtype == jnp.float32
        np.testing.assert_allclose(kept, (1 - 1 / count) ** (averages.exponent(std) + 1), rtol=0, atol=6e-8)


def test_an_exponential_decay_warms_up():
    decay = jax.jit(averages.exponential(0.99))
    expected = [min(0.99, (1 + step) / (10 + step)) for step in (0, 1, 90, 889, 900, 10**6)]
    np.testing.assert_allclose([decay(jnp.int32(step)) for step in (0, 1, 90, 889, 900, 10**6)], expected, rtol=1e-6)


def test_names():
    for text in ("0.99", 0.99, "exponential(0.99)"):
        assert averages.named(text)(10**6) == np.float32(0.99)
    for text in ("power(0.05)", "power(std=0.05)"):
        assert averages.named(text)(40) == averages.power(0.05)(40)


@pytest.mark.parametrize(
    "text, message",
    [
        ("1.0", r"decay=1.0 .* not in \[0, 1\)"),
        ("-0.1", r"decay=-0.1 .* not in \[0, 1\)"),
        ("nan", r"decay=nan .* not in \[0, 1\)"),
        ("powr(0.05)", "did you mean 'power'.*allowed: exponential, power"),
        ("weights(0.05)", "unknown"),
        ("power(0.05", "is not a name"),
        ("power", "lacks its number"),
        ("power()", "missing"),
        ("power('a')", "training.ema"),
        ("power(0.3)", r"std=0.3 .* not in \(0, 0.288675\]"),
        ("power(0)", r"std=0 .* not in \(0, 0.288675\]"),
    ],
)
def test_wrong_names_are_refused(text, message):
    with pytest.raises(InputError, match=message) as error:
        averages.named(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("std", [0, -0.1, 0.2887, 1.0, float("nan"), float("inf")])
def test_widths_out_of_range_are_refused(std):
    for function in (averages.power, averages.exponent, lambda std: averages.weights([(10, 0.1)], 10, std)):
        with pytest.raises(InputError, match=f"std={std} "):
            function(std)


def snapshots(total, n, widths=(0.05, 0.10)):
    return [(total * (i + 1) / n, std) for i in range(n) for std in widths]


@pytest.mark.parametrize("n, total", [(1, 50), (20, 2000), (200, 1_000_000)])
def test_a_stored_average_is_reconstructed_as_itself(n, total):
    stored = snapshots(total, n)
    for index in (len(stored) - 2, len(stored) - 1):  # those stored at the end, of either width
        np.testing.assert_allclose(averages.weights(stored, *stored[index]), np.eye(len(stored))[index], atol=1e-8)


def test_weights_are_the_least_squares_fit_of_the_profiles():
    stored = [(300.0, 0.05), (300.0, 0.2), (620.0, 0.1), (811.0, 0.28), (940.0, 0.05), (1000.0, 0.15)]
    t = midpoints(1000.0, 100_000)
    columns = np.stack([profile(t, *s) for s in stored], 1)
    expected = np.linalg.lstsq(columns, profile(t, 1000.0, 0.11), rcond=None)[0]
    found = averages.weights(stored, 1000, 0.11)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Only ratios of step counts matter.
    longer = averages.weights([(count * 1e4, std) for count, std in stored], 1e7, 0.11)
    np.testing.assert_allclose(longer, found, atol=1e-12)


def test_many_snapshots_do_not_blow_up():
    for total, std in [(2000, 0.07), (2_000_000, 0.15)]:
        found = averages.weights(snapshots(total, 200), total, std)
        assert np.abs(found).sum() < 2
        assert found.sum() == pytest.approx(1, abs=1e-6)
    # One average stored twice is as good as once.
    stored = snapshots(2000, 20)
    np.testing.assert_allclose(
        averages.weights(stored + stored, 2000, 0.07), np.tile(averages.weights(stored, 2000, 0.07), 2) / 2, atol=1e-10
    )


def test_an_average_that_was_never_tracked_is_reconstructed(x64):
    total, std = 2000, 0.07
    path = walk(1, total, 64)
    stored = snapshots(total, 20)
    tracked = {width: track(averages.power(width), path) for width in (0.05, 0.10, std)}
    target = tracked[std][-1]

    def error(average):
        return np.linalg.norm(average - target) / np.linalg.norm(target)

    trees = ({"w": tracked[width][int(count) - 1]} for count, width in stored)
    found = averages.combine(averages.weights(stored, total, std), trees)["w"]
    nearest = min(error(tracked[width][-1]) for width in (0.05, 0.10))
    assert error(found) < 1e-2
    assert error(found) < nearest / 20


def test_averages_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"step 1001 .* not in \(0, 1000\]"):
        averages.weights([(1000, 0.05), (1001, 0.05)], 1000, 0.05)
    with pytest.raises(ValueError, match="step 0 "):
        averages.weights([(0, 0.05)], 1000, 0.05)
    with pytest.raises(ValueError, match="no stored"):
        averages.weights([], 1000, 0.05)
    with pytest.raises(InputError, match=r"std=0\.5 "):
        averages.weights([(10, 0.5)], 1000, 0.05)


def test_a_sum_is_float64_inside_and_keeps_structure_and_dtypes():
    # 1 is lost in a float32 sum beside 1e8.
    trees = [
        {"a": np.full((2, 3), value, np.float32), "b": (jnp.asarray([value], jnp.bfloat16), np.float32(value))}
        for value in (2**27, 1, -(2**27))
    ]
    found = averages.combine(np.asarray([1.0, 3.0, 1.0]), iter(trees))
    assert jax.tree.structure(found) == jax.tree.structure(trees[0])
    assert isinstance(found["a"], np.ndarray) and found["a"].shape == (2, 3) and found["a"].dtype == np.float32
    assert found["b"][0].dtype == jnp.bfloat16 and found["b"][1].dtype == np.float32
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(np.asarray(leaf, np.float64), np.full(leaf.shape, 3.0))
    np.testing.assert_array_equal(trees[0]["a"], np.full((2, 3), 2.0**27))


def test_one_tree_is_held_at_a_time():
    made = []

    def make(value):
        assert all(ref() is None for ref in made)
        tree = {"w": np.full(3, value, np.float32)}
        made.append(weakref.ref(tree["w"]))
        return tree

    found = averages.combine([0.5] * 4, (make(float(i)) for i in range(4)))
    assert len(made) == 4
    np.testing.assert_array_equal(found["w"], np.full(3, 3.0))


def test_trees_that_do_not_fit_are_refused():
    tree = {"w": np.zeros(3)}
    for weights, trees, message in [
        ([1.0], [tree, tree], "more trees"),
        ([1.0, 1.0], [tree], "1 trees for 2 weights"),
        ([], [], "0 trees"),
        ([1.0, 1.0], [tree, {"v": np.zeros(3)}], "tree 1 "),
        ([1.0, 1.0], [tree, {"w": np.zeros(1)}], "tree 1 "),
    ]:
        with pytest.raises(ValueError, match=message):
            averages.combine(weights, trees)
