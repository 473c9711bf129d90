"""The train state and the train step: pure functions, to be jitted once with the state donated."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdiff.errors import InputError
from jaxdiff.experiment import Experiment
from jaxdiff.names import named, with_arguments

Array = jax.Array
Step = Callable[[Array, "TrainState", dict[str, Array]], tuple["TrainState", dict[str, Array]]]


class TrainState(NamedTuple):
    """All that training carries from step to step; `ema` maps each decay, written as a string, to averaged parameters."""

    step: Array
    params: Any
    ema: dict[str, Any]
    opt_state: optax.OptState
    extra: Any


def make_optimizer(config) -> optax.GradientTransformation:
    """The optimizer of a config's `optimizer` group: optax names, the schedule a factor on `learning_rate`, global-norm `clip`.

    A clip of 0 is none. Raises InputError for a name optax does not have, or arguments it does not take.
    """
    if not config.learning_rate > 0:
        raise InputError(f"optimizer.learning_rate={config.learning_rate} is not positive")
    factor = named(optax, config.schedule, "optimizer.schedule")

    def learning_rate(step):
        return config.learning_rate * factor(step)

    update = with_arguments(optax, config.name, "optimizer.name")(learning_rate=learning_rate)
    if not isinstance(update, optax.GradientTransformation):
        raise InputError(f"optimizer.name={config.name!r} is not an optimizer")
    return optax.chain(optax.clip_by_global_norm(config.clip), update) if config.clip else update


def init_state(experiment: Experiment, optimizer: optax.GradientTransformation, decays: Sequence[float], key: Array) -> TrainState:
    """The state before the first step; every average starts at the parameters."""
    params = experiment.init(key)
    # Copies: the step donates its state, and a buffer may be donated only once.
    ema = {str(decay): jax.tree.map(jnp.copy, params) for decay in decays}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), experiment.extra)


def make_step(experiment: Experiment, optimizer: optax.GradientTransformation) -> Step:
    """The function (key, state, batch) -> (state, {"loss", "grad_norm"}), DDPM algorithm 1 with an optax update.

    The step folds its number into the one key, so a resumed run draws what the uninterrupted one would have drawn. An average
    with decay d uses min(d, (1 + step) / (10 + step)), so that it forgets the random start soon.
    """

    def step(key: Array, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        def mean_loss(params):
            each, extra, metrics = experiment.loss(params, state.extra, jax.random.fold_in(key, state.step), batch)
            return each.mean(), (extra, metrics)

        (loss, (extra, metrics)), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        warm = (1 + state.step) / (10 + state.step)
        ema = {
            decay: optax.incremental_update(params, average, 1 - jnp.minimum(float(decay), warm))
            for decay, average in state.ema.items()
        }
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        metrics = {"loss": loss, "grad_norm": norm, **metrics}
        return TrainState(state.step + 1, params, ema, opt_state, extra), metrics

    return step
