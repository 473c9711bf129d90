"""Scores: the gradient of the log density of noisy data, the losses that train one, and the stochastic differential equations.

A score function is s: x [B, ...] -> [B, ...], each row of its own x alone; every loss is one number a sample, [B], summed over its
entries as in the papers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxdiff.denoiser import Denoiser, partial
from jaxdiff.level import Level, Prediction, diffuse
from jaxdiff.schedules import Schedule

Array = jax.Array
Score = Callable[[Array], Array]


def score(prediction: Prediction, level: Level) -> Array:
    """The gradient of log p(x) at the level, -eps / sigma, [B, ...]; not finite at sigma = 0.

    Source: Song et al. 2021, appendix C, with Vincent 2011: the mean of the noise given x is -sigma times the score.
    """
    return -prediction.eps / level.sigma


def score_of(denoise: Denoiser, level: Level) -> Score:
    """The score function of a denoiser at one level, [] or [B, 1, ..., 1]."""
    return Partial(_score_of, partial(denoise), level)


def _score_of(denoise: Denoiser, level: Level, x: Array) -> Array:
    return score(denoise(x, level), level)


def explicit_score_matching(s: Score, true_score: Score, x: Array) -> Array:
    """Half the squared distance of s from the true score at x [B, ...]: [B]. Source: Hyvarinen 2005, eq. 2."""
    return _half_square(s(x) - true_score(x))


def denoising_score_matching(key: Array, s: Score, x0: Array, level: Level, eps: Array | None = None) -> Array:
    """Half the squared distance of s at alpha x0 + sigma eps from -eps / sigma, the score given x0: [B].

    Its minimum is the score of the noisy data. x0 is [B, ...], level [] or [B, 1, ..., 1]; key draws the noise, and is used only
    where `eps` [B, ...] is not given. Source: Vincent 2011, the criterion J_DSM.
    """
    eps = jax.random.normal(key, x0.shape, x0.dtype) if eps is None else eps
    return _half_square(s(diffuse(level, x0, eps)) + eps / level.sigma)


def implicit_score_matching(s: Score, x: Array) -> Array:
    """The trace of the Jacobian of s at x [B, ...] plus half its squared length: [B], exact, one derivative an entry of a sample.

    Its mean differs from that of explicit score matching by a constant. Source: Hyvarinen 2005, eq. 4.
    """
    y, push = jax.linearize(s, x)
    size = x[0].size

    def add(trace: Array, i: Array) -> tuple[Array, None]:
        # Rows do not look at each other, so one direction serves the whole batch.
        direction = jnp.zeros((size,), x.dtype).at[i].set(1).reshape((1, *x.shape[1:]))
        return trace + push(jnp.broadcast_to(direction, x.shape)).reshape(x.shape[0], size)[:, i], None

    trace, _ = jax.lax.scan(add, jnp.zeros((x.shape[0],), y.dtype), jnp.arange(size))
    return trace + _half_square(y)


def sliced_score_matching(key: Array, s: Score, x: Array, projections: int = 1) -> Array:
    """Implicit score matching with the trace estimated by v . J v over `projections` random signs v a sample: [B].

    x is [B, ...]. Source: Song et al. 2019, eq. 8, the form of reduced variance.
    """
    y, push = jax.linearize(s, x)
    v = jax.random.rademacher(key, (projections, *x.shape), x.dtype)
    trace = jax.vmap(lambda v: (v * push(v)).reshape(x.shape[0], -1).sum(1))(v).mean(0)
    return trace + _half_square(y)


def _half_square(y: Array) -> Array:
    return jnp.square(y).reshape(y.shape[0], -1).sum(1) / 2


def forward_sde(schedule: Schedule) -> tuple[Callable[[Array, Array], Array], Callable[[Array], Array]]:
    """The drift f(x, t) and diffusion g(t) of dx = f dt + g dw, whose samples at t have the schedule's level; t is [], x [B, ...].

    f = x dlog(alpha)/dt, g^2 = -sigma^2 dlogsnr/dt. Not finite at alpha = 0, nor where sigma has no slope, as of `vp` at t = 0.
    Source: Kingma et al. 2021 (VDM), appendix B, for Song et al. 2021, eq. 5.
    """
    schedule = partial(schedule)
    return Partial(_forward_drift, schedule), Partial(_forward_diffusion, schedule)


def _forward_drift(schedule: Schedule, x: Array, t: Array) -> Array:
    level, slope = _slope(schedule, t)
    return slope.alpha / level.alpha * x


def _forward_diffusion(schedule: Schedule, t: Array) -> Array:
    level, slope = _slope(schedule, t)
    return jnp.sqrt(jnp.maximum(2 * level.sigma * _noising(level, slope), 0))


def reverse_sde(
    denoise: Denoiser, schedule: Schedule, eta: float | Array = 1.0
) -> tuple[Callable[[Array, Array], Array], Callable[[Array], Array]]:
    """The drift(x, t) and diffusion(t) that undo `forward_sde`, steps dt < 0: eta = 0 is the probability flow, 1 the reverse SDE.

    They are f - (1 + eta^2) / 2 g^2 score and eta g; any eta gives the same distribution at every t. t is [], x [B, ...]. Finite
    where the forward ones are. Source: Song et al. 2021, eqs. 6 and 13.
    """
    schedule = partial(schedule)
    return Partial(_reverse_drift, partial(denoise), schedule, eta), Partial(_reverse_diffusion, schedule, eta)


def _reverse_drift(denoise: Denoiser, schedule: Schedule, eta: Array, x: Array, t: Array) -> Array:
    level, slope = _slope(schedule, t)
    p = denoise(x, level)
    # f - g^2 score / 2 is the line integral's x0 alpha' + eps sigma', and -g^2 score / 2 is eps times what `_noising` says.
    return slope.alpha * p.x0 + (slope.sigma + eta**2 * _noising(level, slope)) * p.eps


def _reverse_diffusion(schedule: Schedule, eta: Array, t: Array) -> Array:
    return eta * _forward_diffusion(schedule, t)


def _slope(schedule: Schedule, t: Any) -> tuple[Level, Level]:
    t = jnp.asarray(t) * 1.0
    return jax.jvp(schedule, (t,), (jnp.ones_like(t),))


def _noising(level: Level, slope: Level) -> Array:
    # g^2 / (2 sigma) = -sigma / 2 dlogsnr/dt, without a division by sigma.
    return slope.sigma - level.sigma * slope.alpha / level.alpha
