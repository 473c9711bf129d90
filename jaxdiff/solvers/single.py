"""Solvers that remember nothing between steps: one function `line` under several names, Runge-Kutta rules, and stochastic ones."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff.checks import number, positive, share, whole
from jaxdiff.denoiser import Denoiser, partial
from jaxdiff.level import beta_std, between, learned_std, posterior_std, with_x0
from jaxdiff.solvers.base import (
    Noise,
    Solver,
    State,
    Std,
    denoised,
    deterministic,
    dial,
    fold,
    half,
    langevin_step,
    move,
    with_noise,
)
from jaxdiff.solvers.wrappers import ancestral, churn, langevin

Array = jax.Array


def line(denoise: Denoiser, std: Std = deterministic, add: Std | None = None, noise: Noise = jax.random.normal) -> Solver:
    """The solver x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + add * noise.

    `std(t, s, prediction)` shapes the mean and `add(t, s, prediction)` (the same unless given) is the noise really added;
    `noise(key, shape, dtype)` draws for one sample. Source: DDIM eq. 12.
    """
    denoise = partial(denoise)
    step = Partial(_line, denoise, partial(std), partial(std if add is None else add), partial(noise))
    return Solver(Partial(State), step, Partial(denoised, denoise))


def _line(denoise, std, add, noise, keys, state, t, s):
    p = denoise(state.x, t)
    return State(move(std, add, noise, keys, p, t, s)), p


def ddpm(denoise: Denoiser, std: Std = posterior_std, noise: Noise = jax.random.normal) -> Solver:
    """Ancestral sampling: the posterior's mean, and noise of deviation `std`, `posterior_std` or `beta_std`.

    Source: DDPM algorithm 2; section 3.2 for the two deviations.
    """
    return line(denoise, posterior_std, std, noise)


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

    Raises ValueError for an eta outside [0, 1]. Source: DDIM eqs. 12 and 16.
    """
    return line(denoise, Partial(dial, share("eta", eta)), noise=noise)


def euler(denoise: Denoiser) -> Solver:
    """Euler's rule for the probability flow, in x / alpha and sigma / alpha: `ddim` with eta = 0. Source: EDM section 3."""
    return ddim(denoise)


def euler_ancestral(denoise: Denoiser, eta: float | Array = 1.0, noise: Noise = jax.random.normal) -> Solver:
    """Euler's step to a lower level, then noise up to the next one: `ddim` with eta = 1. Source: k-diffusion's "Euler a"."""
    return ddim(denoise, eta, noise)


def dpmpp_1s(denoise: Denoiser, eta: float | Array = 0.0, noise: Noise = jax.random.normal) -> Solver:
    """DPM-Solver++ of first order: `ddim`; eta = 1 is its SDE form. Source: Lu et al. 2022 (DPM-Solver++), section 4."""
    return ddim(denoise, eta, noise)


def consistency(denoise: Denoiser, noise: Noise = jax.random.normal) -> Solver:
    """Multistep consistency sampling: all of eps is given up for fresh noise, x_s = alpha_s x0 + sigma_s noise.

    For consistency functions; a denoiser's samples lose variance by it. Source: Song et al. 2023, algorithm 1.
    """
    return line(denoise, _all_of_sigma, noise=noise)


def _all_of_sigma(t, s, prediction):
    return s.sigma


def heun(denoise: Denoiser) -> Solver:
    """The trapezoid rule of the line integral, second order from two evaluations a step.

    Where alpha = 1 it is EDM's Heun, on the straight path flow matching's. Source: EDM algorithm 1.
    """
    denoise = partial(denoise)
    return Solver(Partial(State), Partial(_trapezoid, denoise), Partial(denoised, denoise))


def _trapezoid(denoise, keys, state, t, s):
    p = denoise(state.x, t)
    q = denoise(s.alpha * p.x0 + s.sigma * p.eps, s)
    x0, eps = (p.x0 + q.x0) / 2, (p.eps + q.eps) / 2
    return State(state.x + (s.alpha - t.alpha) * x0 + (s.sigma - t.sigma) * eps), p


def dpm2(denoise: Denoiser) -> Solver:
    """The midpoint rule of the line integral, at the geometric mean of the levels: second order from two evaluations a step.

    From alpha = 0 the first step is of first order. Source: k-diffusion's DPM2, which it is where alpha = 1; `dpmpp_2s` is the
    midpoint rule of DPM-Solver++ on every curve.
    """
    denoise = partial(denoise)
    return Solver(Partial(State), Partial(_midpoint, denoise), Partial(denoised, denoise))


def _midpoint(denoise, keys, state, t, s):
    p, u = denoise(state.x, t), between(t, s, 0.5)
    q = denoise(u.alpha * p.x0 + u.sigma * p.eps, u)
    x = state.x + (s.alpha - t.alpha) * q.x0 + (s.sigma - t.sigma) * q.eps
    # Nothing lies geometrically between alpha = 0 and another.
    return State(jnp.where(t.alpha > 0, x, s.alpha * p.x0 + s.sigma * p.eps)), p


def dpm2_ancestral(denoise: Denoiser, eta: float | Array = 1.0, noise: Noise = jax.random.normal) -> Solver:
    """`dpm2` to a lower level, then noise up to the next one. Source: k-diffusion's "DPM2 a"."""
    return ancestral(dpm2(denoise), eta, noise)


def dpmpp_2s(denoise: Denoiser, eta: float | Array = 0.0, noise: Noise = jax.random.normal) -> Solver:
    """DPM-Solver++(2S), second order from two evaluations a step, the second halfway in logsnr; eta = 1 is its SDE form.

    From alpha = 0 the first step is of first order. Source: Lu et al. 2022 (DPM-Solver++), algorithm 1 with r = 1/2; the SDE form
    is k-diffusion's "DPM++ SDE".
    """
    denoise, std = partial(denoise), Partial(dial, share("eta", eta))
    return Solver(Partial(State), Partial(_two_stages, denoise, std, partial(noise)), Partial(denoised, denoise))


def _two_stages(denoise, std, noise, keys, state, t, s):
    p, u = denoise(state.x, t), between(t, s, 0.5)
    q = denoise(move(std, std, noise, fold(keys, 1), p, t, u), u)
    x0 = jnp.where(t.alpha > 0, q.x0, p.x0)
    return State(move(std, std, noise, keys, with_x0(state.x, t, x0, p.aux), t, s)), p


def dpmpp_2s_ancestral(denoise: Denoiser, eta: float | Array = 1.0, noise: Noise = jax.random.normal) -> Solver:
    """`dpmpp_2s` to a lower level, then noise up to the next one. Source: k-diffusion's "DPM++ 2S a"."""
    return ancestral(dpmpp_2s(denoise), eta, noise)


def churned(
    denoise: Denoiser,
    solver=heun,
    gamma: float | Array = 0.2,
    within: tuple[float, float] = (0.05, 50.0),
    scale: float | Array = 1.003,
    noise: Noise = jax.random.normal,
) -> Solver:
    """EDM's stochastic sampler: before each step of `solver`, the noise is raised by the share gamma, as `wrappers.churn` does.

    Source: EDM algorithm 2, with gamma = min(S_churn / N, sqrt(2) - 1), `within` = (S_min, S_max) and `scale` = S_noise; the
    defaults are table 5's for CIFAR-10-like images at S_churn / N = 0.2. The last evaluation, which ends at sigma = 0, is not
    churned: theirs is where S_min lets it.
    """
    return churn(solver(denoise), gamma, within, scale, noise)


def corrected(
    denoise: Denoiser, solver=ddpm, ratio: float | Array = 0.16, steps: int = 1, noise: Noise = jax.random.normal
) -> Solver:
    """Predictor and corrector: `solver`, and after each of its steps `steps` of Langevin dynamics, as `wrappers.langevin` does.

    Source: Song et al. 2021, algorithms 2 to 5; ratio 0.16 is their VE model's on CIFAR-10.
    """
    return langevin(solver(denoise), denoise, ratio, steps, noise)


def euler_maruyama(denoise: Denoiser, eta: float | Array = 1.0, noise: Noise = jax.random.normal) -> Solver:
    """The reverse SDE by Euler and Maruyama, first order; eta = 0 is Euler's rule for the probability flow.

    The differential is that of half-logsnr, not of a time, and so the same under every schedule; from alpha = 0 the first step is
    `ddim`'s. Source: Song et al. 2021, eq. 6 and appendix E; eta as in `score.reverse_sde`.
    """
    denoise = partial(denoise)
    eta = number("eta", eta, "a finite number of at least 0", lambda v: (v >= 0) & np.isfinite(v))
    step = Partial(_euler_maruyama, denoise, eta, partial(noise))
    return Solver(Partial(State), step, Partial(denoised, denoise))


def _euler_maruyama(denoise, eta, noise, keys, state, t, s):
    p, forward = denoise(state.x, t), half(s) - half(t)
    known = jnp.isfinite(forward)
    rate = jnp.where(known, eta**2 * forward, 0)
    mean = state.x + (s.alpha - t.alpha) * p.x0 + (s.sigma - t.sigma - rate * t.sigma) * p.eps
    std = jnp.sqrt(2 * jnp.maximum(rate, 0)) * t.sigma
    x = with_noise(noise, keys, mean, std)
    return State(jnp.where(known, x, move(Partial(dial, eta), Partial(dial, eta), noise, keys, p, t, s))), p


def annealed_langevin(denoise: Denoiser, size: float | Array = 0.05, steps: int = 10, noise: Noise = jax.random.normal) -> Solver:
    """Langevin dynamics at each level in turn, nothing between: `steps` of x - size sigma eps + sqrt(2 size) sigma noise.

    x keeps x / alpha from level to level. Their step epsilon sigma_i^2 / sigma_L^2 is 2 size sigma_i^2. Source: Song and Ermon
    2019, algorithm 1; the last denoising is Jolicoeur-Martineau et al. 2021's.
    """
    denoise = partial(denoise)
    # The count as a shape: it is static, and the solver remains a pytree of arrays.
    numbers = jnp.arange(whole("steps", steps, 1))
    step = Partial(_annealed_langevin, denoise, positive("size", size), numbers, partial(noise))
    return Solver(Partial(State), step, Partial(denoised, denoise))


def _annealed_langevin(denoise, size, numbers, noise, keys, state, t, s):
    def one(x, n):
        return langevin_step(noise, fold(keys, n), denoise(x, s), x, s, size), None

    p = denoise(state.x, t)
    x, _ = jax.lax.scan(one, state.x * jnp.where(t.alpha > 0, s.alpha / t.alpha, s.sigma / t.sigma), numbers)
    return State(x), p
