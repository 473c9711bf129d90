"""A tiny autoencoder of random weights whose latents have the shape of Stable Diffusion's, written as a workdir:

python tests/sd_latents.py WORKDIR      # to try configs/dit_xl_2.py: --config.data.codec="autoencoder('WORKDIR')"
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdiff.interop import workdir
from jaxdiff.models.autoencoder import AutoencoderKL

MODEL = {"channels": 4, "multipliers": (1, 1, 1, 1), "blocks": 1, "latent_channels": 4, "out_channels": 3, "scale": 0.18215}


def config(size: int = 256) -> ConfigDict:
    return ConfigDict(
        dict(
            data=dict(shape=(size, size, 3), codec="pixels"),
            model=dict(name="AutoencoderKL", **MODEL),
            training=dict(ema=(0.0,)),
            sampling=dict(ema=0.0),
        )
    )


def write(where, size: int = 256) -> str:
    """Writes it, and says what data.codec names it by."""
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    shapes, rng = jax.eval_shape(AutoencoderKL(**MODEL).init, jax.random.key(0), image), np.random.default_rng(0)

    def draw(a):
        scale = np.prod(a.shape[:-1]) ** -0.5 if len(a.shape) > 1 else 0.3
        return jnp.asarray(scale * rng.standard_normal(a.shape), a.dtype)

    workdir.write(where, config(size), jax.tree.map(draw, shapes))
    return f"autoencoder({str(where)!r})"


if __name__ == "__main__":
    print(write(sys.argv[1]))
