"""EDM's augmentation: labels say what was done, and nothing where nothing was; and random crops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data import augment
from jaxdiff.data.augment import Change, edm, label, transform

NOTHING = Change(*[jnp.zeros(())] * 8)


def images(n=4, height=16, width=16, channels=3):
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (n, height, width, channels)), jnp.float32)


def test_crops_are_windows_of_the_reflected_image_and_every_window_comes():
    x = jnp.arange(1.0, 1 + 6 * 5 * 2).reshape(1, 6, 5, 2)
    out, told = jax.jit(augment.crop(2))(jax.random.key(0), jnp.repeat(x, 400, axis=0))
    padded = np.pad(np.asarray(x[0]), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    windows = [padded[i : i + 6, j : j + 5] for i in range(5) for j in range(5)]
    which = [next(n for n, window in enumerate(windows) if (window == image).all()) for image in np.asarray(out)]
    assert set(which) == set(range(25)) and told is None
    np.testing.assert_array_equal(augment.crop(0)(jax.random.key(0), x)[0], x)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="whole number of pixels"):
            augment.crop(wrong)


def test_either_flip_takes_of_two_sides_what_random_flip_makes():
    x, key = images(64), jax.random.key(3)
    both = jnp.stack([x, x[:, :, ::-1]], axis=1)
    got = augment.either_flip(key, both)
    np.testing.assert_array_equal(got, augment.random_flip(key, x))
    assert 16 < (got != x).any((1, 2, 3)).sum() < 48
    np.testing.assert_array_equal(augment.either_flip(key, both[:, :1]), x)


@functools.cache
def augmented(probability):
    return jax.jit(edm(probability=probability))


def changed(image, **numbers):
    return np.asarray(jax.jit(transform)(image, NOTHING._replace(**{k: jnp.float32(v) for k, v in numbers.items()})))


def test_the_label_is_zero_exactly_where_the_image_is_unchanged():
    x = images(600, 8, 8)
    out, labels = augmented(0.12)(jax.random.key(0), x)
    assert out.shape == x.shape and out.dtype == jnp.float32 and labels.shape == (600, 9) and labels.dtype == jnp.float32
    untouched = np.asarray((labels == 0).all(1))
    same = np.asarray((out == x).all((1, 2, 3)))
    np.testing.assert_array_equal(same, untouched)
    # 1/2 not mirrored, and none of the other five: flips are half of those drawn.
    want = 0.5 * (1 - 0.06) * (1 - 0.12) ** 4
    assert abs(untouched.mean() - want) < 4 * np.sqrt(want * (1 - want) / 600)


def test_each_change_is_drawn_as_often_as_the_table_says():
    labels = np.asarray(jax.jit(jax.vmap(lambda key: label(augment.draw(key, 0.12))))(jax.random.split(jax.random.key(1), 20_000)))
    often = (labels != 0).mean(0)
    want = np.asarray([0.5, 0.06, *[0.12] * 7])
    assert (np.abs(often - want) < 4 * np.sqrt(want * (1 - want) / 20_000)).all()
    assert set(np.unique(labels[:, :2])) == {0.0, 1.0}
    for column in (2, 7, 8):
        drawn = labels[labels[:, column] != 0, column]
        assert abs(drawn.std() - 1) < 0.1 and abs(drawn.mean()) < 0.1
    turned = labels[labels[:, 4] != 0]
    np.testing.assert_allclose((turned[:, 3] + 1) ** 2 + turned[:, 4] ** 2, 1, atol=1e-5)


def test_probability_0_leaves_the_bits():
    x = images(64, 8, 8)
    out, labels = augmented(0.0)(jax.random.key(3), x)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(labels, 0)


def test_the_same_key_gives_the_same_and_another_another():
    x = images(64, 8, 8)
    a, b, c = (augmented(1.0)(jax.random.key(seed), x) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert (np.asarray(a[1]) != np.asarray(c[1])).any(1).all()


def test_an_image_depends_on_itself_and_its_place_alone():
    x = images(6, 8, 8)
    out, labels = augmented(1.0)(jax.random.key(0), x)
    moved, told = augmented(1.0)(jax.random.key(0), x.at[2].add(0.5))
    np.testing.assert_array_equal(told, labels)
    assert np.asarray((moved != out).any((1, 2, 3))).tolist() == [False, False, True, False, False, False]
    few, said = edm(1.0)(jax.random.key(0), x[:3])  # and not on how many others there are
    np.testing.assert_array_equal(said, labels[:3])
    np.testing.assert_allclose(few, out[:3], atol=1e-5)


def test_mirrors_and_flips_are_numpys():
    x = images(1, 6, 9)[0]
    np.testing.assert_array_equal(changed(x, mirror=1), np.asarray(x)[:, ::-1])
    np.testing.assert_array_equal(changed(x, flip=1), np.asarray(x)[::-1])
    np.testing.assert_array_equal(changed(x, mirror=1, flip=1), np.asarray(x)[::-1, ::-1])


def test_a_move_of_whole_pixels_shifts_over_a_reflected_border():
    x = images(1, 8, 16)[0]  # an eighth of the height is 1 pixel, of the width 2
    padded = np.pad(np.asarray(x), ((5, 5), (5, 5), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(changed(x, right=1.5, down=-2), padded[5 + 2 : 13 + 2, 5 - 3 : 21 - 3])
    np.testing.assert_array_equal(label(NOTHING._replace(right=jnp.float32(1.5), down=jnp.float32(-2)))[7:], [1.5, -2])


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_turns_by_right_angles_are_numpys(quarters):
    x = images(1)[0]
    angle = quarters * np.pi / 2
    np.testing.assert_allclose(changed(x, angle=angle), np.rot90(x, quarters), atol=1e-4)
    np.testing.assert_allclose(changed(x, angle=angle - 2 * np.pi), np.rot90(x, quarters), atol=1e-4)


def test_scales_and_stretches_of_a_smooth_image_are_the_formulas():
    """Where a picture is a polynomial of degree 2, the cubic kernel reads it exactly."""
    y, x = np.mgrid[7.5:-8.5:-1, -7.5:8.5]  # y upwards

    def picture(x, y):
        return (0.1 * x + 0.02 * x * y - 0.03 * y * y)[..., None]

    image, inside = jnp.asarray(picture(x, y), jnp.float32), np.s_[6:10, 6:10]  # the border, reflected, is no polynomial
    larger = 2**0.2
    np.testing.assert_allclose(changed(image, scale=1)[inside], picture(x / larger, y / larger)[inside], atol=1e-4)
    np.testing.assert_allclose(changed(image, stretch=1)[inside], picture(x / larger, y * larger)[inside], atol=1e-4)
    up = changed(image, stretch=1, direction=np.pi / 2)
    np.testing.assert_allclose(up[inside], picture(x * larger, y / larger)[inside], atol=1e-4)
    u, v = (x + y) / 2, (x - y) / 2  # along the diagonal, (1, 1), and across, (1, -1)
    diagonal = picture(u / larger + v * larger, u / larger - v * larger)
    np.testing.assert_allclose(changed(image, stretch=1, direction=np.pi / 4)[inside], diagonal[inside], atol=1e-4)
    turned = changed(image, angle=0.3)
    back = picture(np.cos(0.3) * x + np.sin(0.3) * y, -np.sin(0.3) * x + np.cos(0.3) * y)
    np.testing.assert_allclose(turned[inside], back[inside], atol=1e-4)
    # In the table's order: what is moved last is moved by pixels of the result.
    both = changed(image, scale=1, right=1 / 2)
    np.testing.assert_allclose(both[inside], picture((x - 1) / larger, y / larger)[inside], atol=1e-4)


def test_the_largest_changes_stay_finite():
    x = images(1)[0]
    for c in ({"scale": -12.0}, {"scale": 12.0}, {"stretch": 9.0, "direction": 1.0}, {"right": 40.0, "down": -40.0}):
        assert np.isfinite(changed(x, **c)).all() and np.abs(changed(x, **c)).max() < 2


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan"), True, "0.1"])
def test_what_is_no_probability_is_refused(probability):
    with pytest.raises(ValueError, match="not a probability"):
        edm(probability)
