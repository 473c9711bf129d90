"""The autoencoders of latent diffusion: an image as few channels at a fraction of the size, Gaussian or of a codebook, and back.

Both ways are the U-Net's (`unet.Trunk`, `parts`) without a noise level, and the way up without skips.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.codebook import quantise
from jaxdiff.models.parts import Attention, Dense, Leave, ResBlock, Up
from jaxdiff.models.unet import Part, Trunk

Array = jax.Array
Dtype = Any

# What parts are given for the noise level and the embedding that they do not read.
SILENCE: Any = np.zeros((), np.float32)
# The bounds of the posterior's log variance: nothing in float32 is lost, and its exponential stays finite.
LOGVAR = (-30.0, 20.0)


class SilentBlock(ResBlock):
    """ResBlock that hears no noise level. Source: Esser et al. 2021 (VQGAN), table 7."""

    def condition(self, h: Array, embedding: Array) -> Array:
        return self.norm2(h)


class Encoder(Trunk):
    """Way down and middle, then norm, SiLU and a convolution: [B, *space, C] -> [B, *(space / 2^(levels - 1)), out_channels]."""

    out_channels: int = 8
    block: Part = SilentBlock
    leave: Part = Leave

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        h = self.middle(self.descend(x, SILENCE, SILENCE, train)[-1], SILENCE, train)
        return self.inline(self.leave(self.out_channels, self.dtype))(h, x)


class Decoder(Encoder):
    """Middle and way up: [B, *space, C] -> [B, *(space 2^(levels - 1)), out_channels]."""

    up: Part = Up

    @nn.compact
    def __call__(self, z: Array, train: bool = False) -> Array:
        last = len(self.multipliers) - 1
        h = self.inline(self.enter(self.channels * self.multipliers[last], self.dtype))(z, SILENCE)
        h = self.middle(h, SILENCE, train)
        for level in reversed(range(last + 1)):
            for i in range(self.blocks + 1):
                h = self.call(self.block, level, f"up{level}_{i}_block", h, SILENCE, train)
                h = self.look(f"up{level}_{i}", h) if level in self.attention else h
            h = self.call(self.up, level, f"up{level}", h, SILENCE, train) if level else h
        return self.inline(self.leave(self.out_channels, self.dtype))(h, z)


class Autoencoder(nn.Module):
    """What the two autoencoders share: their fields but those of the codebook, and both ways.

    `attention` names levels besides the middle, whose part is `middle_attend` where that is another one; `groups` above 0 are those
    of every norm, `out_channels` is the image's C. `scale` is what a codec multiplies a latent by, for a deviation of about 1; None
    where it is measured instead. The network itself scales nothing.
    """

    channels: int = 128
    multipliers: Sequence[int] = (1, 2, 4, 4)
    blocks: int = 2
    attention: Sequence[int] = ()
    middle_attend: Part | None = None
    latent_channels: int = 4
    out_channels: int = 3
    groups: int = 0
    scale: float | None = None
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    remat: bool = False

    def ways(self, encoded: int) -> tuple[Encoder, Decoder]:
        """Encoder and decoder; `encoded` is how many channels the encoder gives."""
        same = ("channels", "multipliers", "blocks", "attention", "dropout", "dtype", "remat")
        fields: dict[str, Any] = {name: getattr(self, name) for name in same}
        if self.middle_attend is not None:
            fields["middle_attend"] = _in_groups(self.middle_attend, self.groups)
        for role, part in {"block": SilentBlock, "attend": Attention, "leave": Leave}.items():
            fields[role] = _in_groups(part, self.groups)
        return Encoder(out_channels=encoded, **fields), Decoder(out_channels=self.out_channels, **fields)

    def decode(self, z: Array, train: bool = False) -> Array:
        return self.decoder(self.post_quant_conv(z), train)


class AutoencoderKL(Autoencoder):
    """Latent diffusion's first stage: `encode(x) -> (mean, logvar)` of the posterior, `decode(z) -> x`, images at [-1, 1].

    x [B, *space, C] and z [B, *(space / 2^(levels - 1)), latent_channels], float32; the fields are `Autoencoder`'s. Raises
    ValueError where a size does not divide. Source: Rombach et al. 2022, appendix G; the default is Stable Diffusion's (83,653,863
    parameters), whose scale is 0.18215.
    """

    def setup(self):
        self.encoder, self.decoder = self.ways(2 * self.latent_channels)
        self.quant_conv = Dense(2 * self.latent_channels)
        self.post_quant_conv = Dense(self.latent_channels)

    def encode(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        mean, logvar = jnp.split(self.quant_conv(self.encoder(x, train)), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR)

    def __call__(self, x: Array, train: bool = False) -> Array:
        """The posterior's mean, decoded; what makes all parameters."""
        return self.decode(self.encode(x, train)[0], train)


class AutoencoderVQ(Autoencoder):
    """The first stage with a codebook: `encode(x) -> z` before it is quantised, `decode(z) -> x` of z as given, images at [-1, 1].

    x [B, *space, C] and z [B, *(space / 2^(levels - 1)), code_channels], float32; `jaxdiff.codebook` quantises, by the parameter
    `codebook` [codes, code_channels], uniform within 1 / codes of 0 at first. `latent_channels` is what enters the decoder; the
    other fields are `Autoencoder`'s. Raises ValueError where a size does not divide. Source: Esser et al. 2021 (VQGAN), section
    3.1; the default is latent diffusion's VQ-f4 (Rombach et al. 2022, table 8).
    """

    multipliers: Sequence[int] = (1, 2, 4)
    latent_channels: int = 3
    codes: int = 8192
    code_channels: int = 3

    def setup(self):
        self.encoder, self.decoder = self.ways(self.latent_channels)
        self.quant_conv = Dense(self.code_channels)
        self.post_quant_conv = Dense(self.latent_channels)
        self.codebook = self.param("codebook", _around_zero, (self.codes, self.code_channels), jnp.float32)

    def encode(self, x: Array, train: bool = False) -> Array:
        return self.quant_conv(self.encoder(x, train))

    def __call__(self, x: Array, train: bool = False) -> Array:
        """The nearest codes, decoded; what makes all parameters."""
        return self.decode(quantise(self.codebook, self.encode(x, train))[0], train)


def _in_groups(part: Part, groups: int) -> Part:
    """The part with so many groups in its norm, where it has one and says no number itself."""
    kind, own = getattr(part, "func", part), getattr(part, "keywords", {})
    return functools.partial(kind, **{"groups": groups} | own) if hasattr(kind, "groups") else part


def _around_zero(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
    return jax.random.uniform(key, shape, dtype, -1 / shape[0], 1 / shape[0])
