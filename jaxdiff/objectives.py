"""Objectives: what training minimises, one number a sample, as a config names it.

`simple` is a weighted squared error. `hybrid` and `vlb` are the variational bound of a table of steps with a learned variance.
`bound` is the continuous-time bound with all its terms, which may train the schedule too. `cross_entropy` trains a classifier.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff.classifier import at_label, log_probs
from jaxdiff.denoiser import Net, denoiser, network_input
from jaxdiff.level import Level, Prediction, diffuse
from jaxdiff.likelihood import (
    bayes_decoder,
    bits_per_dim,
    diffusion_term,
    discretised_decoder,
    eps_error,
    learned,
    prior_kl,
    step_kl,
)
from jaxdiff.losses import denoising_loss
from jaxdiff.schedules import Schedule, interior, of_logsnr
from jaxdiff.targets import Target, invert, regress

Array = jax.Array

__all__ = ["bound", "cross_entropy", "hybrid", "simple", "vlb"]


class Problem(NamedTuple):
    """What an objective is told of the process it trains, besides the data, the noise and the time.

    `weight(t)` is the factor on the squared error of the target; `density(t)` that of the draw, and `ends` its first and last time;
    `steps` the rows of the table that t is drawn from, 0 without a table; `values` black and white as the process sees them,
    [1, ..., 1, C] each; `curve` the parameters of a learned schedule, None where it is fixed. Where the network says classes,
    `target` is None, and `label` [B] is what it ought to say.
    """

    net: Net
    target: Target | None
    schedule: Schedule
    weight: Callable[[Array], Array]
    density: Callable[[Array], Array]
    steps: int
    ends: tuple[float, float]
    values: tuple[Array, Array]
    data_std: float
    curve: Any = None
    label: Array | None = None


class Objective(NamedTuple):
    """`loss(problem, x0, eps, t) -> (loss of each sample [B], metrics)`, with x0 and eps [B, ...] and t [B, 1, ..., 1].

    `outputs` is how many numbers the network says of an entry: 2 with a learned variance, 0 where it says classes instead; `table`
    whether t must be a table's rows; `curve` whether it must be continuous, between two ends, and a learned schedule can be
    trained; `weighted` whether it asks the problem's weight.
    """

    outputs: int
    loss: Callable[[Problem, Array, Array, Array], tuple[Array, dict[str, Array]]]
    table: bool = False
    curve: bool = False
    weighted: bool = True


def simple() -> Objective:
    """The squared error of the target times its weight, averaged over entries. Source: DDPM eq. 14, for any target and weight."""
    return Objective(1, _simple)


def vlb() -> Objective:
    """The discrete bound without its constant prior term, in bits per dimension, from one random term; learned variance.

    The last term is the decoder's, a discretised Gaussian. Source: Nichol and Dhariwal 2021 (Improved DDPM), eqs. 4 to 7 and 15.
    """
    return Objective(2, _vlb, table=True, weighted=False)


def hybrid(share: float = 0.001) -> Objective:
    """`simple` plus `share` of `vlb`, through which only the variance learns: the predicted mean is held there.

    Source: Improved DDPM, eq. 16. Raises ValueError for a negative share.
    """
    if not share >= 0:
        raise ValueError(f"hybrid needs a share of at least 0, got {share}")
    return Objective(2, Partial(_hybrid, share), table=True)


def bound() -> Objective:
    """The continuous-time bound in bits per dimension: prior, diffusion at one random time, and a decoder by Bayes' rule.

    Of a learned schedule the ends follow the bound's gradient; to the rest the bound does not react, and it follows the gradient of
    the squared diffusion term, whose mean is the estimate's variance. Source: VDM eqs. 11, 14, 17 and appendix I.2.
    """
    return Objective(1, _bound, curve=True, weighted=False)


def cross_entropy() -> Objective:
    """The negative log-probability that a classifier of noisy images gives to their labels, in nats, and its accuracy.

    Source: Dhariwal and Nichol 2021 (ADM), section 4.
    """
    return Objective(0, _cross_entropy, weighted=False)


def split_output(outputs: int, y: Array) -> tuple[Array, Any]:
    """A network's output as (what it says, aux): with 2 outputs the second half of the channels is the variance's."""
    if outputs != 2:
        return y, None
    y, variance = jnp.split(y, 2, axis=-1)
    return y, variance


def _mean(a: Array) -> Array:
    return a.reshape(a.shape[0], -1).mean(1)


def _predict(problem: Problem, x: Array, level: Level) -> tuple[Array, Prediction]:
    y, aux = problem.net(*network_input(x, level, problem.data_std))
    return y, invert(problem.target, level, x, y)._replace(aux=aux)  # type: ignore[arg-type]


def _simple(problem, x0, eps, t):
    level = problem.schedule(t)
    unused = jax.random.key(0)  # the noise is given
    each = denoising_loss(unused, problem.net, problem.target, x0, level, eps, lambda level: problem.weight(t), problem.data_std)
    return each, {}


def _vlb(problem, x0, eps, t):
    level = problem.schedule(t)
    x = diffuse(level, x0, eps)
    return _term(problem, x0, x, t, _predict(problem, x, level)[1]), {}


def _hybrid(share, problem, x0, eps, t):
    level = problem.schedule(t)
    x = diffuse(level, x0, eps)
    y, p = _predict(problem, x, level)
    held = Prediction(*map(jax.lax.stop_gradient, p[:2]), p.aux)
    error = _mean(problem.weight(t) * jnp.square(y.astype(x0.dtype) - regress(problem.target, level, x0, eps)))
    term = _term(problem, x0, x, t, held)
    return error + share * term, {"simple": error, "vlb": term}


def _term(problem: Problem, x0: Array, x: Array, t: Array, p: Prediction) -> Array:
    """The bound in bits per dimension, estimated by its term at the row t of the table, [B]."""
    steps = problem.steps
    # Counted in whole rows: t - 1 / steps would be off by a rounding.
    row = jnp.round(t * steps)
    decodes = row == 1
    # The first row's term is the decoder's. Its Kullback-Leibler term has no variance, and the next row's stands in, unused.
    at, to = (problem.schedule(jnp.where(decodes, after, before) / steps) for after, before in ((row + 1, row), (row, row - 1)))
    kl = step_kl(x0, p, at, to, learned.step)
    before, last = (problem.schedule(jnp.asarray(i / steps, x0.dtype)) for i in (2, 1))
    # Elsewhere than at the first row the decoder is asked something harmless: its derivative there is not used, but must be finite.
    near = p._replace(x0=jnp.where(decodes, p.x0, x0))
    log = discretised_decoder(*problem.values)(x0, x, near, last, learned.last(before, last, p))
    return steps * bits_per_dim(_mean(jnp.where(decodes, -log, kl)), 1)


def _cross_entropy(problem, x0, eps, t):
    level = problem.schedule(t)
    each = log_probs(problem.net, diffuse(level, x0, eps), level, problem.data_std)
    right = each.argmax(-1) == problem.label
    return -at_label(each, problem.label), {"accuracy": right.astype(jnp.float32)}


def _bound(problem, x0, eps, t):
    low, high = (problem.schedule(jnp.asarray(end, x0.dtype)) for end in problem.ends)
    x = diffuse(low, x0, eps)
    log = bayes_decoder(*problem.values)(x0, x, Prediction(x, eps), low, low.sigma)
    dims = int(np.prod(x0.shape[1:]))
    denoise = denoiser(problem.net, problem.target, problem.data_std)
    if problem.curve is None:
        diffusion, pull = _mean(diffusion_term(denoise, problem.schedule, t, x0, eps) / problem.density(t)), 0.0
    else:
        diffusion, pull = _diffusion_of_a_learned_curve(problem.curve, denoise, t, x0, eps)
    terms = {"prior": prior_kl(x0, high, problem.data_std) / dims, "diffusion": diffusion, "decoder": -_mean(log)}
    bits = {name: bits_per_dim(nats, 1) for name, nats in terms.items()}
    return sum(bits.values()) + pull, bits


def _diffusion_of_a_learned_curve(curve, denoise, t, x0, eps):
    """(the diffusion term [B] in nats per dimension, a number that is zero and whose gradient moves the curve's interior)."""

    def term(share, slope):
        fall = curve["ends"][0] - curve["ends"][1]
        level = of_logsnr(curve["ends"][0] - fall * share)
        error = eps_error(denoise(diffuse(level, x0, eps), level), level, x0, eps)
        return _mean(fall * slope * jnp.square(error) / 2)

    share, slope = jax.jvp(lambda t: interior(curve, t), (t,), (jnp.ones_like(t),))
    held, held_slope = jax.lax.stop_gradient((share, slope))
    diffusion = term(held, held_slope)
    # d(L^2) = 2 L dL, and dL is the sum of what L changes with the share and with its slope, in which it is linear.
    frozen = jax.lax.stop_gradient
    _, by_share = jax.jvp(lambda share: term(share, held_slope), (held,), (jnp.ones_like(held),))
    by_slope = diffusion / _mean(held_slope)
    moves = frozen(by_share) * _mean(share - held) + frozen(by_slope) * _mean(slope - held_slope)
    return diffusion, frozen(2 * diffusion) * moves
