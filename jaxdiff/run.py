"""A run is a trained experiment: what a notebook or sample.py draws from; a classifier is what it can be guided by."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxdiff import codec as codecs
from jaxdiff import guidance as guide
from jaxdiff import mesh as meshes
from jaxdiff import sampling, solvers, times
from jaxdiff.classifier import LogProb, classifier
from jaxdiff.codec import Codec
from jaxdiff.denoiser import Denoiser, denoiser
from jaxdiff.errors import InputError
from jaxdiff.experiment import Experiment, build, target_of
from jaxdiff.level import Level
from jaxdiff.names import with_arguments
from jaxdiff.solvers import Solver
from jaxdiff.targets import determinant

Array = jax.Array


class Run(NamedTuple):
    """A trained model.

    `denoiser(label=None, guidance=1.) -> Denoiser`, label an int or [n]; `generate(key, n, steps=50, solver="ddim", label=None,
    guidance=1.) -> uint8 [n, H, W, C]`. A label of None or -1 is none. `params` is the average that config.sampling.ema names,
    `shape` one image's (H, W, C), `step` the training step it is from.
    """

    config: ConfigDict
    params: Any
    shape: tuple[int, ...]
    codec: Codec
    denoiser: Callable[..., Denoiser]
    generate: Callable[..., np.ndarray]
    step: int


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


def load(workdir: str | Path, ema: float | str | None = None) -> Run:
    """The run whose newest good checkpoint is in `workdir`; only its averaged parameters are read, onto every device.

    `ema` names another average than config.sampling.ema: one of config.training.ema, or where the workdir holds snapshots
    "power(std)" of any width, put together from them (Karras et al. 2024, section 3). Damaged checkpoints are passed over with a
    warning. Raises InputError where there is no good checkpoint or no such average, and for a classifier's.
    """
    config, experiment, params, step = _load(workdir, ema)
    if experiment.target is None:
        raise InputError(f"{workdir} holds a classifier, which draws no images; jaxdiff.load_classifier loads it, to guide with")
    return of(config, experiment, params, step)


def load_classifier(workdir: str | Path, ema: float | str | None = None) -> Classifier:
    """The classifier whose newest good checkpoint is in `workdir`, as `load` loads a model that draws."""
    config, experiment, params, step = _load(workdir, ema)
    if experiment.target is not None:
        raise InputError(f"{workdir} holds a {config.model.name}, no classifier; jaxdiff.load loads it")
    return classifier_of(config, experiment, params, step)


def _load(workdir: str | Path, ema: float | str | None) -> tuple[ConfigDict, Experiment, Any, int]:
    from jaxdiff.training import checkpoint, posthoc  # brings Orbax, which drawing from parameters at hand does not need

    step, config, bad = checkpoint.restore_meta(workdir)
    for number, problem in bad.items():
        warnings.warn(f"checkpoint of step {number} is damaged ({problem}); using step {step}", stacklevel=3)
    experiment = build(config)
    everywhere = meshes.replicated(meshes.make_mesh((-1, 1)))
    params = jax.eval_shape(experiment.init, jax.random.key(0))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), params)
    kept = {str(name): abstract for name in config.training.ema}
    if ema is None or str(ema) in kept:
        name = average(config) if ema is None else str(ema)
        return config, experiment, checkpoint.restore_ema(workdir, step, kept)[name], step
    averaged = posthoc.reconstruct(workdir, config, abstract, ema, step)
    return config, experiment, jax.device_put(averaged, everywhere), step


def average(config) -> str:
    """The name of the average that sampling uses. Raises InputError where training does not keep it."""
    kept = [str(decay) for decay in config.training.ema]
    if str(config.sampling.ema) not in kept:
        raise InputError(f"sampling.ema={config.sampling.ema} is not among training.ema; allowed: {', '.join(kept) or 'none'}")
    return str(config.sampling.ema)


def of(config, experiment: Experiment, params: Any, step: int = 0) -> Run:
    """The run of parameters at hand. Runs of one experiment share their compiled samplers. Raises InputError for a classifier's."""
    target = target_of(experiment)

    def denoise(label: Any = None, guidance: float = 1.0) -> Denoiser:
        labels = _labels(config, experiment, label)
        if not np.isfinite(guidance):
            raise InputError(f"guidance={guidance} is not a finite number")
        if guidance != 1 and (labels is None or (labels == -1).all()):
            raise InputError(f"guidance={guidance} needs a label: without one there is nothing to guide towards")
        if guidance != 1 and not config.process.drop_label:
            raise InputError(f"guidance={guidance} needs a model trained with process.drop_label above 0")

        def of_label(labels):
            cond = None if labels is None else {"label": jnp.asarray(labels, jnp.int32)}
            return denoiser(experiment.net(params, cond), target, experiment.data_std)

        if labels is None and experiment.classes:
            labels = np.array(-1)
        made = of_label(labels)
        if guidance != 1:
            made = guide.classifier_free(made, of_label(np.full_like(labels, -1)), guidance)
        return guide.clip(made, *codecs.ends(experiment.codec, experiment.shape)) if config.sampling.clip else made

    def generate(key: Array, n: int, steps: int = 50, solver: str = "ddim", label: Any = None, guidance: float = 1.0) -> np.ndarray:
        if n < 1:
            raise InputError(f"{n} images cannot be drawn; ask for at least 1")
        levels = grid(config, experiment, params, steps)
        labels = _labels(config, experiment, label)
        if labels is None and experiment.classes:
            labels = np.array(-1, np.int32)  # as an array: no label and any label share one program
        if labels is not None:
            labels = np.broadcast_to(labels, (n,)) if labels.ndim == 0 or len(labels) == n else labels
            if labels.shape != (n,):
                raise InputError(f"{n} images need one label or {n}, got {labels.shape[0]}")
        keys = sampling.sample_keys(key, n)
        # Each device draws its share of a batch; a sample depends on its own key alone, so not on how many share the work.
        mesh = _mesh(params)
        devices = 1 if mesh is None else mesh.size
        size = -(-min(n, config.sampling.batch_size) // devices) * devices
        images = []
        for start in tqdm(range(0, n, size), desc="sampling", unit="batch", disable=n <= size):
            # The last batch is filled up, so that every batch has one shape and one compiled program.
            rows = np.minimum(np.arange(start, start + size), n - 1)
            made = _solver(solver, "solver", denoise(None if labels is None else labels[rows], guidance))
            try:
                z = _draw(keys[rows], made, levels, experiment.data_std, shape=latent_shape(experiment, size), mesh=mesh)
            except ValueError as error:
                raise InputError(f"solver={solver!r}: {error}") from error
            images.append(meshes.fetch(experiment.codec.decode(z))[: n - start])
        return np.concatenate(images)

    return Run(config, params, experiment.shape, experiment.codec, denoise, generate, step)


def classifier_of(config, experiment: Experiment, params: Any, step: int = 0) -> Classifier:
    """The classifier of parameters at hand."""

    def log_prob(label: Any) -> LogProb:
        return classifier(experiment.net(params, None), jnp.asarray(_in_range(label, 0, experiment)), experiment.data_std)

    return Classifier(config, params, experiment.shape, experiment.codec, log_prob, step)


def _mesh(params: Any) -> Mesh | None:
    """The mesh of several devices that the parameters are on, None for a single one."""
    sharding = getattr(next(iter(jax.tree.leaves(params)), None), "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None  # type: ignore[return-value]


def _draw_samples(keys, solver, levels, data_std, shape, mesh):
    if mesh is not None:
        keys = jax.lax.with_sharding_constraint(keys, meshes.split(mesh))
    k_prior, k_solve = (jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys) for i in range(2))
    start = Level(levels.alpha[0], levels.sigma[0])
    return sampling.sample(k_solve, solver, sampling.prior(k_prior, start, shape, data_std), levels)


# Parameters, labels, guidance, eta, the grid and the keys are traced arguments: new values never compile again.
_draw = jax.jit(_draw_samples, static_argnames=("shape", "mesh"))


def grid(config, experiment: Experiment, params: Any, steps: int) -> Level:
    """The levels of `steps` sampling steps, padded to config.sampling.max_steps so that all numbers of steps share a program.

    Raises InputError for more steps than the schedule or the padding has, and for a grid that does not fall.
    """
    most = config.sampling.max_steps
    if not 1 <= steps <= most:
        raise InputError(f"steps={steps} is out of range; allowed: 1 to {most} (sampling.max_steps)")
    chosen = with_arguments(times, config.sampling.times, "sampling.times")(n=steps)
    try:
        levels = times.grid(experiment.schedule(params), chosen, most)
    except ValueError as error:
        raise InputError(f"sampling.times={config.sampling.times!r}: {error}") from error
    if not (np.diff(levels.sigma / np.hypot(levels.alpha, levels.sigma)) <= 0).all():
        raise InputError(f"sampling.times={config.sampling.times!r} does not fall from noise to data")
    first = Level(levels.alpha[0], levels.sigma[0])
    if np.asarray(determinant(target_of(experiment), first)) == 0:
        raise InputError(
            f"process.target={config.process.target!r} says nothing at the first level of sampling.times="
            f"{config.sampling.times!r} (alpha {first.alpha:g}, sigma {first.sigma:g}); start the grid lower"
        )
    return levels


def check(config, experiment: Experiment) -> None:
    """Raises InputError where config.sampling asks for what the model cannot do; needs no parameters and computes nothing."""
    average(config)
    for name in ("num", "batch_size"):
        if name in config.sampling and config.sampling[name] < 1:
            raise InputError(f"sampling.{name}={config.sampling[name]} is out of range; it is at least 1")
    if experiment.target is None:  # nothing is drawn
        return
    grid(config, experiment, None, config.sampling.steps)
    label, guidance = (0, config.sampling.guidance) if experiment.classes else (None, 1.0)
    denoise = of(config, experiment, None).denoiser(label, guidance)
    _solver(config.sampling.solver, "sampling.solver", denoise)


def _solver(text: str, key: str, denoise: Denoiser) -> Solver:
    made = with_arguments(solvers, text, key)(denoise)
    if not isinstance(made, Solver):
        raise InputError(f"{key}={text!r} is not a solver")
    return made


def latent_shape(experiment: Experiment, n: int) -> tuple[int, ...]:
    """The shape of n encoded images."""
    image = jax.ShapeDtypeStruct((n, *experiment.shape), jnp.uint8)
    return jax.eval_shape(experiment.codec.encode, jax.random.key(0), image).shape


def _labels(config, experiment: Experiment, label: Any) -> np.ndarray | None:
    """The labels as int32 [] or [n], or None. Raises InputError for one out of range."""
    if label is None:
        if experiment.classes and not config.process.drop_label:
            raise InputError(f"this model knows only labelled images: give a label, 0 to {experiment.classes - 1}")
        return None
    if not experiment.classes:
        raise InputError(f"label={label} was given, but this model is unconditional")
    # Without dropped labels the null one was never trained.
    return _in_range(label, -1 if config.process.drop_label else 0, experiment)


def _in_range(label: Any, least: int, experiment: Experiment) -> np.ndarray:
    labels = np.asarray(label)
    wrong = labels[(labels < least) | (labels >= experiment.classes)]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim > 1 or wrong.size:
        value = wrong.flat[0] if wrong.size else label
        none = ", or -1 for none" if least < 0 else ""
        raise InputError(f"label={value} is out of range; allowed: 0 to {experiment.classes - 1}{none}")
    return labels.astype(np.int32)


def showcase(run: Run, key: Array, n: int, label: Any = None, **settings: Any) -> tuple[np.ndarray, int | None, np.ndarray | None]:
    """n images as config.sampling says, where `settings` (steps, solver, guidance) do not: (images, columns, labels).

    Without a label, a model with classes draws each in turn, one a column. Labels are int32 [n] or None, columns None where a
    square will do.
    """
    sampling, classes = run.config.sampling, run.config.model.classes
    asked = "guidance" in settings
    settings = {name: sampling[name] for name in ("steps", "solver", "guidance")} | settings
    columns = None
    if label is None and classes:
        label, columns = np.arange(n) % classes, classes if classes <= 20 else None
    if (label is None or np.all(np.asarray(label) == -1)) and not asked:
        # There is nothing to guide towards; a guidance that was asked for is refused.
        settings["guidance"] = 1.0
    images = run.generate(key, n, label=label, **settings)
    return images, columns, None if label is None else np.broadcast_to(np.asarray(label, np.int32), (n,))
