"""Editing with a trained model: inpainting, linear inverse problems, and going from an image back to noise.

Nothing here is trained. Inpainting by replacement is a function from solver to solver, measurements are functions from denoiser to
denoiser, and the rest are grids and starting points for the samplers there are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff.denoiser import Denoiser, partial
from jaxdiff.level import Level, Prediction, beta_std, diffuse, logsnr, with_x0
from jaxdiff.sampling import sample, sample_keys, solve
from jaxdiff.solvers.base import Noise, Solver, fold, fresh

Array = jax.Array

# --- inpainting -----------------------------------------------------------------------------------------------------------


def replacement(solver: Solver, known: Array, mask: Array, noise: Noise = jax.random.normal) -> Solver:
    """The solver, with the pixels where `mask` is 1 put back: after each step as `known` noised to the new level, at last exactly.

    `known` and `mask` broadcast with x [B, ...]; mask values in between mix. A multistep solver forgets its history at each step.
    The other pixels do not quite follow their distribution given the known ones, which `resampling` mends. Raises ValueError for
    a mask that does not fit `known` or leaves [0, 1]. Sources: Song et al. 2021 (score SDEs), section 5; Lugmayr et al. 2022
    (RePaint), eq. 8.
    """
    mask, known = _mask(mask), jnp.asarray(known, float)
    try:
        np.broadcast_shapes(mask.shape, known.shape)
    except ValueError:
        raise ValueError(f"a mask of shape {mask.shape} does not fit an image of shape {known.shape}") from None
    step = Partial(_replace, partial(solver.init), partial(solver.step), known, mask, partial(noise))
    return Solver(solver.init, step, Partial(_put_back, partial(solver.final), known, mask))


def _replace(init, step, known, mask, noise, keys, state, t, s):
    state, p = step(fold(keys, 1), state, t, s)
    noised = diffuse(s, _fit("known", known, state.x.shape), fresh(noise, keys, state.x))
    return init(_mix(mask, noised, state.x)), p


def _put_back(final, known, mask, state, t):
    return _mix(mask, known, final(state, t))


def _mix(mask: Array, known: Array, x: Array) -> Array:
    mask, known = _fit("mask", mask, x.shape), _fit("known", known, x.shape)
    return mask * known + (1 - mask) * x


def resampling(solver: Solver, noise: Noise = jax.random.normal) -> Solver:
    """The solver on downward intervals; on upward ones x is noised to the new level by the forward process, and history forgotten.

    `resampling(replacement(solver, known, mask))` on a grid of `repaint_levels` is RePaint. The predictions of upward intervals are
    zero. Source: Lugmayr et al. 2022 (RePaint), algorithm 1.
    """
    return solver._replace(step=Partial(_resample, partial(solver.init), partial(solver.step), partial(noise)))


def _resample(init, step, noise, keys, state, t, s):
    def down(state):
        return step(keys, state, t, s)

    def up(state):
        x = s.alpha / t.alpha * state.x + beta_std(s, t) * fresh(noise, keys, state.x)
        return init(x), jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(down, state)[1])

    return jax.lax.cond(logsnr(s) < logsnr(t), up, down, state)


def repaint_levels(levels: Level, jump: int = 10, times: int = 10) -> Level:
    """The grid [N] with ways back up: every stretch of `jump` levels is walked down `times` times, one upward interval between.

    NumPy, without the padding of `levels`. One upward interval stands for the paper's `jump` single steps, which have the same
    distribution together. 250 levels become 2626, with 2410 evaluations. Raises ValueError unless 1 <= jump < N and times >= 1.
    Source: Lugmayr et al. 2022 (RePaint), section 4.2, in the order of its published schedule: 250 levels, jump 10, times 10.
    """
    n = true_length(levels)
    if not (1 <= jump < n and times >= 1):
        raise ValueError(f"repaint_levels needs 1 <= jump < {n}, the levels of the grid, and times >= 1, got {jump=}, {times=}")
    left: list[int] = []  # how many levels are below
    for i in range(n - 1, -1, -1):
        again = (times - 1) * list(range(i + jump, i - 1, -1))
        left += [i, *again] if i % jump == 0 and i < n - jump else [i]
    return _pick(levels, n - 1 - np.asarray(left))


# --- linear measurements --------------------------------------------------------------------------------------------------


class Operator(NamedTuple):
    """A linear measurement y = A x0 of images [B, ..., C]: `forward(x) -> y`, and `pseudo(y) -> x`, its Moore-Penrose inverse."""

    forward: Callable[[Array], Array]
    pseudo: Callable[[Array], Array]


def mask_operator(mask: Array) -> Operator:
    """Inpainting: y = mask * x, of x's shape, with which `mask` broadcasts. Raises ValueError where it leaves [0, 1]."""
    mask = _mask(mask)
    return Operator(Partial(_times, mask), Partial(_times, jnp.where(mask > 0, 1 / jnp.where(mask > 0, mask, 1), 0)))


def _times(mask: Array, x: Array) -> Array:
    return _fit("mask", mask, x.shape) * x


def average(factor: int) -> Operator:
    """Super-resolution: y holds the means of blocks, `factor` pixels along each axis but the first and last; back, it repeats them.

    Raises ValueError where the factor is no positive integer, and later where it does not divide an axis. Source: Wang et al.
    2023 (DDNM), section 3.3.
    """
    if factor < 1 or factor != int(factor):
        raise ValueError(f"average needs a positive integer factor, got {factor}")
    # The factor is the length of an array: a number in a Partial would be traced, and a shape cannot depend on that.
    block = np.ones(int(factor), bool)
    return Operator(Partial(_block_means, block), Partial(_repeat, block))


def _block_means(block: Array, x: Array) -> Array:
    for axis in range(1, x.ndim - 1):
        if x.shape[axis] % block.size:
            raise ValueError(f"a factor of {block.size} does not divide the axes of images of shape {x.shape[1:]}")
        x = x.reshape(*x.shape[:axis], -1, block.size, *x.shape[axis + 1 :]).mean(axis + 1)
    return x


def _repeat(block: Array, y: Array) -> Array:
    for axis in range(1, y.ndim - 1):
        y = jnp.repeat(y, block.size, axis)
    return y


def grey(weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3)) -> Operator:
    """Colourisation: y [B, ..., 1] is the sum of x's channels with these weights, one a channel.

    Raises ValueError where the weights are not finite or all 0, and later where they are not as many as the channels. Source:
    Wang et al. 2023 (DDNM), section 3.3, with thirds.
    """
    w = np.asarray(weights, np.float64)
    if w.ndim != 1 or not np.isfinite(w).all() or not w.any():
        raise ValueError(f"grey needs one finite weight a channel, not all of them 0, got {weights}")
    return Operator(Partial(_weigh, jnp.asarray(w)), Partial(_tint, jnp.asarray(w / (w @ w))))


def _weigh(w: Array, x: Array) -> Array:
    if x.shape[-1] != w.size:
        raise ValueError(f"{w.size} weights do not fit images of shape {x.shape[1:]}")
    return (x * w.reshape((1,) * (x.ndim - 1) + (-1,))).sum(-1, keepdims=True)


def _tint(w: Array, y: Array) -> Array:
    return y * w.reshape((1,) * (y.ndim - 1) + (-1,))


def blur(std: float, shape: Sequence[int], threshold: float = 0.03) -> Operator:
    """Deblurring: circular convolution of images of `shape` (..., C), one to three spatial axes, with a Gaussian of `std` pixels.

    Frequencies of which less than `threshold` is left count as lost, in both directions: what inverts is then the inverse, and
    float32 can bear it. Raises ValueError for std <= 0 or a threshold outside (0, 1]. Source: Wang et al. 2023 (DDNM), whose
    published code cuts singular values at 0.03.
    """
    if not (0 < std < np.inf and 0 < threshold <= 1):
        raise ValueError(f"blur needs a finite std > 0 and 0 < threshold <= 1, got {std=}, {threshold=}")
    gain = np.ones(())
    for n in shape[:-1]:
        away = np.minimum(np.arange(n), n - np.arange(n))
        kernel = np.exp(-np.square(away / std) / 2)
        gain = np.multiply.outer(gain, np.fft.fft(kernel / kernel.sum()).real)
    gain = gain.reshape(1, *shape[:-1], 1)
    left = np.abs(gain) >= threshold
    gain, back = np.where(left, gain, 0), np.where(left, 1 / np.where(left, gain, 1), 0)
    return Operator(Partial(_filter, jnp.asarray(gain)), Partial(_filter, jnp.asarray(back)))


def _filter(gain: Array, x: Array) -> Array:
    if x.shape[1:-1] != gain.shape[1:-1]:
        raise ValueError(f"a blur of images of shape {gain.shape[1:-1]} does not fit {x.shape[1:-1]}")
    axes = tuple(range(1, x.ndim - 1))
    return jnp.fft.ifftn(gain * jnp.fft.fftn(x, axes=axes), axes=axes).real


def null_space(denoise: Denoiser, operator: Operator, y: Array) -> Denoiser:
    """The denoiser with what was measured put into x0: x0 + A^+ (y - A x0), so that A x0 = y; eps agrees, sigma must be positive.

    `y` broadcasts with A x0, and is taken to be free of noise. Source: Wang et al. 2023 (DDNM), eq. 13.
    """
    return Partial(_null_space, partial(denoise), _operator(operator), jnp.asarray(y, float))


def _null_space(denoise: Denoiser, operator: Operator, y: Array, x: Array, level: Level) -> Prediction:
    p = denoise(x, level)
    return with_x0(x, level, p.x0 + operator.pseudo(_residual(operator, y, p.x0)), p.aux)


def reconstruction(denoise: Denoiser, operator: Operator, y: Array, scale: float | Array = 1.0) -> Denoiser:
    """Reconstruction guidance: x0 - scale alpha / 2 * gradient by x of |y - A x0(x)|^2, through the denoiser; eps agrees.

    `scale` is [] or [B, 1, ..., 1]. At 1 the shift is (sigma^2 / alpha) times the gradient of log N(y; A x0, (sigma / alpha)^2),
    as Tweedie's formula has it; larger trusts y more. A step of DPS (Chung et al. 2023, algorithm 1) divides by |y - A x0|
    instead and moves x_s: its length then depends on the number of steps, which this one does not. Raises ValueError for a scale
    that is not finite. Source: Ho et al. 2022 (Video Diffusion Models), eq. 7.
    """
    value = _value(scale)
    if value is not None and not np.isfinite(value).all():
        raise ValueError(f"reconstruction needs a finite scale, got {scale}")
    return Partial(_reconstruction, partial(denoise), _operator(operator), jnp.asarray(y, float), jnp.asarray(scale, float))


def _reconstruction(denoise: Denoiser, operator: Operator, y: Array, scale: Array, x: Array, level: Level) -> Prediction:
    def misfit(x):
        p = denoise(x, level)
        return jnp.square(_residual(operator, y, p.x0)).sum(), p

    slope, p = jax.grad(misfit, has_aux=True)(x)
    return with_x0(x, level, p.x0 - scale * level.alpha / 2 * slope, p.aux)


def pseudo_inverse(denoise: Denoiser, operator: Operator, y: Array, data_std: float | Array = 1.0) -> Denoiser:
    """Pseudo-inverse guidance: x0 + sigma^2 / (alpha r^2) J' A^+ (y - A x0), J the derivative of x0 by x; eps agrees.

    r^2 = sigma^2 v / (alpha^2 v + sigma^2), v = data_std^2, is the variance of x0 given x if the data were N(0, v I), for which the
    result is the mean of x0 given x and y. `y` is taken to be free of noise. At alpha = 0 the prediction stays as it is, as
    J says nothing there. Published samplers take alpha for the factor of J, which is the same once the noise is small. Raises
    ValueError for a data_std that is not positive. Source: Song et al. 2023 (PiGDM), eq. 8.
    """
    value = _value(data_std)
    if value is not None and not (np.isfinite(value) & (value > 0)).all():
        raise ValueError(f"pseudo_inverse needs a finite data_std > 0, got {data_std}")
    return Partial(_pseudo_inverse, partial(denoise), _operator(operator), jnp.asarray(y, float), jnp.asarray(data_std, float))


def _pseudo_inverse(denoise: Denoiser, operator: Operator, y: Array, data_std: Array, x: Array, level: Level) -> Prediction:
    def clean(x):
        p = denoise(x, level)
        return p.x0, p

    x0, pull, p = jax.vjp(clean, x, has_aux=True)
    (slope,) = pull(operator.pseudo(_residual(operator, y, x0)))
    weight = level.alpha + jnp.square(level.sigma / data_std) / level.alpha  # sigma^2 / (alpha r^2)
    return with_x0(x, level, x0 + jnp.where(level.alpha > 0, weight * slope, 0), p.aux)


def _operator(operator: Operator) -> Operator:
    return Operator(*map(partial, operator))


def _residual(operator: Operator, y: Array, x0: Array) -> Array:
    seen = operator.forward(x0)
    return _fit("y", y, seen.shape) - seen


# --- images as starting points --------------------------------------------------------------------------------------------


def sdedit(key: Array, solver: Solver, x0: Array, levels: Level, noise: Noise = jax.random.normal) -> Array:
    """x0 [B, ...] noised to levels[0] and sampled down again: what the noise hid is made anew. `key` is one key or [B].

    `from_strength` cuts a grid to start there. Source: Meng et al. 2022 (SDEdit), algorithm 1.
    """
    keys = sample_keys(key, x0.shape[0])
    start = Level(*(jnp.asarray(a[0], x0.dtype) for a in levels))
    return sample(fold(keys, 1), solver, diffuse(start, x0, fresh(noise, keys, x0)), levels)


def from_strength(levels: Level, strength: float) -> Level:
    """The last `strength` of a grid's levels, at least one, padded to the grid's length: all strengths share one compiled program.

    NumPy. Strength 1 is the whole grid; 0.6 of 50 levels are the 30 least noisy. Raises ValueError outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} is out of range; it is above 0 and at most 1")
    n = true_length(levels)
    first = n - max(1, round(strength * n))
    return _pick(levels, np.minimum(first + np.arange(len(levels.alpha)), n - 1))


def invert(solver: Solver, x0: Array, levels: Level) -> Array:
    """The noise at levels[0], [B, ...], from which `solver` makes x0 [B, ...]: its own steps along the grid in reverse.

    `levels` is the sampler's grid, noisiest first, and the solver a deterministic one. The walk starts at x = alpha x0 of the
    least noisy level, as if x0 held no noise; the denoiser says what eps is. So the way back errs by the steps' error, and by
    about (sigma / alpha)^2 / variance of that level. Source: Song et al. 2021 (DDIM), eq. 14 in reverse and section 5.4.
    """
    rising = Level(*(jnp.asarray(a, x0.dtype)[::-1] for a in levels))
    # The key is of no use: nothing deterministic asks for it, and the posterior of an upward interval has no deviation.
    state, _ = solve(jax.random.key(0), solver, rising.alpha[0] * x0, rising)
    return state.x


def interpolate(a: Array, b: Array, n: int) -> Array:
    """n points on the arc from a to b [B, ...], both included, [n, B, ...]: spherical, sample by sample, so noise stays as loud.

    Where a and b have one direction it is the straight line; opposite ones have no one arc between them. Raises ValueError for
    n < 2 or two shapes. Sources: Shoemake 1985; Song et al. 2021 (DDIM), section 5.3.
    """
    if n < 2 or a.shape != b.shape:
        raise ValueError(f"interpolate needs two arrays of one shape and n >= 2, got {a.shape}, {b.shape} and n={n}")

    def size(x):
        return jnp.sqrt(jnp.square(x).sum(range(1, x.ndim), keepdims=True))

    # The half angle by its tangent is exact for small angles, where the cosine is not, and needs no unit vectors.
    u, v = size(b) * a, size(a) * b
    angle = 2 * jnp.arctan2(size(u - v), size(u + v))[None] / np.pi
    w = jnp.linspace(0, 1, n, dtype=a.dtype).reshape(n, *(1,) * a.ndim)

    def share(w):
        return w * jnp.sinc(w * angle) / jnp.sinc(angle)  # sin(w angle) / sin(angle), and w at angle 0

    return share(1 - w) * a[None] + share(w) * b[None]


# --- what they share ------------------------------------------------------------------------------------------------------


def true_length(levels: Level) -> int:
    """How many levels a grid has before the padding."""
    alpha, sigma = (np.asarray(a) for a in levels)
    moves = np.flatnonzero((np.diff(alpha) != 0) | (np.diff(sigma) != 0))
    return int(moves[-1]) + 2 if moves.size else 1


def _pick(levels: Level, rows: np.ndarray) -> Level:
    alpha, sigma = (np.asarray(a)[rows] for a in levels)
    return Level(alpha, sigma)  # type: ignore[arg-type]


def _value(a: Any) -> np.ndarray | None:
    """What a is, or None where it is traced and nobody knows."""
    return None if isinstance(a, jax.core.Tracer) else np.asarray(a)


def _mask(mask: Array) -> Array:
    value = _value(mask)
    if value is not None and not ((value >= 0) & (value <= 1)).all():
        raise ValueError("a mask is 1 where pixels are known and 0 where not; this one has values outside [0, 1]")
    return jnp.asarray(mask, float)


def _fit(name: str, a: Array, shape: tuple[int, ...]) -> Array:
    """a with the leading axes it lacks. Raises ValueError where it does not broadcast to `shape`."""
    a = a.reshape((1,) * (len(shape) - a.ndim) + a.shape)
    if len(a.shape) != len(shape) or any(n not in (1, m) for n, m in zip(a.shape, shape)):
        raise ValueError(f"{name} of shape {a.shape} does not fit {shape}")
    return a
