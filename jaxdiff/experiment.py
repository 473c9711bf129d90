"""An experiment is what a config describes, built: a network, its objective and the process it is trained on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxdiff import codec as codecs
from jaxdiff import models, schedules, targets, times
from jaxdiff.codec import Codec
from jaxdiff.data import random_flip
from jaxdiff.denoiser import Net, clip_logsnr
from jaxdiff.errors import InputError
from jaxdiff.level import Level, logsnr
from jaxdiff.losses import denoising_loss
from jaxdiff.names import named
from jaxdiff.schedules import Schedule
from jaxdiff.targets import Target

Array = jax.Array
Params = Any


class Experiment(NamedTuple):
    """What training and sampling need of a task.

    `init(key) -> params`; `loss(params, extra, key, batch) -> (loss of each example [B], extra, metrics)`, batch being {"image":
    uint8 [B, H, W, C], "label": int32 [B]}; `extra` is the initial value of what training carries besides the parameters;
    `net(params, cond, key=None) -> Net`, where a key turns dropout on; `schedule(params) -> Schedule`.
    """

    init: Callable[[Array], Params]
    loss: Callable[[Params, Any, Array, dict[str, Array]], tuple[Array, Any, dict[str, Array]]]
    extra: Any
    net: Callable[..., Net]
    schedule: Callable[[Params], Schedule]
    target: Target
    codec: Codec
    shape: tuple[int, ...]
    data_std: float
    classes: int


def build(config) -> Experiment:
    """The experiment of a config (its groups `data`, `model` and `process`).

    Raises InputError for a name, number or combination that cannot work, before anything is compiled.
    """
    shape, process = tuple(config.data.shape), config.process
    model = models.build(config.model)
    codec = named(codecs, _called(config.data.codec), "data.codec")
    schedule = named(schedules, process.schedule, "process.schedule")
    target = named(targets, process.target, "process.target")
    draw = named(times, process.draw, "process.draw")
    _check(config, schedule, target, draw)
    range_ = logsnr(times.grid(schedule, np.array([draw.last, draw.first])))
    lo, hi = (float(r) for r in range_)

    def apply(params, cond, key, x, seen):
        rngs = None if key is None else {"dropout": key}
        return model.apply(params, x, seen, cond, train=key is not None, rngs=rngs), None

    def net(params: Params, cond: Any, key: Array | None = None) -> Net:
        return clip_logsnr(Partial(apply, params, cond, key), lo, hi)

    def init(key: Array) -> Params:
        return model.init(key, jnp.zeros((1, *shape)), jnp.zeros(()))

    def loss(params, extra, key, batch):
        k_flip, k_encode, k_time, k_label, k_eps, k_dropout = jax.random.split(key, 6)
        image, label = batch["image"], batch["label"]
        if config.data.flip:
            image = random_flip(k_flip, image)
        z = codec.encode(k_encode, image)
        t = draw.sample(k_time, z.shape[0])
        level = schedule(t.reshape(-1, *(1,) * (z.ndim - 1)))
        cond = None
        if config.model.classes:
            # A network that sometimes sees no label can be guided without a classifier (Ho and Salimans 2022, algorithm 1).
            cond = {"label": jnp.where(jax.random.bernoulli(k_label, process.drop_label, label.shape), -1, label)}
        each = denoising_loss(k_eps, net(params, cond, k_dropout), target, z, level, data_std=process.data_std)
        return each, extra, {}

    return Experiment(init, loss, (), net, lambda params: schedule, target, codec, shape, process.data_std, config.model.classes)


def _called(text: str) -> str:
    return text if "(" in text else f"{text}()"


def _check(config, schedule, target, draw) -> None:
    """Raises InputError for what would otherwise fail late, or silently."""
    process, shape = config.process, tuple(config.data.shape)
    if not isinstance(draw, times.Draw):
        raise InputError(f"process.draw={process.draw!r} needs brackets, such as draw_table(1000)")
    probe = jnp.asarray((draw.first + draw.last) / 2)
    if not (callable(schedule) and isinstance(_try(schedule, probe), Level)):
        raise InputError(f"process.schedule={process.schedule!r} needs brackets, such as linear_beta(steps=1000)")
    if not isinstance(_try(target, schedule(probe)), tuple):
        raise InputError(f"process.target={process.target!r} needs brackets, such as edm(0.5)")
    if not 0 <= process.drop_label <= 1:
        raise InputError(f"process.drop_label={process.drop_label} is not a probability, 0 to 1")
    if not process.data_std > 0:
        raise InputError(f"process.data_std={process.data_std} is not positive")
    halvings = 2 ** (len(config.model.multipliers) - 1)
    if len(shape) < 2 or any(n < 1 for n in shape) or any(n % halvings for n in shape[:-1]):
        raise InputError(
            f"data.shape={shape} does not fit {len(config.model.multipliers)} levels of model.multipliers: "
            f"it is (height, width, channels), each size divisible by {halvings}"
        )


def _try(function: Callable, *args: Any) -> Any:
    try:
        return function(*args)
    except (TypeError, ValueError):
        return None
