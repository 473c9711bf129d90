"""Decoding in tiles: the memory that a decoder takes is that of one tile, however large the picture."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Decoder = Callable[[Array], Array]


def tiled(decode: Decoder, tile: int, overlap: int) -> Decoder:
    """A decoder [B, h, w, c] -> float [B, f h, f w, C] that calls `decode` on squares of `tile` latents and blends what it says.

    Neighbours share `overlap` latents or more, across which the weight goes linearly from one to the other. Where all that a pixel
    depends on lies within its tiles, the result is the whole decoder's; what looks further, such as the statistics of a norm or
    attention, sees a tile alone. A latent no larger than a tile along both axes is decoded whole. Raises ValueError for an overlap
    that is negative or not below `tile`.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap={overlap} is out of range; allowed: 0 to {tile - 1}, below tile={tile}")

    def whole(z: Array) -> Array:
        (_, *size, _) = z.shape
        if max(size) <= tile:
            return decode(z)
        edges = tuple(min(n, tile) for n in size)
        begin = [starts(n, edge, overlap) for n, edge in zip(size, edges)]
        piece = jax.eval_shape(decode, jax.ShapeDtypeStruct((len(z), *edges, z.shape[-1]), z.dtype))
        factor = piece.shape[1] // edges[0]
        rows, columns = (weights(at, n, edge, overlap, factor) for at, n, edge in zip(begin, size, edges))
        canvas = jnp.zeros((len(z), *(factor * n for n in size), piece.shape[-1]), piece.dtype)

        def add(canvas: Array, index: Array) -> tuple[Array, None]:
            i, j = index
            top, left = jnp.asarray(begin[0])[i], jnp.asarray(begin[1])[j]
            out = decode(jax.lax.dynamic_slice(z, (0, top, left, 0), (len(z), *edges, z.shape[-1])))
            weight = jnp.asarray(rows)[i][:, None, None] * jnp.asarray(columns)[j][None, :, None]
            here = 0, factor * top, factor * left, 0
            there = jax.lax.dynamic_slice(canvas, here, out.shape)
            return jax.lax.dynamic_update_slice(canvas, there + weight[None].astype(out.dtype) * out, here), None

        each = jnp.stack(jnp.meshgrid(*(jnp.arange(len(at)) for at in begin), indexing="ij"), -1).reshape(-1, 2)
        return jax.lax.scan(add, canvas, each)[0]

    return whole


def starts(size: int, tile: int, overlap: int) -> np.ndarray:
    """Where the tiles along one axis begin, int [n]: as few as share `overlap` at least, spread evenly from end to end."""
    count = math.ceil((size - overlap) / (tile - overlap)) if size > tile else 1
    return np.round(np.linspace(0, size - tile, count)).astype(np.int32)


def weights(begin: np.ndarray, size: int, tile: int, overlap: int, factor: int) -> np.ndarray:
    """How much each tile's pixels count along one axis, float32 [n, factor tile]: at every pixel they add up to 1.

    A ramp over the overlap on either side, but for the picture's own edges.
    """
    ramp = np.minimum((np.arange(factor * tile) + 0.5) / max(factor * overlap, 1), 1)
    ramps = [(ramp if at else 1) * (ramp[::-1] if at + tile < size else 1) * np.ones(factor * tile) for at in begin]
    total = np.zeros(factor * size)
    spans = [slice(factor * at, factor * (at + tile)) for at in begin]
    for span, each in zip(spans, ramps):
        total[span] += each
    return np.stack([each / total[span] for span, each in zip(spans, ramps)]).astype(np.float32)
