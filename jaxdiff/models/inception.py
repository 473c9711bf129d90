"""Inception-v3 as FID uses it: the graph that Google published on 2015-12-05, for inference, with the names of its PyTorch port.

Modules are called as in the port's state dict ("Mixed_5b.branch1x1.conv.weight"), so that its names follow from ours. Three things
differ from the Inception-v3 of today's libraries: average pools do not count the padding, the pool of the very last block is a
maximum, and there are 1008 logits. Source: Szegedy et al. 2016 (the network), Heusel et al. 2017 (its use).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class Inception(nn.Module):
    """Features of images: float32 [B, 299, 299, 3] in [-1, 1] -> a dict of float32 arrays.

    `pool` [B, 2048], the mean over positions (FID, KID, precision); `spatial` [B, 17 * 17 * 7], the first 7 channels of the graph's
    node mixed_6/conv, here Mixed_6d.branch1x1, row by row (sFID: Nash et al. 2021, as ADM's evaluator takes them); `logits` [B,
    1008], and `logits_unbiased` without the last layer's bias, which the Inception Score is of (Salimans et al. 2016, their code).
    """

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        h = Unit(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        h = Unit(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(h)
        h = halve(Unit(64, (3, 3), name="Conv2d_2b_3x3")(h))
        h = Unit(80, name="Conv2d_3b_1x1")(h)
        h = halve(Unit(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(h))
        for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
            h = MixedA(pooled, name=f"Mixed_{name}")(h)
        h = MixedB(name="Mixed_6a")(h)
        for name, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            h = MixedC(inner, name=f"Mixed_{name}")(h)
            if name == "6d":
                spatial = h[..., :7]  # branch1x1 is the first of the branches
        h = MixedD(name="Mixed_7a")(h)
        h = MixedE(name="Mixed_7b")(h, average(h))
        h = MixedE(name="Mixed_7c")(h, nn.max_pool(h, (3, 3), padding="SAME"))
        pool = h.mean((1, 2))
        unbiased, logits = Last(1008, name="fc")(pool)
        return {"pool": pool, "spatial": spatial.reshape(len(x), -1), "logits": logits, "logits_unbiased": unbiased}


class Unit(nn.Module):
    """A convolution without a bias, batch normalisation and ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        stride = (self.stride, self.stride)
        h = nn.Conv(self.features, self.kernel, stride, self.padding, use_bias=False, name="conv")(x)
        return nn.relu(Norm(name="bn")(h))


class Norm(nn.Module):
    """Batch normalisation with the statistics of training, which are parameters like the others: nothing here learns."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        one, zero, shape = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        scale, bias = self.param("scale", one, shape), self.param("bias", zero, shape)
        mean, var = self.param("mean", zero, shape), self.param("var", one, shape)
        scale = scale * jax.lax.rsqrt(var + 1e-3)
        axes = (None,) * (x.ndim - 1)
        return x * scale[axes] + (bias - mean * scale)[axes]


class Last(nn.Module):
    """A linear map: h -> (without its bias, with it)."""

    features: int

    @nn.compact
    def __call__(self, h: Array) -> tuple[Array, Array]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (h.shape[-1], self.features))
        unbiased = h @ kernel
        return unbiased, unbiased + self.param("bias", nn.initializers.zeros, (self.features,))[None]


def chain(x: Array, name: str, *units: tuple[int, tuple[int, int]], last: int = 1) -> Array:
    """Units of (features, kernel) one after the other, called name_1, name_2, ...; the last has stride 2 where `last` says so."""
    for i, (features, kernel) in enumerate(units, 1):
        stride = last if i == len(units) else 1
        x = Unit(features, kernel, stride, "SAME" if stride == 1 else "VALID", name=f"{name}_{i}")(x)
    return x


def average(x: Array) -> Array:
    """The mean of each position's 3x3 neighbourhood, at the border of those that exist."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def halve(x: Array) -> Array:
    """The maximum of 3x3 at every second position: [B, n, n, C] -> [B, (n - 1) // 2, ...]."""
    return nn.max_pool(x, (3, 3), (2, 2))


def join(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


class MixedA(nn.Module):
    """35x35: one 5x5, two 3x3. Source: Szegedy et al. 2016, figure 5."""

    pooled: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return join(
            Unit(64, name="branch1x1")(x),
            chain(x, "branch5x5", (48, (1, 1)), (64, (5, 5))),
            chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
            Unit(self.pooled, name="branch_pool")(average(x)),
        )


class MixedB(nn.Module):
    """35x35 to 17x17. Source: Szegedy et al. 2016, figure 10."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return join(
            Unit(384, (3, 3), 2, "VALID", name="branch3x3")(x),
            chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), last=2),
            halve(x),
        )


class MixedC(nn.Module):
    """17x17: 7x7 as 1x7 and 7x1. Source: Szegedy et al. 2016, figure 6."""

    inner: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, wide, tall = self.inner, (1, 7), (7, 1)
        return join(
            Unit(192, name="branch1x1")(x),
            chain(x, "branch7x7", (c, (1, 1)), (c, wide), (192, tall)),
            chain(x, "branch7x7dbl", (c, (1, 1)), (c, tall), (c, wide), (c, tall), (192, wide)),
            Unit(192, name="branch_pool")(average(x)),
        )


class MixedD(nn.Module):
    """17x17 to 8x8. Source: Szegedy et al. 2016, figure 10."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return join(
            chain(x, "branch3x3", (192, (1, 1)), (320, (3, 3)), last=2),
            chain(x, "branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)), last=2),
            halve(x),
        )


class MixedE(nn.Module):
    """8x8: branches that end in 1x3 beside 3x1; `pooled` is x after the block's own pool. Source: Szegedy et al. 2016, figure 7."""

    @nn.compact
    def __call__(self, x: Array, pooled: Array) -> Array:
        three = Unit(384, name="branch3x3_1")(x)
        twice = chain(x, "branch3x3dbl", (448, (1, 1)), (384, (3, 3)))
        return join(
            Unit(320, name="branch1x1")(x),
            Unit(384, (1, 3), name="branch3x3_2a")(three),
            Unit(384, (3, 1), name="branch3x3_2b")(three),
            Unit(384, (1, 3), name="branch3x3dbl_3a")(twice),
            Unit(384, (3, 1), name="branch3x3dbl_3b")(twice),
            Unit(192, name="branch_pool")(pooled),
        )
