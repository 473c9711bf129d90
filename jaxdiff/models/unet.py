"""The U-Net: one skeleton (which levels, how many blocks, where attention), whose parts are modules.

The default parts are Ho et al.'s (DDPM appendix B). Parameters, norm statistics and the embedding of the noise level are float32;
convolutions and attention run in `dtype`.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Dtype = Any

# The logsnr of a 1000-step linear table spans 20; 50 a unit gives the frequencies DDPM has for its 1000 integer times.
TIME_PER_LOGSNR = 50.0

# DDPM: variance_scaling(1, fan_avg, uniform) everywhere, and zero where a residual branch or the network ends.
INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
ZERO = nn.initializers.zeros_init()


class Sinusoidal(nn.Module):
    """Sines and cosines of the logsnr at fixed, geometric frequencies: [B] -> [B, features]. Source: DDPM appendix B."""

    features: int

    @nn.compact
    def __call__(self, logsnr: Array) -> Array:
        half = self.features // 2
        frequencies = jnp.exp(-math.log(10000.0) / max(half - 1, 1) * jnp.arange(half, dtype=jnp.float32))
        angle = TIME_PER_LOGSNR * logsnr.astype(jnp.float32)[:, None] * frequencies[None]
        embedding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        return jnp.pad(embedding, ((0, 0), (0, self.features % 2)))


class LearnedSinusoidal(nn.Module):
    """Sines and cosines at learned frequencies, with the logsnr itself: [B] -> [B, features + 1].

    Source: the Fourier features of Tancik et al. 2020, eq. 3, with trained frequencies.
    """

    features: int

    @nn.compact
    def __call__(self, logsnr: Array) -> Array:
        logsnr = logsnr.astype(jnp.float32)[:, None]
        frequencies = self.param("frequencies", nn.initializers.normal(1.0), (1, self.features // 2), jnp.float32)
        angle = logsnr * frequencies * 2 * jnp.pi
        return jnp.concatenate([logsnr, jnp.sin(angle), jnp.cos(angle)], axis=-1)


def conv(features: int, width: int, axes: int, dtype: Dtype, init=INIT, stride: int = 1, name: str | None = None) -> nn.Conv:
    """A convolution over `axes` spatial axes; at stride 2, "SAME" pads right and bottom, as DDPM's TensorFlow did."""
    return nn.Conv(features, (width,) * axes, (stride,) * axes, "SAME", dtype=dtype, kernel_init=init, name=name)


def norm(channels: int, dtype: Dtype, name: str | None = None) -> nn.GroupNorm:
    """Group normalisation in 32 groups, fewer where a group would have under 4 channels; statistics in float32.

    A group of one channel would take away all that the embedding adds: the network would not see the noise level.
    """
    groups = math.gcd(min(32, max(channels // 4, 1)), channels)
    return nn.GroupNorm(groups, epsilon=1e-6, dtype=dtype, name=name)


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, with the embedding added in between and a shortcut around. Source: DDPM appendix B."""

    channels: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, embedding: Array, train: bool) -> Array:
        axes = x.ndim - 2
        h = conv(self.channels, 3, axes, self.dtype, name="conv1")(nn.silu(norm(x.shape[-1], self.dtype, "norm1")(x)))
        shift = nn.Dense(self.channels, dtype=self.dtype, kernel_init=INIT, name="embed")(nn.silu(embedding))
        h = h + shift.reshape(shift.shape[0], *(1,) * axes, -1)
        h = nn.silu(norm(self.channels, self.dtype, "norm2")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.channels, 3, axes, self.dtype, ZERO, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype, kernel_init=INIT, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over all positions, with norm before and a residual around. Source: DDPM appendix B."""

    heads: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, channels = x.shape[0], x.shape[-1]
        h = norm(channels, self.dtype, "norm")(x).reshape(batch, -1, channels)
        q, k, v = (
            nn.Dense(channels, dtype=self.dtype, kernel_init=INIT, name=name)(h).reshape(
                batch, -1, self.heads, channels // self.heads
            )
            for name in ("q", "k", "v")
        )
        h = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return x + nn.Dense(channels, dtype=self.dtype, kernel_init=ZERO, name="out")(h)


class Down(nn.Module):
    """Half the size by a convolution of stride 2. Source: DDPM appendix B."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return conv(x.shape[-1], 3, x.ndim - 2, self.dtype, stride=2, name="conv")(x)


class Up(nn.Module):
    """Twice the size by repeating each position, then a convolution. Source: DDPM appendix B."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for axis in range(1, x.ndim - 1):
            x = jnp.repeat(x, 2, axis)
        return conv(x.shape[-1], 3, x.ndim - 2, self.dtype, name="conv")(x)


class UNet(nn.Module):
    """Ho et al.'s network: (x [B, *space, C] at unit scale, logsnr [] or [B, 1, ..., 1], cond) -> [B, *space, out_channels].

    `space` has any number of axes, each divisible by 2^(levels - 1). `multipliers` gives each level's channels, `attention` the
    levels (0 is full size) whose every block, down and up, is followed by attention; the middle always has one. With `classes` > 0
    the condition is {"label": int [] or [B]}, -1 being the null label (and what a missing condition means). `train` turns on
    dropout. `remat` keeps no activations inside blocks and computes them again for the gradient: less memory, more operations.
    Raises ValueError where a size does not divide. Source: DDPM appendix B; its CIFAR-10 form is the default (35,746,307).
    """

    channels: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    blocks: int = 2
    attention: Sequence[int] = (1,)
    heads: int = 1
    classes: int = 0
    dropout: float = 0.0
    out_channels: int | None = None
    dtype: Dtype = jnp.float32
    remat: bool = False
    time: type[nn.Module] = Sinusoidal
    block: type[nn.Module] = ResBlock
    attend: type[nn.Module] = Attention
    down: type[nn.Module] = Down
    up: type[nn.Module] = Up

    @nn.compact
    def __call__(self, x: Array, logsnr: Array, cond: Any = None, train: bool = False) -> Array:
        last = len(self.multipliers) - 1
        if any(n % 2**last for n in x.shape[1:-1]):
            raise ValueError(f"{last + 1} levels need sizes divisible by {2**last}, got {x.shape[1:-1]}")
        out_channels = self.out_channels or x.shape[-1]
        embedding = self.embed(jnp.broadcast_to(logsnr.reshape(-1), x.shape[:1]), cond)

        # Argument 3, counted with self, is `train`: a Python bool.
        block, attend = (nn.remat(self.block, static_argnums=3), nn.remat(self.attend)) if self.remat else (self.block, self.attend)

        def stage(h: Array, level: int, name: str) -> Array:
            h = block(self.channels * self.multipliers[level], self.dropout, self.dtype, name=f"{name}_block")(h, embedding, train)
            return attend(self.heads, self.dtype, name=f"{name}_attention")(h) if level in self.attention else h

        h = conv(self.channels, 3, x.ndim - 2, self.dtype, name="conv_in")(x.astype(self.dtype))
        skips = [h]
        for level in range(last + 1):
            for i in range(self.blocks):
                h = stage(h, level, f"down{level}_{i}")
                skips.append(h)
            if level < last:
                h = self.down(self.dtype, name=f"down{level}")(h)
                skips.append(h)

        middle = self.channels * self.multipliers[last]
        h = block(middle, self.dropout, self.dtype, name="middle_block1")(h, embedding, train)
        h = attend(self.heads, self.dtype, name="middle_attention")(h)
        h = block(middle, self.dropout, self.dtype, name="middle_block2")(h, embedding, train)

        for level in reversed(range(last + 1)):
            for i in range(self.blocks + 1):
                h = stage(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up{level}_{i}")
            if level > 0:
                h = self.up(self.dtype, name=f"up{level}")(h)

        h = nn.silu(norm(h.shape[-1], self.dtype, "norm_out")(h))
        return conv(out_channels, 3, x.ndim - 2, self.dtype, ZERO, name="conv_out")(h).astype(jnp.float32)

    def embed(self, logsnr: Array, cond: Any) -> Array:
        """The noise level, and the label if there are classes, as one vector a sample, float32 [B, 4 channels]."""
        width = 4 * self.channels
        h = self.time(self.channels, name="time")(logsnr)
        h = nn.Dense(width, kernel_init=INIT, name="embed1")(h)
        h = nn.Dense(width, kernel_init=INIT, name="embed2")(nn.silu(h))
        if self.classes:
            label = jnp.broadcast_to(-1 if cond is None else cond["label"], logsnr.shape)
            # Row 0 is the null label, -1.
            h = h + nn.Embed(self.classes + 1, width, name="label")(label + 1)
        return h
