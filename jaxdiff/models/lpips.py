"""LPIPS: how far two images look apart, by what VGG-16 makes of them; `jaxdiff.interop.lpips` reads its published weights."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

# VGG-16's convolutions by 3x3: channels and how many there are, stage by stage; the size is halved between stages.
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
# What brings images at [-1, 1] to the mean and the deviation that VGG was trained at.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Keeps a position where nothing is seen from a division by 0.
EPSILON = 1e-10
# The least size: below it nothing is left after the fourth pool.
SIDE = 2 ** (len(STAGES) - 1)


def lpips(params: Any, x: Array, y: Array) -> Array:
    """The distance of images x and y at [-1, 1], [B, H, W, 3] or [B, H, W, 1], grey ones seen as RGB: float32 [B].

    `params` is what `jaxdiff.interop.lpips.read` gives. Raises ValueError for images of other channels or smaller than 16 pixels.
    Source: Zhang et al. 2018, section 3 and eq. 1, version 0.1 of its weights for VGG.
    """
    apart = jnp.zeros(x.shape[0], jnp.float32)
    for stage, (of_x, of_y) in enumerate(zip(features(params, x), features(params, y), strict=True)):
        difference = (_unit(of_x) - _unit(of_y)) ** 2
        apart += jnp.mean(difference @ params["params"][f"linear{stage + 1}"], axis=(1, 2))
    return apart


def features(params: Any, x: Array) -> list[Array]:
    """What VGG's stages give before they are pooled, float32 [B, H / 2^n, W / 2^n, channels], n = 0 ... 4."""
    if x.ndim != 4 or x.shape[-1] not in (1, 3) or min(x.shape[1:3]) < SIDE:
        raise ValueError(f"LPIPS sees images [B, H, W, 1] or [B, H, W, 3] of {SIDE} pixels at least, got {x.shape}")
    shift, scale = (jnp.asarray(a, jnp.float32)[None, None, None] for a in (SHIFT, SCALE))
    h, seen = (x.astype(jnp.float32) - shift) / scale, []
    for stage, (_, convolutions) in enumerate(STAGES):
        h = nn.max_pool(h, (2, 2), (2, 2)) if stage else h
        for i in range(convolutions):
            h = nn.relu(_conv(params["params"][f"conv{stage + 1}_{i + 1}"], h))
        seen.append(h)
    return seen


def shapes() -> Any:
    """The shapes of `lpips`'s params."""
    made: dict[str, Any] = {}
    before = 3
    for stage, (channels, convolutions) in enumerate(STAGES):
        for i in range(convolutions):
            kernel, bias = (3, 3, before, channels), (channels,)
            made[f"conv{stage + 1}_{i + 1}"] = {"kernel": _shape(kernel), "bias": _shape(bias)}
            before = channels
        made[f"linear{stage + 1}"] = _shape((channels,))
    return {"params": made}


def _shape(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _conv(of: Any, h: Array) -> Array:
    h = jax.lax.conv_general_dilated(h, of["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return h + of["bias"][None, None, None]


def _unit(h: Array) -> Array:
    """The vector at each position at length 1, or 0 where it is 0; there the root has no gradient and is passed by."""
    square = jnp.sum(h**2, axis=-1, keepdims=True)
    seen = square > 0
    return h / (jnp.where(seen, jnp.sqrt(jnp.where(seen, square, 1.0)), 0.0) + EPSILON)
