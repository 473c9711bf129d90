"""The train state and the train step: pure functions, to be jitted once with the state donated."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff.errors import InputError
from jaxdiff.experiment import Experiment
from jaxdiff.names import named, parse, with_arguments
from jaxdiff.training import averages

Array = jax.Array
Step = Callable[[Array, "TrainState", dict[str, Array]], tuple["TrainState", dict[str, Array]]]

# The second player of an adversarial loss: parameters beside the network's, of no use once training is done.
DISCRIMINATOR = "discriminator"
# The loss is told apart by noise level: bins of logsnr 2 wide, the first and the last open.
LOGSNR_EDGES = np.arange(-12.0, 13.0, 2.0)


class TrainState(NamedTuple):
    """All that training carries from step to step; `ema` maps each average's name to averaged parameters."""

    step: Array
    params: Any
    ema: dict[str, Any]
    opt_state: optax.OptState
    extra: Any


def make_optimizer(config) -> optax.GradientTransformation:
    """The optimizer of a config's `optimizer` group: optax names, the schedule a factor on `learning_rate`, global-norm `clip`.

    A clip of 0 is none; a discriminator's gradient has a norm of its own. Weight decay leaves alone a learned schedule, whose ends
    are noise levels, and a codebook, whose codes are where outputs of the encoder are: zero is none better than another. Raises
    InputError for a name optax does not have, or arguments it does not take.
    """
    if not config.learning_rate > 0:
        raise InputError(f"optimizer.learning_rate={config.learning_rate} is not positive")
    if not config.clip >= 0:
        raise InputError(f"optimizer.clip={config.clip} is negative; 0 is no clip")
    factor = named(optax, config.schedule, "optimizer.schedule")
    try:  # traced only: called, a schedule is thirty small programs
        jax.eval_shape(lambda step: jnp.asarray(factor(step), jnp.float32).reshape(()), 0)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer.schedule={config.schedule!r} needs brackets, such as constant_schedule(1)") from error

    def learning_rate(step):
        return config.learning_rate * factor(step)

    function, _, given = parse(optax, config.name, "optimizer.name")
    masks = inspect.isfunction(function) and "mask" in inspect.signature(function).parameters
    decays = {"mask": _decayed} if masks and "mask" not in given else {}
    update = with_arguments(optax, config.name, "optimizer.name")(learning_rate=learning_rate, **decays)
    if not isinstance(update, optax.GradientTransformation):
        raise InputError(f"optimizer.name={config.name!r} is not an optimizer")
    # Without a clip the state has the same shape, so that a run may go on with another one.
    return optax.chain(_clip(config.clip) if config.clip else optax.identity(), update)


def _clip(most: float) -> optax.GradientTransformation:
    """Global-norm clipping of each player apart. It carries nothing, as `optax.clip_by_global_norm`, unlike `optax.partition`."""
    clip = optax.clip_by_global_norm(most)

    def update(updates, state, params=None):
        network, discriminator = _network(updates), _discriminator(updates)
        clipped, _ = clip.update(network, state)
        return clipped | (clip.update(discriminator, state)[0] if discriminator else {}), state

    return optax.GradientTransformation(clip.init, update)


def _network(params: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in params.items() if name != DISCRIMINATOR}


def _discriminator(params: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in params.items() if name == DISCRIMINATOR}


def _decayed(params: Any) -> Any:
    """Which parameters weight decay acts on: all but a codebook and, beside the network's, a learned schedule's."""
    schedule, codebook = (jax.tree_util.DictKey(name) for name in ("schedule", "codebook"))
    return jax.tree_util.tree_map_with_path(lambda path, _: path[:1] != (schedule,) and path[1:] != (codebook,), params)


def init_state(
    experiment: Experiment, optimizer: optax.GradientTransformation, names: Sequence[float | str], key: Array
) -> TrainState:
    """The state before the first step; every average (`averages.named`) starts at the parameters, and has no discriminator."""
    params = experiment.init(key)
    # Copies: the step donates its state, and a buffer may be donated only once.
    ema = {str(name): jax.tree.map(jnp.copy, _network(params)) for name in names}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), experiment.extra)


def jit_init(init: Callable[[Array], Any], shardings: Any = None) -> Callable[[Array], Any]:
    """`init(key)` as one program, whose arrays are born with these shardings; JAX compiles it when first called.

    It runs once, so the compiler need not make it fast: on a CPU LLVM would take longer over the random numbers of a hundred
    arrays than over a train step. At level 1 it takes half as long and draws the same numbers bit for bit; at 0 some differ.
    """
    quick = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(init, out_shardings=shardings, compiler_options=quick)


def make_step(experiment: Experiment, optimizer: optax.GradientTransformation, accumulate: int = 1) -> Step:
    """The function (key, state, batch) -> (state, metrics): DDPM algorithm 1 with an optax update.

    `accumulate` cuts the batch into that many pieces, whose gradients are averaged before the one update. The step folds its
    number into the one key, so a resumed run draws what the uninterrupted one would have drawn. After the update the experiment
    settles what it will, which the averages then see. A step whose loss or gradient is not finite leaves everything but the step's
    number as it was.

    Metrics: "loss", "grad_norm", "finite" (bool), the experiment's own, and where those say each sample's logsnr, the sums and
    counts of the loss by noise level ("level_loss", "level_count", one a bin of LOGSNR_EDGES), and "worst_logsnr", where the loss
    is largest or not finite.
    """

    def mean_loss(params, extra, key, example):
        each, extra, metrics = experiment.loss(params, extra, key, example)
        return each.mean(), (each, extra, metrics)

    gradient = jax.value_and_grad(mean_loss, has_aux=True)

    def accumulated(params, extra, key, example):
        if accumulate == 1:
            return gradient(params, extra, key, example)

        def piece(carry, inputs):
            total, extra = carry
            (_, (each, extra, metrics)), grads = gradient(params, extra, jax.random.fold_in(key, inputs[0]), inputs[1])
            return (jax.tree.map(jnp.add, total, grads), extra), (each, metrics)

        # Every accumulate-th example to one piece: each device cuts up what it has, and nothing moves between devices.
        pieces = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, accumulate, *a.shape[1:]), 1, 0), example)
        zeros = jax.tree.map(jnp.zeros_like, params)
        (total, extra), (each, metrics) = jax.lax.scan(piece, (zeros, extra), (jnp.arange(accumulate), pieces))
        metrics = jax.tree.map(lambda a: a.reshape(-1) if a.ndim == 2 else a.mean(), metrics)
        each = each.reshape(-1)
        return (each.mean(), (each, extra, metrics)), jax.tree.map(lambda g: g / accumulate, total)

    def step(key: Array, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        k_step = jax.random.fold_in(key, state.step)
        (k_prepare, k_loss), k_settle = jax.random.split(k_step), jax.random.fold_in(k_step, 2)
        example = experiment.prepare(state.extra, k_prepare, batch)
        (loss, (each, extra, metrics)), grads = accumulated(state.params, state.extra, k_loss, example)
        grad_norm = _norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update() -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params, settled = experiment.settle(k_settle, optax.apply_updates(state.params, updates), extra)
            ema = {name: _average(name, state.step, average, _network(params)) for name, average in state.ema.items()}
            return TrainState(state.step, params, ema, opt_state, settled)

        kept = _where(finite, update, state)
        means = {name: value.mean() for name, value in metrics.items() if name != "logsnr"}
        levels = _by_level(each, metrics["logsnr"]) if "logsnr" in metrics else {}
        told = {"loss": loss, "grad_norm": grad_norm, "finite": finite, **means, **levels}
        return kept._replace(step=state.step + 1), told

    return step


def _where(finite: Array, update: Callable[[], TrainState], state: TrainState) -> TrainState:
    """update() where that is to be, and else the state as it is."""
    if jax.default_backend() == "cpu":
        # In a branch all is updated in place; a choice reads and writes both, and takes twice as long.
        return jax.lax.cond(finite, update, lambda: state)
    # On a GPU a branch would have the host wait for its condition, in every step.
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(), state)


def ema_distance(state: TrainState, name: str) -> Array:
    """How far the parameters are from their average `name`, as a share of the average's own norm, []."""
    return _norm(jax.tree.map(jnp.subtract, _network(state.params), state.ema[name])) / _norm(state.ema[name])


def _norm(tree: Any) -> Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(tree)))


def _average(name: str, step: Array, average: Any, params: Any) -> Any:
    return optax.incremental_update(params, average, 1 - averages.named(name)(step))


def _by_level(each: Array, logsnr: Array) -> dict[str, Array]:
    """The loss in bins of logsnr, and the level where it is worst."""
    bins = jax.nn.one_hot(jnp.searchsorted(jnp.asarray(LOGSNR_EDGES, logsnr.dtype), logsnr), len(LOGSNR_EDGES) + 1)
    worst = jnp.argmax(jnp.where(jnp.isfinite(each), each, jnp.inf))
    return {"level_loss": jnp.where(bins > 0, each[:, None], 0).sum(0), "level_count": bins.sum(0), "worst_logsnr": logsnr[worst]}
