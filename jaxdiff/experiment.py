"""An experiment is what a config describes, built: a network, its objective and the process it is trained on."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from ml_collections import ConfigDict

from jaxdiff import autoencoding, first_stage, models, objectives, schedules, targets, times, weights
from jaxdiff import codec as codecs
from jaxdiff.codec import Codec
from jaxdiff.data import augment as augments
from jaxdiff.data import either_flip, random_flip
from jaxdiff.denoiser import LOGSNR_LIMIT, Net, clip_logsnr
from jaxdiff.errors import InputError, nearest
from jaxdiff.level import Level, logsnr
from jaxdiff.names import named, public, whole
from jaxdiff.objectives import Objective, Problem
from jaxdiff.schedules import Learned, Schedule
from jaxdiff.targets import Target, determinant

Array = jax.Array
Params = Any

# The keys of a config, by group; "" is the config itself. Those of `model` are `models.FIELDS`, and here the ones read elsewhere.
KEYS: dict[str, tuple[str, ...]] = {
    "": ("seed", "steps", "batch_size", "data_dir"),
    "data": ("name", "split", "shape", "size", "pad", "codec", "latents", "flip", "augment"),
    "model": ("name", "classes"),
    "process": (
        "schedule",
        "target",
        "draw",
        "weight",
        "loss",
        "data_std",
        "drop_label",
        "regulariser",
        "perceptual",
        "discriminator",
    ),
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
BUILT = {
    "data": ("shape", "codec", "flip"),
    "model": KEYS["model"],
    "process": ("schedule", "target", "draw", "data_std", "drop_label", "regulariser"),
}
# What only a model that predicts images has a use for: a classifier's config leaves these out.
PREDICTS = {
    "process": ("target", "weight", "drop_label"),
    "sampling": ("times", "solver", "steps", "max_steps", "guidance", "num", "clip"),
}
# What only a model that sees noise, one that predicts images or a classifier, has a use for: an autoencoder's leaves these out.
DIFFUSES = {
    "data": ("latents", "augment"),
    "model": ("classes",),
    "process": ("schedule", "draw", "data_std", *PREDICTS["process"]),
    "sampling": tuple(name for name in PREDICTS["sampling"] if name != "num"),
}
# What only an autoencoder has a use for.
ENCODES = {"process": ("regulariser", "perceptual", "discriminator")}
# Keys that a config may leave out, and what that means.
OPTIONAL = {
    ("data", "pad"): 0,
    ("data", "latents"): "",
    ("data", "augment"): "",
    ("process", "weight"): "unit",
    ("process", "loss"): "simple",
    ("process", "perceptual"): "",
    ("process", "discriminator"): "",
}
# The same of an autoencoder, where that means something else.
OPTIONAL_THERE = {("process", "loss"): "l1"}


class Experiment(NamedTuple):
    """What a task is: the first five fields are all that training knows of it.

    `init(key) -> params`. `prepare(extra, key, batch) -> example` draws all that knows no parameters, for the whole batch
    {"image": uint8 [B, H, W, C], "label": int32 [B]} at once: what accumulation then cuts up is the same however many pieces it
    cuts; of latents it may be what `data.latents` keeps of the images, "latent" [B, 1 or 2, h, w, m] in place of "image".
    `loss(params, extra, key, example) -> (loss of each example [B], extra, metrics)`, where metrics hold numbers [] or one a
    sample [B], and among those "logsnr". `extra` is the initial value of what training carries besides the parameters.
    `settle(key, params, extra) -> (params, extra)` is what a step does to them besides the gradient, after the update: nothing.
    `net(params, cond, key=None) -> Net`, where a key turns dropout on; `schedule(params) -> Schedule`, of None the one before
    training. `shape` is one image's (H, W, C), of which `codec` may make another. `draw` and `objective` are what the config names.
    `target` is None where the network is a classifier, whose output is logits [B, classes].
    """

    init: Callable[[Array], Params]
    prepare: Callable[[Any, Array, dict[str, Array]], dict[str, Any]]
    loss: Callable[[Params, Any, Array, dict[str, Any]], tuple[Array, Any, dict[str, Array]]]
    extra: Any
    settle: Callable[[Array, Params, Any], tuple[Params, Any]]
    net: Callable[..., Net]
    schedule: Callable[[Params], Schedule]
    target: Target | None
    codec: Codec
    shape: tuple[int, ...]
    data_std: float
    classes: int
    draw: times.Draw | times.Adaptive
    objective: Objective


def build(config) -> Experiment:
    """The experiment of a config (its groups `data`, `model` and `process`); of an autoencoder the `autoencoding.Autoencoding`.

    Raises InputError for a name, number or combination that cannot work, before anything is compiled.
    """
    check_keys(config, BUILT)
    shape, process = _shape(config), config.process
    if config.model.name in models.AUTOENCODERS:
        return autoencoding.build(config, shape)  # type: ignore[return-value]  # to training the two are the same
    codec = first_stage.of_config(config.data.codec)
    latent = _latent(config, codec, shape)
    curve = named(schedules, process.schedule, "process.schedule")
    draw = named(times, process.draw, "process.draw")
    weight = named(weights, optional(config, "process", "weight"), "process.weight")
    objective = named(objectives, _called(optional(config, "process", "loss")), "process.loss")
    augment = named(augments, config.data.augment, "data.augment") if optional(config, "data", "augment") else None
    model = models.build(config.model)
    _check_network(config, model, objective)
    target = named(targets, process.target, "process.target") if objective.outputs else None
    learns = curve if isinstance(curve, Learned) else None
    start = curve if learns is None else learns.at(learns.init(jax.random.key(0)))
    _check(config, model, objective, start, target, draw, weight)
    _check_sizes(config, model, objective, latent)
    folder = _folder(config)
    if first_stage.is_latent(codec):
        _check_latent(config, objective)
    elif folder:
        raise InputError(f"data.latents={folder!r} keeps latents, and data.codec={config.data.codec!r} makes none; leave it out")
    _check_objective(config, objective, start, target, draw, learns)
    lo, hi = (-LOGSNR_LIMIT, LOGSNR_LIMIT) if learns else _logsnr_range(process, start, draw)
    if target is not None and objective.weighted:
        _check_weight(process, weight, start, draw, target)
    if objective.outputs > 1:
        model = model.clone(out_channels=objective.outputs * latent[-1])
    values = _values(codec, shape, latent)
    density = _density(draw)

    def apply(params, cond, key, x, seen):
        rngs = None if key is None else {"dropout": key}
        y = model.apply(params if learns is None else params["network"], x, seen, cond, train=key is not None, rngs=rngs)
        return objectives.split_output(objective.outputs, y)

    def net(params: Params, cond: Any, key: Array | None = None) -> Net:
        return clip_logsnr(Partial(apply, params, cond, key), lo, hi)

    def init(key: Array) -> Params:
        network = model.init(key, jnp.zeros((1, *latent)), jnp.zeros(()))
        return network if learns is None else {"network": network, "schedule": learns.init(jax.random.fold_in(key, 1))}

    def schedule(params: Params) -> Schedule:
        return start if learns is None or params is None else learns.at(params["schedule"])

    def prepare(extra, key, batch):
        k_flip, k_encode, k_time, k_label, k_eps = jax.random.split(key, 5)
        label = batch["label"]
        if "latent" in batch:
            x0 = codec.stage.draw(k_encode, either_flip(k_flip, batch["latent"]))
        else:
            x0 = codec.encode(k_encode, random_flip(k_flip, batch["image"]) if config.data.flip else batch["image"])
        cond = {}
        if augment is not None:
            x0, change = augment(jax.random.fold_in(key, 5), x0)
            cond |= {} if change is None else {"augment": change}
        chosen = draw.draw(extra) if isinstance(draw, times.Adaptive) else draw
        t = chosen.sample(k_time, x0.shape[0])
        example = {"x0": x0, "eps": jax.random.normal(k_eps, x0.shape, x0.dtype), "t": t}
        if isinstance(draw, times.Adaptive):
            example["density"] = chosen.density(t)
        if target is None:
            return example | {"label": label}
        if config.model.classes:
            # A network that sometimes sees no label can be guided without a classifier (Ho and Salimans 2022, algorithm 1).
            cond["label"] = jnp.where(jax.random.bernoulli(k_label, process.drop_label, label.shape), -1, label)
        return example | ({"cond": cond} if cond else {})

    def loss(params, extra, key, example):
        x0 = example["x0"]
        t = example["t"].reshape(-1, *(1,) * (x0.ndim - 1))
        along = schedule(params)

        def factor(t):
            return weight(along(t), weights.rate(along, density, t), target)

        problem = Problem(
            net(params, example.get("cond"), key),
            target,
            along,
            factor,
            density,
            draw.steps,
            (draw.first, draw.last),
            values,
            process.data_std,
            None if learns is None else params["schedule"],
            example.get("label"),
        )
        each, told = objective.loss(problem, x0, example["eps"], t)
        if isinstance(draw, times.Adaptive):
            extra = draw.update(extra, example["t"], jax.lax.stop_gradient(each))
            each = each / example["density"]
        return each, extra, {**told, "logsnr": jax.lax.stop_gradient(logsnr(along(t)).reshape(-1))}

    extra = draw.init() if isinstance(draw, times.Adaptive) else ()
    return Experiment(
        init,
        prepare,
        loss,
        extra,
        unchanged,
        net,
        schedule,
        target,
        codec,
        shape,
        process.data_std,
        config.model.classes,
        draw,
        objective,
    )


def unchanged(key: Array, params: Params, extra: Any) -> tuple[Params, Any]:
    """The `settle` of a task whose parameters only the gradient moves."""
    return params, extra


def _density(draw: times.Draw | times.Adaptive) -> Callable[[Array], Array]:
    # What an adaptive draw prefers is divided out of the loss, so that to an objective it is uniform.
    return jnp.ones_like if isinstance(draw, times.Adaptive) else draw.density


def target_of(experiment: Experiment) -> Target:
    """What the network regresses. Raises InputError for a classifier."""
    if experiment.target is None:
        raise InputError("a classifier (model.name='Classifier') predicts no images; it guides a diffusion model, which does")
    return experiment.target


def optional(config, group: str, name: str) -> Any:
    """The value of a key that a config may leave out."""
    return config[group].get(name, left_out(config, group, name))


def left_out(config, group: str, name: str) -> Any:
    """What it means that a config leaves a key out; None where it may not."""
    there = OPTIONAL_THERE if config.model.name in models.AUTOENCODERS else {}
    return (OPTIONAL | there).get((group, name))


def check_keys(config, needed: Mapping[str, Sequence[str]] = KEYS) -> None:
    """Raises InputError where a config has a key that is not in KEYS, lacks one that is in `needed`, or its seed is no seed.

    It neither needs nor may have the keys that are of another kind of model.
    """
    groups = [group for group in KEYS if group]
    _check_group("", config, [*KEYS[""], *groups], [*needed.get("", ()), *filter(None, needed)])
    has_name = isinstance(config.get("model"), ConfigDict) and "name" in config.model
    kind = models.network(config.model.name) if has_name else None
    for group in groups:
        if group in config:
            unused = _unused(kind, group)
            allowed = [n for n in (models.FIELDS if group == "model" else KEYS[group]) if n not in unused]
            wanted = [n for n in needed.get(group, ()) if (group, n) not in OPTIONAL and n not in unused]
            for key in [key for key in unused if isinstance(config[group], ConfigDict) and key in config[group]]:
                raise InputError(f"config key {group}.{key} says nothing to model.name={config.model.name!r}; leave it out")
            _check_group(group, config[group], allowed, wanted)
    if "seed" in config and not (whole(config.seed, 0) and config.seed < 2**63):
        raise InputError(f"config.seed={config.seed!r} is out of range; it is a whole number from 0 to 2**63 - 1")


def _unused(kind: type | None, group: str) -> tuple[str, ...]:
    """The keys of a group that say nothing to this kind of network."""
    if kind is not None and kind.__name__ in models.AUTOENCODERS:
        return DIFFUSES.get(group, ())
    return ENCODES.get(group, ()) + (PREDICTS.get(group, ()) if kind is models.Classifier else ())


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


def _check_network(config, model: models.Network, objective: Objective) -> None:
    """Raises InputError for an objective that is not for this network."""
    loss = f"process.loss={optional(config, 'process', 'loss')!r}"
    if objective.outputs and isinstance(model, models.Classifier):
        raise InputError(f"{loss} needs a network that predicts images; allowed with model.name='Classifier': cross_entropy")
    if not objective.outputs and not isinstance(model, models.Classifier):
        raise InputError(f"{loss} trains a classifier, and model.name={config.model.name!r} is none; set model.name to Classifier")


def _check_objective(config, objective: Objective, schedule: Schedule, target, draw, learns: Learned | None) -> None:
    """Raises InputError for an objective that this process cannot have."""
    text, process = optional(config, "process", "loss"), config.process
    weight, augment = optional(config, "process", "weight"), optional(config, "data", "augment")
    if objective.table and draw.steps < 2:
        raise InputError(f"process.loss={text!r} needs a table of at least 2 steps; set process.draw to draw_table(1000), say")
    if objective.curve and draw.steps:
        raise InputError(f"process.loss={text!r} needs continuous times; set process.draw to draw_uniform(0.001, 0.999), say")
    if learns is not None and not objective.curve:
        raise InputError(f"process.loss={text!r} does not train a learned schedule; allowed with one: bound")
    if learns is not None and (draw.first, draw.last) != (0, 1):
        raise InputError(
            f"process.draw={process.draw!r} is not of all times of a learned schedule; allowed: draw_uniform(0.0, 1.0)"
        )
    if not objective.weighted and named(weights, weight, "process.weight") is not weights.unit:
        raise InputError(f"process.weight={weight!r} would do nothing: process.loss={text!r} is weighted already; allowed: unit")
    if not (objective.table or objective.curve):
        return
    if augment:
        raise InputError(f"data.augment={augment!r} takes pixels off the 256 values that process.loss={text!r} is a bound on")
    for t in (draw.first, draw.last):
        _check_end(process, text, objective, t, schedule(jnp.asarray(t)), target)


def _check_end(process, text: str, objective: Objective, t: float, level: Level, target: Target) -> None:
    """Raises InputError where a bound cannot be trained at time t: it needs the prediction, and in continuous time the logsnr."""
    here = f"at t = {t:g} (alpha {level.alpha:g}, sigma {level.sigma:g})"
    if np.asarray(determinant(target, level)) == 0:
        raise InputError(
            f"process.target={process.target!r} says nothing {here}, which process.loss={text!r} needs; "
            "draw times within it, or use the target v"
        )
    if objective.curve and not np.isfinite(logsnr(level)):
        raise InputError(f"process.draw={process.draw!r}: process.loss={text!r} needs a finite logsnr {here}; draw times within it")


def _check_weight(process, weight, schedule: Schedule, draw, target: Target) -> None:
    """Raises InputError for a weight that is not finite at the first or last time, or at a row of a table of any usual size."""
    t = jnp.linspace(draw.first, draw.last, min(max(draw.steps, 2), 100_000))
    factor = np.asarray(jax.jit(lambda t: weight(schedule(t), weights.rate(schedule, _density(draw), t), target))(t))
    if not np.isfinite(factor).all():
        bad = float(t[~np.isfinite(factor)][-1])
        raise InputError(
            f"process.weight={process.weight!r} of process.target={process.target!r} is not finite at t = {bad:g}, which "
            f"process.draw={process.draw!r} draws; draw times within it, or use the target v"
        )


def _check(config, model, objective, schedule, target, draw, weight) -> None:
    """Raises InputError for what would otherwise fail late, or silently."""
    process = config.process
    if not isinstance(draw, times.Draw | times.Adaptive):
        raise InputError(f"process.draw={process.draw!r} needs brackets, such as draw_table(1000)")
    if not (_finite(draw.first) and _finite(draw.last)):
        raise InputError(
            f"process.draw={process.draw!r} does not draw between two finite numbers, as draw_uniform(0.001, 0.999) does"
        )
    # Traced only: a table may have more rows than an int32 can count.
    plain = draw if isinstance(draw, times.Draw) else draw.draw(draw.init())
    if _try(jax.eval_shape, lambda key: plain.sample(key, 1), jax.random.key(0)) is None:
        raise InputError(f"process.draw={process.draw!r} cannot be drawn from; a table has at most 2**31 - 2 rows")
    probe = jnp.asarray((draw.first + draw.last) / 2)
    if not (callable(schedule) and isinstance(_try(schedule, probe), Level)):
        raise InputError(f"process.schedule={process.schedule!r} needs brackets, such as linear_beta(steps=1000)")
    if target is not None and not isinstance(_try(target, schedule(probe)), tuple):
        raise InputError(f"process.target={process.target!r} needs brackets, such as edm(0.5)")
    if not hasattr(_try(weight, schedule(probe), probe, target), "dtype"):
        raise InputError(f"process.weight={process.weight!r} needs brackets, such as min_snr(5.0)")
    if not isinstance(objective, Objective):
        raise InputError(f"process.loss={process.loss!r} is not an objective; allowed: {', '.join(public(objectives))}")
    if target is not None and not (_finite(process.drop_label) and 0 <= process.drop_label <= 1):
        raise InputError(f"process.drop_label={process.drop_label!r} is not a probability, 0 to 1")
    if not (_finite(process.data_std) and process.data_std > 0):
        raise InputError(f"process.data_std={process.data_std!r} is not a positive number")


def _check_sizes(config, model: models.Network, objective: Objective, latent: tuple[int, ...]) -> None:
    """Raises InputError where what the codec gives does not fit the network."""
    shape = tuple(config.data.shape)
    least, reason = models.checks.divisor(model)
    encoded = f" ({latent} as data.codec encodes it)" if latent != shape else ""
    if any(n % least for n in latent[:-1]):
        raise InputError(
            f"data.shape={shape}{encoded} does not fit {reason}: it is (height, width, channels), each size divisible by {least}"
        )
    channels = objective.outputs * latent[-1]
    if channels and model.out_channels not in (None, channels):
        raise InputError(
            f"model.out_channels={model.out_channels!r} is not what process.loss={optional(config, 'process', 'loss')!r} needs; "
            f"allowed: None, {channels} ({objective.outputs} for each of the {latent[-1]} channels of data.shape{encoded})"
        )


def _folder(config) -> str:
    """data.latents. Raises InputError for what names no folder of a local disk."""
    folder = optional(config, "data", "latents")
    if not isinstance(folder, str) or "://" in folder:
        raise InputError(f"data.latents={folder!r} is not the name of a folder on a disk; '' is one of jaxdiff's cache")
    return folder


def _check_latent(config, objective: Objective) -> None:
    """Raises InputError for what only pixels can have."""
    text, augment = optional(config, "process", "loss"), optional(config, "data", "augment")
    gives = f"and data.codec={config.data.codec!r} gives latents"
    if objective.outputs and not objective.weighted:
        raise InputError(f"process.loss={text!r} is a bound on 256 pixel values, {gives}; allowed: simple, hybrid(0.001)")
    if augment:
        raise InputError(f"data.augment={augment!r} moves pixels, {gives}; leave it out")


def _latent(config, codec: Codec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one encoded image. Raises InputError where the codec takes no such image."""
    try:
        return latent_shape(codec, shape, 1)[1:]
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"data.shape={shape} does not fit data.codec={config.data.codec!r}: {reason}") from error


def latent_shape(codec: Codec, shape: Sequence[int], n: int) -> tuple[int, ...]:
    """The shape of n encoded images of `shape`."""
    return jax.eval_shape(codec.encode, jax.random.key(0), jax.ShapeDtypeStruct((n, *shape), jnp.uint8)).shape


def _values(codec: Codec, shape: tuple[int, ...], latent: tuple[int, ...]) -> tuple[Array, Array]:
    """Black and white as the process sees them, [1, ..., 1, C] each.

    A latent has neither; the bound's last term then reads it as pixels of [-1, 1], as the public code of DiT does. That is one row
    of a table's 1000, and moves nothing but the learned variance.
    """
    if not first_stage.is_latent(codec):
        return jax.jit(lambda: codecs.ends(codec, shape))()
    ones = jnp.ones((*(1,) * len(latent), latent[-1]))
    return -ones, ones


def _logsnr_range(process, schedule: Schedule, draw: times.Draw | times.Adaptive) -> tuple[float, float]:
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
