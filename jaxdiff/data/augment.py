"""Augmentation that runs inside jit, on the accelerator."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.names import whole

# What a config's data.augment may name.
__all__ = ["crop", "edm"]

Array = jax.Array


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image of [B, H, W, C] mirrored left-right with probability 1/2; `key` is one `jax.random.key`."""
    return jnp.where(_mirrored(key, images), images[:, :, ::-1], images)


def either_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """One of [B, 1 or 2, H, W, C] for each: the first, or where there are two the second, mirrored, where `random_flip` mirrors."""
    first = images[:, 0]
    return first if images.shape[1] == 1 else jnp.where(_mirrored(key, first), images[:, 1], first)


def _mirrored(key: jax.Array, images: jax.Array) -> jax.Array:
    return jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))


def crop(pixels: int = 4) -> Callable[[Array, Array], tuple[Array, None]]:
    """Random crops: (key, float images [B, H, W, C]) -> (images, None), each moved by up to `pixels` along both axes.

    What comes in at the border is a reflection. The network is not told, so a diffusion model would learn to draw such images; a
    classifier overfits less. Raises ValueError for what is no whole number of pixels, at least 0. Source: He et al. 2016, section
    4.2 (4 pixels on CIFAR-10), whose border is zero.
    """
    if not whole(pixels, 0):
        raise ValueError(f"{pixels!r} is not a whole number of pixels, at least 0")
    return functools.partial(_crop, int(pixels))


def _crop(pixels: int, key: Array, images: Array) -> tuple[Array, None]:
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pixels + 1)
    one = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))
    return one(padded, corners), None


class Change(NamedTuple):
    """What is done to one image, in this order; each number is [], and zeros (direction: any) do nothing.

    Source: EDM table 6, a0 ... a7.
    """

    mirror: Array  # 1: left-right
    flip: Array  # 1: top-bottom
    scale: Array  # larger by 2^(0.2 scale)
    angle: Array  # turned about the centre, counter-clockwise, radians
    direction: Array  # of the stretch, counter-clockwise from the right, radians
    stretch: Array  # by 2^(0.2 stretch) along it and 2^(-0.2 stretch) across
    right: Array  # moved by this, in eighths of the width
    down: Array  # ... of the height


def edm(probability: float = 0.12) -> Callable[[Array, Array], tuple[Array, Array]]:
    """EDM's non-leaky augmentation: (key, float images [B, H, W, C]) -> (images, labels [B, 9]).

    Half of the images are mirrored; flip (for half of those drawn), scale, turn, stretch and move are each drawn with
    `probability`; at 0 nothing is, mirroring included. The label, (mirror, flip, scale, cos angle - 1, sin angle,
    stretch cos direction, stretch sin direction, right, down), is all zeros where an image was left as it was: a network that is
    told it and later asked for zeros draws images that were not changed. So `data.flip` is not wanted as well. An image sees its
    own fold of the key alone. Raises ValueError for what is no probability. Source: EDM appendix F.2, table 6 (12% on CIFAR-10).
    Its filter is a wavelet's, at twice the size; here pixels are read with Keys's cubic kernel, over a border that is reflected
    without its edge repeated, so that images that are only mirrored, flipped or moved by whole pixels keep their pixels exactly.
    Values may leave [-1, 1] a little.
    """
    if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 <= probability <= 1:
        raise ValueError(f"{probability!r} is not a probability, 0 to 1")
    return functools.partial(_edm, float(probability))


def _edm(probability: float, key: Array, images: Array) -> tuple[Array, Array]:
    def one(key: Array, image: Array) -> tuple[Array, Array]:
        change = draw(key, probability)
        return transform(image, change), label(change)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(images.shape[0]))
    return jax.vmap(one)(keys, images)


def draw(key: Array, probability: float) -> Change:
    """The changes of one image. Source: EDM table 6."""
    k_do, k_coin, k_normal, k_angle = jax.random.split(key, 4)
    flip, scale, angle, stretch, move = jax.random.bernoulli(k_do, probability, (5,)).astype(jnp.float32)
    heads = jax.random.bernoulli(k_coin, 0.5, (2,)).astype(jnp.float32)
    normal = jax.random.normal(k_normal, (4,))
    turn = jax.random.uniform(k_angle, (2,), minval=-math.pi, maxval=math.pi)
    mirror = heads[0] if probability > 0 else jnp.zeros(())
    right, down = move * normal[2:]
    return Change(mirror, flip * heads[1], scale * normal[0], angle * turn[0], turn[1], stretch * normal[1], right, down)


def label(c: Change) -> Array:
    """What a network is told of a change: [9]. Source: EDM table 6, "conditioning"."""
    along, across = c.stretch * jnp.cos(c.direction), c.stretch * jnp.sin(c.direction)
    return jnp.stack([c.mirror, c.flip, c.scale, jnp.cos(c.angle) - 1, jnp.sin(c.angle), along, across, c.right, c.down])


def transform(image: Array, c: Change) -> Array:
    """One image [H, W, C] changed; where `c` says nothing, its very bits."""
    image = jnp.where(c.mirror > 0, image[:, ::-1], image)
    image = jnp.where(c.flip > 0, image[::-1], image)
    height, width = image.shape[:2]
    # From each pixel of the result, counted from the centre with y upwards, back to where it came from: the last change first.
    x = jnp.arange(width) - (width - 1) / 2 - c.right * (width / 8)
    y = (height - 1) / 2 - jnp.arange(height) + c.down * (height / 8)
    x, y = jnp.meshgrid(x, y)
    x, y = _turned(x, y, -c.direction)
    x, y = _turned(x * jnp.exp2(-0.2 * c.stretch), y * jnp.exp2(0.2 * c.stretch), c.direction)
    x, y = _turned(x, y, -c.angle)
    x, y = x * jnp.exp2(-0.2 * c.scale), y * jnp.exp2(-0.2 * c.scale)
    moved = (c.scale != 0) | (c.angle != 0) | (c.stretch != 0) | (c.right != 0) | (c.down != 0)
    return jnp.where(moved, _read(image, (height - 1) / 2 - y, x + (width - 1) / 2), image)


def _turned(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def _read(image: Array, row: Array, column: Array) -> Array:
    """The image [H, W, C] between its pixels, at `row` and `column` [H, W]."""
    rows, row_weights = _taps(row, image.shape[0])
    columns, column_weights = _taps(column, image.shape[1])
    near = image[rows[..., :, None], columns[..., None, :]]  # [H, W, 4, 4, C]
    weights = row_weights[..., :, None] * column_weights[..., None, :]
    return jnp.einsum("hwijc,hwij->hwc", near, weights.astype(image.dtype), precision="highest")


def _taps(position: Array, n: int) -> tuple[Array, Array]:
    """The four pixels of 0 ... n - 1 about a position, and their weights. Source: Keys 1981, eq. 15 (a = -1/2)."""
    floor = jnp.floor(position)
    f = position - floor
    weights = [
        ((-0.5 * f + 1.0) * f - 0.5) * f,
        (1.5 * f - 2.5) * f * f + 1.0,
        ((-1.5 * f + 2.0) * f + 0.5) * f,
        (0.5 * f - 0.5) * f * f,
    ]
    period = max(2 * (n - 1), 1)
    index = jnp.mod(floor.astype(jnp.int32)[..., None] + jnp.arange(-1, 3).reshape(*(1,) * floor.ndim, 4), period)
    return jnp.minimum(index, period - index), jnp.stack(weights, axis=-1)
