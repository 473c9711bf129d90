"""The U-Net: one skeleton (which levels, how many blocks, where attention), whose parts are modules (`parts`).

Its way down and middle, `Trunk`, it shares with the classifier.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdiff.models.parts import (
    TIME_PER_LOGSNR,
    Attention,
    Context,
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

__all__ = ["TIME_PER_LOGSNR", "LearnedSinusoidal", "ResBlock", "Sinusoidal", "Trunk", "UNet", "norm"]

Array = jax.Array
Dtype = Any
# A module's class, or functools.partial of it with fields of its own.
Part = Callable[..., Any]


class Trunk(nn.Module):
    """The way down and the middle of a U-Net: its fields, and what a network that ends otherwise builds on.

    `multipliers` gives each level's channels, `attention` the levels (0 is full size) whose every block is followed by attention;
    the middle always has one, `middle_attend` where that is another part than `attend`. `remat` keeps no activations inside blocks
    and computes them again for the gradient: less memory, more operations.
    """

    channels: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    blocks: int = 2
    attention: Sequence[int] = (1,)
    heads: int = 1
    classes: int = 0
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    remat: bool = False
    time: Part = Sinusoidal
    embed: Part = Embed
    enter: Part = Enter
    block: Part = ResBlock
    attend: Part = Attention
    middle_attend: Part | None = None
    down: Part = Down

    def hear(self, x: Array, logsnr: Array, cond: Any, classes: int, augment: int) -> Array:
        """All that is not the image, as one vector a sample: [B, 4 channels]."""
        embed = self.inline(self.embed(self.channels, classes, augment, self.time))
        return embed(jnp.broadcast_to(logsnr.reshape(-1), x.shape[:1]), cond)

    def descend(self, x: Array, logsnr: Array, embedding: Array, train: bool, context: Context | None = None) -> list[Array]:
        """What each step of the way down gives, the coarsest last. Raises ValueError where a size does not divide."""
        last = len(self.multipliers) - 1
        if any(n % 2**last for n in x.shape[1:-1]):
            raise ValueError(f"{last + 1} levels need sizes divisible by {2**last}, got {x.shape[1:-1]}")
        h = self.inline(self.enter(self.channels, self.dtype))(x, logsnr)
        steps = [h]
        for level in range(last + 1):
            for i in range(self.blocks):
                h = self.call(self.block, level, f"down{level}_{i}_block", h, embedding, train)
                h = self.look(f"down{level}_{i}", h, context=context) if level in self.attention else h
                steps.append(h)
            if level < last:
                h = self.call(self.down, level, f"down{level}", h, embedding, train)
                steps.append(h)
        return steps

    def middle(self, h: Array, embedding: Array, train: bool, context: Context | None = None) -> Array:
        last = len(self.multipliers) - 1
        h = self.call(self.block, last, "middle_block1", h, embedding, train)
        h = self.look("middle", h, self.middle_attend, context)
        return self.call(self.block, last, "middle_block2", h, embedding, train)

    def call(self, part: Part, level: int, name: str, h: Array, embedding: Array, train: bool) -> Array:
        """A block, down or up, at a level."""
        channels = self.channels * self.multipliers[level]
        part = _remat(part, 3) if self.remat else part  # argument 3, counted with self, is `train`: a Python bool
        return part(channels, self.dropout, self.dtype, name=name)(h, embedding, train)

    def look(self, name: str, h: Array, attend: Part | None = None, context: Context | None = None) -> Array:
        """Attention after the block of that name."""
        attend = attend or self.attend
        attend = _remat(attend) if self.remat else attend
        return attend(self.heads, self.dtype, name=f"{name}_attention")(h, context)

    def inline(self, part: nn.Module) -> Any:
        """The part, its parameters named as if they were the network's own."""
        nn.share_scope(self, part)
        return part


class UNet(Trunk):
    """Ho et al.'s network: (x [B, *space, C] at unit scale, logsnr [] or [B, 1, ..., 1], cond) -> [B, *space, out_channels].

    `space` has any number of axes, each divisible by 2^(levels - 1). On the way up attention follows every block of the levels in
    `attention`, where `attend_each` is False only the last. With `classes` > 0 the condition is {"label": int [] or [B]}, -1 being
    the null label (and what a missing condition means); with `augment` > 0 it may have "augment": float [B, augment], zeros where
    it is missing; what of it is a sequence the part `context` says, and an `attend` such as SpatialTransformer hears. `train` turns
    on dropout. Raises ValueError where a size does not divide. Source: DDPM appendix B; its CIFAR-10 form is the default
    (35,746,307).
    """

    attend_each: bool = True
    augment: int = 0
    out_channels: int | None = None
    context: Part | None = None
    up: Part = Up
    leave: Part = Leave

    @nn.compact
    def __call__(self, x: Array, logsnr: Array, cond: Any = None, train: bool = False) -> Array:
        context, classes = self.sequence(cond, x.shape[0])
        embedding = self.hear(x, logsnr, cond, classes, self.augment)
        skips = self.descend(x, logsnr, embedding, train, context)
        h = self.middle(skips[-1], embedding, train, context)
        for level in reversed(range(len(self.multipliers))):
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self.call(self.block, level, f"up{level}_{i}_block", h, embedding, train)
                if level in self.attention and (self.attend_each or i == self.blocks):
                    h = self.look(f"up{level}_{i}", h, context=context)
            if level > 0:
                h = self.call(self.up, level, f"up{level}", h, embedding, train)
        return self.inline(self.leave(self.out_channels or x.shape[-1], self.dtype))(h, x)

    def sequence(self, cond: Any, batch: int) -> tuple[Context | None, int]:
        """What of the condition is a sequence, and how many classes are left for the embedding to hear."""
        if self.context is None:
            return None, self.classes
        part = self.inline(self.context(self.classes))
        return part(cond, batch), 0 if part.says_label else self.classes


def _remat(part: Part, *static: int) -> Part:
    if isinstance(part, functools.partial):
        return functools.partial(_remat(part.func, *static), **part.keywords)
    return nn.remat(part, static_argnums=static)
