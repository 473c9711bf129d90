import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config

import jaxdiff as jd
from jaxdiff import experiment, pictures, run


def noisy(key, params):
    """Parameters away from their start, where the last layer is zero and a network says nothing."""
    keys = iter(jax.random.split(key, len(jax.tree.leaves(params))))
    return jax.tree.map(lambda a: a + 0.2 * jax.random.normal(next(keys), a.shape), params)


@pytest.fixture(scope="module")
def model():
    c = config()
    built = experiment.build(c)
    params = jax.jit(built.init)(jax.random.key(0))
    return c, built, noisy(jax.random.key(1), params), noisy(jax.random.key(2), params)


def test_one_compiled_sampler_serves_steps_seeds_labels_scales_and_parameters(model):
    c, built, one, two = model
    run._draw.clear_cache()
    seen = []
    for params, seed, steps, label, scale, eta in [
        (one, 0, 10, 3, 2.0, 0.0),
        (one, 0, 20, 3, 2.0, 0.0),
        (one, 0, 15, 3, 2.0, 0.0),
        (one, 1, 10, 3, 2.0, 0.0),
        (one, 0, 10, 4, 2.0, 0.0),
        (one, 0, 10, 3, 4.0, 0.0),
        (one, 0, 10, 3, 2.0, 1.0),
        (two, 0, 10, 3, 2.0, 0.0),
    ]:
        solver = f"ddim(eta={eta})"
        seen.append(run.of(c, built, params).generate(jax.random.key(seed), 4, steps, solver, label, scale))
    assert run._draw._cache_size() == 1
    for i, a in enumerate(seen):  # each value matters: no two results are the same
        assert a.shape == (4, 8, 8, 1) and a.dtype == np.uint8
        assert not any((a == b).all() for b in seen[:i])


def test_a_sample_does_not_depend_on_what_is_drawn_with_it(model):
    c, built, params, _ = model
    r = run.of(c, built, params)
    labels = np.arange(10)
    many = r.generate(jax.random.key(5), 10, steps=5, solver="ddpm", label=labels, guidance=2.0)  # batches of 4, 4, 2
    few = r.generate(jax.random.key(5), 3, steps=5, solver="ddpm", label=labels[:3], guidance=2.0)
    assert np.abs(many[:3].astype(int) - few).max() <= 1
    assert len(np.unique(many.reshape(10, -1), axis=0)) == 10


def test_guidance_and_labels_reach_the_denoiser(model):
    c, built, params, _ = model
    with c.unlocked():
        c = c.copy_and_resolve_references()
        c.sampling.clip = False
    r = run.of(c, built, params)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    level = jd.schedules.cosine(jnp.float32(0.5))
    cond, uncond, mixed = (r.denoiser(*a)(x, level) for a in [(3,), (None,), (3, 2.5)])
    np.testing.assert_allclose(mixed.eps, uncond.eps + 2.5 * (cond.eps - uncond.eps), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(level.alpha * mixed.x0 + level.sigma * mixed.eps, x, rtol=1e-4, atol=1e-4)
    rows = r.denoiser(np.array([3, -1]))(x, level)
    np.testing.assert_allclose(rows.x0, jnp.stack([cond.x0[0], uncond.x0[1]]), rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(cond.x0 - uncond.x0).max()) > 1e-3


def test_clipping_holds_black_and_white_of_the_codec(model):
    c, built, params, _ = model
    big = jax.tree.map(lambda a: 5 * a, params)
    p = run.of(c, built, big).denoiser(1)(jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jd.schedules.cosine(jnp.float32(0.9)))
    assert float(p.x0.max()) == 1 and float(p.x0.min()) == -1


@pytest.mark.parametrize(
    "kwargs, said",
    [
        (dict(n=0), "0 images"),
        (dict(steps=0), "steps=0 is out of range; allowed: 1 to 20"),
        (dict(steps=21), "steps=21 is out of range; allowed: 1 to 20"),
        (dict(solver="dimm"), "did you mean 'ddim'"),
        (dict(solver="ddim(eat=1)"), "unexpected keyword argument 'eat'"),
        (dict(label=10), "label=10 is out of range; allowed: 0 to 9"),
        (dict(label=-2), "label=-2"),
        (dict(label=1.5), "label=1.5"),
        (dict(label=[0, 1, 2]), "2 images need one label or 2, got 3"),
        (dict(guidance=2.0), "needs a label"),
        (dict(label=1, guidance=float("nan")), "guidance=nan"),
    ],
)
def test_wrong_requests_are_one_line(model, kwargs, said):
    c, built, params, _ = model
    with pytest.raises(jd.InputError) as error:
        run.of(c, built, params).generate(jax.random.key(0), **{"n": 2, "steps": 5, **kwargs})
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, kwargs, said",
    [
        ({"model.classes": 0}, dict(label=1), "unconditional"),
        ({"process.drop_label": 0.0}, dict(label=None), "give a label"),
        ({"process.drop_label": 0.0}, dict(label=1, guidance=2.0), "drop_label above 0"),
        ({"process.target": "eps"}, dict(label=1), "says nothing at the first level"),
        ({"sampling.times": "strided(10)"}, dict(label=1, steps=11), "11 sampling steps are more than the 10"),
        ({"sampling.times": "strided(10, spacing='lead')"}, dict(label=1), "unknown spacing 'lead'"),
    ],
)
def test_requests_that_the_model_cannot_meet_are_one_line(changes, kwargs, said):
    c = config(**changes)
    built = experiment.build(c)
    params = jax.eval_shape(built.init, jax.random.key(0))  # refused before any parameter is touched
    with pytest.raises(jd.InputError, match=said) as error:
        run.of(c, built, params).generate(jax.random.key(0), 2, **{"steps": 5, **kwargs})
    assert "\n" not in str(error.value)


def test_the_showcase_draws_each_class_in_turn(model):
    c, built, params, _ = model
    r = run.of(c, built, params)
    images, columns, labels = run.showcase(r, jax.random.key(0), 12, steps=2)
    assert columns == 10 and labels.tolist() == [*range(10), 0, 1]
    again = r.generate(jax.random.key(0), 12, 2, "ddim", labels, c.sampling.guidance)
    assert (images == again).all()
    assert run.showcase(r, jax.random.key(0), 2, label=-1, steps=2)[2].tolist() == [-1, -1]


def test_tiles_lie_row_by_row():
    images = np.stack([np.full((8, 8, 1), 10 * i, np.uint8) for i in range(5)])
    picture = pictures.tile(images, columns=3, gap=2)
    assert picture.shape == (2 * 34 + 2, 3 * 34 + 2, 3)  # 8 pixels shown as 32
    assert [picture[3, 3 + 34 * i, 0] for i in range(3)] == [0, 10, 20]
    assert [picture[37, 3 + 34 * i, 0] for i in range(3)] == [30, 40, 255]
    with pytest.raises(ValueError, match="uint8"):
        pictures.tile(images / 255)
