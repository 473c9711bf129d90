import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config

from jaxdiff import experiment, run


@pytest.mark.gpu
def test_the_gpu_draws_what_the_cpu_draws():
    c = config(**{"model.channels": 32, "model.multipliers": (1, 2)})
    built = experiment.build(c)
    images = []
    for platform in ("gpu", "cpu"):
        with jax.default_device(jax.devices(platform)[0]):
            params = jax.tree.map(lambda a: a + 0.02, built.init(jax.random.key(0)))
            images.append(run.of(c, built, params).generate(jax.random.key(1), 4, 10, "ddim", np.arange(4), 1.5))
    # The GPU may multiply in tf32; a few grey values are its rounding.
    assert np.abs(images[0].astype(int) - images[1]).max() <= 8


@pytest.mark.gpu
def test_bfloat16_stays_close_on_the_gpu():
    outs = []
    for dtype in ("float32", "bfloat16"):
        built = experiment.build(config(**{"model.dtype": dtype, "model.channels": 32}))
        params = jax.tree.map(lambda a: a + 0.02, built.init(jax.random.key(0)))
        x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
        outs.append(built.net(params, {"label": jnp.arange(4)})(x, jnp.float32(0.3))[0])
    np.testing.assert_allclose(outs[0], outs[1], atol=0.05 * float(jnp.abs(outs[0]).max()))
