"""Codecs give back every pixel value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import codec

CIFAR = ((-0.017, -0.036, -0.107), (0.494, 0.487, 0.523))
CODECS = {"pixels": codec.pixels(), "standardised": codec.standardised(*CIFAR), "centred": codec.centred()}
EVERY = np.stack([np.roll(np.arange(256, dtype=np.uint8), 85 * c) for c in range(3)], -1).reshape(2, 8, 16, 3)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(2, 8, 16, 3), (2, 128, 3), (2, 4, 4, 8, 3)])
def test_every_value_survives(name, shape):
    x = jnp.asarray(EVERY.reshape(shape))
    z = CODECS[name].encode(jax.random.key(0), x)
    assert z.shape == shape and z.dtype == jnp.float32
    back = CODECS[name].decode(z)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(jax.jit(CODECS[name].decode)(jax.jit(CODECS[name].encode)(None, x)), x)


def test_pixels_run_from_minus_one_to_one():
    z = CODECS["pixels"].encode(None, jnp.asarray([[0, 51, 255]], jnp.uint8))
    np.testing.assert_allclose(z, [[-1, -0.6, 1]], atol=1e-6)


def test_centred_pixels_are_the_middles_of_256_parts():
    z = np.asarray(CODECS["centred"].encode(None, jnp.arange(256, dtype=jnp.uint8)[:, None]), np.float64)
    np.testing.assert_array_equal(z[:, 0], 2 * (np.arange(256) + 0.5) / 256 - 1)
    lo, hi = codec.ends(CODECS["centred"], (1, 1))
    assert (hi - lo).item() / 255 == 1 / 128
    # What the sine of 2^7 pi z has beyond its sign, it has of noise alone.
    np.testing.assert_allclose(np.abs(np.sin(128 * np.pi * z)), 1, rtol=1e-12)
    values = jnp.asarray([[-3.0, -1.0, -1 + 1.99 / 256, -1 + 2.01 / 256, 1.0]])
    np.testing.assert_array_equal(CODECS["centred"].decode(values), [[0, 0, 0, 1, 255]])


def test_decode_rounds_to_the_nearest_and_clips():
    decode = CODECS["pixels"].decode
    values = jnp.asarray([[-3.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1.5]])
    np.testing.assert_array_equal(decode(values), [[0, 0, 1, 255]])
    assert (decode(jnp.asarray([[-jnp.inf, jnp.inf]])) == jnp.asarray([[0, 255]], jnp.uint8)).all()


def test_standardised_data_has_zero_mean_and_unit_deviation():
    x = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3)).astype(np.uint8)
    x[..., 1] //= 3
    scaled = x / 127.5 - 1
    fitted = codec.standardised(scaled.mean((0, 1, 2)), scaled.std((0, 1, 2)))
    z = fitted.encode(None, jnp.asarray(x))
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std((0, 1, 2)), 1, rtol=1e-5)


def test_a_deviation_of_zero_is_refused():
    with pytest.raises(ValueError, match="positive deviations"):
        codec.standardised((0.0,), (0.0,))
