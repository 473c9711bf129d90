"""A codebook: vectors quantised to the nearest of K codes, how gradients pass, and codes as moving averages of what falls to them.

The codebook is float32 [K, D] and z [B, *space, D]. Source: van den Oord et al. 2017 (VQ-VAE), section 3 and appendix A.1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Usage(NamedTuple):
    """What falls to each code: averaged `counts` [K] and `sums` [K, D] of vectors, the same of the batch so far, and candidates.

    `candidates` [K, D] are vectors of the batch drawn at random, each as likely, for codes that are revived.
    """

    counts: Array
    sums: Array
    batch_counts: Array
    batch_sums: Array
    candidates: Array


def nearest(codebook: Array, z: Array) -> Array:
    """Which code is nearest to each vector, int32 [B, *space]; of codes that are equally near the first."""
    # |z - e|^2 without |z|^2, which is the same for all codes: no array of [vectors, K, D] is made.
    flat = z.reshape(-1, z.shape[-1]).astype(jnp.float32)
    along = jnp.matmul(flat, codebook.T, precision=jax.lax.Precision.HIGHEST)
    half = jnp.sum(codebook**2, axis=-1) / 2
    return jnp.argmin(half[None] - along, axis=-1).astype(jnp.int32).reshape(z.shape[:-1])


def quantise(codebook: Array, z: Array) -> tuple[Array, Array]:
    """(the nearest codes, of z's shape; which they are, int32 [B, *space])."""
    indices = nearest(codebook, z)
    return codebook[indices], indices


def straight_through(z: Array, z_q: Array) -> Array:
    """z_q, whose gradient goes to z as if nothing had been quantised."""
    return z + jax.lax.stop_gradient(z_q - z)


def commitment(z: Array, z_q: Array) -> Array:
    """The mean square by which z misses its codes, [B], which moves z alone. Source: VQ-VAE eq. 3, third term."""
    return _mean_square(z - jax.lax.stop_gradient(z_q))


def pull(z: Array, z_q: Array) -> Array:
    """The mean square by which the codes miss z, [B], which moves the codes alone. Source: VQ-VAE eq. 3, second term."""
    return _mean_square(jax.lax.stop_gradient(z) - z_q)


def start(codes: int, channels: int) -> Usage:
    """The usage before anything was seen."""
    vectors = jnp.zeros((codes, channels), jnp.float32)
    return Usage(vectors[:, 0], vectors, vectors[:, 0], vectors, vectors)


def tally(usage: Usage, z: Array, indices: Array, key: Array) -> Usage:
    """Adds a batch, or a piece of one, to the batch's counts and sums; its vectors take their share of the candidates.

    A batch in pieces gives the counts and sums of the whole, and candidates that are drawn alike from all of it.
    """
    codes, channels = usage.candidates.shape
    flat = jax.lax.stop_gradient(z).reshape(-1, channels).astype(jnp.float32)
    which = indices.reshape(-1)
    seen = usage.batch_counts.sum()
    draw, turn = jax.random.split(key)
    drawn = flat[jax.random.randint(draw, (codes,), 0, len(flat))]
    takes = jax.random.uniform(turn, (codes,)) * (seen + len(flat)) < len(flat)  # reservoir sampling, by the piece
    return usage._replace(
        batch_counts=usage.batch_counts.at[which].add(1.0),
        batch_sums=usage.batch_sums.at[which].add(flat),
        candidates=jnp.where(takes[:, None], drawn, usage.candidates),
    )


def average(usage: Usage, codebook: Array, decay: float) -> tuple[Usage, Array]:
    """Takes the batch into the averages and clears it: (usage, codebook), a code being the mean of what fell to it.

    Both averages start at 0, so that their ratio has no bias; a code that the batch did not use stays as it is. `decay` is at least
    0 and below 1. Source: VQ-VAE eq. 6 to 8.
    """
    counts = decay * usage.counts + (1 - decay) * usage.batch_counts
    sums = decay * usage.sums + (1 - decay) * usage.batch_sums
    # Elsewhere both have only shrunk by the same factor: their ratio would be the old code, until they are too small for float32.
    moved = (usage.batch_counts > 0)[:, None]
    codebook = jnp.where(moved, sums / jnp.where(moved, counts[:, None], 1.0), codebook)
    return Usage(counts, sums, jnp.zeros_like(counts), jnp.zeros_like(sums), usage.candidates), codebook


def revive(key: Array, usage: Usage, codebook: Array, least: float) -> tuple[Usage, Array]:
    """Moves each code whose averaged share of use is below `least` of 1/K to a candidate, as if it had been used as the mean code.

    No two codes take the same candidate, and those that are far from every code are the likelier, in proportion to the square of
    the distance: else most would go where there are codes already. Source of the proportion: Arthur and Vassilvitskii 2007
    (k-means++), section 2.2.
    """
    mean = usage.counts.mean()
    dead = usage.counts < least * mean
    near, _ = quantise(codebook, usage.candidates)
    far = jnp.sum((usage.candidates - near) ** 2, axis=-1)
    order = jnp.argsort(-(jnp.log(far) + jax.random.gumbel(key, far.shape)))  # a weighted draw without replacement
    fresh = usage.candidates[order][jnp.cumsum(dead) - 1]  # the first dead code takes the first, and so on
    sums = jnp.where(dead[:, None], mean * fresh, usage.sums)
    usage = usage._replace(counts=jnp.where(dead, mean, usage.counts), sums=sums)
    return usage, jnp.where(dead[:, None], fresh, codebook)


def perplexity(counts: Array) -> Array:
    """The exponential of the entropy of use: K where all K codes are used alike, 1 where one is used alone."""
    shares = counts / jnp.maximum(counts.sum(), jnp.finfo(jnp.float32).tiny)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares, shares)))


def used(counts: Array) -> Array:
    """The share of codes that were used at all, 0 to 1."""
    return jnp.mean(counts > 0)


def _mean_square(difference: Array) -> Array:
    return jnp.mean(difference**2, axis=tuple(range(1, difference.ndim)))
