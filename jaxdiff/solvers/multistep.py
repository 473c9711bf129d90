"""Multistep solvers: what the denoiser said at earlier levels is extrapolated, at one evaluation a step.

All of them are one step: an affine mix of the x0 (or the eps) of this level and of those before it, sum_j w_j x0_j with weights
that sum to one, and then the first-order move. A row is a function that gives the weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff.checks import share
from jaxdiff.denoiser import Denoiser, partial
from jaxdiff.level import Level, with_x0
from jaxdiff.solvers.base import (
    POINTS,
    Noise,
    Solver,
    Std,
    denoised,
    deterministic,
    dial,
    half,
    kept,
    move,
    under_exponential,
)

Array = jax.Array
# (half-logsnrs of this level and of those before it [K], NaN where there was none; that of the next; the exponent) -> weights [K]
Weights = Callable[[Array, Array, Array], Array]


class History(NamedTuple):
    """The state: the noisy sample; what was said at the K - 1 levels before it, newest first, [K - 1, B, ...]; their half-logsnrs.

    A half-logsnr of NaN stands for a level that there has not been.
    """

    x: Array
    past: Array
    lam: Array


def multistep(
    denoise: Denoiser, weights: Weights, order: int, std: Std = deterministic, noise: Noise = jax.random.normal
) -> Solver:
    """The solver that moves with sum_j w_j x0_j, of this level and the `order` - 1 before it, in place of x0.

    `weights(lam [order], lam_s, exponent) -> [order]` sum to one and are zero for levels that there have not been; `exponent` is
    by how much log(x) falls from t to s where x0 = 0, measured against alpha's way: h for a flow, 2 h for the reverse SDE.
    """
    denoise = partial(denoise)
    step = Partial(_x0_step, denoise, partial(weights), partial(std), partial(noise))
    return Solver(_start(order), step, Partial(denoised, denoise))


def _within_reach(lam: Array, lam_s: Array) -> Array:
    """`lam` [K] with NaN for all levels before this one where the step to lam_s is more than twice as long as the one before it.

    So far the polynomial is not extrapolated: on a grid whose last step is seven times the one before, mixes such as
    12 x0 - 25 x0' + 14 x0'' would end up there.
    """
    steps = jnp.abs(lam_s - lam[0]), jnp.abs(lam[0] - lam[1:2])
    far = (steps[0] > 2 * steps[1]).any()
    return jnp.where(far & (jnp.arange(len(lam)) > 0), jnp.nan, lam)


def _start(order: int) -> Partial:
    # The length as a shape: static, where a number in a Partial would be traced.
    return Partial(_no_history, jnp.full((order - 1,), jnp.nan))


def _no_history(lam: Array, x: Array) -> History:
    return History(x, jnp.zeros((len(lam), *x.shape), x.dtype), lam.astype(x.dtype))


def _x0_step(denoise, weights, std, noise, keys, state, t, s):
    p = denoise(state.x, t)
    lam = jnp.concatenate([half(t)[None], state.lam])
    # x is multiplied by sqrt(sigma_s^2 - std^2) / sigma_t: by how much that falls against alpha is what the mix is integrated with.
    exponent = half(s) - lam[0] + jnp.log(s.sigma / kept(std(t, s, p), s))
    x0 = _mix(weights(_within_reach(lam, half(s)), half(s), exponent), p.x0, state.past)
    x = move(std, std, noise, keys, with_x0(state.x, t, x0, p.aux), t, s)
    return _remember(state, x, p.x0, lam), p


def _eps_step(denoise, weights, keys, state, t, s):
    p = denoise(state.x, t)
    lam = jnp.concatenate([half(t)[None], state.lam])
    eps = _mix(weights(lam, half(s), lam[0] - half(s)), p.eps, state.past)
    # At alpha = 0, where eps is all of x, x0 is the prediction's own.
    x0 = jnp.where(t.alpha > 0, (state.x - t.sigma * eps) / jnp.where(t.alpha > 0, t.alpha, 1), p.x0)
    return _remember(state, s.alpha * x0 + s.sigma * eps, p.eps, lam), p


def _mix(w: Array, now: Array, past: Array) -> Array:
    return w[0] * now + jnp.tensordot(w[1:], past, 1)


def _remember(state: History, x: Array, said: Array, lam: Array) -> History:
    return History(x, jnp.concatenate([said[None], state.past])[:-1], lam[:-1])


def polynomial(lam: Array, lam_s: Array, exponent: Array) -> Array:
    """The weights whose mix is the polynomial in half-logsnr, averaged over the step under exp(exponent r), r from 0 to 1.

    An exponential integrator of order K. `lam` is [K], newest first; levels that there have not been (NaN), or that have no alpha,
    lower the order. Source: Lu et al. 2022 (DPM-Solver++), eq. 3.4, with the interpolating polynomial for Taylor's; Hochbruck and
    Ostermann 2010, section 2.5.
    """
    return _averaged((lam - lam[0]) / (lam_s - lam[0]), exponent)


def polynomial_in_sigma(lam: Array, lam_s: Array, exponent: Array) -> Array:
    """The weights of the interpolating polynomial in sigma / alpha: Adams and Bashforth's for any steps; `exponent` is not used."""
    rho, rho_s = jnp.exp(-lam), jnp.exp(-lam_s)
    return _averaged((rho - rho[0]) / (rho_s - rho[0]), jnp.zeros_like(exponent))


def _averaged(places: Array, exponent: Array) -> Array:
    """The weights of values at `places` [K], in steps, that average their polynomial over [0, 1] under exp(exponent r)."""
    # The step starts at place 0 whatever the levels are; once one is unknown, so are those before it.
    there = jnp.cumprod(jnp.isfinite(places).at[0].set(True)).astype(bool)
    places = jnp.where(there, places, 0).at[0].set(0)
    r = POINTS.astype(places.dtype)[None, None]
    other = there[:, None] & there[None, :] & ~np.eye(len(places), dtype=bool)
    gap = jnp.where(other, places[:, None] - places[None, :], 1)
    basis = jnp.where(other[:, :, None], (r - places[None, :, None]) / gap[:, :, None], 1).prod(1)
    return jnp.where(there, basis @ under_exponential(exponent), 0)


def _two(lam: Array, lam_s: Array, exponent: Array) -> Array:
    # h / (2 h_before); zero, hence first order, where there is no step before and where one of them started at alpha = 0.
    ratio = (lam_s - lam[0]) / (lam[0] - lam[1]) / 2
    ratio = jnp.where(jnp.isfinite(ratio), ratio, 0)
    return jnp.stack([1 + ratio, -ratio])


def dpmpp_2m(denoise: Denoiser, eta: float | Array = 0.0, noise: Noise = jax.random.normal) -> Solver:
    """DPM-Solver++(2M), second order from one evaluation a step; eta = 1 is its SDE form.

    Started at alpha = 0 exactly, its first two steps are of first order. Source: Lu et al. 2022 (DPM-Solver++), algorithm 2, and
    SDE-DPM-Solver++(2M) of the same paper.
    """
    return multistep(denoise, _two, 2, Partial(dial, share("eta", eta)), noise)


def _three_published(lam: Array, lam_s: Array, exponent: Array) -> Array:
    """DPM-Solver++(3M)'s as its code has them: phi_3 is given the second divided difference, which is half the derivative."""
    h, r0, r1 = lam_s - lam[0], (lam[0] - lam[1]) / (lam_s - lam[0]), (lam[1] - lam[2]) / (lam_s - lam[0])
    safe = jnp.where(exponent > 0, exponent, 1)
    whole = -jnp.expm1(-safe)
    phi_2 = 1 - whole / safe
    phi_3 = phi_2 / safe - 0.5
    now, one, two = jnp.eye(3, dtype=lam.dtype)
    first = (now - one) / r0
    before = (one - two) / r1
    slope = first + (first - before) * r0 / (r0 + r1)
    curve = (first - before) / (r0 + r1)
    third = now + (phi_2 * slope - phi_3 * curve) / whole
    second = now + phi_2 * first / whole
    known = jnp.isfinite(h / r0), jnp.isfinite(h / r0 / r1)
    return jnp.where(known[1], third, jnp.where(known[0], second, now))


def dpmpp_3m(denoise: Denoiser, eta: float | Array = 0.0, noise: Noise = jax.random.normal) -> Solver:
    """DPM-Solver++(3M) as published code has it, one evaluation a step; eta = 1 is its SDE form.

    Its second difference is half the derivative it stands for, so that it is of second order; `dpmpp_3m_corrected` is of third.
    Source: Lu et al. 2022 (DPM-Solver++), appendix, as k-diffusion's "DPM++ 3M SDE" has it.
    """
    return multistep(denoise, _three_published, 3, Partial(dial, share("eta", eta)), noise)


def dpmpp_3m_corrected(denoise: Denoiser, eta: float | Array = 0.0, noise: Noise = jax.random.normal) -> Solver:
    """DPM-Solver++(3M) with the quadratic through three x0, third order from one evaluation a step; eta = 1 is its SDE form.

    Source: Lu et al. 2022 (DPM-Solver++), eq. 3.4, integrated exactly.
    """
    return multistep(denoise, polynomial, 3, Partial(dial, share("eta", eta)), noise)


def deis(denoise: Denoiser, order: int = 3) -> Solver:
    """DEIS, exponential Adams and Bashforth of eps in half-logsnr (log rho), of `order` 1 to 4 from one evaluation a step.

    Source: Zhang and Chen 2023 (DEIS), eq. 15, tAB with polynomials in log rho. Raises ValueError for another order.
    """
    return _of_eps("deis", denoise, polynomial, order)


def lms(denoise: Denoiser, order: int = 4) -> Solver:
    """The linear multistep method of Adams and Bashforth in sigma / alpha, of `order` 1 to 4 from one evaluation a step.

    Source: k-diffusion's "LMS"; Liu et al. 2022 (PNDM), eq. 9 for equal steps. Raises ValueError for another order.
    """
    return _of_eps("lms", denoise, polynomial_in_sigma, order)


def _of_eps(name: str, denoise: Denoiser, weights: Weights, order: int) -> Solver:
    _check_order(name, order, 4)
    denoise = partial(denoise)
    return Solver(_start(order), Partial(_eps_step, denoise, partial(weights)), Partial(denoised, denoise))


def _check_order(name: str, order: int, most: int) -> None:
    if order not in range(1, most + 1):
        raise ValueError(f"{name} has order 1 to {most}, got {order}")


class Corrected(NamedTuple):
    """UniPC's state: the predicted x; of the step that led to it the corrected x before, that level, and x0 there and earlier."""

    x: Array
    before: Array
    alpha: Array
    sigma: Array
    past: Array
    lam: Array


def unipc(denoise: Denoiser, order: int = 3) -> Solver:
    """UniPC, a predictor of `order` 1 to 3 and a corrector one higher that costs no evaluation, in the form B_2(h) = exp(h) - 1.

    Source: Zhao et al. 2023 (UniPC), algorithms 1 and 2 with data prediction, multistep; weights of 1/2 at the lowest orders, as in
    its appendix. Raises ValueError for another order.
    """
    _check_order("unipc", order, 3)
    denoise = partial(denoise)
    step = Partial(_predict_correct, denoise, Partial(_unified))
    return Solver(Partial(_uncorrected, jnp.full((order,), jnp.nan)), step, Partial(denoised, denoise))


def _uncorrected(lam: Array, x: Array) -> Corrected:
    one = jnp.ones((), x.dtype)
    return Corrected(x, x, one, one, jnp.zeros((len(lam), *x.shape), x.dtype), lam.astype(x.dtype))


def _unified(lam: Array, lam_s: Array, exponent: Array) -> Array:
    """The predictor's weights: the polynomial's, at order 2 those of `dpmpp_2m`, to which any B(h) reduces its one equation."""
    if len(lam) == 1:
        return jnp.ones_like(lam)
    two = jnp.concatenate([_two(lam[:2], lam_s, exponent), jnp.zeros_like(lam[2:])])
    if len(lam) == 2:
        return two
    return jnp.where(jnp.isfinite(lam[2]), polynomial(lam, lam_s, exponent), two)


def _predict_correct(denoise, weights, keys, state, t, s):
    p, lam_t = denoise(state.x, t), half(t)
    x = _correct(state, p.x0, lam_t, t)
    lam, past = jnp.concatenate([lam_t[None], state.lam[:-1]]), jnp.concatenate([p.x0[None], state.past[:-1]])
    x0 = _mix(weights(_within_reach(lam, half(s)), half(s), half(s) - lam_t), p.x0, past[1:])
    ahead = with_x0(x, t, x0)
    return Corrected(s.alpha * ahead.x0 + s.sigma * ahead.eps, x, t.alpha, t.sigma, past, lam), p


def _correct(state: Corrected, x0: Array, lam_t: Array, t: Level) -> Array:
    """The last step once more, its polynomial now through its end (place 1), too; x as it is where there was none."""
    h = lam_t - state.lam[0]
    before = (state.lam[1:] - state.lam[0]) / h
    places = jnp.concatenate([jnp.array([0, 1], h.dtype), before])
    half_half = jnp.zeros_like(places).at[:2].set(0.5)
    w = jnp.where(jnp.isfinite(before[:1]).any(), _averaged(places, h), half_half)
    mixed = jnp.tensordot(w, jnp.concatenate([state.past[:1], x0[None], state.past[1:]]), 1)
    again = with_x0(state.before, Level(state.alpha, state.sigma), mixed)
    return jnp.where(jnp.isfinite(h), t.alpha * again.x0 + t.sigma * again.eps, state.x)
