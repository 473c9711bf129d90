"""Guidance keeps alpha * x0 + sigma * eps == x, and does what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian

from jaxdiff import guidance, schedules
from jaxdiff.level import diffuse

X = np.random.default_rng(0).standard_normal((4, 2, 3)).astype(np.float32) * 2
LEVELS = {
    "cosine": schedules.cosine(jnp.float32(0.6)),
    "edm": schedules.edm(jnp.float32(3)),
    "a level a sample": schedules.straight(jnp.asarray([0.1, 0.4, 0.9, 1.0]).reshape(4, 1, 1)),
}
COND, UNCOND = gaussian(1.0, 0.1), gaussian(0.0, 0.5)


def with_aux(denoise, aux):
    return lambda x, level: denoise(x, level)._replace(aux=aux)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0, 4.0])
def test_classifier_free_mixes_and_keeps_the_identity(level, scale):
    p = guidance.classifier_free(COND, UNCOND, scale)(X, level)
    c, u = COND(X, level), UNCOND(X, level)
    np.testing.assert_allclose(p.x0, (1 - scale) * u.x0 + scale * c.x0, atol=2e-5)
    np.testing.assert_allclose(p.eps, (1 - scale) * u.eps + scale * c.eps, atol=2e-5)
    np.testing.assert_allclose(diffuse(level, p.x0, p.eps), X, atol=1e-4)


def test_scale_one_is_conditional_and_zero_unconditional():
    level = LEVELS["cosine"]
    for scale, want in ((1.0, COND), (0.0, UNCOND)):
        p = guidance.classifier_free(COND, UNCOND, scale)(X, level)
        np.testing.assert_allclose(p.x0, want(X, level).x0, atol=1e-6)
        np.testing.assert_allclose(p.eps, want(X, level).eps, atol=1e-6)


def test_the_scale_may_differ_between_samples():
    level = LEVELS["cosine"]
    scales = jnp.asarray([0.0, 1.0, 2.0, 3.0]).reshape(4, 1, 1)
    p = guidance.classifier_free(COND, UNCOND, scales)(X, level)
    for i in range(4):
        one = guidance.classifier_free(COND, UNCOND, float(i))(X[i : i + 1], level)
        np.testing.assert_allclose(p.x0[i : i + 1], one.x0, atol=1e-5)


def test_aux_is_the_conditional_branchs():
    p = guidance.classifier_free(with_aux(COND, "cond"), with_aux(UNCOND, "uncond"), 3.0)(X, LEVELS["cosine"])
    assert p.aux == "cond"
    assert guidance.clip(with_aux(COND, "cond"), -1, 1)(X, LEVELS["cosine"]).aux == "cond"


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_clip_keeps_the_bounds_and_the_identity(level):
    free, clipped = UNCOND(X, level), guidance.clip(UNCOND, -0.02, 0.03)(X, level)
    assert (free.x0 < -0.02).any() and (free.x0 > 0.03).any()
    np.testing.assert_array_equal(clipped.x0, np.clip(free.x0, np.float32(-0.02), np.float32(0.03)))
    np.testing.assert_allclose(diffuse(level, clipped.x0, clipped.eps), X, atol=1e-5)
    inside = guidance.clip(UNCOND, -100.0, 100.0)(X, level)
    np.testing.assert_allclose(inside.eps, free.eps, atol=2e-5)


def test_guidance_is_a_traced_argument():
    traces = []

    @jax.jit
    def x0(denoise, x):
        traces.append(1)
        return denoise(x, LEVELS["cosine"]).x0

    outs = [x0(guidance.clip(guidance.classifier_free(COND, UNCOND, w), -hi, hi), X) for w, hi in ((1.0, 1.0), (2.0, 0.5))]
    assert len(traces) == 1 and jnp.abs(outs[1]).max() == 0.5
