"""Schedules, t -> Level: which curve in the (alpha, sigma) plane the noise follows. t is a label; 0 is data.

Each works on arrays of any shape, in the precision of the arrays JAX makes (float64 under x64). None returns a
negative alpha: float32 cos(pi/2) is -4e-8, whose logsnr would be NaN.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff.level import Level

Array = jax.Array
Schedule = Callable[[Array], Level]

__all__ = ["cosine", "edm", "linear_beta", "straight"]


def cosine(t: Array) -> Level:
    """The circle alpha = cos(pi t / 2), sigma = sin(pi t / 2) for t in [0, 1]; alpha is exactly 0 at t = 1.

    Source: Salimans and Ho 2022, section 2, the continuous form of Nichol and Dhariwal's cosine schedule.
    """
    t = jnp.asarray(t)
    return Level(jnp.sin(jnp.pi / 2 * (1 - t)), jnp.sin(jnp.pi / 2 * t))


def straight(t: Array) -> Level:
    """The straight line alpha = 1 - t, sigma = t for t in [0, 1]: flow matching, rectified flow, SiT.

    Source: Lipman et al. 2023, eq. 22 with sigma_min = 0, time reversed; Liu et al. 2023, eq. 1.
    """
    t = jnp.asarray(t)
    return Level(1 - t, t)


def edm(sigma: Array) -> Level:
    """Variance exploding, labelled by its own noise: alpha = 1, sigma = t for any t >= 0.

    Source: Karras et al. 2022 (EDM), table 1, column "Ours": sigma(t) = t, s(t) = 1.
    """
    sigma = jnp.asarray(sigma)
    return Level(jnp.ones_like(sigma), sigma)


def linear_beta(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """DDPM's schedule: betas linear from `first` to `last` over `steps` steps, on t in [0, 1], the table's row i at t = i / steps.

    Between the rows log alpha_bar is interpolated. Source: DDPM section 4. Raises ValueError for steps < 1 or betas outside
    0 < first <= last < 1.
    """
    if steps < 1 or not 0 < first <= last < 1:
        raise ValueError(f"linear_beta needs steps >= 1 and 0 < first <= last < 1, got {steps=}, {first=}, {last=}")
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-np.linspace(first, last, steps)))])
    return Partial(_table, log_alpha_bar)


def _table(log_alpha_bar: Array, t: Array) -> Level:
    t = jnp.asarray(t) * 1.0
    rows = jnp.arange(len(log_alpha_bar), dtype=t.dtype)
    # The logarithm is interpolated, and sigma comes from expm1: near t = 0, 1 - alpha_bar has no digits in float32.
    log = jnp.interp(t * (len(log_alpha_bar) - 1), rows, jnp.asarray(log_alpha_bar, t.dtype))
    return Level(jnp.exp(log / 2), jnp.sqrt(-jnp.expm1(log)))
