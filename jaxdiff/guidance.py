"""Guidance: functions from denoiser to denoiser. An affine mix of two keeps alpha * x0 + sigma * eps == x."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxdiff.denoiser import Denoiser, partial
from jaxdiff.level import Level, Prediction

Array = jax.Array


def classifier_free(cond: Denoiser, uncond: Denoiser, scale: float | Array) -> Denoiser:
    """The mix uncond + scale (cond - uncond): scale 0 is unconditional, 1 conditional, above 1 sharper; `aux` is cond's.

    `scale` is [] or [B, 1, ..., 1]. Source: Ho and Salimans 2022, eq. 6, whose w is scale - 1.
    """
    return Partial(_mix, partial(cond), partial(uncond), jnp.asarray(scale, float))


def _mix(cond: Denoiser, uncond: Denoiser, scale: Array, x: Array, level: Level) -> Prediction:
    c, u = cond(x, level), uncond(x, level)
    return Prediction(u.x0 + scale * (c.x0 - u.x0), u.eps + scale * (c.eps - u.eps), c.aux)


def clip(denoise: Denoiser, lo: float | Array, hi: float | Array) -> Denoiser:
    """The same denoiser with x0 clipped to [lo, hi] and eps made to agree; sigma must be positive.

    Source: DDPM's own sampler clips x0 to [-1, 1].
    """
    return Partial(_clip, partial(denoise), lo, hi)


def _clip(denoise: Denoiser, lo: Array, hi: Array, x: Array, level: Level) -> Prediction:
    p = denoise(x, level)
    x0 = jnp.clip(p.x0, lo, hi)
    return Prediction(x0, (x - level.alpha * x0) / level.sigma, p.aux)
