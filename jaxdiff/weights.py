"""Weights of the loss by noise level: (level, rate, target) -> the factor on the squared error of the network's own target.

With x fixed, an error in one target is an error in every other: error_y = (det / alpha) error_eps = -(det / sigma) error_x0, where
det = alpha * b - sigma * a is the target's determinant. So a weight that a paper gives for eps or for x0 is one row here for all.

`rate` is one over the density of the log signal-to-noise ratio as training draws it; only the weights of the variational bound read
it. Everything has the level's shape, [] or [B, 1, ..., 1].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxdiff.level import Level, logsnr
from jaxdiff.schedules import Schedule
from jaxdiff.targets import Target

Array = jax.Array
Weight = Callable[[Level, Array, Target], Array]

__all__ = ["edm", "elbo", "min_snr", "p2", "sigmoid", "simple", "unit"]


def rate(schedule: Schedule, density: Callable[[Array], Array], t: Array) -> Array:
    """-dlogsnr/dt / density(t), of t's shape: one over the density that times of `density` give the log signal-to-noise ratio.

    It is inf where alpha or sigma is 0, for there the ratio itself is infinite. At a row of a table, where the slope jumps, it has
    one of the two neighbours' slopes. `density` is a `Draw`'s. Source: Kingma and Gao 2023, eq. 6 (importance sampling of lambda).
    """
    t = jnp.asarray(t) * 1.0
    _, slope = jax.jvp(lambda t: logsnr(schedule(t)), (t,), (jnp.ones_like(t),))
    return -slope / density(t)


def unit(level: Level, rate: Array, target: Target) -> Array:
    """1 in the space of the network's own target, whichever that is."""
    return jnp.ones_like(level.sigma)


def simple(level: Level, rate: Array, target: Target) -> Array:
    """1 on the error of eps. Source: DDPM eq. 14."""
    return _of_eps(level, target)


def elbo(level: Level, rate: Array, target: Target) -> Array:
    """rate / 2 on the error of eps, whose mean is the diffusion part of the variational bound, in nats where errors are summed.

    Source: VDM eq. 17 (any times), Kingma and Gao 2023, eq. 4 with w = 1.
    """
    return _product(rate / 2, _of_eps(level, target))


def sigmoid(bias: float = 0.0) -> Weight:
    """rate / 2 * sigmoid(bias - logsnr) on the error of eps: the bound with little weight on what the eye does not see.

    Source: Kingma and Gao 2023, section 4 and table 1; Hoogeboom et al. 2024 (SiD2), section 3.1.
    """
    return Partial(_sigmoid, bias)


def _sigmoid(bias: Array, level: Level, rate: Array, target: Target) -> Array:
    return _product(rate / 2, jax.nn.sigmoid(bias - logsnr(level)) * _of_eps(level, target))


def min_snr(gamma: float = 5.0) -> Weight:
    """min(snr, gamma) / snr on the error of eps, so min(snr, gamma) on that of x0. Raises ValueError for gamma <= 0.

    Source: Hang et al. 2023, section 3.4.
    """
    if not gamma > 0:
        raise ValueError(f"min_snr needs gamma > 0, got {gamma=}")
    return Partial(_min_snr, gamma)


def _min_snr(gamma: Array, level: Level, rate: Array, target: Target) -> Array:
    # No quotient of two infinities: 1 on eps, or gamma on x0, whichever is less.
    return jnp.minimum(_of_eps(level, target), gamma * _of_x0(level, target))


def p2(gamma: float = 1.0, k: float = 1.0) -> Weight:
    """1 / (k + snr)^gamma on the error of eps. Raises ValueError for gamma < 0 or k <= 0. Source: Choi et al. 2022 (P2), eq. 8."""
    if not (gamma >= 0 and k > 0):
        raise ValueError(f"p2 needs gamma >= 0 and k > 0, got {gamma=}, {k=}")
    return Partial(_p2, gamma, k)


def _p2(gamma: Array, k: Array, level: Level, rate: Array, target: Target) -> Array:
    alpha2, sigma2 = jnp.square(level.alpha), jnp.square(level.sigma)
    return (sigma2 / (k * sigma2 + alpha2)) ** gamma * _of_eps(level, target)


def edm(data_std: float = 0.5) -> Weight:
    """(sigma^2 + data_std^2) / (sigma data_std)^2 on the error of x0 at alpha = 1, and 1 on that of EDM's own target everywhere.

    At any level sigma / alpha stands for sigma: 1 + (sigma / (alpha data_std))^2 on the error of eps. Source: EDM table 1, row
    "Loss weighting". Raises ValueError for data_std <= 0.
    """
    if not data_std > 0:
        raise ValueError(f"edm needs data_std > 0, got {data_std=}")
    return Partial(_edm, data_std)


def _edm(data_std: Array, level: Level, rate: Array, target: Target) -> Array:
    return _of_eps(level, target) + _of_x0(level, target) / data_std**2


def _of_eps(level: Level, target: Target) -> Array:
    """What a weight 1 on the error of eps is on the target's: (alpha / det)^2."""
    a, b = target(level)
    det = level.alpha * b - level.sigma * a
    # At a = 0 the quotient is 1 / b, also where alpha, and with it det, is 0.
    none = a == 0
    return jnp.square(jnp.where(none, 1 / jnp.where(none, b, 1), level.alpha / jnp.where(none, 1, det)))


def _of_x0(level: Level, target: Target) -> Array:
    """What a weight 1 on the error of x0 is on the target's: (sigma / det)^2."""
    a, b = target(level)
    det = level.alpha * b - level.sigma * a
    none = b == 0
    return jnp.square(jnp.where(none, 1 / jnp.where(none, a, 1), level.sigma / jnp.where(none, 1, det)))


def _product(rate: Array, share: Array) -> Array:
    # At alpha = 0 the rate is inf, and what it multiplies is 0 for every target but eps.
    return jnp.where(share == 0, 0, rate * jnp.where(share == 0, 1, share))
