"""DiT: its sizes, its zero start, its scan, its places, its conditions; and that a config can have it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from jaxdiff import InputError, experiment, models, run, training
from jaxdiff.interop import dit as interop
from jaxdiff.models.dit import Block, DiT, NoNorm, NoPlaces, RMSNorm, Rotary, places
from jaxdiff.training import hardware

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


# Peebles and Xie 2023, table 4, at patches of 2, 4 and 8: millions of parameters, and Gflops as they count, a multiply-add as one.
PUBLISHED = [
    (384, 12, 6, (33, 33, 33), (6.06, 1.41, 0.36)),
    (768, 12, 12, (130, 130, 131), (23.01, 5.56, 1.42)),
    (1024, 24, 16, (458, 458, 459), (80.71, 19.70, 5.01)),
    (1152, 28, 16, (675, 675, 676), (118.64, 29.05, 7.39)),
]


@pytest.mark.parametrize(("width", "depth", "heads", "millions", "gflops"), PUBLISHED)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_parameters_and_operations_are_the_papers(width, depth, heads, millions, gflops, which):
    """S, B, L and XL on ImageNet latents of 32 x 32 x 4, with a learned variance."""
    model, x = DiT(patch=2 ** (which + 1), width=width, depth=depth, heads=heads, classes=1000, out_channels=8), (1, 32, 32, 4)
    params = shapes(model, jnp.zeros(x))
    assert round(count(params) / 1e6) == millions[which]
    counted = hardware.flops(jax.make_jaxpr(model.apply)(params, jax.ShapeDtypeStruct(x, jnp.float32), jnp.zeros(())))
    assert counted / 2e9 == pytest.approx(gflops[which], rel=5e-4, abs=0.006)


def test_xl_has_the_parameters_that_its_authors_counted():
    """675,129,632 in their training log, which has the fixed places, 256 x 1152, among the parameters."""
    model = DiT(width=1152, depth=28, heads=16, classes=1000, out_channels=8)
    assert count(shapes(model, jnp.zeros((1, 32, 32, 4)))) == 675_129_632 - 256 * 1152


def test_at_first_the_output_is_zero_and_a_block_the_identity():
    model, x = DiT(**SMALL), image(2, 4, 4, 3)
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), x, jnp.zeros(()))  # rbg compiles faster
    np.testing.assert_array_equal(jax.jit(model.apply)(params, x, jnp.zeros(()), {"label": jnp.array([0, 2])}), 0)
    own = {"params": jax.tree.map(lambda a: a[0], params["params"]["blocks"])}
    block, h, embedding = jax.jit(Block(2).apply), image(2, 5, 16), image(2, 16, seed=3)
    np.testing.assert_array_equal(block(own, h, embedding)[0], h)
    own["params"]["modulation"]["bias"] = jnp.ones(6 * 16)  # the gates open, and it is not
    assert jnp.abs(block(own, h, embedding)[0] - h).max() > 0.1


def test_at_first_weights_are_as_wide_as_the_authors():
    """Glorot's bound, sqrt(6 / (in + out)), of q, k and v as one matrix and of a patch as one vector; the labels' 0.02."""
    made = DiT(patch=2, width=64, depth=2, heads=2, classes=9).init(jax.random.key(0), image(1, 4, 4, 3), jnp.zeros(()))["params"]
    bounds = {"q": (64, 192), "k": (64, 192), "v": (64, 192), "out": (64, 64), "mlp1": (64, 256), "mlp2": (256, 64)}
    kernels = {name: made["blocks"][name]["kernel"] for name in bounds} | {"patches": made["patches"]["kernel"]}
    for name, (ins, outs) in (bounds | {"patches": (12, 64)}).items():
        bound = np.sqrt(6 / (ins + outs))
        assert 0.98 * bound < jnp.abs(kernels[name]).max() <= bound, name
    assert float(made["label"]["embedding"].std()) == pytest.approx(0.02, rel=0.1)


OTHERS = {"places": NoPlaces, "qk_norm": RMSNorm, "rotate": Rotary}


@pytest.mark.parametrize("parts", [{}, OTHERS])
def test_the_scan_is_the_blocks_one_after_another(parts):
    """The embedding and the two ends by the network itself, in which the blocks are left out."""
    model, x, snr = DiT(**SMALL, **parts), image(2, 4, 8, 3), jnp.asarray([-1.0, 3.0]).reshape(2, 1, 1, 1)
    params, cond = woken(model, x), {"label": jnp.array([1, -1])}
    blocks = params["params"]["blocks"]
    assert {a.shape[0] for a in jax.tree.leaves(blocks)} == {2}

    def by_hand(module, h, embedding, grid):
        block = Block(2, qk_norm=module.qk_norm, rotate=module.rotate, grid=grid)
        for i in range(2):
            h, _ = block.apply({"params": jax.tree.map(lambda a, i=i: a[i], blocks)}, h, embedding)
        return h

    class Unrolled(DiT):
        through = by_hand

    others = {"params": {name: a for name, a in params["params"].items() if name != "blocks"}}
    got = jax.jit(Unrolled(**SMALL, **parts).apply)(others, x, snr, cond)
    np.testing.assert_allclose(jax.jit(model.apply)(params, x, snr, cond), got, rtol=1e-4, atol=1e-5)
    assert jnp.abs(got).max() > 0.1


@pytest.mark.slow
def test_remat_changes_no_gradient(small):
    _, params = small
    x = image(2, 4, 4, 3)

    def gradient(remat):
        model = DiT(**SMALL, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.square(model.apply(p, x, jnp.zeros(()))).sum()))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient(False), gradient(True))


def test_the_operations_of_a_gradient_count_every_block_and_with_remat_once_more():
    def counted(depth, remat):
        model, x = DiT(width=32, depth=depth, heads=4, remat=remat), jnp.zeros((4, 32, 32, 4))
        loss = jax.grad(lambda params: model.apply(params, x, jnp.zeros(())).sum())
        return hardware.flops(jax.make_jaxpr(loss)(shapes(model, x)))

    n, d = 256, 32
    forward = 2 * 4 * (12 * d**2 * n + 2 * n**2 * d + 6 * d**2)
    assert (counted(6, False) - counted(2, False)) / 4 == pytest.approx(3 * forward)
    # All is computed again but the block's last product, which no gradient needs.
    assert 3.8 * forward < (counted(6, True) - counted(2, True)) / 4 <= 4 * forward


def test_places_are_sines_of_column_then_row():
    got = places(2, 3, 8)
    want = [
        [np.sin(c), np.sin(c / 100), np.cos(c), np.cos(c / 100), np.sin(r), np.sin(r / 100), np.cos(r), np.cos(r / 100)]
        for r in range(2)
        for c in range(3)
    ]
    np.testing.assert_allclose(got, want, atol=1e-6)


def turned(q, grid, base=100.0):
    return Rotary(base=base).apply({}, q, grid)


def test_rotation_is_a_complex_phase_of_the_row_in_one_half_and_of_the_column_in_the_other():
    q = image(1, 6, 1, 8)
    got = np.asarray(turned(q, (2, 3), 100.0)).reshape(2, 3, 8)
    z = np.asarray(q).reshape(2, 3, 8)
    z = z[..., :4] + 1j * z[..., 4:]
    for r, c in np.ndindex(2, 3):
        want = z[r, c] * np.exp(1j * np.array([r, r / 10, c, c / 10]))  # 100^(-i / 2), i = 0, 1
        np.testing.assert_allclose(got[r, c], [*want.real, *want.imag], atol=1e-6)


def test_scores_of_rotated_queries_and_keys_depend_on_relative_places_alone():
    """One query and one key, put at all places of a grid: their product is a function of rows and columns between them."""
    rows, columns = 5, 4
    q, k = (jnp.broadcast_to(image(1, 1, 1, 16, seed=seed), (1, rows * columns, 1, 16)) for seed in (1, 2))
    scores = np.einsum("nd,md->nm", *(np.asarray(turned(a, (rows, columns)))[0, :, 0] for a in (q, k)))
    scores = scores.reshape(rows, columns, rows, columns)
    found = {}
    for r, c, s, d in np.ndindex(*scores.shape):
        found.setdefault((r - s, c - d), []).append(scores[r, c, s, d])
    assert len(found) == (2 * rows - 1) * (2 * columns - 1)
    assert max(np.ptp(each) for each in found.values()) < 1e-5
    means = np.array([np.mean(each) for each in found.values()])
    assert np.unique(means.round(4)).size == means.size  # and tells any two displacements apart
    np.testing.assert_allclose(found[0, 0], np.sum(np.asarray(q)[0, 0] * np.asarray(k)[0, 0]), rtol=1e-5)


def test_queries_are_normalised_in_each_head_and_scaled_by_what_is_learned():
    q, scale = 7.0 * image(2, 5, 3, 8) + 2.0, jnp.linspace(0.5, 2.0, 8)
    got = RMSNorm().apply({"params": {"scale": scale}}, q)
    np.testing.assert_allclose(jnp.square(got / scale.reshape(1, 1, 1, 8)).mean(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(got / scale.reshape(1, 1, 1, 8) * jnp.sqrt(jnp.square(q).mean(-1, keepdims=True)), q, rtol=1e-5)
    # Statistics are float32: in bfloat16 the result is the float32 one, rounded.
    low = q.astype(jnp.bfloat16)
    full = RMSNorm().apply({"params": {"scale": scale}}, low.astype(jnp.float32))
    np.testing.assert_array_equal(RMSNorm(dtype=jnp.bfloat16).apply({"params": {"scale": scale}}, low), full.astype(jnp.bfloat16))


def test_with_normalised_queries_their_size_no_longer_matters():
    x = image(2, 4, 8, 3)

    def change(qk_norm):
        """How far the output moves where all queries are 30 times as large."""
        model = DiT(**SMALL, qk_norm=qk_norm)
        params, run_all = woken(model, x), jax.jit(model.apply)
        grown = params["params"]["blocks"] | {"q": jax.tree.map(lambda a: 30 * a, params["params"]["blocks"]["q"])}
        return jnp.abs(
            run_all({"params": params["params"] | {"blocks": grown}}, x, jnp.zeros(())) - run_all(params, x, jnp.zeros(()))
        ).max()

    assert change(RMSNorm) < 1e-4 and change(NoNorm) > 1e-2


@pytest.mark.parametrize(
    ("parts", "blind"),
    [
        ({"places": NoPlaces}, True),
        ({"places": NoPlaces, "qk_norm": RMSNorm}, True),
        ({}, False),
        ({"places": NoPlaces, "rotate": Rotary}, False),
    ],
)
def test_without_places_patches_are_a_set_and_either_part_tells_them_apart(parts, blind):
    """Patches in another order come out in that order, as they were, where nothing says their places."""
    model, x = DiT(**SMALL, **parts), image(1, 4, 8, 3)
    params, run_all = woken(model, x), jax.jit(model.apply)

    def swapped(a):  # the patches of both rows
        return jnp.concatenate([a[:, 2:], a[:, :2]], axis=1)

    def mixed(a):  # and their columns in another order
        return swapped(a).reshape(1, 4, 4, 2, -1)[:, :, np.array([2, 0, 3, 1])].reshape(a.shape)

    off = jnp.abs(run_all(params, mixed(x), jnp.zeros(())) - mixed(run_all(params, x, jnp.zeros(())))).max()
    assert off < 1e-5 if blind else off > 1e-2


def test_the_parts_add_no_parameters_but_the_scales_of_queries_and_keys():
    def names(**parts):
        found = jax.tree_util.tree_leaves_with_path(shapes(DiT(**SMALL, **parts), image(1, 4, 4, 3))["params"])
        return {jax.tree_util.keystr(path, simple=True, separator="/"): a.shape for path, a in found}

    assert names(places=NoPlaces, rotate=Rotary) == names()
    assert names(**OTHERS) == names() | {"blocks/q_norm/scale": (2, 8), "blocks/k_norm/scale": (2, 8)}


def test_a_config_names_the_parts():
    c = config()
    c.model.update(places="NoPlaces", qk_norm="RMSNorm(epsilon=1e-5)", rotate="Rotary(base=100)")
    model = models.build(c.model)
    assert model.places is NoPlaces and model.qk_norm.keywords == {"epsilon": 1e-5} and model.rotate.keywords == {"base": 100}
    built = experiment.build(c)
    assert jax.eval_shape(built.init, jax.random.key(0))["params"]["blocks"]["q_norm"]["scale"].shape == (2, 8)


@pytest.mark.parametrize(("role", "other"), [("places", "NoPlaces"), ("qk_norm", "RMSNorm"), ("rotate", "Rotary")])
def test_a_transformer_of_other_parts_is_not_exported_as_diffusers(role, other):
    c = config(model__time="LinearBetaSinusoidal(cos_first=1)")
    c.model[role] = other
    with pytest.raises(InputError, match=f"model.{role}='{other}' is no DiT of diffusers'; allowed: "):
        interop.to_diffusers(c, None)


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
        ({"model__rotate": "SinCosPlaces"}, "model.rotate='SinCosPlaces' is unknown; allowed: NoRotation, Rotary"),
        ({"model__rotate": "Rotary(base=0)"}, "model.rotate's base=0 is out of range; it is a finite number above 0"),
        (
            {"model__rotate": "Rotary", "model__heads": 8},
            "model.heads=8 leaves 2 channels a head, and model.rotate='Rotary' needs a",
        ),
        ({"model__qk_norm": "RMSNorm(scale=2)"}, "takes numbers by name: epsilon"),
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
