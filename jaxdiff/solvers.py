"""Solvers: how to go from one noise level to the next. Each row below is one function, `line`, with other arguments.

The probability flow is the line integral dx = x0 dalpha + eps dsigma along the curve of levels, so a first-order step from t to s
is x_s = alpha_s x0 + sigma_s eps. Noise is added by giving up part of eps for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxdiff.denoiser import Denoiser, partial
from jaxdiff.level import Level, Prediction, beta_std, learned_std, logsnr, posterior_std

Array = jax.Array
Std = Callable[[Level, Level, Prediction], Array]
Noise = Callable[[Array, tuple[int, ...], Any], Array]

__all__ = ["ddim", "ddpm", "ddpm_large", "ddpm_learned", "dpmpp_2m", "heun", "line"]


class Solver(NamedTuple):
    """`init(x) -> state`; `step(keys [B], state, t, s) -> (state, Prediction at t)`; `final(state, t) -> x0`.

    A state is a NamedTuple whose first field is `x`.
    """

    init: Callable[[Array], Any]
    step: Callable[[Array, Any, Level, Level], tuple[Any, Prediction]]
    final: Callable[[Any, Level], Array]


class State(NamedTuple):
    """The state of a one-step solver: the noisy sample, [B, ...]."""

    x: Array


class Multistep(NamedTuple):
    """The state of a two-step solver: the noisy sample, the x0 of the step before, and that step's half-logsnr (NaN: none yet)."""

    x: Array
    x0: Array
    lam: Array


def deterministic(t: Level, s: Level, prediction: Prediction) -> Array:
    """No noise: the standard deviation 0, of the levels' shape."""
    return jnp.zeros_like(s.sigma)


def ddpm(denoise: Denoiser, std: Std = posterior_std, noise: Noise = jax.random.normal) -> Solver:
    """Ancestral sampling: the posterior's mean, and noise of deviation `std`, `posterior_std` or `beta_std`.

    Source: DDPM algorithm 2; section 3.2 for the two deviations.
    """
    return line(denoise, 1, posterior_std, std, noise)


def ddpm_large(denoise: Denoiser, noise: Noise = jax.random.normal) -> Solver:
    """`ddpm` with the large deviation, sqrt(beta): what DDPM's own CIFAR-10 samples used. Source: DDPM section 3.2."""
    return ddpm(denoise, beta_std, noise)


def ddpm_learned(denoise: Denoiser, noise: Noise = jax.random.normal) -> Solver:
    """`ddpm` with the deviation that the network has learned, for models trained on `hybrid` or `vlb`.

    Source: Nichol and Dhariwal 2021 (Improved DDPM), eq. 15.
    """
    return ddpm(denoise, learned_std, noise)


def ddim(denoise: Denoiser, eta: float | Array = 0.0, noise: Noise = jax.random.normal) -> Solver:
    """DDIM, deterministic at eta = 0 and the DDPM posterior at eta = 1; on the straight path, flow matching's Euler.

    Source: DDIM eqs. 12 and 16.
    """
    return line(denoise, 1, Partial(_dial, jnp.asarray(eta, float)), noise=noise)


def dpmpp_2m(denoise: Denoiser, eta: float | Array = 0.0, noise: Noise = jax.random.normal) -> Solver:
    """DPM-Solver++(2M), second order from one evaluation a step; eta = 1 is its SDE form.

    Started at alpha = 0 exactly, its first two steps are of first order. Source: Lu et al. 2022 (DPM-Solver++), algorithm 2, and
    SDE-DPM-Solver++(2M) of the same paper.
    """
    return line(denoise, 2, Partial(_dial, jnp.asarray(eta, float)), noise=noise)


def _dial(eta: Array, t: Level, s: Level, prediction: Prediction) -> Array:
    return eta * posterior_std(t, s)


def line(
    denoise: Denoiser,
    order: int = 1,
    std: Std = deterministic,
    add: Std | None = None,
    noise: Noise = jax.random.normal,
) -> Solver:
    """The solver x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + add * noise, with x0 extrapolated from two steps at order 2.

    `std(t, s, prediction)` shapes the mean and `add(t, s, prediction)` (the same unless given) is the noise really added;
    `noise(key, shape, dtype)` draws for one sample. Source: DDIM eq. 12; DPM-Solver++ algorithm 2 for order 2. Raises
    ValueError for another order.
    """
    parts = (partial(denoise), partial(std), partial(std if add is None else add), partial(noise))
    if order == 1:
        return Solver(Partial(State), Partial(_first_order, *parts), Partial(_denoised, parts[0]))
    if order == 2:
        return Solver(Partial(_no_history), Partial(_second_order, *parts), Partial(_denoised, parts[0]))
    raise ValueError(f"line has order 1 or 2, got {order}")


def _denoised(denoise: Denoiser, state: Any, t: Level) -> Array:
    return denoise(state.x, t).x0


def _first_order(denoise, std, add, noise, keys, state, t, s):
    p = denoise(state.x, t)
    return State(_move(std, add, noise, keys, p, t, s)), p


def _no_history(x: Array) -> Multistep:
    return Multistep(x, jnp.zeros_like(x), jnp.full((), jnp.nan, x.dtype))


def _second_order(denoise, std, add, noise, keys, state, t, s):
    p = denoise(state.x, t)
    lam, lam_s = logsnr(t) / 2, logsnr(s) / 2
    # h / (2 h_before); zero, hence first order, where there is no step before and where one of them started at alpha = 0.
    ratio = (lam_s - lam) / (lam - state.lam) / 2
    ratio = jnp.where(jnp.isfinite(ratio), ratio, 0)
    x0 = p.x0 + ratio * (p.x0 - state.x0)
    ahead = Prediction(x0, (state.x - t.alpha * x0) / t.sigma, p.aux)
    return Multistep(_move(std, add, noise, keys, ahead, t, s), p.x0, lam), p


def _move(std, add, noise, keys, p, t, s):
    d = std(t, s, p)
    keep = jnp.sqrt(jnp.maximum((s.sigma - d) * (s.sigma + d), 0))
    mean, a = s.alpha * p.x0 + keep * p.eps, add(t, s, p)

    def noisy():
        return mean + a * jax.vmap(lambda key: noise(key, mean.shape[1:], mean.dtype))(keys)

    # Drawing noise to multiply it by zero would cost more than the rest of the step.
    return jax.lax.cond(jnp.any(a > 0), noisy, lambda: mean)


def heun(denoise: Denoiser) -> Solver:
    """The trapezoid rule of the line integral, second order from two evaluations a step. Source: EDM algorithm 1."""
    denoise = partial(denoise)
    return Solver(Partial(State), Partial(_trapezoid, denoise), Partial(_denoised, denoise))


def _trapezoid(denoise, keys, state, t, s):
    p = denoise(state.x, t)
    q = denoise(s.alpha * p.x0 + s.sigma * p.eps, s)
    x0, eps = (p.x0 + q.x0) / 2, (p.eps + q.eps) / 2
    return State(state.x + (s.alpha - t.alpha) * x0 + (s.sigma - t.sigma) * eps), p
