"""Noise levels and predictions: every method is a point on the plane curve x = alpha * x0 + sigma * eps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Level(NamedTuple):
    """A noise level: how much data (`alpha`) and how much noise (`sigma`) a noisy sample holds.

    Both fields have one shape: [] for one level, [N] for a grid, [B, 1, ..., 1] for one level a sample.
    """

    alpha: Array
    sigma: Array


class Prediction(NamedTuple):
    """What a denoiser makes of x: the data `x0` and noise `eps`, [B, ...] each, with alpha * x0 + sigma * eps == x.

    `aux` is whatever else the network says, such as a learned variance; None where it says nothing.
    """

    x0: Array
    eps: Array
    aux: Any = None


def logsnr(level: Level) -> Array:
    """The log signal-to-noise ratio log(alpha^2 / sigma^2), of the level's shape; -inf at alpha = 0, inf at sigma = 0.

    Source: Kingma et al. 2021 (VDM), eq. 3.
    """
    return 2 * (jnp.log(level.alpha) - jnp.log(level.sigma))


def diffuse(level: Level, x0: Array, eps: Array) -> Array:
    """The noisy sample alpha * x0 + sigma * eps, [B, ...]; the level is [] or [B, 1, ..., 1].

    Source: Ho et al. 2020 (DDPM), eq. 4, for any schedule.
    """
    return level.alpha * x0 + level.sigma * eps


def between(t: Level, s: Level, r: float | Array) -> Level:
    """The level at the share r of the way from t to s, geometric in alpha and in sigma, so that the logsnr is linear in r.

    Of the shape that the levels and r broadcast to. Source: Lu et al. 2022 (DPM-Solver), algorithm 1, of its midpoint in lambda.
    """
    return Level(*(a ** (1 - r) * b**r for a, b in zip(t, s)))


def with_x0(x: Array, level: Level, x0: Array, aux: Any = None) -> Prediction:
    """The prediction at x [B, ...] that says x0, its eps from alpha * x0 + sigma * eps == x; sigma must be positive."""
    return Prediction(x0, (x - level.alpha * x0) / level.sigma, aux)


def posterior_std(t: Level, s: Level, prediction: Prediction | None = None) -> Array:
    """The standard deviation of q(x_s | x_t, x0) for s less noisy than t, of the levels' shape: DDPM's "small" one.

    Source: DDPM eq. 7, the square root of beta tilde. The prediction is not used; learned deviations need it.
    """
    return _k(t, s) * s.sigma


def beta_std(t: Level, s: Level, prediction: Prediction | None = None) -> Array:
    """The standard deviation of the forward step q(x_t | x_s), sqrt(beta) under variance preservation: DDPM's "large" one.

    Source: DDPM section 3.2. The levels' shape; the prediction is not used.
    """
    return _k(t, s) * t.sigma


def learned_std(t: Level, s: Level, prediction: Prediction) -> Array:
    """A deviation between `posterior_std` and `beta_std`, in their logarithms, at the place (aux + 1) / 2; [B, ...].

    Source: Nichol and Dhariwal 2021 (Improved DDPM), eq. 15. The network's `aux` is -1 for the small one and 1 for the large;
    raises ValueError where it has none.
    """
    if prediction.aux is None:
        raise ValueError("this network says nothing of its variance; a model trained with process.loss hybrid or vlb does")
    share = (prediction.aux + 1) / 2
    return _k(t, s) * jnp.exp((1 - share) * jnp.log(s.sigma) + share * jnp.log(t.sigma))


def _k(t: Level, s: Level) -> Array:
    # expm1 keeps the digits that 1 - SNR_t / SNR_s would lose between neighbours of a 1000-step table.
    return jnp.sqrt(-jnp.expm1(jnp.minimum(logsnr(t) - logsnr(s), 0)))
