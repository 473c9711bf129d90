"""Draws of a tiny network before they become bytes, on as many devices as there are; on the command line it saves them to a file.

python tests/draws.py OUT.npz                                           # XLA_FLAGS=--xla_force_host_platform_device_count=8
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from tiny import config, noisy

from jaxdiff import experiment, run, solvers
from jaxdiff import mesh as meshes
from jaxdiff.level import Level, Prediction

SOLVERS = ("ddim", "ddpm", "churned")


def images(params, solver: str, n: int, first: int = 0) -> np.ndarray:
    """Encoded images of 64, n from the `first` on, float32 [n, 8, 8, 1], as `run.generate` draws them: ten labels, 6 steps."""
    c = config(**{"process.drop_label": 0.0})
    built = experiment.build(c)
    rows = np.arange(first, first + n)
    asked = run.request(c, built, params, keys(rows), n, 6, solver, rows % 10)
    made = asked.make(np.arange(n))
    return meshes.fetch(draw(params, asked.keys, made, asked.levels, (n, *built.shape)))


def guided(params, n: int, guidance: float = 2.0) -> tuple[np.ndarray, list[str]]:
    """Encoded images of n, guided, and what the devices tell each other in the compiled program."""
    c = config()
    built = experiment.build(c)
    asked = run.request(c, built, params, keys(np.arange(n)), n, 6, "ddim", np.arange(n) % 10, guidance)
    given = asked.keys, asked.make(np.arange(n)), asked.levels, 1.0, None
    compiled = run._draw.jitted().lower(*given, shape=(n, *built.shape), mesh=run._mesh(params)).compile()
    said = [word for word in ("all-gather", "all-to-all", "collective-permute") if word in compiled.as_text()]
    return meshes.fetch(draw(params, *given[:1], given[1], asked.levels, (n, *built.shape))), said


def noise(params, n: int, first: int = 0) -> np.ndarray:
    """All noise of the same samples, float32 [n, 8, 8, 1]: that of the start and of three steps, added with weights.

    A denoiser that says x0 = x adds, with all of sigma for the deviation, each step's noise to x and takes nothing off.
    """
    levels = Level(np.ones(4, np.float32), np.float32([8, 4, 2, 1]))
    solver = solvers.consistency(Partial(_everything_is_data))
    return meshes.fetch(draw(params, keys(np.arange(first, first + n)), solver, levels, (n, 8, 8, 1)))


def keys(rows):
    return run.sampling.sample_keys(jax.random.key(5), 64)[rows]


def _everything_is_data(x, level):
    return Prediction(x, jnp.zeros_like(x))


def draw(params, keys, solver, levels, shape):
    return run._draw(keys, solver, levels, 1.0, None, shape=shape, mesh=run._mesh(params))


def parameters():
    """The tiny network's, moved away from their start, on every device there is."""
    params = jax.jit(experiment.build(config()).init)(jax.random.key(0))
    return jax.device_put(noisy(jax.random.key(1), params), meshes.replicated(meshes.make_mesh((-1, 1))))


if __name__ == "__main__":
    params = parameters()
    arrays = {"noise": noise(params, 64)} | {solver: images(params, solver, 64) for solver in SOLVERS}
    arrays["guided"], said = guided(params, 64)
    np.savez(sys.argv[1], devices=jax.device_count(), said=said, **arrays)
