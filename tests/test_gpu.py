import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config

from jaxdiff import experiment, run
from jaxdiff.models import parts


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


@pytest.mark.gpu
def test_fused_attention_is_attention_on_the_gpu():
    x, weight = (jax.random.normal(jax.random.key(i), (4, 16, 16, 64)) for i in range(2))
    plain, fused = (part(1, jnp.bfloat16) for part in (parts.Attention, parts.FusedAttention))
    params = jax.tree.map(lambda a: a + 0.1, plain.init(jax.random.key(2), x))

    def value_and_gradient(part):
        return jax.jit(jax.value_and_grad(lambda x: (weight * part.apply(params, x).astype(jnp.float32)).sum()))(x)

    (a, da), (b, db) = value_and_gradient(plain), value_and_gradient(fused)
    np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(weight).sum()) ** 0.5)
    np.testing.assert_allclose(da, db, atol=0.05 * float(jnp.abs(da).max()))
