"""Closed-form denoisers of Gaussian data and of Gaussian mixtures: what a perfect network would say, so that samplers, losses and
likelihoods are checked without training.

Each is a `Partial` whose numbers are leaves, so it can be an argument of a jitted function.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff import targets
from jaxdiff.level import Level, Prediction


def gaussian(mean, var):
    """The denoiser of data N(mean, diag(var)); both broadcast with x, so [] or [1, ...]."""
    return Partial(_gaussian, mean, var)


def _gaussian(mean, var, x, level):
    total = level.alpha**2 * var + level.sigma**2
    off = x - level.alpha * mean
    return Prediction(mean + level.alpha * var / total * off, level.sigma / total * off)


def flow(mean, var, x, t, s):
    """Where the probability flow of data N(mean, diag(var)) takes x from level t to level s, exactly."""
    stretch = np.sqrt((s.alpha**2 * var + s.sigma**2) / (t.alpha**2 * var + t.sigma**2))
    return s.alpha * mean + stretch * (x - t.alpha * mean)


def ancestral_std(var, levels, start_var, eta=1.0, large=False):
    """The deviation that DDIM(eta), or DDPM with the large deviation, gives Gaussian data of variance `var` on a grid, exactly.

    Every step is affine in x, so the variance follows one line a step; few steps lose some of it, by no fault of the code.
    """
    alpha, sigma = (np.asarray(a, np.float64) for a in levels)
    gain = alpha * var / (alpha**2 * var + sigma**2)  # of x0 in x
    rest = sigma / (alpha**2 * var + sigma**2)  # of eps in x
    total = start_var
    for t, s in zip(range(len(alpha) - 1), range(1, len(alpha))):
        k2 = 1 - (alpha[t] / sigma[t] * sigma[s] / alpha[s]) ** 2
        mean = alpha[s] * gain[t] + sigma[s] * np.sqrt(1 - eta**2 * k2) * rest[t]
        total = mean**2 * total + (k2 * sigma[t] ** 2 if large else eta**2 * k2 * sigma[s] ** 2)
    return gain[-1] * np.sqrt(total)


def mixture(weights, means, stds):
    """The denoiser of sum_k weights[k] N(means[k], stds[k]^2 I): weights and stds [K], means [K, D]; x is [B, D]."""
    return Partial(_mixture, weights, means, stds)


def _mixture(weights, means, stds, x, level):
    alpha, sigma = (jnp.reshape(a, (-1, 1, 1)) for a in level)
    var = jnp.square(stds)[None, :, None]
    total = alpha**2 * var + sigma**2
    off = x[:, None] - alpha * means[None]
    log = jnp.log(weights)[None, :, None] - off.shape[-1] / 2 * jnp.log(total)
    share = jax.nn.softmax(log - (off**2 / total).sum(-1, keepdims=True) / 2, axis=1)
    x0 = (share * (means[None] + alpha * var / total * off)).sum(1)
    eps = (share * (sigma / total * off)).sum(1)
    return Prediction(x0, eps)


def network(denoise, target, data_std=1.0):
    """The network that a perfectly trained one would be: (unit-scale x, logsnr) -> (the target's value, None).

    Every target row depends only on alpha / sigma, so the level's place on the circle stands for the level itself.
    """
    return Partial(_network, denoise, targets_partial(target), data_std)


def targets_partial(target):
    return target if isinstance(target, Partial) else Partial(target)


def _network(denoise, target, data_std, x, logsnr):
    level = Level(jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr)))
    p = denoise(x * jnp.hypot(level.alpha * data_std, level.sigma), level)
    return targets.regress(target, level, p.x0, p.eps), None


def known(x0):
    """The denoiser of data that is the single point x0."""
    return Partial(_known, x0)


def _known(x0, x, level):
    return Prediction(x0 + 0 * x, (x - level.alpha * x0) / level.sigma)


def zeros(key, shape, dtype):
    """No noise, for a solver's `noise`."""
    return jnp.zeros(shape, dtype)


def ones(key, shape, dtype):
    """Noise of one standard deviation everywhere, for a solver's `noise`."""
    return jnp.ones(shape, dtype)
