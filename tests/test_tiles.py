"""Decoding in tiles: what looks no further than a tile comes out as from the whole decoder, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import tiles


def latent(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def enlarged(z):
    return jnp.repeat(jnp.repeat(z, 2, axis=1), 2, axis=2)


def local(z):
    """A decoder that looks at each latent alone."""
    return jnp.tanh(enlarged(z) @ jnp.asarray([[1.0, 0.5, -1.0], [0.3, 2.0, 1.0]]))


def convolved(z):
    """A decoder that looks one latent to each side: a 3x3 convolution with zeros beyond the border, then twice the size."""
    kernel = latent(3, 3, z.shape[-1], 3)
    return enlarged(jax.lax.conv_general_dilated(z, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))


@pytest.mark.parametrize(("size", "tile", "overlap"), [(20, 8, 2), (9, 8, 2), (21, 8, 0), (64, 16, 4), (13, 4, 3), (16, 16, 4)])
def test_tiles_cover_and_their_weights_add_up_to_one(size, tile, overlap):
    begin, factor = tiles.starts(size, tile, overlap), 3
    weights = tiles.weights(begin, size, tile, overlap, factor)
    assert begin[0] == 0 and begin[-1] == size - tile
    assert (np.diff(begin) <= tile - overlap).all()  # neighbours share as much as was asked
    total = np.zeros(factor * size)
    for at, each in zip(begin, weights):
        total[factor * at : factor * (at + tile)] += each
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert weights.min() > 0
    fewest = -(-(size - overlap) // (tile - overlap))
    assert len(begin) == fewest


def test_the_weight_goes_linearly_from_one_tile_to_the_next():
    """Two tiles of 8 that share 2 of 14, each three pixels wide: six pixels of ramp."""
    left, right = tiles.weights(tiles.starts(14, 8, 2), 14, 8, 2, 3)
    ramp = (np.arange(6) + 0.5) / 6
    np.testing.assert_allclose(right[:6], ramp, atol=1e-6)
    np.testing.assert_allclose(left[-6:], ramp[::-1], atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([left[:-6], right[6:]]), 1)


@pytest.mark.parametrize("shape", [(2, 20, 13, 2), (1, 8, 30, 2), (1, 5, 21, 2)])
def test_a_decoder_of_local_support_is_the_same_in_tiles(shape):
    z = latent(*shape)
    np.testing.assert_allclose(jax.jit(tiles.tiled(local, 8, 2))(z), local(z), atol=1e-6)


def test_a_convolution_differs_only_where_a_tile_ends_inside_the_picture():
    z = latent(1, 20, 20, 2)
    got, want = (np.asarray(jax.jit(decode)(z)) for decode in (tiles.tiled(convolved, 8, 2), convolved))
    wrong = np.abs(got - want).max((0, 3)).reshape(20, 2, 20, 2).max((1, 3)) > 1e-5
    begin = tiles.starts(20, 8, 2)
    ends = sorted({*begin[1:], *(begin[:-1] + 7)})
    assert np.flatnonzero(wrong.all(0)).tolist() == np.flatnonzero(wrong.all(1)).tolist() == ends
    inside = np.setdiff1d(np.arange(20), ends)
    assert not wrong[np.ix_(inside, inside)].any()


def test_a_constant_stays_constant_and_a_small_latent_is_decoded_whole():
    np.testing.assert_allclose(tiles.tiled(lambda z: 0 * enlarged(z) + 0.7, 8, 2)(latent(1, 19, 30, 2)), 0.7, atol=1e-6)
    z = latent(1, 8, 8, 2)
    np.testing.assert_array_equal(tiles.tiled(convolved, 8, 2)(z), convolved(z))


def test_memory_is_that_of_a_tile():
    def wide(z):
        h = jnp.tile(enlarged(z), (1, 1, 1, 64))
        for _ in range(3):
            kernel = jnp.full((3, 3, 128, 128), 0.01)
            h = jnp.sin(jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        return h[..., :3]

    z = jax.ShapeDtypeStruct((1, 128, 128, 2), jnp.float32)
    whole, tiled = (
        jax.jit(decode).lower(z).compile().memory_analysis().temp_size_in_bytes for decode in (wide, tiles.tiled(wide, 16, 4))
    )
    assert tiled < whole / 8, (tiled, whole)


def test_an_overlap_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="overlap=8 is out of range; allowed: 0 to 7"):
        tiles.tiled(local, 8, 8)
