"""A classifier is a network of logits and a label: (x, level) -> log p(label | x). Its gradient guides a denoiser.

The network sees what a denoiser's does, x at unit scale and the log signal-to-noise ratio, so it too works under every schedule.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxdiff.denoiser import Net, network_input, partial
from jaxdiff.level import Level

Array = jax.Array
LogProb = Callable[[Array, Level], Array]


def classifier(net: Net, label: int | Array, data_std: float = 1.0) -> LogProb:
    """The log-probability of a label, int [] or [B]: x [B, ...], level [] or [B, 1, ..., 1] -> [B].

    `net` says logits [B, classes]; `data_std` is the standard deviation of the data. Source: Dhariwal and Nichol 2021, section 4.
    """
    return Partial(_log_prob, partial(net), jnp.asarray(label), data_std)


def _log_prob(net: Net, label: Array, data_std: Array, x: Array, level: Level) -> Array:
    return at_label(log_probs(net, x, level, data_std), label)


def log_probs(net: Net, x: Array, level: Level, data_std: float | Array = 1.0) -> Array:
    """The log-probabilities of all classes, [B, classes]."""
    logits, _ = net(*network_input(x, level, data_std))
    return jax.nn.log_softmax(logits)


def at_label(each: Array, label: Array) -> Array:
    """Of [B, classes] the entries of the labels [] or [B], [B]; NaN where there is no such class."""
    return jnp.take_along_axis(each, jnp.broadcast_to(label, each.shape[:1])[:, None], axis=1)[:, 0]
