"""Times: the grids a sampler walks, noisiest first, and the draws a training step makes.

Grids are NumPy float64 arrays made on the host; a schedule turns them into levels. `grid` does that in float64 and pads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff.level import Level
from jaxdiff.schedules import Schedule

Array = jax.Array

__all__ = [
    "draw_importance",
    "draw_independent",
    "draw_log_normal",
    "draw_logit_normal",
    "draw_table",
    "draw_uniform",
    "karras",
    "linear",
    "strided",
    "uniform",
]

# Normal draws are cut off here, so that they have a first and a last time, and this is the share that lies beyond either end.
_DEVIATIONS = 5.0
_TAIL = 2.8665157187919e-07

# jax.enable_x64 replaced jax.experimental.enable_x64 within the supported range, and neither spans it.
_enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # type: ignore[attr-defined]


class Draw(NamedTuple):
    """How training draws times: `sample(key, n)` -> t [n], all within `first` <= t <= `last`, of probability density `density(t)`.

    Of a table of `steps` rows the density is steps * (the probability of t's row): 1 where all rows are as likely. It holds within
    the range. `steps` is 0 where there is no table.
    """

    sample: Callable[[Array, int], Array]
    first: float
    last: float
    density: Callable[[Array], Array]
    steps: int = 0


class History(NamedTuple):
    """The newest losses of a table's rows, float32 [steps, history], and how many of each there ever were, int32 [steps]."""

    losses: Array
    counts: Array


class Adaptive(NamedTuple):
    """A draw that learns from the losses: `init() -> history`, `draw(history) -> Draw`, `update(history, t, each) -> history`.

    `t` and `each` are [B]: the times drawn and the losses there, before any weight. All draws are rows of a table of `steps`,
    within `first` <= t <= `last`.
    """

    init: Callable[[], Any]
    draw: Callable[[Any], Draw]
    update: Callable[[Any, Array, Array], Any]
    first: float
    last: float
    steps: int


def uniform(n: int) -> np.ndarray:
    """n equal steps, [n]: 1, (n-1)/n, ..., 1/n. Raises ValueError for n < 1."""
    _at_least_one(n)
    return np.arange(n, 0, -1) / n


def linear(n: int, lo: float = 1e-3, hi: float = 1.0) -> np.ndarray:
    """n times from `hi` down to `lo`, both in, equally far apart, [n]; 2 are the ends alone, for a solver that goes its own steps.

    Source: Song et al. 2021, appendix C, whose last time is 1e-3. Raises ValueError for n < 1 or not 0 < lo < hi.
    """
    _at_least_one(n)
    if not 0 < lo < hi:
        raise ValueError(f"linear needs 0 < lo < hi, got {lo=}, {hi=}")
    return np.linspace(hi, lo, n)


def karras(n: int, lo: float = 0.002, hi: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """n values of sigma from `hi` down to `lo`, [n], equal steps in sigma^(1/rho); for the schedule `edm`.

    Source: EDM eq. 5 (whose last level, 0, is the sampler's final denoising). Raises ValueError for n < 1 or not 0 < lo < hi.
    """
    _at_least_one(n)
    if not 0 < lo < hi:
        raise ValueError(f"karras needs 0 < lo < hi, got {lo=}, {hi=}")
    return np.linspace(hi ** (1 / rho), lo ** (1 / rho), n) ** rho


def strided(train_steps: int, n: int, spacing: str = "leading") -> np.ndarray:
    """At most n of the times i / train_steps, i = 1 ... train_steps, noisiest first, [n] (fewer where rounding repeats one).

    `spacing`: "leading" (every k-th from the first), "trailing" (every k-th from the last, so t = 1 is always in),
    "linspace" (both ends in), "quadratic" (denser near the data). Sources: Song et al. 2021 (DDIM), appendix D.2, for leading
    and quadratic; Lin et al. 2024, table 2, for trailing and linspace. Raises ValueError for n < 1, n > train_steps or an
    unknown spacing.
    """
    _at_least_one(n)
    if n > train_steps:
        raise ValueError(f"{n} sampling steps are more than the {train_steps} the schedule has; ask for 1 to {train_steps}")
    rows = {
        "leading": lambda: 1 + np.arange(n) * (train_steps // n),
        "trailing": lambda: np.round(train_steps - np.arange(n) * (train_steps / n)),
        "linspace": lambda: 1 + np.round(np.linspace(0, train_steps - 1, n)),
        "quadratic": lambda: 1 + np.floor(np.linspace(0, np.sqrt(0.8 * train_steps), n) ** 2),
    }
    if spacing not in rows:
        raise ValueError(f"unknown spacing {spacing!r}; allowed: {', '.join(sorted(rows))}")
    # unique drops the repeated rows of a quadratic grid, and sorts; a zero-length interval would waste an evaluation.
    return np.unique(np.clip(rows[spacing](), 1, train_steps))[::-1] / train_steps


def _at_least_one(n: int) -> None:
    if n < 1:
        raise ValueError(f"a grid needs at least 1 step, got {n}")


def grid(schedule: Schedule, times: np.ndarray, length: int | None = None) -> Level:
    """The levels of `times`, NumPy float32 [length], computed on the host in float64 and padded by repeating the last.

    Padded grids of one length share one compiled sampler; `solve` skips the padding. Raises ValueError where `length` is too
    short, or the levels are not finite.
    """
    length = len(times) if length is None else length
    # TPUs have no float64, and a jitted float32 schedule would blur neighbouring levels.
    with _enable_x64(True), jax.default_device(_host()):
        alpha, sigma = (np.asarray(a, np.float32) for a in schedule(jnp.asarray(times, jnp.float64)))
    if not (np.isfinite(alpha).all() and np.isfinite(sigma).all()):
        raise ValueError(f"the schedule is not finite on times {times[0]:g} to {times[-1]:g}")
    return pad(Level(alpha, sigma), length)  # type: ignore[arg-type]


def pad(levels: Level, length: int) -> Level:
    """The grid with its last level repeated to `length` levels, NumPy [length]. Raises ValueError where it is longer."""
    n = len(levels.alpha)
    if n > length:
        raise ValueError(f"{n} sampling steps are more than the maximum {length}")
    return jax.tree.map(lambda a: np.pad(a, (0, length - n), mode="edge"), levels)


def _host() -> jax.Device | None:
    # JAX_PLATFORMS=cuda leaves no CPU device; the default device then has to do.
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def draw_table(steps: int = 1000) -> Draw:
    """Training times uniform over the rows i / steps, i = 1 ... steps. Source: DDPM algorithm 1, line 3.

    Raises ValueError where `steps` is not a whole number, at least 1.
    """
    if not _whole(steps):
        raise ValueError(f"draw_table needs a whole number of steps, at least 1, got {steps=}")
    return Draw(Partial(_draw_table, steps), 1 / steps, 1.0, Partial(jnp.ones_like), steps)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


def _draw_table(steps: Array, key: Array, n: int) -> Array:
    return jax.random.randint(key, (n,), 1, steps + 1) / steps


def draw_uniform(first: float = 0.0, last: float = 1.0) -> Draw:
    """Training times uniform in [first, last), stratified: one random offset, i / n added to it, modulo 1.

    Each time alone is uniform, together they lower the variance of the mean loss. Source: VDM appendix I.1.
    """
    return Draw(Partial(_draw_uniform, first, last), first, last, Partial(_uniform_density, first, last))


def _draw_uniform(first: Array, last: Array, key: Array, n: int) -> Array:
    return first + (last - first) * _stratified(key, n)


def _stratified(key: Array, n: int) -> Array:
    return jnp.mod(jax.random.uniform(key) + jnp.arange(n) / n, 1)


def _uniform_density(first: Array, last: Array, t: Array) -> Array:
    return jnp.ones_like(t) / (last - first)


def draw_independent(first: float = 0.0, last: float = 1.0) -> Draw:
    """Training times uniform in [first, last), each drawn by itself: what `draw_uniform` lowers the variance of."""
    return Draw(Partial(_draw_independent, first, last), first, last, Partial(_uniform_density, first, last))


def _draw_independent(first: Array, last: Array, key: Array, n: int) -> Array:
    return first + (last - first) * jax.random.uniform(key, (n,))


def draw_log_normal(mean: float = -1.2, std: float = 1.2) -> Draw:
    """Training times whose logarithm is normal, stratified and cut off at 5 deviations; under `edm` they are sigma.

    Source: EDM table 1, row "Noise distribution" (P_mean, P_std). Raises ValueError for std <= 0 or numbers that are not finite.
    """
    _normal("draw_log_normal", mean, std)
    first, last = (float(np.exp(mean + side * _DEVIATIONS * std)) for side in (-1, 1))
    return Draw(Partial(_draw_log_normal, mean, std, first, last), first, last, Partial(_log_normal_density, mean, std))


def _draw_log_normal(mean: Array, std: Array, first: Array, last: Array, key: Array, n: int) -> Array:
    return jnp.clip(jnp.exp(mean + std * _deviates(key, n)), first, last)


def _log_normal_density(mean: Array, std: Array, t: Array) -> Array:
    return _normal_density((jnp.log(t) - mean) / std) / (std * t)


def draw_logit_normal(mean: float = 0.0, std: float = 1.0) -> Draw:
    """Training times whose logit is normal, stratified and cut off at 5 deviations; a positive mean draws more noise.

    Source: Esser et al. 2024 (Stable Diffusion 3), eq. 19. Raises ValueError for std <= 0 or numbers that are not finite.
    """
    _normal("draw_logit_normal", mean, std)
    first, last = (float(1 / (1 + np.exp(-mean - side * _DEVIATIONS * std))) for side in (-1, 1))
    # Float32 has nothing between this and 1, where the density is not finite.
    last = min(last, 1 - 2.0**-24)
    return Draw(Partial(_draw_logit_normal, mean, std, first, last), first, last, Partial(_logit_normal_density, mean, std))


def _draw_logit_normal(mean: Array, std: Array, first: Array, last: Array, key: Array, n: int) -> Array:
    return jnp.clip(jax.nn.sigmoid(mean + std * _deviates(key, n)), first, last)


def _logit_normal_density(mean: Array, std: Array, t: Array) -> Array:
    return _normal_density((jnp.log(t) - jnp.log1p(-t) - mean) / std) / (std * t * (1 - t))


def _normal(name: str, mean: float, std: float) -> None:
    if not (np.isfinite(mean) and 0 < std < np.inf):
        raise ValueError(f"{name} needs a finite mean and a finite std > 0, got {mean=}, {std=}")


def _deviates(key: Array, n: int) -> Array:
    """n stratified standard normal deviates, none beyond the cut, [n]."""
    z = jax.scipy.special.ndtri(_TAIL + (1 - 2 * _TAIL) * _stratified(key, n))
    return jnp.clip(z, -_DEVIATIONS, _DEVIATIONS)


def _normal_density(z: Array) -> Array:
    return jnp.exp(-jnp.square(z) / 2) / (np.sqrt(2 * np.pi) * (1 - 2 * _TAIL))


def draw_importance(steps: int = 1000, history: int = 10, uniform: float = 0.001) -> Adaptive:
    """Rows i / steps of probability in proportion to the root mean square of their last `history` losses, stratified.

    A share `uniform` of the draws stays uniform, and all of them are until every row has its `history` losses. A loss divided by
    the draw's density has the mean that uniform rows would give it. Source: Nichol and Dhariwal 2021 (Improved DDPM), eq. 18 and
    section 3.3. Raises ValueError where steps or history is no whole number, at least 1, or `uniform` is outside [0, 1].
    """
    if not (_whole(steps) and _whole(history) and 0 <= uniform <= 1):
        need = "whole steps >= 1, whole history >= 1 and 0 <= uniform <= 1"
        raise ValueError(f"draw_importance needs {need}, got {steps=}, {history=}, {uniform=}")
    return Adaptive(Partial(_no_history, steps, history), Partial(_draw_of_history, uniform), _record, 1 / steps, 1.0, steps)


def _no_history(steps: int, history: int) -> History:
    return History(jnp.zeros((steps, history), jnp.float32), jnp.zeros((steps,), jnp.int32))


def _draw_of_history(uniform: Array, history: History) -> Draw:
    steps, depth = history.losses.shape
    size = jnp.sqrt(jnp.mean(jnp.square(history.losses), axis=1))
    known = (history.counts >= depth).all() & (size.sum() > 0)
    p = jnp.where(known, (1 - uniform) * size / jnp.where(known, size.sum(), 1) + uniform / steps, 1 / steps)
    return Draw(Partial(_draw_rows, p), 1 / steps, 1.0, Partial(_row_density, p), steps)


def _draw_rows(p: Array, key: Array, n: int) -> Array:
    below = jnp.cumsum(p)
    # Divided by the last, which float32 does not make exactly 1; the first row whose sum lies above u never has probability 0.
    row = jnp.searchsorted(below / below[-1], _stratified(key, n), side="right")
    return (1 + jnp.minimum(row, len(p) - 1)) / len(p)


def _row_density(p: Array, t: Array) -> Array:
    return len(p) * p[_row(t, len(p))]


def _row(t: Array, steps: int) -> Array:
    return jnp.clip(jnp.round(t * steps).astype(jnp.int32) - 1, 0, steps - 1)


def _record(history: History, t: Array, each: Array) -> History:
    """The history with the losses `each` [B] of the times t [B] in it, in their order; a row keeps its newest ones."""
    steps, depth = history.losses.shape
    row = _row(t, steps)
    same = row[:, None] == row[None, :]
    # Of one row's losses in a batch each takes the place after the one before; where they come round, only the newest are written.
    earlier, later = jnp.tril(same, -1).sum(1), jnp.triu(same, 1).sum(1)
    place = (history.counts[row] + earlier) % depth
    losses = history.losses.at[jnp.where(later < depth, row, steps), place].set(each.astype(jnp.float32), mode="drop")
    return History(losses, history.counts.at[row].add(1))
