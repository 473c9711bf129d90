"""How often a noise-aware classifier is right, by noise level."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdiff import compiling
from jaxdiff import mesh as meshes
from jaxdiff.classifier import log_probs
from jaxdiff.data import Dataset
from jaxdiff.experiment import Experiment
from jaxdiff.level import diffuse
from jaxdiff.schedules import of_logsnr
from jaxdiff.training.state import LOGSNR_EDGES


def accuracy_by_level(
    experiment: Experiment, params: Any, dataset: Dataset, num: int, size: int, key: jax.Array, mesh: Mesh
) -> np.ndarray:
    """The share of `num` images, spread over the data set, that is told right at each logsnr of LOGSNR_EDGES, float64 [levels].

    `size` images at once, split over the mesh. An image's noise is the same at every level and in every call with the same key.
    """
    chosen = np.linspace(0, len(dataset.labels) - 1, num).round().astype(int)
    size = -(-min(size, num) // mesh.size) * mesh.size
    right = []
    with jax.set_mesh(mesh):
        for start in range(0, num, size):
            # The last batch is filled up, so that one compiled program does for all.
            rows = chosen[np.minimum(np.arange(start, start + size), num - 1)]

            def part(i, of, rows=rows):
                mine = np.split(rows, of)[i]
                return {"row": mine, "image": np.asarray(dataset.images)[mine], "label": dataset.labels[mine]}

            batch = meshes.put(mesh, size, part)
            k_encode, k_eps = jax.random.split(key)
            x0 = experiment.codec.encode(k_encode, batch["image"])
            told = _right(experiment.net(params, None), experiment.data_std, k_eps, batch["row"], x0, batch["label"])
            right.append(meshes.fetch(told)[:, : num - start])
    return np.concatenate(right, axis=1).mean(1, dtype=np.float64)


@compiling.jit
def _right(net, data_std, key, row, x0, label):
    eps = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), x0.shape[1:], x0.dtype))(row)

    def at(logsnr):
        level = of_logsnr(logsnr)
        return log_probs(net, diffuse(level, x0, eps), level, data_std).argmax(-1) == label

    return jax.lax.map(at, jnp.asarray(LOGSNR_EDGES, x0.dtype))
