"""Augmentation that runs inside jit, on the accelerator."""

import jax
import jax.numpy as jnp


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image of [B, H, W, C] mirrored left-right with probability 1/2; `key` is one `jax.random.key`."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)
