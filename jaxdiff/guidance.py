"""Guidance: functions from denoiser to denoiser, each of which keeps alpha * x0 + sigma * eps == x.

An affine mix of two predictions keeps it by itself; whatever moves x0 alone has eps recomputed, and the other way round. Scales and
other numbers are traced: a new one never compiles again. One that is known and is not a finite number is a ValueError.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff import targets
from jaxdiff.checks import number, ordered
from jaxdiff.classifier import LogProb
from jaxdiff.denoiser import Denoiser, partial
from jaxdiff.level import Level, Prediction, logsnr, with_x0
from jaxdiff.targets import Target

Array = jax.Array
Scale = float | Array | Callable[[Level], Array]


def classifier_free(cond: Denoiser, uncond: Denoiser, scale: Scale) -> Denoiser:
    """The mix uncond + scale (cond - uncond): scale 0 is unconditional, 1 conditional, above 1 sharper; `aux` is cond's.

    `scale` is [], [B, 1, ..., 1] or a function level -> such an array; a `Partial` of a module's function is traced in its numbers.
    At scale 1 `uncond` is not evaluated. Source: Ho and Salimans 2022, eq. 6, whose w is scale - 1.
    """
    return Partial(_mix, partial(cond), partial(uncond), _scale(scale))


def _mix(cond: Denoiser, uncond: Denoiser, scale: Scale, x: Array, level: Level) -> Prediction:
    w, c = _at(scale, level, x), cond(x, level)

    def mixed() -> tuple[Array, Array]:
        u = uncond(x, level)
        return u.x0 + w * (c.x0 - u.x0), u.eps + w * (c.eps - u.eps)

    # Without guidance the second network is not asked, and yet it is the same program.
    x0, eps = jax.lax.cond(jnp.all(w == 1), lambda: (c.x0, c.eps), mixed)
    return Prediction(x0, eps, c.aux)


def at_once(cond: Denoiser, both: Denoiser, scale: Scale) -> Denoiser:
    """`classifier_free` by one evaluation of twice the batch: the same but for rounding, where a small batch leaves a device idle.

    `both` is of x [2 B, ...]: of its rows 2 i has the condition of sample i and 2 i + 1 has none, so that where a batch is over
    several devices each keeps its own samples. At scale 1 `cond` alone is evaluated, of the batch itself. `scale` and `aux` are as
    in `classifier_free`.
    """
    return Partial(_at_once, partial(cond), partial(both), _scale(scale))


def _at_once(cond: Denoiser, both: Denoiser, scale: Scale, x: Array, level: Level) -> Prediction:
    w = _at(scale, level, x)

    def mixed() -> Prediction:
        pairs = jax.tree.map(lambda a: a.reshape(-1, 2, *a.shape[1:]), both(_twice(x), Level(*map(_twice, level))))
        c, u = (jax.tree.map(lambda a, i=i: a[:, i], pairs) for i in range(2))
        return Prediction(u.x0 + w * (c.x0 - u.x0), u.eps + w * (c.eps - u.eps), c.aux)

    return jax.lax.cond(jnp.all(w == 1), lambda: cond(x, level), mixed)


def _twice(a: Array) -> Array:
    """Every sample of [B, ...] twice, one after the other; what is [], one for all, stays."""
    a = jnp.asarray(a)
    return a if a.ndim == 0 else jnp.stack([a, a], axis=1).reshape(-1, *a.shape[1:])


def autoguidance(main: Denoiser, weak: Denoiser, scale: Scale) -> Denoiser:
    """A model guided by a worse version of itself, weak + scale (main - weak): scale 1 is main alone; `aux` is main's.

    The weak one is smaller or less trained and has the same condition. `scale` is as in `classifier_free`. Source: Karras et al.
    2024 (Guiding a Diffusion Model with a Bad Version of Itself), section 2 for the mix, section 4 for the weak model.
    """
    return classifier_free(main, weak, scale)


def interval(guided: Denoiser, plain: Denoiser, lo: float | Array, hi: float | Array) -> Denoiser:
    """`guided` where lo <= logsnr <= hi, elsewhere `plain`, such as the conditional network alone.

    With a level [] only the one needed is evaluated, with [B, 1, ..., 1] both are. The two say the same kind of `aux`, arrays
    [B, ...] or None. An end may be infinite. Source: Kynkäänniemi et al. 2024, section 3.1; their noise level sigma, at alpha = 1,
    in (a, b] is a logsnr of -2 log sigma from lo = -2 log b to hi = -2 log a: EDM2-S's (0.28, 2.90] is [-2.13, 2.55] (for data of
    its deviation, 0.5). Raises ValueError for NaN and for lo > hi.
    """
    ends = [number(name, end, "a number", lambda v: ~np.isnan(v)) for name, end in (("lo", lo), ("hi", hi))]
    ordered(lo, hi)
    return Partial(_interval, partial(guided), partial(plain), *ends)


def _interval(guided: Denoiser, plain: Denoiser, lo: Array, hi: Array, x: Array, level: Level) -> Prediction:
    lam = logsnr(level)
    inside = (lo <= lam) & (lam <= hi)
    if inside.ndim == 0:
        return jax.lax.cond(inside, lambda: guided(x, level), lambda: plain(x, level))

    def select(a: Array, b: Array) -> Array:
        return jnp.where(inside.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, guided(x, level), plain(x, level))


def rescale(cond: Denoiser, uncond: Denoiser, scale: Scale, share: float | Array = 0.7, target: Target = targets.v) -> Denoiser:
    """`classifier_free`, its output brought towards cond's standard deviation, which large scales raise: less over-exposure.

    Each sample's output is multiplied by share * std(cond) / std(mix) + 1 - share; share 0 is `classifier_free`. The source
    rescales "the model outputs", which are v in its experiments: `target` is the row they are taken in, v unless given, which is
    singular nowhere; x0 and eps then follow from x and the output. With `targets.eps` it is diffusers' rescale_noise_cfg for a
    network that regresses noise. `scale` and `aux` are as in `classifier_free`. Source: Lin et al. 2024 (Common Diffusion Noise
    Schedules and Sample Steps are Flawed), eqs. 13 to 16 and algorithm 2.
    """
    return Partial(_rescale, partial(cond), partial(uncond), _scale(scale), number("share", share), partial(target))


def _rescale(cond: Denoiser, uncond: Denoiser, scale: Scale, share: Array, target: Target, x: Array, level: Level) -> Prediction:
    w = _at(scale, level, x)
    c, u = cond(x, level), uncond(x, level)
    y_c, y_u = (targets.regress(target, level, p.x0, p.eps) for p in (c, u))
    y = y_u + w * (y_c - y_u)
    var_c, var = (jnp.var(a, axis=_inner(a), keepdims=True) for a in (y_c, y))
    # An output without spread, a sample of one number for instance, has no scale to restore.
    ratio = jnp.sqrt(jnp.where(var > 0, var_c, 1) / jnp.where(var > 0, var, 1))
    return targets.invert(target, level, x, (share * ratio + 1 - share) * y)._replace(aux=c.aux)


def projected(
    cond: Denoiser, uncond: Denoiser, scale: Scale, parallel: float | Array = 0.0, radius: float | Array = np.inf
) -> Denoiser:
    """Adaptive projected guidance: cond.x0 + (scale - 1) * d, d the difference to uncond.x0 with less of what is along cond.x0.

    The difference is shortened to norm `radius` at most, each sample by itself; its part along cond.x0, which over-saturates, is
    weighted by `parallel` (their eta). parallel = 1, radius = inf is `classifier_free`; `scale` and `aux` are as there. This is
    their method at momentum 0, not at the negative momentum of their experiments (-0.75 or -0.5): that is a running sum of the
    differences of all evaluations so far, and a denoiser has no state (docs/guidance_and_editing.md says why none was added).
    sigma must be positive. Raises ValueError for a negative radius. Source: Sadat et al. 2025, arXiv 2410.02416, algorithm 1
    without its momentum buffer.
    """
    radius = number("radius", radius, "a number of at least 0", lambda v: v >= 0)
    return Partial(_projected, partial(cond), partial(uncond), _scale(scale), number("parallel", parallel), radius)


def _projected(
    cond: Denoiser, uncond: Denoiser, scale: Scale, parallel: Array, radius: Array, x: Array, level: Level
) -> Prediction:
    w = _at(scale, level, x)
    c, u = cond(x, level), uncond(x, level)
    d = c.x0 - u.x0
    # Selections on both sides of a division keep its derivative finite too, where the networks agree and where x0 is zero.
    square, own = _dot(d, d), _dot(c.x0, c.x0)
    far = square > radius**2
    d = d * jnp.where(far, radius / jnp.sqrt(jnp.where(far, square, 1)), 1)
    part = _dot(d, c.x0) / jnp.where(own > 0, own, 1) * c.x0
    return with_x0(x, level, c.x0 + (w - 1) * (d + (parallel - 1) * part), c.aux)


def clip(denoise: Denoiser, lo: float | Array, hi: float | Array) -> Denoiser:
    """The same denoiser with x0 clipped to [lo, hi] and eps made to agree; sigma must be positive.

    Source: DDPM's own sampler clips x0 to [-1, 1]. Raises ValueError for NaN.
    """
    for name, end in (("lo", lo), ("hi", hi)):
        number(name, end, "a number", lambda v: ~np.isnan(v))
    return Partial(_clip, partial(denoise), lo, hi)


def _clip(denoise: Denoiser, lo: Array, hi: Array, x: Array, level: Level) -> Prediction:
    p = denoise(x, level)
    return with_x0(x, level, jnp.clip(p.x0, lo, hi), p.aux)


def dynamic_clip(
    denoise: Denoiser, percentile: float | Array = 0.995, lo: float | Array = -1.0, hi: float | Array = 1.0
) -> Denoiser:
    """Dynamic thresholding: x0 clipped to [-s, s] and divided by s, s the percentile of a sample's |x0|, at least 1; eps agrees.

    That is for data in [-1, 1]; for data in [lo, hi], numbers or [1, ..., 1, C], x0 is measured from the middle, in half widths.
    sigma must be positive. Raises ValueError for a percentile outside [0, 1] and for lo >= hi. Source: Saharia et al. 2022
    (Imagen), section 2.3; the percentile from figure A.10.
    """
    percentile = number("percentile", percentile, "between 0 and 1", lambda v: (v >= 0) & (v <= 1))
    ordered(lo, hi, strictly=True)
    return Partial(_dynamic_clip, partial(denoise), percentile, number("lo", lo), number("hi", hi))


def _dynamic_clip(denoise: Denoiser, percentile: Array, lo: Array, hi: Array, x: Array, level: Level) -> Prediction:
    p = denoise(x, level)
    middle, half = (lo + hi) / 2, (hi - lo) / 2
    unit = (p.x0 - middle) / half
    s = jnp.maximum(jnp.quantile(jnp.abs(unit), percentile, axis=_inner(unit), keepdims=True), 1)
    return with_x0(x, level, middle + half * jnp.clip(unit, -s, s) / s, p.aux)


def classifier(denoise: Denoiser, log_prob: LogProb, scale: Scale) -> Denoiser:
    """Guidance by the gradient g of log_prob(x, level) -> [B]: eps - scale sigma g, and x0 + scale sigma^2 / alpha g.

    The same shift of the score, in both halves, so nothing is divided by sigma. At alpha = 0 the prediction stays as it is: x
    is then all noise and tells nothing of the label, so g is 0 for a true classifier, and eps is x / sigma whatever x0 may be.
    log_prob(x, level)[i] depends on x[i] alone; `scale` is as in `classifier_free`; `aux` is the denoiser's. Raises ValueError
    where log_prob is not [B]. Source: Dhariwal and Nichol 2021, algorithm 2 and eq. 14, whose sqrt(1 - alpha_bar) is sigma.
    """
    return Partial(_classifier, partial(denoise), partial(log_prob), _scale(scale))


def _classifier(denoise: Denoiser, log_prob: LogProb, scale: Scale, x: Array, level: Level) -> Prediction:
    def total(x: Array) -> Array:
        each = log_prob(x, level)
        if each.shape != x.shape[:1]:
            raise ValueError(f"log_prob is one number a sample, of shape {x.shape[:1]}; got {each.shape}")
        return each.sum()

    p, grad = denoise(x, level), jax.grad(total)(x)
    known = level.alpha > 0
    # A classifier may say NaN at alpha = 0, whose logsnr is -inf; the selection, unlike a factor of zero, does not pass it on.
    push = jnp.where(known, _at(scale, level, x) * level.sigma * grad, 0)
    return Prediction(p.x0 + level.sigma / jnp.where(known, level.alpha, 1) * push, p.eps - push, p.aux)


def _inner(a: Array) -> tuple[int, ...]:
    """The axes of one sample."""
    return tuple(range(1, a.ndim))


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=_inner(a), keepdims=True)


def _scale(scale: Scale) -> Any:
    return partial(scale) if callable(scale) else number("scale", scale)


def _at(scale: Scale, level: Level, x: Array) -> Array:
    """The scale at a level. Raises ValueError for one a sample as [B], which would be taken for one a column of x."""
    w = jnp.asarray(scale(level) if callable(scale) else scale)
    if w.ndim == 1 and w.size > 1 and x.ndim > 1:
        raise ValueError(
            f"scale of shape {w.shape} is neither [] nor one a sample, which here is {(len(w),) + (1,) * (x.ndim - 1)}"
        )
    return w
