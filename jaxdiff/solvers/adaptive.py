"""A solver that chooses its own steps, each sample its own, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxdiff.checks import positive, whole
from jaxdiff.denoiser import Denoiser, partial
from jaxdiff.level import Level, between, with_x0
from jaxdiff.solvers.base import LAMBDA_LIMIT, POINTS, Solver, denoised, half, under_exponential

Array = jax.Array


class Adapted(NamedTuple):
    """The state: the noisy sample, the length of each sample's next step in half-logsnr, and its evaluations, [B] each."""

    x: Array
    length: Array
    evaluations: Array


def adaptive(
    denoise: Denoiser, rtol: float | Array = 0.05, atol: float | Array = 0.0078, first: float | Array = 0.05, most: int = 1000
) -> Solver:
    """DPM-Solver++ of order 3 with an embedded one of order 2: each sample takes the steps that its own error allows.

    A step's error is the root mean square, over a sample, of the two results' difference over max(atol, rtol |x|); `first` is the
    first step in half-logsnr, `most` the steps that an interval of the grid may take, after which one last step ends it. A grid of
    two levels leaves all to the solver. A sample's steps follow its own error, which float32 rounds otherwise in another batch:
    there it may differ by a few grey values. Source: Lu et al. 2022 (DPM-Solver), appendix on adaptive step sizes, in x0
    (DPM-Solver++).
    """
    denoise = partial(denoise)
    step = Partial(_adaptive, denoise, positive("rtol", rtol), positive("atol", atol), jnp.int32(whole("most", most, 1)))
    return Solver(Partial(_untried, positive("first", first)), step, Partial(denoised, denoise))


def _untried(first: Array, x: Array) -> Adapted:
    return Adapted(x, jnp.full((len(x),), first, x.dtype), jnp.zeros((len(x),), jnp.int32))


def _adaptive(denoise, rtol, atol, most, keys, state, t, s):
    # At alpha = 0 half-logsnr is infinite; as little alpha as float32 does not see in x begins the same path.
    t = Level(jnp.maximum(t.alpha, t.sigma * jnp.exp(-LAMBDA_LIMIT)), t.sigma)
    whole, each = half(s) - half(t), (-1, *(1,) * (state.x.ndim - 1))

    def going(carry):
        _, done, _, _, tries = carry
        return (done < 1).any() & (tries < most + 1)

    def attempt(carry):
        x, done, length, evaluations, tries = carry
        active = done < 1
        share = jnp.where(tries < most, jnp.minimum(length / jnp.abs(whole), 1 - done), 1 - done)
        goal = jnp.where(share >= 1 - done, 1.0, done + share)
        a, b = (between(t, s, place.reshape(each)) for place in (done, goal))
        low, high = _pair(denoise, x, a, b)
        error = _error(x, low, high, rtol, atol)
        accept = active & ((error <= 1) | (tries >= most))
        factor = jnp.where(jnp.isfinite(error), jnp.clip(0.9 * jnp.maximum(error, 1e-10) ** (-1 / 3), 0.2, 5), 0.2)
        x = jnp.where(accept.reshape(each), high, x)
        # What was cut to reach the end says nothing against longer steps, so it may only lengthen.
        tried = share * jnp.abs(whole) * factor
        length = jnp.where(active, jnp.where(accept & (goal == 1), jnp.maximum(tried, length), tried), length)
        return x, jnp.where(accept, goal, done), length, evaluations + 3 * active, tries + 1

    n = len(state.x)
    start = (state.x, jnp.zeros((n,), state.x.dtype), state.length, state.evaluations, jnp.int32(0))
    x, _, length, evaluations, _ = jax.lax.while_loop(going, attempt, start)
    return Adapted(x, length, evaluations), denoise(state.x, t)


def _pair(denoise: Denoiser, x: Array, t: Level, s: Level) -> tuple[Array, Array]:
    """x at s by the method of order 2 and by that of order 3, from evaluations at the shares 0, 1/3 and 2/3 of the step."""
    h = half(s) - half(t)
    u, v = (between(t, s, r) for r in (1 / 3, 2 / 3))

    def along(end: Level, x0: Array) -> Array:
        ahead = with_x0(x, t, x0)
        return end.alpha * ahead.x0 + end.sigma * ahead.eps

    def sloped(said: Array, place: float, exponent: Array) -> Array:
        # The line through p at 0 and `said` at `place`, both in units of the way that is gone, averaged along it.
        return p + (said - p) * (under_exponential(exponent) @ POINTS.astype(x.dtype)) / place

    p = denoise(x, t).x0
    q = denoise(along(u, p), u).x0
    r = denoise(along(v, sloped(q, 1 / 2, h * 2 / 3)), v).x0
    return along(s, sloped(q, 1 / 3, h)), along(s, sloped(r, 2 / 3, h))


def _error(x: Array, low: Array, high: Array, rtol: Array, atol: Array) -> Array:
    scale = jnp.maximum(atol, rtol * jnp.maximum(jnp.abs(x), jnp.abs(low)))
    return jnp.sqrt(jnp.square((low - high) / scale).reshape(len(x), -1).mean(1))
