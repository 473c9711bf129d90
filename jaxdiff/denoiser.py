"""A denoiser is a network and its target row: (x, level) -> Prediction.

The network sees x at unit scale and the log signal-to-noise ratio, nothing else, so one trained network works under every schedule.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxdiff import targets
from jaxdiff.level import Level, Prediction, logsnr

Array = jax.Array
Net = Callable[[Array, Array], tuple[Array, Any]]
Denoiser = Callable[[Array, Level], Prediction]

# Beyond this no float32 sample differs from pure noise or pure data; it only keeps the network's input finite at alpha = 0.
LOGSNR_LIMIT = 30.0


def partial(f: Callable) -> Partial:
    """f as a pytree, so that it can be an argument of a jitted function; what it already carries stays traced."""
    return f if isinstance(f, Partial) else Partial(f)


def denoiser(net: Net, target: targets.Target, data_std: float = 1.0) -> Denoiser:
    """The denoiser of a network trained on `target`: x [B, ...], level [] or [B, 1, ..., 1] -> Prediction.

    `data_std` is the standard deviation of the data, which scales the network's input to 1 (EDM table 1, c_in).
    """
    return Partial(_denoise, partial(net), partial(target), data_std)


def _denoise(net: Net, target: targets.Target, data_std: Array, x: Array, level: Level) -> Prediction:
    y, aux = net(*network_input(x, level, data_std))
    return targets.invert(target, level, x, y)._replace(aux=aux)


def network_input(x: Array, level: Level, data_std: float | Array = 1.0) -> tuple[Array, Array]:
    """What a network sees of x at a level: (x / hypot(alpha data_std, sigma), logsnr), the logsnr finite."""
    seen = jnp.clip(logsnr(level), -LOGSNR_LIMIT, LOGSNR_LIMIT)
    return x / jnp.hypot(level.alpha * data_std, level.sigma), seen


def clip_logsnr(net: Net, lo: float | Array, hi: float | Array) -> Net:
    """The same network, shown no logsnr outside [lo, hi], the range it was trained on; a sampler's grid may reach further."""
    return Partial(_clip_logsnr, partial(net), lo, hi)


def _clip_logsnr(net: Net, lo: Array, hi: Array, x: Array, seen: Array) -> tuple[Array, Any]:
    return net(x, jnp.clip(seen, lo, hi))
