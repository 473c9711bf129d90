"""DINOv2's vision transformer, for inference, with the names of its published state dict ("blocks.0.attn.qkv.weight").

Source: Oquab et al. 2023; Dosovitskiy et al. 2021 (the transformer), Touvron et al. 2021 (the scale of each layer).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class DINOv2(nn.Module):
    """The class token after the last norm: standardised images, float32 [B, H, W, 3] -> {"pool": float32 [B, dim]}.

    H and W are multiples of `patch`; `grid` is the side of the grid of patches that the positions were learned on (518 / 14 = 37).
    S, B and L have a `dim` of 384, 768 and 1024, a `depth` of 12, 12 and 24, and heads of 64.
    """

    dim: int
    depth: int
    heads: int
    patch: int = 14
    grid: int = 37

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        patch = (self.patch, self.patch)
        h = nn.Conv(self.dim, patch, patch, "VALID", name="patch_embed.proj")(x)
        place = self.param("pos_embed", nn.initializers.normal(0.02), (1, 1 + self.grid**2, self.dim))
        first = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.dim)) + place[:, :1]
        h = h + places(place[0, 1:].reshape(self.grid, self.grid, self.dim), (h.shape[1], h.shape[2]))[None]
        h = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.dim)), h.reshape(len(x), -1, self.dim)], axis=1)
        for i in range(self.depth):
            h = Block(self.heads, name=f"blocks.{i}")(h)
        return {"pool": nn.LayerNorm(1e-6, name="norm")(h[:, 0])}


class Block(nn.Module):
    """Attention and two layers, each after a norm and scaled, around which the input goes."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = attention(nn.LayerNorm(1e-6, name="norm1")(x), self.heads)
        x = x + h * self.param("ls1.gamma", nn.initializers.ones, x.shape[-1:])[None, None]
        h = nn.Dense(4 * x.shape[-1], name="mlp.fc1")(nn.LayerNorm(1e-6, name="norm2")(x))
        h = nn.Dense(x.shape[-1], name="mlp.fc2")(nn.gelu(h, approximate=False))
        return x + h * self.param("ls2.gamma", nn.initializers.ones, x.shape[-1:])[None, None]


def attention(x: Array, heads: int) -> Array:
    """Self-attention of [B, N, dim], inside the module that calls it: queries, keys and values are one linear map."""
    q, k, v = jnp.split(nn.Dense(3 * x.shape[-1], name="attn.qkv")(x).reshape(*x.shape[:2], 3 * heads, -1), 3, axis=2)
    return nn.Dense(x.shape[-1], name="attn.proj")(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


def places(learned: Array, size: tuple[int, int]) -> Array:
    """The learned places [n, n, dim] on a grid of another size, [*size, dim].

    Bicubic, as published: the step between positions is n / (size + 0.1) and not n / size, a rounding guard that became part of
    the model.
    """
    n = len(learned)
    if size == (n, n):
        return learned
    rows, columns = (jnp.asarray(cubic(n, m, (m + 0.1) / n), learned.dtype) for m in size)
    return jnp.einsum("in,jm,nmd->ijd", rows, columns, learned)


def cubic(n: int, m: int, scale: float) -> np.ndarray:
    """The weights [m, n] of cubic convolution from n to m positions (a = -0.75; beyond the border the last value goes on).

    Position i of the new grid is at (i + 1/2) / scale - 1/2 of the old one. Source: Keys 1981, eq. 4; PyTorch's bicubic.
    """
    at = (np.arange(m) + 0.5) / scale - 0.5
    taps = np.floor(at)[:, None] + np.arange(-1, 3)
    x = abs(at[:, None] - taps)
    a = -0.75
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    weights = np.zeros((m, n))
    np.add.at(weights, (np.arange(m)[:, None], taps.clip(0, n - 1).astype(int)), np.where(x <= 1, near, far))
    return weights
