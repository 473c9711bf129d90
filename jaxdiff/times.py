"""Times: the grids a sampler walks, noisiest first, and the draws a training step makes.

Grids are NumPy float64 arrays made on the host; a schedule turns them into levels. `grid` does that in float64 and pads.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff.level import Level
from jaxdiff.schedules import Schedule

Array = jax.Array

__all__ = ["draw_table", "draw_uniform", "karras", "strided", "uniform"]

# jax.enable_x64 replaced jax.experimental.enable_x64 within the supported range, and neither spans it.
_enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # type: ignore[attr-defined]


class Draw(NamedTuple):
    """How training draws times: `sample(key, n)` -> t [n], all within `first` <= t <= `last`."""

    sample: Callable[[Array, int], Array]
    first: float
    last: float


def uniform(n: int) -> np.ndarray:
    """n equal steps, [n]: 1, (n-1)/n, ..., 1/n. Raises ValueError for n < 1."""
    _at_least_one(n)
    return np.arange(n, 0, -1) / n


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
    if len(times) > length:
        raise ValueError(f"{len(times)} sampling steps are more than the maximum {length}")
    # TPUs have no float64, and a jitted float32 schedule would blur neighbouring levels.
    with _enable_x64(True), jax.default_device(_host()):
        alpha, sigma = (np.asarray(a, np.float32) for a in schedule(jnp.asarray(times, jnp.float64)))
    if not (np.isfinite(alpha).all() and np.isfinite(sigma).all()):
        raise ValueError(f"the schedule is not finite on times {times[0]:g} to {times[-1]:g}")
    return jax.tree.map(lambda a: np.pad(a, (0, length - len(times)), mode="edge"), Level(alpha, sigma))  # type: ignore[arg-type]


def _host() -> jax.Device | None:
    # JAX_PLATFORMS=cuda leaves no CPU device; the default device then has to do.
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def draw_table(steps: int = 1000) -> Draw:
    """Training times uniform over the rows i / steps, i = 1 ... steps. Source: DDPM algorithm 1, line 3."""
    return Draw(Partial(_draw_table, steps), 1 / steps, 1.0)


def _draw_table(steps: Array, key: Array, n: int) -> Array:
    return jax.random.randint(key, (n,), 1, steps + 1) / steps


def draw_uniform(first: float = 0.0, last: float = 1.0) -> Draw:
    """Training times uniform in [first, last), stratified: one random offset, i / n added to it, modulo 1.

    Each time alone is uniform, together they lower the variance of the mean loss. Source: VDM appendix I.1.
    """
    return Draw(Partial(_draw_uniform, first, last), first, last)


def _draw_uniform(first: Array, last: Array, key: Array, n: int) -> Array:
    return first + (last - first) * jnp.mod(jax.random.uniform(key) + jnp.arange(n) / n, 1)
