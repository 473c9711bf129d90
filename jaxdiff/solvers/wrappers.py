"""Functions from solver to solver: noise between steps and corrections, which make a multistep solver forget, and a record."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff.checks import number, ordered, positive, share, whole
from jaxdiff.denoiser import Denoiser, partial
from jaxdiff.level import Level, posterior_std
from jaxdiff.solvers.base import Noise, Solver, fold, kept, langevin_step, with_noise

Array = jax.Array


def ancestral(solver: Solver, eta: float | Array = 1.0, noise: Noise = jax.random.normal) -> Solver:
    """Steps to a level below s, of deviation sqrt(sigma_s^2 - std^2), and adds noise of std = eta posterior_std to reach s.

    Source: k-diffusion's ancestral samplers; with `ddim` it is DDIM's own eta.
    """
    return solver._replace(step=Partial(_ancestral, *solver, share("eta", eta), partial(noise)))


def _ancestral(init, step, final, eta, noise, keys, state, t, s):
    std = eta * posterior_std(t, s)
    state, p = step(fold(keys, 1), state, t, Level(s.alpha, kept(std, s)))
    return init(with_noise(noise, keys, state.x, std)), p


def churn(
    solver: Solver,
    gamma: float | Array,
    within: tuple[float, float] = (0.0, float("inf")),
    scale: float | Array = 1.0,
    noise: Noise = jax.random.normal,
) -> Solver:
    """Raises sigma by the share gamma before each step whose sigma / alpha lies in `within`, by noise of deviation `scale`.

    `gamma` is a step's, min(S_churn / N, sqrt(2) - 1) in N steps. Raises ValueError for one outside [0, sqrt(2) - 1], a range that
    is none and a negative scale. Source: EDM algorithm 2, lines 4 to 6.
    """
    most = np.sqrt(2) - 1
    gamma = number("gamma", gamma, f"a number from 0 to sqrt(2) - 1 = {most:.4f}", lambda v: (v >= 0) & (v <= most + 1e-6))
    lo, hi = (number("within", end, "a number", lambda v: ~np.isnan(v)) for end in within)
    ordered(*within)
    scale = number("scale", scale, "a finite number of at least 0", lambda v: (v >= 0) & np.isfinite(v))
    return solver._replace(step=Partial(_churn, *solver, gamma, lo, hi, scale, partial(noise)))


def _churn(init, step, final, gamma, lo, hi, scale, noise, keys, state, t, s):
    relative = t.sigma / jnp.maximum(t.alpha, jnp.finfo(t.alpha.dtype).tiny)
    gamma = jnp.where((relative >= lo) & (relative <= hi), gamma, 0)
    raised = Level(t.alpha, t.sigma * (1 + gamma))
    std = t.sigma * jnp.sqrt(gamma * (gamma + 2)) * scale

    def churned():
        return init(with_noise(noise, keys, state.x, std))

    state = jax.lax.cond(jnp.any(gamma > 0), churned, lambda: state)
    return step(fold(keys, 1), state, raised, s)


def langevin(
    solver: Solver, denoise: Denoiser, ratio: float | Array = 0.16, steps: int = 1, noise: Noise = jax.random.normal
) -> Solver:
    """Predictor and corrector: after each step of `solver`, `steps` of Langevin dynamics at the level reached.

    Their length is 2 (ratio sigma_s alpha_t / alpha_s)^2. The source has |noise| / |score| for sigma, both means over a batch,
    which would tie the samples of one together; the ratio is sigma wherever the noise that is left fills the space. Source: Song et
    al. 2021, algorithms 2 to 5, with `ratio` their r, "snr" in the code.
    """
    numbers = jnp.arange(whole("steps", steps, 0))
    step = Partial(_langevin, *solver, partial(denoise), positive("ratio", ratio), numbers, partial(noise))
    return solver._replace(step=step)


def _langevin(init, step, final, denoise, ratio, numbers, noise, keys, state, t, s):
    state, p = step(fold(keys, 1), state, t, s)

    size = 2 * jnp.square(ratio * t.alpha / s.alpha)

    def correct(x, n):
        return langevin_step(noise, fold(keys, n + 2), denoise(x, s), x, s, size), None

    x, _ = jax.lax.scan(correct, state.x, numbers)
    return init(x), p


class Recorded(NamedTuple):
    """The state of a solver that keeps a record: its own, and the x0 and the noisy samples at the levels asked for, [F, B, ...]."""

    x: Array
    state: Any
    x0: Array
    noisy: Array


def recorded(solver: Solver, at: Level) -> Solver:
    """The solver, with what the denoiser said and the noisy samples at the levels `at` [F] of its grid kept in its state.

    Only these are in memory, where `solve`'s stacked predictions are those of every level. What is never reached stays zero.
    """
    return Solver(Partial(_begin_record, solver.init, at), Partial(_record, solver.step, at), Partial(_end_record, solver.final))


def _begin_record(init, at, x):
    empty = jnp.zeros((at.alpha.shape[0], *x.shape), x.dtype)
    return Recorded(x, init(x), empty, empty)


def _record(step, at, keys, state, t, s):
    inner, p = step(keys, state.state, t, s)
    here = ((at.alpha == t.alpha) & (at.sigma == t.sigma)).reshape(-1, *(1,) * state.x.ndim)
    x0, noisy = (jnp.where(here, now[None], kept) for now, kept in ((p.x0, state.x0), (state.state.x, state.noisy)))
    return Recorded(inner.x, inner, x0, noisy), p


def _end_record(final, state, t):
    return final(state.state, t)
