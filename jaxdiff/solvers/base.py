"""What every solver is made of: the protocol, and the move along the line from one noise level to the next.

The probability flow is the line integral dx = x0 dalpha + eps dsigma along the curve of levels, so a first-order step from t to s
is x_s = alpha_s x0 + sigma_s eps. Noise is added by giving up part of eps for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.denoiser import Denoiser
from jaxdiff.level import Level, Prediction, logsnr, posterior_std

Array = jax.Array
Std = Callable[[Level, Level, Prediction], Array]
Noise = Callable[[Array, tuple[int, ...], Any], Array]

# Half the logsnr beyond which no float32 sample differs from pure noise or pure data.
LAMBDA_LIMIT = 15.0

# Gauss and Legendre's points and weights on [0, 1]: a cubic times exp(30 r) to float32's last digits.
POINTS, _SHARES = (np.asarray(a) for a in np.polynomial.legendre.leggauss(24))
POINTS, _SHARES = (POINTS + 1) / 2, _SHARES / 2


class Solver(NamedTuple):
    """`init(x) -> state`; `step(keys [B], state, t, s) -> (state, Prediction at t)`; `final(state, t) -> x0`.

    A state is a NamedTuple whose first field is `x`.
    """

    init: Callable[[Array], Any]
    step: Callable[[Array, Any, Level, Level], tuple[Any, Prediction]]
    final: Callable[[Any, Level], Array]


class State(NamedTuple):
    """The state of a solver that remembers nothing: the noisy sample, [B, ...]."""

    x: Array


def deterministic(t: Level, s: Level, prediction: Prediction) -> Array:
    """No noise: the standard deviation 0, of the levels' shape."""
    return jnp.zeros_like(s.sigma)


def dial(eta: Array, t: Level, s: Level, prediction: Prediction) -> Array:
    """The deviation eta * posterior_std: deterministic at eta = 0, the reverse process at 1. Source: DDIM eq. 16."""
    return eta * posterior_std(t, s)


def half(level: Level) -> Array:
    """Half the logsnr, lambda in the papers on DPM-Solver: log(alpha / sigma), of the level's shape."""
    return logsnr(level) / 2


def denoised(denoise: Denoiser, state: Any, t: Level) -> Array:
    """How a sampler ends: the denoiser's x0."""
    return denoise(state.x, t).x0


def fresh(noise: Noise, keys: Array, like: Array) -> Array:
    """Noise of the shape of `like` [B, ...], each sample's from its own key of `keys` [B]."""
    return jax.vmap(lambda key: noise(key, like.shape[1:], like.dtype))(keys)


def fold(keys: Array, n: int | Array) -> Array:
    """Other keys [B], for noise that is to be independent of what `keys` themselves draw."""
    return jax.vmap(lambda key: jax.random.fold_in(key, n))(keys)


def kept(std: Array, s: Level) -> Array:
    """How much of eps a step to s keeps where it adds noise of deviation `std`: sqrt(sigma_s^2 - std^2)."""
    return jnp.sqrt(jnp.maximum((s.sigma - std) * (s.sigma + std), 0))


def with_noise(noise: Noise, keys: Array, mean: Array, std: Array) -> Array:
    """mean + std * noise; `std` is [] or broadcasts with mean [B, ...]."""

    def noisy():
        return mean + std * fresh(noise, keys, mean)

    # Drawing noise to multiply it by zero would cost more than the rest of the step.
    return jax.lax.cond(jnp.any(std > 0), noisy, lambda: mean)


def move(std: Std, add: Std, noise: Noise, keys: Array, p: Prediction, t: Level, s: Level) -> Array:
    """The first-order step x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + add * noise. Source: DDIM eq. 12."""
    mean = s.alpha * p.x0 + kept(std(t, s, p), s) * p.eps
    return with_noise(noise, keys, mean, add(t, s, p))


def under_exponential(exponent: Array) -> Array:
    """Weights [..., 24] of `POINTS` that average a function of r over [0, 1] under exp(exponent r); they sum to one.

    They are what exponential integrators write as phi functions, without their cancellation at small exponents.
    """
    finite = jnp.where(jnp.isfinite(exponent), exponent, 0)[..., None]
    points, logs = (a.astype(finite.dtype).reshape((1,) * (finite.ndim - 1) + (-1,)) for a in (POINTS, np.log(_SHARES)))
    return jax.nn.softmax(finite * points + logs)


def langevin_step(noise: Noise, keys: Array, p: Prediction, x: Array, level: Level, size: Array) -> Array:
    """One step of Langevin dynamics at a level, x - size sigma eps + sqrt(2 size) sigma noise; its length is size sigma^2."""
    return x - size * level.sigma * p.eps + jnp.sqrt(2 * size) * level.sigma * fresh(noise, keys, x)
