"""A trained sampler as one file that runs without the network's code: StableHLO for CPU, CUDA and TPU, of any batch size.

Only the schedule, which the grid is made of, and what a request is checked by are read from its config.
"""

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export as jax_export
from ml_collections import ConfigDict

from jaxdiff import compiling, schedules, targets
from jaxdiff import run as runs
from jaxdiff.errors import InputError
from jaxdiff.experiment import Experiment, build
from jaxdiff.level import Level
from jaxdiff.names import named
from jaxdiff.run import Run

Array = jax.Array
PLATFORMS = ("cpu", "cuda", "tpu")
GENERATOR = "threefry2x32"


class Exported(NamedTuple):
    """A sampler from a file.

    `generate(key, n, steps=50, label=None, guidance=1., times=None) -> uint8 [n, H, W, C]` as of a `Run`;
    `call(params, key_data [n, 2], alpha [N], sigma [N], labels int32 [n], guidance []) -> uint8 [n, H, W, C]` is the program
    itself, N config.sampling.max_steps.
    """

    config: ConfigDict
    params: Any
    generate: Callable[..., np.ndarray]
    call: Callable[..., Array]


def export(run: Run, path: str | Path, solver: str = "ddim", platforms: Sequence[str] = ("cpu", "cuda", "tpu")) -> None:
    """Writes the whole sampler of a run, network, solver and codec, with its parameters and config, to `path`.

    Batch, seed, labels, guidance, grid and the number of steps, up to config.sampling.max_steps, stay free; keys are those of
    jax.random.key with the generator threefry2x32, JAX's default. Raises InputError for a platform, a solver or a folder there
    is not.
    """
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        raise InputError(f"platforms={tuple(platforms)!r} is out of range; allowed: {', '.join(PLATFORMS)}")
    place = epath.Path(path)
    if place.is_dir() or ("://" not in str(path) and not place.parent.is_dir()):
        raise InputError(f"{path} is {'a folder' if place.is_dir() else 'in a folder that is not there'}; give the name of a file")
    experiment = build(run.config)
    (batch,) = jax_export.symbolic_shape("batch")
    words = jax.random.key_data(jax.random.key(0, impl=GENERATOR))

    def of(shape: tuple, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    n = run.config.sampling.max_steps
    params = jax.tree.map(lambda a: of(a.shape, a.dtype), run.params)
    given = of((batch, *words.shape), words.dtype), of((n,), jnp.float32), of((n,), jnp.float32), of((batch,), jnp.int32)
    program = jax.jit(_program(run.config, experiment, solver))
    exported = jax_export.export(program, platforms=tuple(platforms))(params, *given, of((), jnp.float32))
    _write(place, run, bytes(exported.serialize()))


def _program(config, experiment: Experiment, solver: str) -> Callable[..., Array]:
    def program(params, words, alpha, sigma, labels, guidance):
        keys = jax.random.wrap_key_data(words, impl=GENERATOR)
        denoise = runs.denoiser_of(config, experiment, params, labels if experiment.classes else None, guidance)
        shape = (words.shape[0], *runs.latent_shape(experiment, 1)[1:])
        made = runs.solver_of(solver, "solver", denoise)
        return experiment.codec.decode(runs.draw_samples(keys, made, Level(alpha, sigma), experiment.data_std, None, shape, None))

    return program


def _write(path: epath.Path, run: Run, program: bytes) -> None:
    leaves = {jax.tree_util.keystr(at): np.asarray(leaf) for at, leaf in jax.tree_util.tree_leaves_with_path(run.params)}
    arrays = io.BytesIO()
    np.savez(arrays, **leaves)  # type: ignore[arg-type]
    temporary = path.parent / (path.name + ".partial")
    with temporary.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("sampler.stablehlo", program)
        archive.writestr("params.npz", arrays.getvalue())
        archive.writestr("config.json", run.config.to_json())
    temporary.replace(path)


def load_exported(path: str | Path) -> Exported:
    """The sampler that `export` wrote, for the platform at hand. Raises InputError for another file, or another platform."""
    from jaxdiff.training.checkpoint import read_config  # brings Orbax

    try:
        with epath.Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            program = jax_export.deserialize(bytearray(archive.read("sampler.stablehlo")))
            params = _params(program, np.load(io.BytesIO(archive.read("params.npz"))))
            config = read_config(archive.read("config.json").decode())
            experiment = _without_network(config)
    except Exception as error:  # a damaged file ends in errors of zipfile, zlib, NumPy, json and JAX
        raise InputError(f"{path} is not an exported sampler: {' '.join(str(error).split()) or type(error).__name__}") from error
    if jax.default_backend().replace("gpu", "cuda") not in program.platforms:
        raise InputError(f"{path} was exported for {', '.join(program.platforms)}; this is {jax.default_backend()}")
    call = compiling.jit(program.call)

    def generate(key, n, steps=50, label=None, guidance=1.0, times=None):
        if (kind := str(jax.random.key_impl(key))) != GENERATOR:
            raise InputError(f"the key is of the generator {kind}; allowed: {GENERATOR}, as jax.random.key(0, impl={GENERATOR!r})")
        wanted = runs.request(config, experiment, params, key, n, steps, "ddim", label, guidance, times)
        labels = np.full((n,), -1, np.int32) if wanted.labels is None else wanted.labels
        words, size = jax.random.key_data(wanted.keys), min(n, config.sampling.batch_size)
        out = []
        for first in range(0, n, size):
            rows = np.minimum(np.arange(first, first + size), n - 1)
            images = call(params, words[rows], *wanted.levels, labels[rows], np.float32(guidance))
            out.append(np.asarray(images)[: n - first])
        return np.concatenate(out)

    return Exported(config, params, generate, call)


def _params(program: jax_export.Exported, arrays: Any) -> Any:
    """The parameters as the program takes them, each found by its path in the tree. Raises an error where one does not fit."""
    (wanted, *_), _ = jax.tree.unflatten(program.in_tree, program.in_avals)

    def found(at: Any, aval: Any) -> Array:
        array = arrays[jax.tree_util.keystr(at)]
        if (array.shape, array.dtype) != (aval.shape, aval.dtype):
            raise ValueError(f"{jax.tree_util.keystr(at)} is {array.dtype} {array.shape}, not {aval.dtype} {aval.shape}")
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(found, wanted)


def _without_network(config) -> Experiment:
    """What a request is checked by and its grid is made of; the network and the objective, which the program replaces, are None."""
    none: Any = None
    curve, process = named(schedules, config.process.schedule, "process.schedule"), config.process

    def schedule(params: Any) -> schedules.Schedule:
        return curve.at(params["schedule"]) if isinstance(curve, schedules.Learned) else curve

    return Experiment(
        init=none,
        prepare=none,
        loss=none,
        extra=none,
        settle=none,
        net=none,
        schedule=schedule,
        target=named(targets, process.target, "process.target"),
        codec=none,
        shape=config.data.shape,
        data_std=process.data_std,
        classes=config.model.classes,
        draw=none,
        objective=none,
    )
