"""A run is a trained experiment: what a notebook or sample.py draws from; a classifier is what it can be guided by."""

import sys
import warnings
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxdiff import codec as codecs
from jaxdiff import compiling, editing, first_stage, models, sampling, shards, solvers, times
from jaxdiff import experiment as experiments
from jaxdiff import guidance as guide
from jaxdiff import mesh as meshes
from jaxdiff.classifier import LogProb, classifier
from jaxdiff.codec import Codec
from jaxdiff.denoiser import Denoiser, denoiser
from jaxdiff.errors import InputError
from jaxdiff.experiment import Experiment, build, target_of
from jaxdiff.level import Level, diffuse
from jaxdiff.names import parse, whole, with_arguments
from jaxdiff.solvers import Solver, wrappers
from jaxdiff.targets import determinant

Array = jax.Array


class Run(NamedTuple):
    """A trained model.

    `denoiser(label=None, guidance=1., classifier=None, classifier_scale=1.) -> Denoiser`, label an int or [n]; `generate(key, n,
    steps=50, solver="ddim", label=None, guidance=1., times=None, classifier=None, classifier_scale=1.) -> uint8 [n, H, W, C]`. A
    label of None or -1 is none; `solver` is a name, or a function of a denoiser; `times` is a name of `jaxdiff.times`, or None for
    the config's; a `Classifier` pushes towards the label too, or alone where the model is unconditional or guidance is 0.
    `trajectory(key, n, frames=10, ...) -> Trajectory` and `edit(key, image, mask=None, strength=1., resample=1, ...) -> uint8
    [n, H, W, C]` take the same. `params` is the average that config.sampling.ema names, `shape` one image's (H, W, C), `step` the
    training step it is from.
    """

    config: ConfigDict
    params: Any
    shape: tuple[int, ...]
    codec: Codec
    denoiser: Callable[..., Denoiser]
    generate: Callable[..., np.ndarray]
    step: int
    trajectory: Callable[..., "Trajectory"]
    edit: Callable[..., np.ndarray]


class Trajectory(NamedTuple):
    """What sampling went through: `x0`, the denoiser's estimates, and `x`, the noisy samples at unit scale.

    uint8 [frames, n, H, W, C] each; the last frame of both is the finished image.
    """

    x0: np.ndarray
    x: np.ndarray


class Request(NamedTuple):
    """What is to be drawn, checked: the network's labels int32 [n] or None, a key a sample, and the solver for some of the rows."""

    levels: Level
    labels: np.ndarray | None
    guidance: float
    keys: Array
    make: Callable[[np.ndarray], Solver]


class Classifier(NamedTuple):
    """A trained noise-aware classifier, for `guidance.classifier`.

    `log_prob(label) -> (x, level) -> [B]`, label an int or [B], x as `codec` encodes images. The other fields are as a `Run`'s.
    """

    config: ConfigDict
    params: Any
    shape: tuple[int, ...]
    codec: Codec
    log_prob: Callable[[Any], LogProb]
    step: int


def load(workdir: str | Path, ema: float | str | None = None, step: int | None = None) -> Run:
    """The run whose newest good checkpoint is in `workdir`; only its averaged parameters are read, onto every device.

    `ema` names another average than config.sampling.ema: one of config.training.ema, or where the workdir holds snapshots
    "power(std)" of any width, put together from them (Karras et al. 2024, section 3). `step` asks for the kept checkpoint of that
    step instead of the newest. Damaged checkpoints are passed over with a warning. A first stage that data.codec names is looked
    for inside `workdir` first, and run.config then says where it was. Raises InputError where there is no good checkpoint or no
    such average, and for a classifier's or an autoencoder's.
    """
    config, experiment, params, step = _load(workdir, ema, step)
    if experiment.target is None:
        raise InputError(f"{workdir} holds a classifier, which draws no images; jaxdiff.load_classifier loads it, to guide with")
    return of(config, experiment, params, step)


def load_classifier(workdir: str | Path, ema: float | str | None = None, step: int | None = None) -> Classifier:
    """The classifier whose newest good checkpoint is in `workdir`, as `load` loads a model that draws."""
    config, experiment, params, step = _load(workdir, ema, step)
    if experiment.target is not None:
        raise InputError(f"{workdir} holds a {config.model.name}, no classifier; jaxdiff.load loads it")
    return classifier_of(config, experiment, params, step)


def _load(workdir: str | Path, ema: float | str | None, step: int | None) -> tuple[ConfigDict, Experiment, Any, int]:
    from jaxdiff.cli import enable_compile_cache
    from jaxdiff.training import checkpoint  # brings Orbax, which drawing from parameters at hand does not need

    enable_compile_cache()
    step, config, bad = checkpoint.restore_meta(workdir, step)
    for number, problem in bad.items():
        warnings.warn(f"checkpoint of step {number} is damaged ({problem}); using step {step}", stacklevel=3)
    if config.model.name in models.AUTOENCODERS:
        raise InputError(f"{workdir} holds an autoencoder, which draws no images; jaxdiff.load_codec loads it, as a codec")
    config.data.codec = first_stage.found(config.data.codec, workdir)
    experiment = build(config)
    return config, experiment, restored(workdir, config, jax.eval_shape(experiment.init, jax.random.key(0)), ema, step), step


def restored(workdir: str | Path, config, shapes: Any, ema: float | str | None, step: int) -> Any:
    """The averaged parameters of that step, of these shapes, on every device; `ema` names the average as for `load`."""
    from jaxdiff.training import checkpoint, posthoc

    everywhere = meshes.replicated(meshes.make_mesh((-1, 1)))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), shapes)
    kept = {str(name): abstract for name in config.training.ema}
    if ema is None or str(ema) in kept:
        name = average(config) if ema is None else str(ema)
        return checkpoint.restore_ema(workdir, step, kept)[name]
    return jax.device_put(posthoc.reconstruct(workdir, config, abstract, ema, step), everywhere)


def average(config) -> str:
    """The name of the average that sampling uses. Raises InputError where training does not keep it."""
    kept = [str(decay) for decay in config.training.ema]
    if str(config.sampling.ema) not in kept:
        raise InputError(f"sampling.ema={config.sampling.ema} is not among training.ema; allowed: {', '.join(kept) or 'none'}")
    return str(config.sampling.ema)


def of(config, experiment: Experiment, params: Any, step: int = 0) -> Run:
    """The run of parameters at hand. Runs of one experiment share their compiled samplers. Raises InputError for a classifier's."""
    target_of(experiment)
    if config.sampling.clip and first_stage.is_latent(experiment.codec):
        raise InputError(
            f"sampling.clip=True clips to the values of pixels, and data.codec={config.data.codec!r} gives latents; set it to False"
        )

    def denoise(
        label: Any = None, guidance: float = 1.0, classifier: Classifier | None = None, classifier_scale: float = 1.0
    ) -> Denoiser:
        labels, pushed = _labels(config, experiment, label, guidance, classifier, classifier_scale)
        log_prob = None if classifier is None else classifier.log_prob(pushed)
        return denoiser_of(config, experiment, params, labels, guidance, log_prob, classifier_scale)

    def ask(*args: Any, **settings: Any) -> Request:
        return request(config, experiment, params, *args, **settings)

    def batches(wanted: Request, start: Array | None = None, draw: Callable = _draw, **more: Any) -> Iterator[tuple[int, Any]]:
        """(how many are left, what `draw` makes), batch by batch; `start` [n, ...] are encoded images to begin from, noised."""
        n = len(wanted.keys)
        # Each device draws its share of a batch; a sample depends on its own key alone, so not on how many share the work.
        mesh = _mesh(params)
        devices = 1 if mesh is None else mesh.size
        size = -(-min(n, config.sampling.batch_size) // devices) * devices
        for first in tqdm(range(0, n, size), desc="sampling", unit="batch", disable=n <= size):
            # The last batch is filled up, so that every batch has one shape and one compiled program.
            rows = np.minimum(np.arange(first, first + size), n - 1)
            made = wanted.make(rows)
            shape, x0 = latent_shape(experiment, size), None if start is None else start[rows]
            _tell_of_compiling(draw, (made, x0, more), shape)
            try:
                z = draw(wanted.keys[rows], made, wanted.levels, experiment.data_std, x0, **more, shape=shape, mesh=mesh)
            except (ValueError, TypeError) as error:
                raise InputError(f"this solver cannot draw: {' '.join(str(error).split())[:300]}") from error
            yield n - first, z

    def images(wanted: Request, start: Array | None = None) -> np.ndarray:
        return np.concatenate([meshes.fetch(experiment.codec.decode(z))[:n] for n, z in batches(wanted, start)])

    def generate(
        key: Array,
        n: int,
        steps: int = 50,
        solver: Any = "ddim",
        label: Any = None,
        guidance: float = 1.0,
        times: str | None = None,
        classifier: Classifier | None = None,
        classifier_scale: float = 1.0,
    ) -> np.ndarray:
        wanted = ask(key, n, steps, solver, label, guidance, times, classifier, classifier_scale)
        return images(wanted)

    def trajectory(key: Array, n: int, frames: int = 10, **settings: Any) -> Trajectory:
        wanted = ask(key, n, **settings)
        steps = editing.true_length(wanted.levels)
        if not 2 <= frames <= steps:
            raise InputError(f"frames={frames} is out of range; allowed: 2 to {steps}, the sampling steps")
        chosen = np.linspace(0, steps - 2, frames - 1).round().astype(int)
        at = jax.tree.map(lambda a: a[chosen], wanted.levels)

        def film(z: Array) -> np.ndarray:
            # Frame by frame: what decodes a batch of latents need not have the memory for all of them.
            return np.stack([meshes.fetch(experiment.codec.decode(frame)) for frame in z])

        parts = [[film(z)[:, :many] for z in path] for many, path in batches(wanted, draw=_draw_path, at=at)]
        return Trajectory(*(np.concatenate(each, axis=1) for each in zip(*parts)))

    def edit(
        key: Array, image: np.ndarray, mask: np.ndarray | None = None, strength: float = 1.0, resample: int = 1, **settings: Any
    ) -> np.ndarray:
        image, mask = _to_edit(experiment, image, mask)
        if not whole(resample, 1) or (mask is None and resample != 1):
            raise InputError(f"resample={resample} is out of range; allowed: whole numbers from 1, and with a mask alone above 1")
        wanted = ask(key, len(image), **settings)
        k_encode = jax.vmap(lambda k: jax.random.fold_in(k, 2))(wanted.keys)
        known = jax.vmap(lambda k, i: experiment.codec.encode(k, i[None])[0])(k_encode, jnp.asarray(image))
        levels, make = _levels_to_edit(wanted.levels, strength, resample), wanted.make
        if mask is not None:

            def make(rows):
                return editing.resampling(editing.replacement(wanted.make(rows), known[rows], 1 - jnp.asarray(mask[rows])))

        return images(wanted._replace(levels=levels, make=make), known if strength < 1 else None)

    return Run(config, params, experiment.shape, experiment.codec, denoise, generate, step, trajectory, edit)


def request(
    config,
    experiment: Experiment,
    params: Any,
    key: Array,
    n: int,
    steps=50,
    solver="ddim",
    label=None,
    guidance=1.0,
    times=None,
    classifier: Classifier | None = None,
    classifier_scale: float = 1.0,
) -> Request:
    """What `generate` is asked, checked. Raises InputError for what this model, or this classifier with it, cannot do."""
    if not whole(n, 1):
        raise InputError(f"{n} images cannot be drawn; ask for a whole number, at least 1")
    levels = grid(config, experiment, params, steps, times)
    labels, pushed = _labels(config, experiment, label, guidance, classifier, classifier_scale)
    if labels is None and experiment.classes:
        labels = np.array(-1, np.int32)  # as an array: no label and any label share one program
    labels, pushed = (None if each is None else _one_each(each, n) for each in (labels, pushed))

    def make(rows: np.ndarray) -> Solver:
        of_rows = None if labels is None else labels[rows]
        log_prob = None if classifier is None or pushed is None else classifier.log_prob(pushed[rows])
        denoise = denoiser_of(config, experiment, params, of_rows, guidance, log_prob, classifier_scale)
        return solver_of(solver, "solver", denoise)

    return Request(levels, labels, guidance, sampling.sample_keys(key, n), make)


def _one_each(labels: np.ndarray, n: int) -> np.ndarray:
    """The labels [] or [n] as [n]. Raises InputError for another number of them."""
    if labels.ndim and len(labels) != n:
        raise InputError(f"{n} images need one label or {n}, got {len(labels)}")
    return np.broadcast_to(labels, (n,))


def denoiser_of(
    config,
    experiment: Experiment,
    params: Any,
    labels: Any,
    guidance: float | Array,
    log_prob: LogProb | None = None,
    scale: float | Array = 1.0,
) -> Denoiser:
    """What sampling asks: the network with labels int32 [] or [n] or None, guided, and clipped where config.sampling.clip says so.

    It is guided without a classifier, and where `log_prob` is given with one. Nothing is checked, so labels and scales may be
    traced.
    """

    def of_label(labels):
        cond = None if labels is None else {"label": jnp.asarray(labels, jnp.int32)}
        return denoiser(experiment.net(params, cond), target_of(experiment), experiment.data_std)

    if labels is None and experiment.classes:
        labels = jnp.array(-1)
    made = of_label(labels)
    if experiment.classes and config.process.drop_label:
        # Always, so that all scales are one program; at 1 the second network is not evaluated.
        made = guide.classifier_free(made, of_label(jnp.full_like(labels, -1)), guidance)
    if log_prob is not None:
        made = guide.classifier(made, log_prob, scale)
    return guide.clip(made, *codecs.ends(experiment.codec, experiment.shape)) if config.sampling.clip else made


def classifier_of(config, experiment: Experiment, params: Any, step: int = 0) -> Classifier:
    """The classifier of parameters at hand."""

    def log_prob(label: Any) -> LogProb:
        return classifier(experiment.net(params, None), jnp.asarray(_in_range(label, 0, experiment.classes)), experiment.data_std)

    return Classifier(config, params, experiment.shape, experiment.codec, log_prob, step)


def _mesh(params: Any) -> Mesh | None:
    """The mesh of several devices that the parameters are on, None for a single one."""
    sharding = getattr(next(iter(jax.tree.leaves(params)), None), "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None  # type: ignore[return-value]


def _begin(keys, levels, data_std, x0, shape):
    """The sample at levels[0], of noise alone or of x0 with noise, and the keys for the rest."""
    k_prior, k_solve = (jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys) for i in range(2))
    first = Level(levels.alpha[0], levels.sigma[0])
    if x0 is None:
        return sampling.prior(k_prior, first, shape, data_std), k_solve
    noise = sampling.prior(k_prior, Level(jnp.zeros(()), jnp.ones(())), shape)
    return diffuse(Level(*(jnp.asarray(a, x0.dtype) for a in first)), x0, noise), k_solve


def draw_samples(keys, solver, levels, data_std, x0, shape, mesh):
    """The encoded images of keys [n], from noise or, where given, from x0 [n, ...] noised to levels[0]."""
    if mesh is not None:
        keys = jax.lax.with_sharding_constraint(keys, meshes.split(mesh))
    x, k_solve = _begin(keys, levels, data_std, x0, shape)
    return sampling.sample(k_solve, solver, x, levels)


# Parameters, labels, guidance, eta, the grid and the keys are traced arguments: new values never compile again.
_draw = compiling.jit(draw_samples, static_argnames=("shape", "mesh"))

# The programs that have been made, as far as a user is to be told that one is.
_compiled: set[Hashable] = set()


def _tell_of_compiling(draw: Callable, arguments: Any, shape: tuple[int, ...]) -> None:
    leaves, structure = jax.tree.flatten(arguments)
    program = draw, structure, shape, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    if program not in _compiled:
        tqdm.write("compiling the sampler (once; its program is kept) ...", file=sys.stderr)
        _compiled.add(program)


def _draw_with_path(keys, solver, levels, data_std, x0, at, shape, mesh):
    """The denoiser's estimates and the unit-scale noisy samples, [frames, n, ...], at the levels `at`; the last is the sample."""
    if mesh is not None:
        keys = jax.lax.with_sharding_constraint(keys, meshes.split(mesh))
    x, k_solve = _begin(keys, levels, data_std, x0, shape)
    solver = wrappers.recorded(solver, at)
    state, _ = sampling.solve(k_solve, solver, x, levels)
    last = solver.final(state, jax.tree.map(lambda a: jnp.asarray(a[-1], x.dtype), levels))[None]
    scale = jnp.hypot(at.alpha * data_std, at.sigma).reshape(-1, *(1,) * len(shape))
    return jnp.concatenate([state.x0, last]), jnp.concatenate([state.noisy / scale, last])


_draw_path = compiling.jit(_draw_with_path, static_argnames=("shape", "mesh"))


def _levels_to_edit(levels: Level, strength: float, resample: int) -> Level:
    """The grid from `strength` of its levels on, walked down `resample` times in stretches, padded as it was."""
    try:
        begun = editing.from_strength(levels, strength)
        steps = editing.true_length(begun)
        if resample == 1 or steps == 1:
            return begun
        return times.pad(editing.repaint_levels(begun, min(10, steps - 1), resample), len(levels.alpha))
    except ValueError as error:
        raise InputError(f"{error} (sampling.max_steps of the config says how many levels there may be)") from error


def _to_edit(experiment: Experiment, image: Any, mask: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 [n, H, W, C] and masks float32 [n, H, W, 1] or None, 1 where drawn anew. Raises InputError for others."""
    image = np.asarray(image)
    image = image[None] if image.ndim == len(experiment.shape) else image
    if image.dtype != np.uint8 or image.shape[1:] != experiment.shape:
        raise InputError(f"an image to edit is uint8 of shape {experiment.shape} or [n, ...], got {image.dtype} {image.shape}")
    if mask is None:
        return image, None
    if first_stage.is_latent(experiment.codec):
        raise InputError("a mask is of pixels, and this model diffuses the latents of its first stage; edit without a mask")
    mask, want = np.asarray(mask), experiment.shape[:-1]
    if mask.shape not in (want, (len(image), *want)) or not ((mask == 0) | (mask == 1)).all():
        raise InputError(
            f"a mask is of shape {want} or [n, ...], 1 where the image is drawn anew and 0 elsewhere, got {mask.shape}"
        )
    return image, np.broadcast_to(mask, (len(image), *want))[..., None].astype(np.float32)


def grid(config, experiment: Experiment, params: Any, steps: int, spacing: str | None = None) -> Level:
    """The levels of `steps` sampling steps, padded to config.sampling.max_steps so that all numbers of steps share a program.

    `spacing` names another function of `jaxdiff.times` than config.sampling.times.
    Raises InputError for more steps than the schedule or the padding has, and for a grid that does not fall.
    """
    most = config.sampling.max_steps
    if not whole(steps, 1) or steps > most:
        raise InputError(f"steps={steps} is out of range; allowed: 1 to {most} (sampling.max_steps), whole")
    key, text = ("sampling.times", config.sampling.times) if spacing is None else ("times", spacing)
    chosen = with_arguments(times, text, key)(n=steps)
    if not isinstance(chosen, np.ndarray):
        raise InputError(f"{key}={text!r} is not a grid of sampling times, such as uniform or 'karras(lo=0.002, hi=80)'")
    try:
        levels = times.grid(experiment.schedule(params), chosen, most)
    except ValueError as error:
        raise InputError(f"{key}={text!r}: {error}") from error
    if (levels.alpha < 0).any() or (levels.sigma <= 0).any():
        raise InputError(
            f"{key}={text!r} leaves the range of process.schedule={config.process.schedule!r}: at times {chosen[0]:g} to "
            f"{chosen[-1]:g} alpha falls to {levels.alpha.min():g} (allowed: from 0), sigma to {levels.sigma.min():g} (above 0)"
        )
    if not (np.diff(levels.sigma / np.hypot(levels.alpha, levels.sigma)) <= 0).all():
        raise InputError(f"{key}={text!r} does not fall from noise to data")
    first = Level(levels.alpha[0], levels.sigma[0])
    if np.asarray(determinant(target_of(experiment), first)) == 0:
        raise InputError(
            f"process.target={config.process.target!r} says nothing at the first level of {key}="
            f"{text!r} (alpha {first.alpha:g}, sigma {first.sigma:g}); start the grid lower"
        )
    return levels


def check(config, experiment: Experiment) -> None:
    """Raises InputError where config.sampling asks for what the model cannot do; needs no parameters and computes nothing."""
    average(config)
    for name in ("num", "batch_size"):
        if name in config.sampling and config.sampling[name] < 1:
            raise InputError(f"sampling.{name}={config.sampling[name]} is out of range; it is at least 1")
    if getattr(experiment, "target", None) is None:  # a classifier or an autoencoder: nothing is drawn
        return
    grid(config, experiment, None, config.sampling.steps)
    label, guidance = (0, config.sampling.guidance) if experiment.classes else (None, 1.0)
    denoise = of(config, experiment, None).denoiser(label, guidance)
    solver_of(config.sampling.solver, "sampling.solver", denoise)


def solver_of(text: Any, key: str, denoise: Denoiser) -> Solver:
    """The solver that `text` names, or that a function of a denoiser gives. Raises InputError naming the config's `key`."""
    if callable(text):
        made = text(denoise)
    elif isinstance(text, str):
        _, positional, _ = parse(solvers, text, key)
        if positional:
            raise InputError(f"{key}={text!r}: numbers of a solver are given by name, as in 'deis(order=2)'")
        made = with_arguments(solvers, text, key)(denoise)
    else:
        raise InputError(f"{key}={text!r} is neither the name of a solver nor a function of a denoiser")
    if not isinstance(made, Solver):
        raise InputError(f"{key}={text!r} is not a solver")
    return made


def latent_shape(experiment: Experiment, n: int) -> tuple[int, ...]:
    """The shape of n encoded images."""
    return experiments.latent_shape(experiment.codec, experiment.shape, n)


def _labels(
    config, experiment: Experiment, label: Any, guidance: float, classifier: Classifier | None, scale: float
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The labels that the network is told and those that the classifier pushes to, int32 [] or [n], or None each.

    Raises InputError for labels out of range, and for guidance that cannot be.
    """
    pushed = None if classifier is None else _pushed(experiment, label, classifier, scale)
    # The label of an unconditional model is the classifier's business alone.
    labels = _told(config, experiment, None if pushed is not None and not experiment.classes else label)
    _finite("guidance", guidance)
    if guidance != 1 and (labels is None or (labels == -1).all()):
        raise InputError(f"guidance={guidance} needs a label: without one there is nothing to guide towards")
    if guidance != 1 and not config.process.drop_label:
        raise InputError(f"guidance={guidance} needs a model trained with process.drop_label above 0")
    return labels, pushed


def _finite(name: str, value: Any) -> None:
    """Raises InputError for what is no single number that float32 can hold."""
    if not isinstance(value, float | int | np.floating | np.integer) or not abs(float(value)) <= float(np.finfo(np.float32).max):
        raise InputError(f"{name}={value} is not a finite number")


def _pushed(experiment: Experiment, label: Any, classifier: Classifier, scale: float) -> np.ndarray:
    classes = classifier.config.model.classes
    if classifier.shape != experiment.shape:
        raise InputError(f"the classifier is of images of shape {classifier.shape}, this model draws {experiment.shape}")
    if experiment.classes not in (0, classes):
        raise InputError(f"the classifier knows {classes} classes, this model {experiment.classes}")
    if not _same(classifier.codec, experiment.codec, experiment.shape):
        raise InputError(f"the classifier was trained with another data.codec, {classifier.config.data.codec!r}, than this model")
    _finite("classifier_scale", scale)
    if label is None:
        raise InputError("a classifier needs a label: without one there is nothing to push towards")
    return _in_range(label, 0, classes)


def _same(a: Codec, b: Codec, shape: tuple[int, ...]) -> bool:
    """Whether two codecs of images of `shape` make the same of them."""
    latent = [jax.tree.leaves(each.encode) for each in (a, b) if first_stage.is_latent(each)]
    if latent:  # an autoencoder is its parameters, and what its latents are scaled by
        alike = len(latent) == 2 and len(latent[0]) == len(latent[1])
        return alike and all(x.shape == y.shape and bool((x == y).all()) for x, y in zip(*latent))
    # A codec of pixels is a line through what it makes of black and of white, whatever a config calls it.
    return all((jnp.abs(x - y) <= 1e-3).all() for x, y in zip(*(codecs.ends(each, shape) for each in (a, b))))


def _told(config, experiment: Experiment, label: Any) -> np.ndarray | None:
    if label is None:
        if experiment.classes and not config.process.drop_label:
            raise InputError(f"this model knows only labelled images: give a label, 0 to {experiment.classes - 1}")
        return None
    if not experiment.classes:
        raise InputError(f"label={label} was given, but this model is unconditional")
    # Without dropped labels the null one was never trained.
    return _in_range(label, -1 if config.process.drop_label else 0, experiment.classes)


def _in_range(label: Any, least: int, classes: int) -> np.ndarray:
    labels = np.asarray(label)
    wrong = labels[(labels < least) | (labels >= classes)]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim > 1 or wrong.size:
        value = wrong.flat[0] if wrong.size else label
        none = ", or -1 for none" if least < 0 else ""
        raise InputError(f"label={value} is out of range; allowed: 0 to {classes - 1}{none}")
    return labels.astype(np.int32)


def chosen(run: Run, n: int, label: Any = None, **settings: Any) -> tuple[np.ndarray | None, int | None, dict[str, Any]]:
    """What n images are drawn with, as config.sampling says where `settings` (steps, solver, guidance, times ...) do not.

    (labels [n] or None, columns of a grid or None where a square will do, settings). Without a label, a model with classes, its
    own or those of a classifier among the settings, draws each in turn, one a column.
    """
    sampling, classes = run.config.sampling, run.config.model.classes
    if classifier := settings.get("classifier"):
        classes = classes or classifier.config.model.classes
    asked = "guidance" in settings
    settings = {name: sampling[name] for name in ("steps", "solver", "guidance")} | settings
    columns = None
    if label is None and classes:
        label, columns = np.arange(n) % classes, classes if classes <= 20 else None
    if (label is None or np.all(np.asarray(label) == -1) or not run.config.model.classes) and not asked:
        # There is nothing to guide towards; a guidance that was asked for is refused.
        settings["guidance"] = 1.0
    if label is not None:
        label = np.broadcast_to(np.asarray(label), (n,))
    return label, columns, settings


def showcase(run: Run, key: Array, n: int, label: Any = None, **settings: Any) -> tuple[np.ndarray, int | None, np.ndarray | None]:
    """n images as `chosen` says: (images, columns, labels)."""
    labels, columns, settings = chosen(run, n, label, **settings)
    images = run.generate(key, n, label=labels, **settings)
    return images, columns, None if labels is None else labels.astype(np.int32)


def asked(run: Run, seed: int, labels: np.ndarray | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What images drawn with these settings depend on, all of it, as JSON: models by their digests."""
    config = run.config
    guides = {"classifier": shards.digest(settings["classifier"].params)} if "classifier" in settings else {}
    # An autoencoder is what it has learnt, wherever it lies.
    codec = first_stage.facts(run.codec) if first_stage.is_latent(run.codec) else config.data.codec
    built = {"process": config.process.to_dict(), "codec": codec, "clip": config.sampling.clip}
    which = {"seed": seed, "labels": None if labels is None else labels.tolist(), "model": shards.digest(run.params)}
    return {"times": config.sampling.times, **settings, **guides, **which, **built}


def kept(run: Run, folder: epath.Path, seed: int, num: int, labels: np.ndarray | None, settings: dict[str, Any]) -> np.ndarray:
    """Many images, uint8 [num, H, W, C], in parts that are kept in `folder`: stopped, the same call goes on where it was.

    `labels` and `settings` as of `chosen`. Raises InputError where the folder holds parts of another request.
    """
    keys, size = sampling.sample_keys(jax.random.key(seed), num), run.config.sampling.batch_size

    def draw(rows: np.ndarray) -> np.ndarray:
        # The last part is filled up, so that all parts have one shape and one compiled program.
        full = np.minimum(np.arange(rows[0], rows[0] + size), num - 1)
        return run.generate(keys[full], size, label=None if labels is None else labels[full], **settings)[: len(rows)]

    return shards.drawn(folder, asked(run, seed, labels, settings), num, size, draw)
