"""Losses: what training minimises, one number a sample."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdiff.denoiser import Net, network_input
from jaxdiff.level import Level, diffuse
from jaxdiff.targets import Target, regress

Array = jax.Array


def unit_weight(level: Level) -> Array:
    """The weight 1 at every level, in the space of the network's own target: DDPM's "simple" loss with the target eps."""
    return jnp.ones_like(level.sigma)


def denoising_loss(
    key: Array,
    net: Net,
    target: Target,
    x0: Array,
    level: Level,
    eps: Array | None = None,
    weight: Callable[[Level], Array] = unit_weight,
    data_std: float = 1.0,
) -> Array:
    """The weighted squared error of the network on its target, averaged over each sample's entries, [B].

    x0 is [B, ...], level [] or [B, 1, ..., 1]; key draws the noise, and is used only where `eps` [B, ...] is not given.
    Source: DDPM eq. 14 and algorithm 1, for any target row.
    """
    eps = jax.random.normal(key, x0.shape, x0.dtype) if eps is None else eps
    y, _ = net(*network_input(diffuse(level, x0, eps), level, data_std))
    error = weight(level) * jnp.square(y.astype(x0.dtype) - regress(target, level, x0, eps))
    return error.reshape(x0.shape[0], -1).mean(1)
