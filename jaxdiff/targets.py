"""Targets, Level -> (a, b): the network regresses y = a * x0 + b * eps, one row of numbers a target.

With x = alpha * x0 + sigma * eps that is a 2x2 system; its determinant, alpha * b - sigma * a, is zero where the target cannot
tell the data: eps at alpha = 0, x0 at sigma = 0; v, flow and edm nowhere.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxdiff.level import Level, Prediction

Array = jax.Array
Target = Callable[[Level], tuple[Array, Array]]

__all__ = ["edm", "eps", "flow", "v", "x0"]


def eps(level: Level) -> tuple[Array, Array]:
    """The noise itself, (0, 1). Source: DDPM eq. 11."""
    return jnp.zeros_like(level.alpha), jnp.ones_like(level.sigma)


def x0(level: Level) -> tuple[Array, Array]:
    """The data itself, (1, 0). Source: DDPM section 3.2."""
    return jnp.ones_like(level.alpha), jnp.zeros_like(level.sigma)


def v(level: Level) -> tuple[Array, Array]:
    """The velocity along the circle, (-sigma, alpha) / hypot(alpha, sigma). Source: Salimans and Ho 2022, appendix D."""
    norm = jnp.hypot(level.alpha, level.sigma)
    return -level.sigma / norm, level.alpha / norm


def flow(level: Level) -> tuple[Array, Array]:
    """The velocity along the straight path, eps - x0, (-1, 1). Source: Liu et al. 2023, eq. 1, time reversed."""
    return -jnp.ones_like(level.alpha), jnp.ones_like(level.sigma)


def edm(data_std: float = 0.5) -> Target:
    """EDM's F: (sigma / (data_std q), -data_std alpha / q), q = hypot(sigma, data_std alpha), of unit variance at every level.

    Source: EDM eq. 7 and table 1 (c_skip, c_out) solved for F.
    """
    return Partial(_edm, data_std)


def _edm(data_std: Array, level: Level) -> tuple[Array, Array]:
    q = jnp.hypot(level.sigma, data_std * level.alpha)
    return level.sigma / (data_std * q), -data_std * level.alpha / q


def regress(target: Target, level: Level, x0: Array, eps: Array) -> Array:
    """What the network should say, y = a * x0 + b * eps, [B, ...]."""
    a, b = target(level)
    return a * x0 + b * eps


def determinant(target: Target, level: Level) -> Array:
    """alpha * b - sigma * a, of the level's shape: zero where the target is singular."""
    a, b = target(level)
    return level.alpha * b - level.sigma * a


def invert(target: Target, level: Level, x: Array, y: Array) -> Prediction:
    """The x0 and eps that give back x and y, [B, ...]: the solution of [alpha sigma; a b] [x0; eps] = [x; y]."""
    a, b = target(level)
    det = level.alpha * b - level.sigma * a
    return Prediction((b * x - level.sigma * y) / det, (level.alpha * y - a * x) / det)
