"""The parts of the U-Net and the classifier: how they hear the noise level, blocks, attention, resampling, what enters and leaves.

A part is a module that the skeleton (`unet.UNet`, `classifier.Classifier`) calls by its role, always in the same way:

    time(features)(logsnr [B]) -> [B, ...]                                   the noise level as features
    embed(channels, classes, augment, time)(logsnr [B], cond) -> [B, 4 channels]     all that is not the image, as one vector
    enter(channels, dtype)(x, logsnr) -> h                                   the image, as features
    block, down, up(channels, dropout, dtype)(h, embedding, train) -> h      at the same, half or twice the size
    context(classes)(cond, batch) -> (tokens [B, N, D], mask [B, N])         what of a condition is a sequence
    attend, middle_attend(heads, dtype)(h, context) -> h                     the second in the middle alone; context may be None
    leave(out_channels, dtype)(h, x) -> y                                    the output, float32
    pool(classes, heads, dtype)(h) -> logits [B, classes]                    a classifier's, float32

What one family does otherwise is a class of its own beside the default, Ho et al.'s (DDPM appendix B). Parameters, norm statistics
and embeddings are float32; convolutions and attention run in `dtype`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import schedules

Array = jax.Array
Dtype = Any
# A sequence: tokens [B, N, D] and which of them are there, bool [B, N].
Context = tuple[Array, Array]

# The logsnr of a 1000-step linear table spans 20; 50 a unit gives the frequencies DDPM has for its 1000 integer times.
TIME_PER_LOGSNR = 50.0

# DDPM: variance_scaling(1, fan_avg, uniform) everywhere, and zero where a residual branch or the network ends.
INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
ZERO = nn.initializers.zeros_init()


class Dense(nn.Module):
    """A linear map of the last axis: [..., C] -> [..., features], in `dtype`; the gradient of its bias is a sum in float32.

    Products and convolutions of 16-bit numbers are summed in float32 by every backend. What is summed over all positions for the
    gradient of a bias is not, unless asked: on a CPU 65,536 ones in bfloat16 made 8192.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        return y + _everywhere(self.param("bias", ZERO, (self.features,), jnp.float32), y) if self.use_bias else y


class Conv(nn.Module):
    """A convolution [B, *space, C] -> [B, *space, features], in `dtype`; its bias is as a `Dense`'s."""

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int]
    padding: Any = "SAME"
    dtype: Dtype = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
        padding = [(self.padding,) * 2] * len(self.strides) if isinstance(self.padding, int) else self.padding
        # What a convolution reads, and the gradient by it, is written down once: XLA's CPU backend would compute the norm before it
        # and its gradient again for every reader, in that one's order of axes. It is 5% of a training step.
        x = jax.lax.optimization_barrier(x.astype(self.dtype))
        axes = "XYZ"[: len(self.strides)]
        layout = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
        y = jax.lax.conv_general_dilated(x, kernel, self.strides, padding, dimension_numbers=layout)
        return y + _everywhere(self.param("bias", ZERO, (self.features,), jnp.float32), y)


def _everywhere(bias: Array, y: Array) -> Array:
    """float32 [C], [1, N, C] or [B, 1, ..., 1, C] as y is; spread, then cast: so its gradient is cast, then summed."""
    return jnp.broadcast_to(bias, y.shape).astype(y.dtype)


def conv(
    features: int, width: int, axes: int, dtype: Dtype, init=INIT, stride: int = 1, name: str | None = None, padding: Any = "SAME"
) -> "Conv":
    """A convolution over `axes` spatial axes; at stride 2, "SAME" pads right and bottom, as DDPM's TensorFlow did."""
    return Conv(features, (width,) * axes, (stride,) * axes, padding, dtype, init, name=name)


class GroupNorm(nn.Module):
    """Group normalisation as one scale and one shift a channel, from each channel's two moments: [B, *space, C] -> same.

    So x is read twice, for the moments and for what becomes of it, which XLA joins with the SiLU after it. All in float32 but for
    the result, `dtype`. Source: Wu and He 2018, eqs. 1 to 7.
    """

    num_groups: int
    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
        x, space = x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
        mean, square = self.of_group(x.mean(space)), self.of_group(jnp.square(x).mean(space))
        factor = scale[None] * jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + self.epsilon)
        return (x * _spread(factor, x) + _spread(bias[None] - mean * factor, x)).astype(self.dtype)

    def of_group(self, moment: Array) -> Array:
        """The mean of each channel's group, at each channel: [B, C] -> [B, C]."""
        batch, channels = moment.shape
        width = channels // self.num_groups
        groups = moment.reshape(batch, self.num_groups, width)
        return jnp.broadcast_to(groups.mean(-1, keepdims=True), groups.shape).reshape(batch, channels)


class Dropout(nn.Module):
    """Each entry zero with probability `rate`, the others divided by what is kept, where `train`: h -> same.

    One of 65,536 numbers an entry decides, which halves the random bits of a uniform float; so `rate` is rounded to 1/65,536.
    Source: Srivastava et al. 2014.
    """

    rate: float

    @nn.compact
    def __call__(self, h: Array, train: bool) -> Array:
        dropped = min(round(self.rate * 2**16), 2**16 - 1)
        if not train or not dropped:
            return h
        *axes, channels = h.shape
        words = jax.random.bits(self.make_rng("dropout"), (*axes, (channels + 1) // 2), jnp.uint32)
        halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*axes, -1)[..., :channels]
        return jnp.where(halves >= dropped, h / (1 - dropped / 2**16), 0)


def norm(channels: int, dtype: Dtype, name: str | None = None, epsilon: float = 1e-6, groups: int = 0) -> GroupNorm:
    """Group normalisation in 32 groups, fewer where a group would have under 4 channels; statistics in float32.

    A group of one channel would take away all that the embedding adds: the network would not see the noise level. `groups` above 0
    is how many there are whatever the channels, for networks trained that way.
    """
    return GroupNorm(group_count(channels, groups), epsilon, dtype, name=name)


def group_count(channels: int, groups: int = 0) -> int:
    """How many groups `norm` makes of that many channels."""
    return groups or math.gcd(min(32, max(channels // 4, 1)), channels)


def double(x: Array) -> Array:
    """Each position twice, along every spatial axis: [B, *space, C] -> [B, *(2 space), C]."""
    for axis in range(1, x.ndim - 1):
        x = jnp.repeat(x, 2, axis)
    return x


def halve(x: Array) -> Array:
    """The mean of two neighbours, along every spatial axis: [B, *space, C] -> [B, *(space / 2), C]."""
    return nn.avg_pool(x, (2,) * (x.ndim - 2), (2,) * (x.ndim - 2))


class Sinusoidal(nn.Module):
    """Sines and cosines of the logsnr at fixed, geometric frequencies: [B] -> [B, features]. Source: DDPM appendix B.

    The highest frequency is `rate` a unit of logsnr, the lowest a 10000th of it. VDM's, 1000 over the range of its logsnr, is
    rate = 54.6. EDM's, of c_noise = ln(sigma) / 4 = -logsnr / 8 (table 1), is rate = 0.125 but for signs.
    """

    features: int
    rate: float = TIME_PER_LOGSNR

    @nn.compact
    def __call__(self, logsnr: Array) -> Array:
        half = self.features // 2
        frequencies = jnp.exp(-math.log(10000.0) / max(half - 1, 1) * jnp.arange(half, dtype=jnp.float32))
        angle = self.rate * logsnr.astype(jnp.float32)[:, None] * frequencies[None]
        embedding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        return jnp.pad(embedding, ((0, 0), (0, self.features % 2)))


class TableSinusoidal(nn.Module):
    """Sines and cosines of the row of a table of noise levels that a logsnr is at: [B] -> [B, features].

    So a network that was trained on the integers 0 ... steps - 1 hears the noise level as every network here does. Between the rows
    the row number is interpolated; within a hundredth of one it is that integer, which float32's logsnr would miss. The highest
    frequency is `scale` a row and the lowest about a 10000th of it: exactly where `shift` is 1 (DDPM), times 10000^(2 / features)
    where it is 0 (Transformer's, ADM and DiT). With `cos_first` 1 the cosines stand before the sines.
    """

    features: int
    steps: int = 1000
    scale: float = 1.0
    shift: int = 1
    cos_first: int = 0

    @nn.compact
    def __call__(self, logsnr: Array) -> Array:
        half = self.features // 2
        frequencies = jnp.exp(-math.log(10000.0) / (half - self.shift) * jnp.arange(half, dtype=jnp.float32))
        angle = self.scale * self.number(logsnr.astype(jnp.float32))[:, None] * frequencies[None]
        parts = jnp.sin(angle), jnp.cos(angle)
        embedding = jnp.concatenate(parts[::-1] if self.cos_first else parts, axis=-1)
        return jnp.pad(embedding, ((0, 0), (0, self.features % 2)))

    def number(self, logsnr: Array) -> Array:
        """The number of the row, from 0."""
        log_alpha_bar = self.table()[1:]
        falling = (log_alpha_bar - np.log(-np.expm1(log_alpha_bar))).astype(np.float32)
        row = jnp.interp(logsnr, falling[::-1], np.arange(self.steps, dtype=np.float32)[::-1])
        return jnp.where(jnp.abs(row - jnp.round(row)) < 0.01, jnp.round(row), row)

    def table(self) -> np.ndarray:
        """log alpha_bar before the first row, 0, and at each, float64 [steps + 1]."""
        raise NotImplementedError


def _rows(schedule: Any) -> np.ndarray:
    (log_alpha_bar,) = schedule.args  # a schedule of a table is a Partial that holds it
    return log_alpha_bar


class LinearBetaSinusoidal(TableSinusoidal):
    """TableSinusoidal of `schedules.linear_beta(steps, first, last)`."""

    first: float = 1e-4
    last: float = 0.02

    def table(self) -> np.ndarray:
        return _rows(schedules.linear_beta(self.steps, self.first, self.last))


class ScaledLinearBetaSinusoidal(TableSinusoidal):
    """TableSinusoidal of `schedules.scaled_linear_beta(steps, first, last)`."""

    first: float = 0.00085
    last: float = 0.012

    def table(self) -> np.ndarray:
        return _rows(schedules.scaled_linear_beta(self.steps, self.first, self.last))


class CosineBetaSinusoidal(TableSinusoidal):
    """TableSinusoidal of `schedules.cosine_beta(steps)`."""

    def table(self) -> np.ndarray:
        return _rows(schedules.cosine_beta(self.steps))


class VPSinusoidal(TableSinusoidal):
    """TableSinusoidal of the time t of `schedules.vp` that a logsnr is at: the number is (steps - 1) t, never rounded.

    So hear the networks of Song et al. 2021 that were trained on the continuous VP SDE. With b = -log alpha_bar(t), which is
    log(1 + exp(-logsnr)), t solves beta_min t + (beta_max - beta_min) t^2 / 2 = b (their eq. 33).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def number(self, logsnr: Array) -> Array:
        b = self.lost(logsnr)
        # The form of the root that keeps its digits where t is small.
        t = 2 * b / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b))
        return (self.steps - 1) * t

    def lost(self, logsnr: Array) -> Array:
        """-log alpha_bar."""
        return jax.nn.softplus(-logsnr)


class SubVPSinusoidal(VPSinusoidal):
    """VPSinusoidal of the time of `schedules.subvp`, whose sigma is 1 - alpha_bar: b = 2 arcsinh(exp(-logsnr / 2) / 2)."""

    def lost(self, logsnr: Array) -> Array:
        return sub_vp_lost(logsnr)


def sub_vp_lost(logsnr: Array) -> Array:
    """-log alpha_bar of the sub-VP level of a logsnr: sigma / alpha is 1 / alpha - alpha = 2 sinh(-log alpha)."""
    return 2 * jnp.arcsinh(jnp.exp(-logsnr / 2) / 2)


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


class Embed(nn.Module):
    """The noise level, augmentation and label as one vector a sample: (logsnr [B], cond) -> float32 [B, 4 channels].

    The label is a row of a table, added after the two layers; row 0 is the null label, -1, which a missing one means. With
    `augment` > 0, cond["augment"] [B, augment] says how the image was changed, and a missing one that it was not: a linear map
    without a bias, added to the features of the noise level. With `factor` above 1 all is as wide as for `factor` times the
    channels. Source: DDPM appendix B; EDM appendix F.2 (augmentation).
    """

    channels: int
    classes: int
    augment: int
    time: Any
    factor: int = 1

    @nn.compact
    def __call__(self, logsnr: Array, cond: Any) -> Array:
        cond = cond if isinstance(cond, Mapping) else {}
        channels, label = self.factor * self.channels, jnp.broadcast_to(cond.get("label", -1), logsnr.shape)
        width = 4 * channels
        h = self.time(channels, name="time")(logsnr)
        if self.augment:
            change = jnp.broadcast_to(cond.get("augment", 0.0), (*logsnr.shape, self.augment)).astype(jnp.float32)
            h = h + Dense(h.shape[-1], use_bias=False, kernel_init=INIT, name="augment")(change)
        h = self.before(h, label)
        h = Dense(width, kernel_init=INIT, name="embed1")(h)
        h = Dense(width, kernel_init=INIT, name="embed2")(nn.silu(h))
        return self.after(h, label)

    def before(self, h: Array, label: Array) -> Array:
        return h

    def after(self, h: Array, label: Array) -> Array:
        return h + nn.Embed(self.classes + 1, h.shape[-1], name="label")(label + 1) if self.classes else h


class OneHotEmbed(Embed):
    """Embed whose label is a linear map of one-hot vectors, added before the two layers; the null label is all zeros.

    The vectors are scaled to a mean square of 1, as the features of the noise level have 1/2. Source: EDM appendix F.1.
    """

    def before(self, h: Array, label: Array) -> Array:
        if not self.classes:
            return h
        one_hot = math.sqrt(self.classes) * jax.nn.one_hot(label, self.classes)
        return h + Dense(h.shape[-1], kernel_init=INIT, name="label")(one_hot)

    def after(self, h: Array, label: Array) -> Array:
        return h


class Enter(nn.Module):
    """A convolution of the image: [B, *space, C] -> [B, *space, channels]. Source: DDPM appendix B."""

    channels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, logsnr: Array) -> Array:
        return conv(self.channels, 3, x.ndim - 2, self.dtype, name="conv_in")(self.features(x, logsnr).astype(self.dtype))

    def features(self, x: Array, logsnr: Array) -> Array:
        return x


class SubVPEnter(Enter):
    """Enter of x as `schedules.subvp` makes it, not at unit scale: times hypot(alpha, sigma). Source: Song et al. 2021, eq. 29."""

    def features(self, x: Array, logsnr: Array) -> Array:
        lost = sub_vp_lost(logsnr.astype(jnp.float32))
        return x * jnp.hypot(jnp.exp(-lost / 2), jnp.expm1(-lost))


class FourierEnter(Enter):
    """Enter of x together with sin(2^n pi x) and cos(2^n pi x), n = low ... high, in float32: a pixel's last bits made large.

    Source: VDM appendix C, whose n are 7 and 8.
    """

    low: int = 7
    high: int = 8

    def features(self, x: Array, logsnr: Array) -> Array:
        x = x.astype(jnp.float32)
        angles = [2.0**n * math.pi * x for n in range(self.low, self.high + 1)]
        return jnp.concatenate([x, *(jnp.sin(a) for a in angles), *(jnp.cos(a) for a in angles)], axis=-1)


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, with the embedding added in between and a shortcut around. Source: DDPM appendix B."""

    channels: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6
    scale: float = 1.0
    groups: int = 0

    @nn.compact
    def __call__(self, x: Array, embedding: Array, train: bool) -> Array:
        axes = x.ndim - 2
        h = self.resample(nn.silu(norm(x.shape[-1], self.dtype, "norm1", self.epsilon, self.groups)(x)))
        h = conv(self.channels, 3, axes, self.dtype, name="conv1")(h)
        h = nn.silu(self.condition(h, nn.silu(embedding)))
        h = Dropout(self.dropout)(h, train)
        h = conv(self.channels, 3, axes, self.dtype, ZERO, name="conv2")(h)
        return (self.around(x, h.shape) + h) * self.scale

    def resample(self, h: Array) -> Array:
        return h

    def around(self, x: Array, shape: tuple[int, ...]) -> Array:
        """x in the shape of what the block gives, by a linear map where they differ."""
        if x.shape == shape:
            return x
        return Dense(self.channels, dtype=self.dtype, kernel_init=INIT, name="shortcut")(self.resample(x))

    def condition(self, h: Array, embedding: Array) -> Array:
        """The embedding enters around the second norm."""
        shift = Dense(self.channels, dtype=self.dtype, kernel_init=INIT, name="embed")(embedding)
        return self.norm2(h + _everywhere(_spread(shift, h), h))

    def norm2(self, h: Array) -> Array:
        return norm(self.channels, self.dtype, "norm2", self.epsilon, self.groups)(h)


class ADMBlock(ResBlock):
    """ResBlock whose embedding scales and shifts what the second norm gives. Source: Nichol and Dhariwal 2021, appendix A."""

    epsilon: float = 1e-5

    def condition(self, h: Array, embedding: Array) -> Array:
        both = Dense(2 * self.channels, dtype=self.dtype, kernel_init=INIT, name="embed")(embedding)
        scale, shift = (_everywhere(part, h) for part in jnp.split(_spread(both, h), 2, axis=-1))
        return self.norm2(h) * (1 + scale) + shift


class ResBlockDown(ResBlock):
    """Half the size by a ResBlock that averages neighbours after its first norm, and around, there without a linear map."""

    def resample(self, h: Array) -> Array:
        return halve(h)

    def around(self, x: Array, shape: tuple[int, ...]) -> Array:
        x = halve(x)
        return x if x.shape == shape else Dense(self.channels, dtype=self.dtype, kernel_init=INIT, name="shortcut")(x)


class ResBlockUp(ResBlock):
    """Twice the size by a ResBlock that repeats positions after its first norm, and around, there without a linear map."""

    def resample(self, h: Array) -> Array:
        return double(h)

    def around(self, x: Array, shape: tuple[int, ...]) -> Array:
        x = double(x)
        return x if x.shape == shape else Dense(self.channels, dtype=self.dtype, kernel_init=INIT, name="shortcut")(x)


class ADMBlockDown(ADMBlock, ResBlockDown):
    """ResBlockDown with ADMBlock's embedding. Source: Dhariwal and Nichol 2021, section 3, who take it from BigGAN."""


class ADMBlockUp(ADMBlock, ResBlockUp):
    """ResBlockUp with ADMBlock's embedding. Source: Dhariwal and Nichol 2021, section 3, who take it from BigGAN."""


class VDMBlock(ResBlock):
    """ResBlock whose embedding comes through a linear map without a bias, zero at first. Source: VDM appendix B."""

    def condition(self, h: Array, embedding: Array) -> Array:
        shift = Dense(self.channels, use_bias=False, dtype=self.dtype, kernel_init=ZERO, name="embed")(embedding)
        return self.norm2(h + _everywhere(_spread(shift, h), h))


class DDPMppBlock(ResBlock):
    """ResBlock whose sum is scaled by sqrt(1/2), so that its variance stays. Source: Song et al. 2021, appendix H."""

    scale: float = math.sqrt(0.5)


class DDPMppDown(DDPMppBlock):
    """Half the size by a block that averages neighbours after its first norm, and around. Source: Song et al. 2021, appendix H."""

    def resample(self, h: Array) -> Array:
        return halve(h)


class DDPMppUp(DDPMppBlock):
    """Twice the size by a block that repeats positions after its first norm, and around. Source: Song et al. 2021, appendix H."""

    def resample(self, h: Array) -> Array:
        return double(h)


class Down(nn.Module):
    """Half the size by a convolution of stride 2. Source: DDPM appendix B."""

    channels: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, embedding: Array, train: bool) -> Array:
        return conv(self.channels, 3, x.ndim - 2, self.dtype, stride=2, name="conv")(x)


class ADMDown(Down):
    """Down whose convolution pads both sides by one, as the PyTorch of Nichol and Dhariwal 2021 does."""

    @nn.compact
    def __call__(self, x: Array, embedding: Array, train: bool) -> Array:
        return conv(self.channels, 3, x.ndim - 2, self.dtype, stride=2, name="conv", padding=1)(x)


class Up(nn.Module):
    """Twice the size by repeating each position, then a convolution. Source: DDPM appendix B."""

    channels: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, embedding: Array, train: bool) -> Array:
        return conv(self.channels, 3, x.ndim - 2, self.dtype, name="conv")(double(x))


class Attention(nn.Module):
    """Self-attention over all positions, with norm before and a residual around; deaf to a context. Source: DDPM appendix B.

    `width` above 0 is the channels of a head, whatever `heads` says (Dhariwal and Nichol 2021, section 3).
    """

    heads: int = 1
    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6
    scale: float = 1.0
    width: int = 0
    groups: int = 0

    @nn.compact
    def __call__(self, x: Array, context: Context | None = None) -> Array:
        batch, channels = x.shape[0], x.shape[-1]
        heads = channels // self.width if self.width else self.heads
        h = self.before(x).reshape(batch, -1, channels)
        q, k, v = (
            Dense(channels, dtype=self.dtype, kernel_init=INIT, name=name)(h).reshape(batch, -1, heads, channels // heads)
            for name in ("q", "k", "v")
        )
        h = self.look(q, k, v).reshape(x.shape)
        return (x + Dense(channels, dtype=self.dtype, kernel_init=ZERO, name="out")(h)) * self.scale

    def before(self, x: Array) -> Array:
        return norm(x.shape[-1], self.dtype, "norm", self.epsilon, self.groups)(x)

    def look(self, q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(q, k, v)


class FusedAttention(Attention):
    """Attention by cuDNN's fused kernel where that fits: a CUDA GPU, a 16-bit `dtype`, heads of few channels; else as Attention.

    It never writes down who looks at whom, [B, heads, N, N]. It has no forward-mode derivative, so a network with it has no exact
    likelihood there, and is no program for other platforms, so none to export: Attention has the same parameters, and both. Source:
    Dao 2023 (FlashAttention-2).
    """

    def look(self, q: Array, k: Array, v: Array) -> Array:
        kernel: Any = "cudnn" if fuses(jax.devices()[0], q.dtype, q.shape[-1]) else None
        return jax.nn.dot_product_attention(q, k, v, implementation=kernel)


def fuses(device: Any, dtype: Dtype, width: int) -> bool:
    """Whether cuDNN has fused attention for heads of `width` channels on a device: of capability 8.0 or, where wide, 9.0."""
    said = str(getattr(device, "compute_capability", ""))
    capability = float(said) if said.replace(".", "").isdigit() else 0.0  # a TPU has none, and AMD's are names
    most = 256 if capability >= 9 else 128
    return capability >= 8 and dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= most


class BareAttention(Attention):
    """Attention without a norm before, as diffusers' UNet2DModel has it in the middle of a network with scales and shifts."""

    def before(self, x: Array) -> Array:
        return x


class NoAttention(nn.Module):
    """What a network has in place of attention where it has none: h -> h."""

    heads: int = 1
    dtype: Dtype = jnp.float32

    def __call__(self, x: Array, context: Context | None = None) -> Array:
        return x


class DDPMppAttention(Attention):
    """Attention whose sum is scaled by sqrt(1/2). Source: Song et al. 2021, appendix H."""

    scale: float = math.sqrt(0.5)


class SpatialTransformer(nn.Module):
    """norm, a linear map, `depth` transformer blocks over all positions, a linear map that is zero at first, a residual around.

    Each block looks at the image, then at the context: so a sequence enters. Without one it looks at the image twice, as the
    authors' code does. `width` above 0 is the channels of a head, whatever `heads` says. Source: Rombach et al. 2022, appendix
    E.2.1 and table 16, the feed-forward last as in their code.
    """

    heads: int = 1
    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6
    width: int = 0
    groups: int = 0
    depth: int = 1

    @nn.compact
    def __call__(self, x: Array, context: Context | None = None) -> Array:
        batch, channels = x.shape[0], x.shape[-1]
        heads = channels // self.width if self.width else self.heads
        h = norm(channels, self.dtype, "norm", self.epsilon, self.groups)(x).reshape(batch, -1, channels)
        h = Dense(channels, dtype=self.dtype, kernel_init=INIT, name="enter")(h)
        for i in range(self.depth):
            h = TransformerBlock(heads, self.dtype, name=f"block{i}")(h, context)
        return x + Dense(channels, dtype=self.dtype, kernel_init=ZERO, name="leave")(h).reshape(x.shape)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward, each after a layer norm, a residual around: h [B, N, C] -> same.

    The feed-forward is GEGLU, four times as wide. Sources: Rombach et al. 2022, appendix E.2.1; Shazeer 2020, eq. 6 (GEGLU).
    """

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Array, context: Context | None) -> Array:
        width = h.shape[-1]
        h = h + CrossAttention(self.heads, self.dtype, name="self_attention")(self.norm("norm1")(h), None)
        h = h + CrossAttention(self.heads, self.dtype, name="cross_attention")(self.norm("norm2")(h), context)
        both = Dense(8 * width, dtype=self.dtype, kernel_init=INIT, name="mlp1")(self.norm("norm3")(h))
        value, gate = jnp.split(both, 2, axis=-1)
        return h + Dense(width, dtype=self.dtype, kernel_init=INIT, name="mlp2")(value * nn.gelu(gate, approximate=False))

    def norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)


class CrossAttention(nn.Module):
    """Attention of h [B, M, C] to a context, or to itself where that is None -> [B, M, C]; only what goes out has a bias.

    A token that is not there is taken as zeros, whatever stands in its place. Where none is there attention is even, and as keys
    and values have no bias what it finds is zero: the bias alone goes out, and no NaN.
    """

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, h: Array, context: Context | None) -> Array:
        tokens, there = (h, None) if context is None else context
        if there is not None:
            tokens, there = jnp.where(there[:, :, None], tokens, 0), there[:, None, None, :]
        batch, width = h.shape[0], h.shape[-1]
        q, k, v = (
            Dense(width, use_bias=False, dtype=self.dtype, kernel_init=INIT, name=name)(of).reshape(
                batch, -1, self.heads, width // self.heads
            )
            for name, of in (("q", h), ("k", tokens), ("v", tokens))
        )
        found = jax.nn.dot_product_attention(q, k, v, mask=there).reshape(h.shape)
        return Dense(h.shape[-1], dtype=self.dtype, kernel_init=INIT, name="out")(found)


class LabelTokens(nn.Module):
    """The label as a sequence of one learned token: (cond, batch) -> (float32 [B, 1, width], all there).

    Row 0 of the table is the null label, -1, which a missing one means. What says the label here need not be said again: the
    network's `embed` is told of no classes. Source: Rombach et al. 2022, appendix E.2.1; drawn from N(0, 1) at first as there.
    """

    classes: int
    width: int = 512
    says_label = True

    @nn.compact
    def __call__(self, cond: Any, batch: int) -> Context:
        label = jnp.broadcast_to(cond.get("label", -1) if isinstance(cond, Mapping) else -1, (batch,))
        table = nn.Embed(self.classes + 1, self.width, embedding_init=nn.initializers.normal(1.0), name="label")
        return table(label[:, None] + 1), jnp.ones((batch, 1), bool)


class Tokens(nn.Module):
    """A sequence that the condition brings, of a text say: (cond, batch) -> (tokens [B, N, width], mask bool [B, N]).

    cond["tokens"] is [B, N, width], or [N, width] for all samples; cond["mask"], [B, N] or [N], says which of them are there, and a
    missing one that all are. Without tokens none is there: so is the null condition, of a whole batch or, by a row of the mask, of
    one sample. Raises ValueError for tokens of another width.
    """

    classes: int
    width: int = 768
    says_label = False

    @nn.compact
    def __call__(self, cond: Any, batch: int) -> Context:
        cond = cond if isinstance(cond, Mapping) else {}
        if (tokens := cond.get("tokens")) is None:
            return jnp.zeros((batch, 1, self.width)), jnp.zeros((batch, 1), bool)
        if tokens.shape[-1] != self.width:
            raise ValueError(f"the network hears tokens of width {self.width}, got {tuple(tokens.shape)}")
        mask = cond.get("mask")
        there = jnp.asarray(True if mask is None else mask, bool)
        shape = (batch, *tokens.shape[-2:])
        return jnp.broadcast_to(tokens, shape), jnp.broadcast_to(there, shape[:2])


class AttentionPool(nn.Module):
    """norm, SiLU, attention whose one query is the mean of all positions, a linear map: h -> float32 [B, classes].

    The mean stands before the positions, all have a learned place added, so an image of another size does not fit. The map is zero
    at first: every class is as likely. What it maps is kept for `classifier.features`; `width` and `groups` are as an Attention's.
    Source: Radford et al. 2021 (CLIP), section 2.4, as Dhariwal and Nichol 2021 use it.
    """

    classes: int
    heads: int = 1
    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6
    width: int = 0
    groups: int = 0

    @nn.compact
    def __call__(self, h: Array) -> Array:
        batch, channels = h.shape[0], h.shape[-1]
        heads = channels // self.width if self.width else self.heads
        h = nn.silu(norm(channels, self.dtype, "norm_out", self.epsilon, self.groups)(h)).reshape(batch, -1, channels)
        h = jnp.concatenate([h.mean(1, keepdims=True), h], axis=1)
        place = self.param("place", nn.initializers.normal(channels**-0.5), (1, *h.shape[1:]), jnp.float32)
        h = h + _everywhere(place, h)
        q, k, v = (
            Dense(channels, dtype=self.dtype, kernel_init=INIT, name=name)(of).reshape(batch, -1, heads, channels // heads)
            for name, of in (("q", h[:, :1]), ("k", h), ("v", h))
        )
        h = jax.nn.dot_product_attention(q, k, v).reshape(batch, channels).astype(jnp.float32)
        self.sow("intermediates", "features", h)
        return Dense(self.classes, kernel_init=ZERO, name="logits")(h)


class Leave(nn.Module):
    """norm, SiLU and a convolution that is zero at first: (h, x) -> float32 [B, *space, out_channels]. Source: DDPM appendix B."""

    out_channels: int
    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6
    groups: int = 0

    @nn.compact
    def __call__(self, h: Array, x: Array) -> Array:
        h = nn.silu(norm(h.shape[-1], self.dtype, "norm_out", self.epsilon, self.groups)(h))
        return conv(self.out_channels, 3, h.ndim - 2, self.dtype, ZERO, name="conv_out")(h).astype(jnp.float32)


class ResidualLeave(Leave):
    """Leave whose output is added to x itself, so that an eps model at first says that all is noise. Source: VDM, public code.

    The output has the channels of x.
    """

    @nn.compact
    def __call__(self, h: Array, x: Array) -> Array:
        h = nn.silu(norm(h.shape[-1], self.dtype, "norm_out", self.epsilon, self.groups)(h))
        return x + conv(self.out_channels, 3, h.ndim - 2, self.dtype, ZERO, name="conv_out")(h).astype(jnp.float32)


def _spread(vector: Array, h: Array) -> Array:
    """[B, C] -> float32 [B, 1, ..., 1, C], with the axes of h."""
    return vector.astype(jnp.float32).reshape(vector.shape[0], *(1,) * (h.ndim - 2), -1)
