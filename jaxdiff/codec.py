"""Codecs: how uint8 images become what the process diffuses, and back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

__all__ = ["centred", "pixels", "standardised"]


class Codec(NamedTuple):
    """`encode(key, x)`: uint8 [B, ..., C] -> z; `decode(z)`: z -> uint8 [B, ..., C]. The key is for stochastic encoders.

    `stage` is None for pixels, and a `first_stage.Stage` where z is a latent.
    """

    encode: Callable[[Array, Array], Array]
    decode: Callable[[Array], Array]
    stage: Any = None


def pixels() -> Codec:
    """Pixels scaled linearly to [-1, 1], float32. Source: DDPM section 3.3."""
    return standardised((0.0,), (1.0,))


def centred() -> Codec:
    """Pixels k at the middle of 256 equal parts of [-1, 1], 2 (k + 1/2) / 256 - 1, float32: a step is exactly 1/128.

    So of sin(2^n pi z) and cos(2^n pi z) for n >= 7 every pixel has the same up to the sign, and a noisy one only its distance to
    the nearest value. Source: VDM's public code.
    """
    return _linear(128.0, 0.5, (0.0,), (1.0,))


def standardised(mean: Sequence[float], std: Sequence[float]) -> Codec:
    """Pixels with each channel's `mean` taken away and divided by its `std`, both measured on the [-1, 1] scale.

    Raises ValueError where a deviation is not positive.
    """
    if not all(s > 0 for s in std):
        raise ValueError(f"standardised needs positive deviations, got {std}")
    return _linear(127.5, 0.0, mean, std)


def _linear(half: float, shift: float, mean: Sequence[float], std: Sequence[float]) -> Codec:
    """The codec ((k + shift) / half - 1 - mean) / std of pixels k."""

    def rows(x: Array) -> tuple[Array, Array]:
        shape = (1,) * (x.ndim - 1) + (-1,)
        return jnp.asarray(mean, jnp.float32).reshape(shape), jnp.asarray(std, jnp.float32).reshape(shape)

    def encode(key: Array, x: Array) -> Array:
        m, s = rows(x)
        return ((x.astype(jnp.float32) + shift) / half - 1 - m) / s

    def decode(z: Array) -> Array:
        m, s = rows(z)
        return jnp.round(jnp.clip((z * s + m + 1) * half - shift, 0, 255)).astype(jnp.uint8)

    return Codec(encode, decode)


def ends(codec: Codec, shape: Sequence[int]) -> tuple[Array, Array]:
    """What a codec of pixels makes of black and of white in images of `shape` (..., C): [1, ..., 1, C] each."""
    channels = (1,) * len(shape) + (shape[-1],)
    lo, hi = (codec.encode(jax.random.key(0), jnp.full(channels, value, jnp.uint8)) for value in (0, 255))
    return lo, hi
