"""An experiment is what a config describes, built: a network, its objective and the process it is trained on."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from ml_collections import ConfigDict

from jaxdiff import codec as codecs
from jaxdiff import models, schedules, targets, times
from jaxdiff.codec import Codec
from jaxdiff.data import random_flip
from jaxdiff.denoiser import Net, clip_logsnr
from jaxdiff.errors import InputError, nearest
from jaxdiff.level import Level, logsnr
from jaxdiff.losses import denoising_loss
from jaxdiff.names import named, whole
from jaxdiff.schedules import Schedule
from jaxdiff.targets import Target

Array = jax.Array
Params = Any

# The keys of a config, by group; "" is the config itself. Those of `model` are `models.FIELDS`, and here the ones read elsewhere.
KEYS: dict[str, tuple[str, ...]] = {
    "": ("seed", "steps", "batch_size", "data_dir"),
    "data": ("name", "split", "shape", "size", "codec", "flip"),
    "model": ("name", "classes"),
    "process": ("schedule", "target", "draw", "data_std", "drop_label"),
    "optimizer": ("name", "learning_rate", "schedule", "clip"),
    "training": (
        "ema",
        "log_every",
        "sample_every",
        "save_every",
        "keep",
        "keep_every",
        "snapshot_every",
        "mesh",
        "accumulate",
        "nonfinite",
    ),
    "sampling": ("ema", "times", "solver", "steps", "max_steps", "guidance", "num", "batch_size", "clip"),
}
# What `build` reads of them: a notebook that trains and draws by itself need not say how often to save.
BUILT = {"data": ("shape", "codec", "flip"), "model": KEYS["model"], "process": KEYS["process"]}


class Experiment(NamedTuple):
    """What training and sampling need of a task.

    `init(key) -> params`. `prepare(extra, key, batch) -> example` draws all that knows no parameters, for the whole batch
    {"image": uint8 [B, H, W, C], "label": int32 [B]} at once: what accumulation then cuts up is the same however many pieces it
    cuts. `loss(params, extra, key, example) -> (loss of each example [B], extra, metrics)`, where metrics hold numbers [] or one a
    sample [B], and among those "logsnr". `extra` is the initial value of what training carries besides the parameters;
    `net(params, cond, key=None) -> Net`, where a key turns dropout on; `schedule(params) -> Schedule`.
    """

    init: Callable[[Array], Params]
    prepare: Callable[[Any, Array, dict[str, Array]], dict[str, Any]]
    loss: Callable[[Params, Any, Array, dict[str, Any]], tuple[Array, Any, dict[str, Array]]]
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
    check_keys(config, BUILT)
    shape, process = _shape(config), config.process
    model = models.build(config.model)
    codec = named(codecs, _called(config.data.codec), "data.codec")
    schedule = named(schedules, process.schedule, "process.schedule")
    target = named(targets, process.target, "process.target")
    draw = named(times, process.draw, "process.draw")
    _check(config, model, schedule, target, draw)
    lo, hi = _logsnr_range(process, schedule, draw)

    def apply(params, cond, key, x, seen):
        rngs = None if key is None else {"dropout": key}
        return model.apply(params, x, seen, cond, train=key is not None, rngs=rngs), None

    def net(params: Params, cond: Any, key: Array | None = None) -> Net:
        return clip_logsnr(Partial(apply, params, cond, key), lo, hi)

    def init(key: Array) -> Params:
        return model.init(key, jnp.zeros((1, *shape)), jnp.zeros(()))

    def prepare(extra, key, batch):
        k_flip, k_encode, k_time, k_label, k_eps = jax.random.split(key, 5)
        image, label = batch["image"], batch["label"]
        if config.data.flip:
            image = random_flip(k_flip, image)
        x0 = codec.encode(k_encode, image)
        example = {"x0": x0, "eps": jax.random.normal(k_eps, x0.shape, x0.dtype), "t": draw.sample(k_time, x0.shape[0])}
        if config.model.classes:
            # A network that sometimes sees no label can be guided without a classifier (Ho and Salimans 2022, algorithm 1).
            example["cond"] = {"label": jnp.where(jax.random.bernoulli(k_label, process.drop_label, label.shape), -1, label)}
        return example

    def loss(params, extra, key, example):
        x0, t = example["x0"], example["t"]
        level = schedule(t.reshape(-1, *(1,) * (x0.ndim - 1)))
        predict = net(params, example.get("cond"), key)
        each = denoising_loss(key, predict, target, x0, level, example["eps"], data_std=process.data_std)
        return each, extra, {"logsnr": logsnr(level).reshape(-1)}

    return Experiment(
        init, prepare, loss, (), net, lambda params: schedule, target, codec, shape, process.data_std, config.model.classes
    )


def check_keys(config, needed: Mapping[str, Sequence[str]] = KEYS) -> None:
    """Raises InputError where a config has a key that is not in KEYS, lacks one that is in `needed`, or its seed is no seed."""
    groups = [group for group in KEYS if group]
    _check_group("", config, [*KEYS[""], *groups], [*needed.get("", ()), *filter(None, needed)])
    for group in groups:
        if group in config:
            allowed = models.FIELDS if group == "model" else KEYS[group]
            _check_group(group, config[group], allowed, needed.get(group, ()))
    if "seed" in config and not (whole(config.seed, 0) and config.seed < 2**63):
        raise InputError(f"config.seed={config.seed!r} is out of range; it is a whole number from 0 to 2**63 - 1")


def _check_group(group: str, values: Any, allowed: Sequence[str], needed: Sequence[str]) -> None:
    if not isinstance(values, ConfigDict):
        what = f"config key {group}={values!r} is a value" if group else f"the config is of type {type(values).__name__}"
        raise InputError(f"{what}, not an ml_collections.ConfigDict; it holds {', '.join(allowed)}")
    dot = f"{group}." if group else ""
    # A misspelt key comes before the one that is then missing: only it says what to write where.
    for key in values:
        if key not in allowed:
            raise InputError(f"config key {dot}{key} is unknown{nearest(key, allowed)}; allowed: {', '.join(allowed)}")
    for key in needed:
        if key not in values:
            raise InputError(f"config key {dot}{key} is missing; configs/digits.py has one to copy")


def _called(text: str) -> str:
    return str(text) if "(" in str(text) else f"{text}()"


def _shape(config) -> tuple[int, ...]:
    """data.shape, three whole numbers. Raises InputError for anything else."""
    shape = config.data.shape
    if not isinstance(shape, list | tuple) or len(shape) != 3 or not all(whole(n, 1) for n in shape):
        raise InputError(f"data.shape={shape!r} is not the (height, width, channels) of an image, each at least 1")
    if shape[-1] not in (1, 3):
        raise InputError(
            f"data.shape={tuple(shape)} has {shape[-1]} channels; allowed: 1 (grey) or 3 (colour), what a grid can show"
        )
    return tuple(shape)


def _check(config, model, schedule, target, draw) -> None:
    """Raises InputError for what would otherwise fail late, or silently."""
    process, shape = config.process, _shape(config)
    if not isinstance(draw, times.Draw):
        raise InputError(f"process.draw={process.draw!r} needs brackets, such as draw_table(1000)")
    if not (_finite(draw.first) and _finite(draw.last)):
        raise InputError(
            f"process.draw={process.draw!r} does not draw between two finite numbers, as draw_uniform(0.001, 0.999) does"
        )
    # Traced only: a table may have more rows than an int32 can count.
    if _try(jax.eval_shape, lambda key: draw.sample(key, 1), jax.random.key(0)) is None:
        raise InputError(f"process.draw={process.draw!r} cannot be drawn from; a table has at most 2**31 - 2 rows")
    probe = jnp.asarray((draw.first + draw.last) / 2)
    if not (callable(schedule) and isinstance(_try(schedule, probe), Level)):
        raise InputError(f"process.schedule={process.schedule!r} needs brackets, such as linear_beta(steps=1000)")
    if not isinstance(_try(target, schedule(probe)), tuple):
        raise InputError(f"process.target={process.target!r} needs brackets, such as edm(0.5)")
    if not (_finite(process.drop_label) and 0 <= process.drop_label <= 1):
        raise InputError(f"process.drop_label={process.drop_label!r} is not a probability, 0 to 1")
    if not (_finite(process.data_std) and process.data_std > 0):
        raise InputError(f"process.data_std={process.data_std!r} is not a positive number")
    halvings = 2 ** (len(model.multipliers) - 1)
    if any(n % halvings for n in shape[:-1]):
        raise InputError(
            f"data.shape={shape} does not fit {len(model.multipliers)} levels of model.multipliers: "
            f"it is (height, width, channels), each size divisible by {halvings}"
        )
    if model.out_channels not in (None, shape[-1]):
        raise InputError(
            f"model.out_channels={model.out_channels!r} is not what process.target={process.target!r} needs; "
            f"allowed: None, {shape[-1]} (the channels of data.shape)"
        )


def _logsnr_range(process, schedule: Schedule, draw: times.Draw) -> tuple[float, float]:
    """The lowest and highest logsnr that training draws; -inf is one, where no data is left in the noisiest sample.

    Raises InputError where they are no range: not a number, without noise, or not falling all the way from `first` to `last`.
    """
    here = f"process.draw={process.draw!r}, times {draw.first:g} to {draw.last:g} of process.schedule={process.schedule!r},"
    try:
        levels = np.asarray(logsnr(times.grid(schedule, np.linspace(draw.last, draw.first, 65))))
    except ValueError as error:
        raise InputError(f"{here} leaves the schedule: {error}") from error
    if np.isnan(levels).any():
        raise InputError(f"{here} leaves the schedule: the log signal-to-noise ratio is not a number there")
    if not np.isfinite(levels.max()):
        raise InputError(f"{here} draws a logsnr up to {levels.max():g}; the highest must be finite, with some data and some noise")
    falling = (levels[:-1] < levels[1:]) | (levels[:-1] == -np.inf)
    if draw.first != draw.last and not falling.all():
        raise InputError(f"{here} does not go from data to noise: the log signal-to-noise ratio must fall all the way")
    return float(levels[0]), float(levels[-1])


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _try(function: Callable, *args: Any) -> Any:
    try:
        return function(*args)
    except (TypeError, ValueError, ArithmeticError):
        return None
