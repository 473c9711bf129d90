"""The diffusion transformer, DiT: patches of an image as a sequence, the noise level and label by adaptive norms.

What a transformer may have otherwise is a part, a module that `DiT` or its `Block` calls by its role, always in the same way; what
stands first here is the papers' own. N patches are those of a grid (rows, columns), row by row.

    time(features)(logsnr [B]) -> [B, ...]                        the noise level as features, of `parts`
    places(dtype)(h [B, N, width], grid) -> same                  where a patch is, as the blocks are entered
    qk_norm(dtype)(q [B, N, heads, D]) -> same                    queries, and once more keys, before anything is done with them
    rotate(q [B, N, heads, D], grid) -> same                      where a patch is, in queries and in keys
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.models.parts import INIT, ZERO, Dense, Sinusoidal, conv
from jaxdiff.models.unet import Part

Array = jax.Array
Dtype = Any

# Peebles and Xie: how many features the noise level is heard as.
TIME_FEATURES = 256
SMALL = nn.initializers.normal(0.02)
# As the authors' code draws what is one matrix there: queries, keys and values together, and a patch's pixels as one vector.
THIRD = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
FLAT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=(0, 1, 2))


class SinCosPlaces(nn.Module):
    """`places`, added. Source: Peebles and Xie 2023, section 3.2."""

    dtype: Dtype = jnp.float32

    def __call__(self, h: Array, grid: tuple[int, int]) -> Array:
        return h + jnp.asarray(places(*grid, h.shape[-1]), self.dtype)[None]


class NoPlaces(nn.Module):
    """What a transformer has in their place that knows places by rotation alone."""

    dtype: Dtype = jnp.float32

    def __call__(self, h: Array, grid: tuple[int, int]) -> Array:
        return h


class NoNorm(nn.Module):
    """Queries and keys as they are."""

    dtype: Dtype = jnp.float32

    def __call__(self, q: Array) -> Array:
        return q


class RMSNorm(nn.Module):
    """Queries or keys of each head at a root mean square of one, times a learned scale [D] that the heads share, from float32.

    However large the weights grow, no product of a query and a key exceeds D times the largest product of two scales, which keeps
    attention from becoming one-hot. Sources: Henry et al. 2020 (query-key normalisation); Dehghani et al. 2023, section 2.
    """

    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, q: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), q.shape[-1:], jnp.float32)
        q = q.astype(jnp.float32)
        q = q * jax.lax.rsqrt(jnp.square(q).mean(-1, keepdims=True) + self.epsilon)
        return (q * scale.reshape(*(1,) * (q.ndim - 1), -1)).astype(self.dtype)


class NoRotation(nn.Module):
    """What a transformer has that knows places by what is added at the start alone."""

    def __call__(self, q: Array, grid: tuple[int, int]) -> Array:
        return q


class Rotary(nn.Module):
    """Pairs of a head's channels turned by angles in proportion to the place, half of them to the row and half to the column.

    The product of a turned query and a turned key depends on how far apart they are, and on nothing else of their places. The
    channels D of a head are a multiple of 4; each half has frequencies base^(-i / (D / 4)). Source: Su et al. 2021 (RoPE), eqs. 13
    to 16 and 34, along two axes.
    """

    base: float = 10000.0

    def __call__(self, q: Array, grid: tuple[int, int]) -> Array:
        angles = turns(*grid, q.shape[-1], self.base)[None, :, None]
        cos, sin = (jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
        a, b = jnp.split(q.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(q.dtype)


class Block(nn.Module):
    """Attention and an MLP, whose norms are shifted and scaled, and whose results gated, by the embedding: h [B, N, width] -> same.

    The maps that make shift, scale and gate are zero at first, so that a block is the identity (adaLN-zero). Called as `nn.scan`
    calls: (h, embedding [B, width]) -> (h, None). Source: Peebles and Xie 2023 (DiT), section 3.2.
    """

    heads: int
    dtype: Dtype = jnp.float32
    mlp_epsilon: float = 1e-6
    qk_norm: Part = NoNorm
    rotate: Part = NoRotation
    grid: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, h: Array, embedding: Array) -> tuple[Array, None]:
        width = h.shape[-1]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(6, width, self.dtype)(embedding)
        h = (h + gate1 * self.attend(layer_norm(self.dtype)(h) * (1 + scale1) + shift1)).astype(self.dtype)
        a = layer_norm(self.dtype, self.mlp_epsilon)(h) * (1 + scale2) + shift2
        a = Dense(4 * width, dtype=self.dtype, kernel_init=INIT, name="mlp1")(a)
        a = Dense(width, dtype=self.dtype, kernel_init=INIT, name="mlp2")(nn.gelu(a))
        return (h + gate2 * a).astype(self.dtype), None

    def attend(self, h: Array) -> Array:
        batch, n, width = h.shape
        q, k, v = (
            Dense(width, dtype=self.dtype, kernel_init=THIRD, name=name)(h).reshape(batch, n, self.heads, width // self.heads)
            for name in ("q", "k", "v")
        )
        q, k = self.qk_norm(dtype=self.dtype, name="q_norm")(q), self.qk_norm(dtype=self.dtype, name="k_norm")(k)
        q, k = self.rotate(name="q_rotate")(q, self.grid), self.rotate(name="k_rotate")(k, self.grid)
        h = jax.nn.dot_product_attention(q, k, v).reshape(batch, n, width)
        return Dense(width, dtype=self.dtype, kernel_init=INIT, name="out")(h)


class DiT(nn.Module):
    """(x [B, H, W, C] at unit scale, logsnr [] or [B, 1, 1, 1], cond) -> float32 [B, H, W, out_channels], as a `UNet` is called.

    H and W are divisible by `patch`. With `classes` > 0 the condition is {"label": int [] or [B]}, -1 being the null label (and
    what a missing condition means). The blocks are one under `nn.scan`, compiled once whatever the depth: their parameters have a
    first axis of `depth`. `remat` keeps no activations inside them. `mlp_epsilon` is of the norm before an MLP alone: diffusers has
    its own. `places`, `qk_norm` and `rotate` are parts. Raises ValueError where a size does not divide. Source: Peebles and Xie
    2023, section 3.2 and table 1, at patches of 2, 4 and 8:

        size   width   depth   heads
        S        384      12       6
        B        768      12      12
        L       1024      24      16
        XL      1152      28      16
    """

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    classes: int = 0
    dtype: Dtype = jnp.float32
    remat: bool = False
    mlp_epsilon: float = 1e-6
    time: Part = Sinusoidal
    places: Part = SinCosPlaces
    qk_norm: Part = NoNorm
    rotate: Part = NoRotation
    out_channels: int | None = None

    @nn.compact
    def __call__(self, x: Array, logsnr: Array, cond: Any = None, train: bool = False) -> Array:
        batch, height, width, channels = x.shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"patches of {self.patch} need sizes divisible by {self.patch}, got {x.shape[1:-1]}")
        embedding = self.hear(jnp.broadcast_to(logsnr.reshape(-1), x.shape[:1]), cond)
        h = conv(self.width, self.patch, 2, self.dtype, FLAT, self.patch, "patches", "VALID")(x.astype(self.dtype))
        rows, columns = h.shape[1:3]
        h = self.places(dtype=self.dtype, name="places")(h.reshape(batch, -1, self.width), (rows, columns))
        h = self.through(h, embedding, (rows, columns))
        shift, scale = modulation(2, self.width, self.dtype)(embedding)
        h = layer_norm(self.dtype)(h) * (1 + scale) + shift
        out = self.out_channels or channels
        h = Dense(self.patch**2 * out, dtype=self.dtype, kernel_init=ZERO, name="leave")(h).astype(jnp.float32)
        h = h.reshape(batch, rows, columns, self.patch, self.patch, out)
        return h.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, out)

    def hear(self, logsnr: Array, cond: Any) -> Array:
        """The noise level and the label as one vector a sample, float32 [B, width]; row 0 of the labels' table is the null one."""
        h = self.time(TIME_FEATURES, name="time")(logsnr)
        h = Dense(self.width, kernel_init=SMALL, name="embed1")(h)
        h = Dense(self.width, kernel_init=SMALL, name="embed2")(nn.silu(h))
        if not self.classes:
            return h
        label = jnp.broadcast_to(cond.get("label", -1) if isinstance(cond, Mapping) else -1, logsnr.shape)
        return h + nn.Embed(self.classes + 1, self.width, embedding_init=SMALL, name="label")(label + 1)

    def through(self, h: Array, embedding: Array, grid: tuple[int, int]) -> Array:
        # Under a scan nothing can be moved between the two computations of a block, which prevent_cse would guard against.
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        along: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
        stack = nn.scan(block, length=self.depth, **along)
        blocks = stack(self.heads, self.dtype, self.mlp_epsilon, self.qk_norm, self.rotate, grid, name="blocks")
        return blocks(h, embedding)[0]


def layer_norm(dtype: Dtype, epsilon: float = 1e-6) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=epsilon, use_bias=False, use_scale=False, dtype=dtype)


def modulation(parts: int, width: int, dtype: Dtype):
    """embedding [B, width] -> `parts` arrays float32 [B, 1, width], all zero at first.

    The map is in `dtype`; what is done with them is not, so that their gradients, sums over all positions, are summed in float32.
    """
    dense = Dense(parts * width, dtype=dtype, kernel_init=ZERO, name="modulation")
    return lambda embedding: jnp.split(dense(nn.silu(embedding))[:, None].astype(jnp.float32), parts, axis=-1)


def places(rows: int, columns: int, width: int) -> np.ndarray:
    """Sines and cosines of each patch's place, row by row: float32 [rows * columns, width], width a multiple of 4.

    The first half is of the column and the second of the row; each half has sines, then cosines, at the frequencies
    10000^(-i / (width / 4)). Source: Peebles and Xie 2023, section 3.2, who take them from Vaswani et al. 2017, section 3.5.
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.mgrid[:rows, :columns].reshape(2, -1, 1)
    angles = column * frequencies, row * frequencies
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=-1).astype(np.float32)


def turns(rows: int, columns: int, channels: int, base: float) -> np.ndarray:
    """By how much `Rotary` turns each pair of a head's channels at each place: float64 [rows * columns, channels / 2].

    Raises ValueError where the channels of a head are no multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"rotary places need heads of a multiple of 4 channels, got {channels}")
    frequencies = base ** (-np.arange(channels // 4) / (channels // 4))
    row, column = np.mgrid[:rows, :columns].reshape(2, -1, 1)
    return np.concatenate([row * frequencies, column * frequencies], axis=-1)
