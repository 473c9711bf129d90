"""DiT: its sizes, its zero start, its scan, its places, its conditions; and that a config can have it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from jaxdiff import InputError, experiment, models, run, training
from jaxdiff.models.dit import Block, DiT, places

SMALL = {"patch": 2, "width": 16, "depth": 2, "heads": 2, "classes": 3}
CONFIG = {"name": "DiT", "patch": 2, "width": 16, "depth": 2, "heads": 2, "classes": 10, "time": "Sinusoidal", "dtype": "float32"}


def shapes(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(()))


def image(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def woken(model, x):
    """Random parameters of the model's shapes, none of them zero; drawn by hand, which compiles nothing."""
    rng = np.random.default_rng(0)

    def draw(a):
        scale = a.shape[-2] ** -0.5 if len(a.shape) > 1 else 0.3
        return jnp.asarray(rng.standard_normal(a.shape) * scale, a.dtype)

    return jax.tree.map(draw, shapes(model, x))


def count(params):
    return sum(a.size for a in jax.tree.leaves(params))


def config(**changes):
    c = tiny.config()
    c.model = ConfigDict(CONFIG)
    for key, value in changes.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return c


@pytest.fixture(scope="module")
def small():
    """(jitted, params away from their start) of a small one."""
    model, x = DiT(**SMALL), image(2, 4, 8, 3)
    return jax.jit(model.apply), woken(model, x)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "millions", "exact"),
    [
        (384, 12, 6, 33, None),
        (768, 12, 12, 130, None),
        (1024, 24, 16, 458, None),
        # 675,129,632 by the count of the authors' own training log, which has the fixed places, 256 x 1152, among the parameters
        (1152, 28, 16, 675, 675_129_632 - 256 * 1152),
    ],
)
def test_parameters_are_the_papers(width, depth, heads, millions, exact):
    """S/2, B/2, L/2 and XL/2 on ImageNet latents of 32 x 32 x 4, with a learned variance."""
    model = DiT(width=width, depth=depth, heads=heads, classes=1000, out_channels=8)
    n = count(shapes(model, jnp.zeros((1, 32, 32, 4))))
    assert round(n / 1e6) == millions and exact in (None, n)


def test_at_first_the_output_is_zero_and_a_block_the_identity():
    model, x = DiT(**SMALL), image(2, 4, 4, 3)
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), x, jnp.zeros(()))  # rbg compiles faster
    np.testing.assert_array_equal(jax.jit(model.apply)(params, x, jnp.zeros(()), {"label": jnp.array([0, 2])}), 0)
    own = {"params": jax.tree.map(lambda a: a[0], params["params"]["blocks"])}
    block, h, embedding = jax.jit(Block(2).apply), image(2, 5, 16), image(2, 16, seed=3)
    np.testing.assert_array_equal(block(own, h, embedding)[0], h)
    own["params"]["modulation"]["bias"] = jnp.ones(6 * 16)  # the gates open, and it is not
    assert jnp.abs(block(own, h, embedding)[0] - h).max() > 0.1


def test_the_scan_is_the_blocks_one_after_another(small):
    """The embedding and the two ends by the network itself, in which the blocks are left out."""
    run_all, params = small
    x, snr, cond = image(2, 4, 8, 3), jnp.asarray([-1.0, 3.0]).reshape(2, 1, 1, 1), {"label": jnp.array([1, -1])}
    blocks = params["params"]["blocks"]
    assert {a.shape[0] for a in jax.tree.leaves(blocks)} == {2}

    def by_hand(module, h, embedding, grid):
        for i in range(2):
            h, _ = Block(2).apply({"params": jax.tree.map(lambda a, i=i: a[i], blocks)}, h, embedding)
        return h

    class Unrolled(DiT):
        through = by_hand

    others = {"params": {name: a for name, a in params["params"].items() if name != "blocks"}}
    got = jax.jit(Unrolled(**SMALL).apply)(others, x, snr, cond)
    np.testing.assert_allclose(run_all(params, x, snr, cond), got, rtol=1e-4, atol=1e-5)
    assert jnp.abs(got).max() > 0.1


@pytest.mark.slow
def test_remat_changes_no_gradient(small):
    _, params = small
    x = image(2, 4, 4, 3)

    def gradient(remat):
        model = DiT(**SMALL, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.square(model.apply(p, x, jnp.zeros(()))).sum()))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient(False), gradient(True))


def test_places_are_sines_of_column_then_row():
    got = places(2, 3, 8)
    want = [
        [np.sin(c), np.sin(c / 100), np.cos(c), np.cos(c / 100), np.sin(r), np.sin(r / 100), np.cos(r), np.cos(r / 100)]
        for r in range(2)
        for c in range(3)
    ]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_without_attention_a_patch_is_seen_by_itself_alone():
    """At first the blocks do nothing, so that what leaves at a place comes from what entered there."""
    model, x = DiT(**SMALL), image(1, 4, 8, 3)
    params = woken(model, x)
    params["params"]["blocks"]["modulation"] = jax.tree.map(jnp.zeros_like, params["params"]["blocks"]["modulation"])
    run_all = jax.jit(model.apply)
    changed = jnp.abs(run_all(params, x.at[0, 3, 4].add(1.0), jnp.zeros(())) - run_all(params, x, jnp.zeros(()))).max(-1)[0] > 1e-6
    want = np.zeros((4, 8), bool)
    want[2:4, 4:6] = True
    np.testing.assert_array_equal(changed, want)


def test_labels_change_the_output_and_minus_one_is_no_condition(small):
    run_all, params = small
    x = jnp.broadcast_to(image(1, 4, 8, 3), (4, 4, 8, 3))
    cond = {"label": jnp.asarray([0, 1, 2, -1])}
    out = run_all(params, x, jnp.zeros(()), cond)
    assert all(jnp.abs(out[i] - out[j]).max() > 1e-3 for i in range(4) for j in range(i))
    np.testing.assert_allclose(run_all(params, x, jnp.zeros(()))[0], out[3], atol=1e-5)
    table = params["params"]["label"]["embedding"]
    other = {"params": params["params"] | {"label": {"embedding": table.at[0].add(1.0)}}}  # row 0 is the null label
    changed = jnp.abs(run_all(other, x, jnp.zeros(()), cond) - out).max((1, 2, 3)) > 1e-4
    assert table.shape == (4, 16) and changed.tolist() == [False, False, False, True]


def test_the_noise_level_is_seen_and_samples_do_not_see_each_other(small):
    run_all, params = small
    x, snr = image(3, 4, 8, 3), jnp.asarray([-3.0, 0.0, 4.0]).reshape(3, 1, 1, 1)
    full = run_all(params, x, snr)
    alone = jnp.concatenate([run_all(params, x[i : i + 1], snr[i, 0, 0, 0]) for i in range(3)])
    np.testing.assert_allclose(alone, full, atol=1e-5)
    assert jnp.abs(run_all(params, x, jnp.zeros(())) - full).max((1, 2, 3))[0] > 1e-3


def test_bfloat16_stays_close_to_float32(small):
    run_all, params = small
    x = image(2, 4, 8, 3)
    low, full = jax.jit(DiT(**SMALL, dtype=jnp.bfloat16).apply)(params, x, jnp.zeros(())), run_all(params, x, jnp.zeros(()))
    assert low.dtype == jnp.float32 and 1e-6 < jnp.abs(low - full).max() / jnp.abs(full).max() < 0.05
    assert {a.dtype for a in jax.tree.leaves(shapes(DiT(**SMALL, dtype=jnp.bfloat16), x))} == {np.dtype("float32")}


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="divisible by 2"):
        shapes(DiT(**SMALL), jnp.zeros((1, 5, 4, 3)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model__width": 18}, "model.width=18 is out of range; it is divisible by 4"),
        ({"model__heads": 3}, "model.heads=3 does not divide model.width=16; allowed: 1, 2, 4, 8, 16"),
        ({"model__depth": 0}, "model.depth=0 is out of range; it is a whole number, at least 1"),
        ({"model__patch": 3}, r"data.shape=\(8, 8, 1\) does not fit model.patch=3"),
        ({"model__mlp_epsilon": 0.0}, "model.mlp_epsilon=0.0 is out of range"),
        ({"model__out_channels": 3}, "model.out_channels=3 is not what process.loss='simple' needs; allowed: None, 1"),
        ({"model__channels": 8}, "model.channels is unknown to model.name='DiT'"),
        ({"model__blocks": 8}, "model.blocks is unknown to model.name='DiT'; did you mean 'depth'|model.blocks is unknown"),
        ({"process__loss": "cross_entropy"}, "process.loss='cross_entropy' trains a classifier"),
    ],
)
def test_wrong_configs_are_refused_in_one_line(changes, text):
    c = config()
    c.model.unlock()
    with pytest.raises(InputError, match=text) as caught:
        for key, value in changes.items():
            group, name = key.split("__")
            with c.unlocked():
                c[group][name] = value
        experiment.build(c)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "process",
    [
        {"process__loss": "hybrid(0.001)", "process__schedule": "linear_beta(100)", "process__draw": "draw_table(100)",
         "process__target": "eps", "sampling__times": "strided(100)", "sampling__solver": "ddpm_learned"},
        {"process__loss": "simple", "process__schedule": "straight", "process__target": "flow"},
    ],
)  # fmt: skip
def test_it_trains_and_draws_as_the_unet_does(process):
    """A learned variance is half of its channels; and on the straight path it is SiT. A few steps bring the loss down."""
    c = config(**process)
    built, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    state = training.init_state(built, optimizer, c.training.ema, jax.random.key(0))
    batch = {"image": jnp.full((8, 8, 8, 1), 255, jnp.uint8), "label": jnp.arange(8)}
    step = jax.jit(training.make_step(built, optimizer, 1))
    losses = []
    for _ in range(30):
        state, metrics = step(jax.random.key(1), state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    images = run.of(c, built, state.params).generate(jax.random.key(0), 2, steps=3, solver=c.sampling.solver, label=1, guidance=1.5)
    assert images.shape == (2, 8, 8, 1)


def test_fields_of_the_config_are_all_of_the_networks():
    assert {"patch", "width", "depth", "latent_channels", "scale"} < set(models.FIELDS)
