"""The patch discriminator: for each patch of an image a logit, above 0 where the patch looks real."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

INIT = nn.initializers.normal(0.02)
# What a convolution's outputs are divided by is the root of their variance plus this.
EPSILON = 1e-5


class BatchNorm(nn.Module):
    """Every channel to mean 0 and variance 1 over the batch at hand, then scaled and shifted; no running averages are kept."""

    @nn.compact
    def __call__(self, h: Array) -> Array:
        axes, shape = tuple(range(h.ndim - 1)), (h.shape[-1],)
        scale = self.param("scale", lambda key, shape: 1 + INIT(key, shape), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        unit = nn.standardize(h, axes, epsilon=EPSILON)
        return unit * _spread(scale, h) + _spread(bias, h)


class PatchDiscriminator(nn.Module):
    """Images at [-1, 1], [B, *space, C], to logits of patches that overlap, float32 [B, *(space / 2^layers - 2), 1].

    `layers` is how many convolutions of stride 2 there are; with 3 a patch is 70 pixels wide. The norms take their statistics of
    the batch at hand, as in training, which is all that a discriminator is for. Raises ValueError for images smaller than 3
    positions after the last stride. Source: Isola et al. 2017 (pix2pix), section 3.2.2 and appendix 6.1.2; 2,765,633 parameters
    at RGB.
    """

    channels: int = 64
    layers: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if any(n // 2**self.layers < 3 for n in x.shape[1:-1]):
            least = 3 * 2**self.layers
            raise ValueError(f"a patch discriminator of {self.layers} layers needs sizes of {least} at least, got {x.shape[1:-1]}")

        def conv(features: int, stride: int, name: str, bias: bool = False) -> nn.Conv:
            return nn.Conv(features, (4,) * (x.ndim - 2), stride, 1, use_bias=bias, kernel_init=INIT, name=name)

        h = conv(self.channels, 2, "conv_in", bias=True)(x.astype(jnp.float32))
        for n in range(1, self.layers + 1):
            # No bias before a norm, which would take it away.
            h = conv(self.channels * min(2**n, 8), 2 if n < self.layers else 1, f"conv{n}")(_leaky(h))
            h = BatchNorm(name=f"norm{n}")(h)
        return conv(1, 1, "conv_out", bias=True)(_leaky(h))


def _leaky(h: Array) -> Array:
    return nn.leaky_relu(h, 0.2)


def _spread(vector: Array, h: Array) -> Array:
    return vector.reshape((1,) * (h.ndim - 1) + (-1,))
