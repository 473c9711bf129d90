"""The U-Net: one skeleton (which levels, how many blocks, where attention), whose parts are modules (`parts`)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.models.parts import (
    TIME_PER_LOGSNR,
    Attention,
    Down,
    Embed,
    Enter,
    LearnedSinusoidal,
    Leave,
    ResBlock,
    Sinusoidal,
    Up,
    norm,
)

__all__ = ["TIME_PER_LOGSNR", "LearnedSinusoidal", "ResBlock", "Sinusoidal", "UNet", "norm"]

Array = jax.Array
Dtype = Any
# A module's class, or functools.partial of it with fields of its own.
Part = Callable[..., Any]


class UNet(nn.Module):
    """Ho et al.'s network: (x [B, *space, C] at unit scale, logsnr [] or [B, 1, ..., 1], cond) -> [B, *space, out_channels].

    `space` has any number of axes, each divisible by 2^(levels - 1). `multipliers` gives each level's channels, `attention` the
    levels (0 is full size) whose every block is followed by attention, on the way up, where `attend_each` is False, only the last;
    the middle always has one. With `classes` > 0 the condition is {"label": int [] or [B]}, -1 being the null label (and what a
    missing condition means); with `augment` > 0 it may have "augment": float [B, augment], zeros where it is missing. `train`
    turns on dropout. `remat` keeps no activations inside blocks and computes them again for the gradient: less memory, more
    operations. Raises ValueError where a size does not divide. Source: DDPM appendix B; its CIFAR-10 form is the default
    (35,746,307).
    """

    channels: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    blocks: int = 2
    attention: Sequence[int] = (1,)
    attend_each: bool = True
    heads: int = 1
    classes: int = 0
    augment: int = 0
    dropout: float = 0.0
    out_channels: int | None = None
    dtype: Dtype = jnp.float32
    remat: bool = False
    time: Part = Sinusoidal
    embed: Part = Embed
    enter: Part = Enter
    block: Part = ResBlock
    attend: Part = Attention
    down: Part = Down
    up: Part = Up
    leave: Part = Leave

    @nn.compact
    def __call__(self, x: Array, logsnr: Array, cond: Any = None, train: bool = False) -> Array:
        last = len(self.multipliers) - 1
        if any(n % 2**last for n in x.shape[1:-1]):
            raise ValueError(f"{last + 1} levels need sizes divisible by {2**last}, got {x.shape[1:-1]}")
        block, down, up, attend = self.block, self.down, self.up, self.attend
        if self.remat:  # Argument 3 of a block, counted with self, is `train`: a Python bool.
            block, down, up, attend = _remat(block, 3), _remat(down, 3), _remat(up, 3), _remat(attend)

        embed = self.inline(self.embed(self.channels, self.classes, self.augment, self.time))
        embedding = embed(jnp.broadcast_to(logsnr.reshape(-1), x.shape[:1]), cond)

        def call(part: Part, h: Array, level: int, name: str) -> Array:
            channels = self.channels * self.multipliers[level]
            return part(channels, self.dropout, self.dtype, name=name)(h, embedding, train)

        def attention(h: Array, name: str) -> Array:
            return attend(self.heads, self.dtype, name=f"{name}_attention")(h)

        h = self.inline(self.enter(self.channels, self.dtype))(x)
        skips = [h]
        for level in range(last + 1):
            for i in range(self.blocks):
                h = call(block, h, level, f"down{level}_{i}_block")
                h = attention(h, f"down{level}_{i}") if level in self.attention else h
                skips.append(h)
            if level < last:
                h = call(down, h, level, f"down{level}")
                skips.append(h)

        h = call(block, h, last, "middle_block1")
        h = call(block, attention(h, "middle"), last, "middle_block2")

        for level in reversed(range(last + 1)):
            for i in range(self.blocks + 1):
                h = call(block, jnp.concatenate([h, skips.pop()], axis=-1), level, f"up{level}_{i}_block")
                if level in self.attention and (self.attend_each or i == self.blocks):
                    h = attention(h, f"up{level}_{i}")
            if level > 0:
                h = call(up, h, level, f"up{level}")

        return self.inline(self.leave(self.out_channels or x.shape[-1], self.dtype))(h, x)

    def inline(self, part: nn.Module) -> Any:
        """The part, its parameters named as if they were the network's own."""
        nn.share_scope(self, part)
        return part


def _remat(part: Part, *static: int) -> Part:
    if isinstance(part, functools.partial):
        return functools.partial(_remat(part.func, *static), **part.keywords)
    return nn.remat(part, static_argnums=static)
