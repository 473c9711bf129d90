"""The U-Net: its size, its zero start, its axes, its conditions, its precision. Weights are drawn by hand, for speed and to wake
the layers that start at zero."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models.unet import LearnedSinusoidal, ResBlock, Sinusoidal, UNet, norm

TINY = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,)}
TINIER = {"channels": 8, "multipliers": (1,), "blocks": 1, "attention": ()}  # quicker to compile


def shapes(model, x, cond=None):
    return jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(()), cond)


def woken(model, x, cond=None):
    return random_like(shapes(model, x, cond))


def woken_block(block, h, embedding):
    return random_like(jax.eval_shape(lambda key: block.init(key, h, embedding[:1], False), jax.random.key(0)))


def random_like(params):
    """Random parameters of the model's shapes, none of them zero."""
    rng = np.random.default_rng(0)

    def draw(a):
        scale = 1 / np.sqrt(np.prod(a.shape[:-1])) if len(a.shape) > 1 else 0.3
        return jnp.asarray(rng.standard_normal(a.shape) * scale, a.dtype)

    return jax.tree.map(draw, params)


def apply(model):
    return jax.jit(lambda params, x, snr, cond=None: model.apply(params, x, snr, cond))


def image(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def tiny():
    model = UNet(**TINY)
    return apply(model), woken(model, jnp.zeros((1, 8, 8, 3)))


def count(params):
    return sum(a.size for a in jax.tree.leaves(params))


def test_the_cifar10_model_has_ho_et_als_parameters():
    assert count(shapes(UNet(), jnp.zeros((1, 32, 32, 3)))) == 35_746_307
    every = shapes(UNet(dtype=jnp.bfloat16), jnp.zeros((1, 32, 32, 3)))
    assert {a.dtype for a in jax.tree.leaves(every)} == {np.dtype("float32")}


def test_attention_follows_each_block_of_its_level_on_both_ways_and_the_middle():
    params = shapes(UNet(**TINY | {"multipliers": (1, 1, 2), "blocks": 2}), jnp.zeros((1, 8, 8, 3)))["params"]
    attention = sorted(name.removesuffix("_attention") for name in params if name.endswith("_attention"))
    assert attention == ["down1_0", "down1_1", "middle", "up1_0", "up1_1", "up1_2"]


def test_output_is_zero_at_initialisation():
    model, x = UNet(**TINIER, classes=3), image(2, 4, 4, 3)
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), x, jnp.zeros(()), None)  # rbg compiles faster
    out = apply(model)(params, x, jnp.zeros(()))
    assert out.shape == x.shape and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)
    # ... because the last convolution and the last of every residual branch are zero, and nothing else is
    zero = {jax.tree_util.keystr(path) for path, a in jax.tree_util.tree_leaves_with_path(params) if not a.any()}
    kernels = {name for name in zero if "kernel" in name}
    assert {name.split("'")[-4] for name in kernels} == {"conv2", "out", "conv_out"}
    assert not any("scale" in name or "embedding" in name for name in zero)


@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_axes(axes):
    model, x = UNet(channels=4, multipliers=(1, 1), blocks=1, attention=(), out_channels=5), image(2, *(4,) * axes, 3)
    params = woken(model, x)
    out = apply(model)(params, x, jnp.zeros(()))
    assert out.shape == (2, *(4,) * axes, 5)
    assert params["params"]["conv_in"]["kernel"].shape == (*(3,) * axes, 3, 4)
    assert jnp.isfinite(out).all() and jnp.abs(out).max() > 1e-3


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="divisible by 2"):
        shapes(UNet(**TINY), jnp.zeros((1, 8, 7, 3)))
    with pytest.raises(ValueError, match="divisible by 8"):
        shapes(UNet(), jnp.zeros((1, 28, 28, 1)))


def test_samples_do_not_see_each_other(tiny):
    run, params = tiny
    x, snr = image(3, 8, 8, 3), jnp.asarray([-3.0, 0.0, 4.0]).reshape(3, 1, 1, 1)
    full = run(params, x, snr)
    moved = run(params, x.at[1].add(1.0), snr.at[1].add(1.0))
    np.testing.assert_array_equal(moved[jnp.asarray([0, 2])], full[jnp.asarray([0, 2])])
    assert jnp.abs(moved[1] - full[1]).max() > 1e-3
    alone = jnp.concatenate([run(params, x[i : i + 1], snr[i, 0, 0, 0]) for i in range(3)])
    np.testing.assert_allclose(alone, full, atol=1e-5)  # and a level [] is that level for every sample


def test_the_noise_level_is_seen_and_never_blows_up(tiny):
    run, params = tiny
    x = image(1, 8, 8, 3)
    outs = [run(params, x, jnp.float32(snr)) for snr in (-30.0, -10.0, 0.0, 0.02, 10.0, 30.0)]
    assert all(jnp.isfinite(out).all() for out in outs)
    assert all(jnp.abs(a - b).max() > 1e-4 for a, b in itertools.pairwise(outs))


@pytest.mark.parametrize("channels", [4, 32, 64])
def test_every_block_of_a_narrow_network_sees_the_noise_level(channels):
    """Groups of one channel would normalise away exactly what the embedding adds."""
    block, h = ResBlock(channels), image(1, 4, 4, channels)
    embedding = image(2, 4 * channels)
    params = woken_block(block, h, embedding)
    a, b = (jax.jit(block.apply, static_argnums=3)(params, h, embedding[i : i + 1], False) for i in range(2))
    assert jnp.abs(a - b).mean() > 0.05


def test_groups_of_the_norm_are_the_papers_where_channels_are_many():
    for channels, groups in ((128, 32), (192, 32), (256, 32), (320, 32), (64, 16), (32, 8), (8, 2), (3, 1), (100, 25)):
        assert norm(channels, jnp.float32).num_groups == groups


def test_bfloat16_stays_close_to_float32(tiny):
    run, params = tiny
    x, snr = image(2, 8, 8, 3), jnp.zeros(())
    low = apply(UNet(**TINY, dtype=jnp.bfloat16))(params, x, snr)
    full = run(params, x, snr)
    assert low.dtype == jnp.float32
    difference = jnp.abs(low - full).max() / jnp.abs(full).max()
    assert 1e-6 < difference < 0.05


def test_labels_change_the_output_and_minus_one_is_no_condition():
    model, x = UNet(**TINIER, classes=3), image(4, 4, 4, 3)
    x = jnp.broadcast_to(x[:1], x.shape)
    run, params = apply(model), woken(model, x, {"label": jnp.zeros(4, int)})
    out = run(params, x, jnp.zeros(()), {"label": jnp.asarray([0, 1, 2, -1])})
    for i in range(4):
        for j in range(i):
            assert jnp.abs(out[i] - out[j]).max() > 1e-3
    np.testing.assert_allclose(run(params, x, jnp.zeros(()))[0], out[3], atol=1e-6)
    table = params["params"]["label"]["embedding"]
    assert table.shape == (4, 32)
    params["params"]["label"]["embedding"] = table.at[0].add(1.0)  # row 0 is the null label
    changed = jnp.abs(run(params, x, jnp.zeros(()), {"label": jnp.asarray([0, 1, 2, -1])}) - out).max((1, 2, 3)) > 1e-4
    assert changed.tolist() == [False, False, False, True]


def test_dropout_only_in_training():
    model, x = UNet(**TINIER, dropout=0.5), image(2, 4, 4, 3)
    params = woken(model, x)
    train = jax.jit(lambda params, key: model.apply(params, x, jnp.zeros(()), None, train=True, rngs={"dropout": key}))
    a, b = (train(params, jax.random.key(seed, impl="rbg")) for seed in (0, 1))
    assert jnp.abs(a - b).max() > 1e-3
    np.testing.assert_array_equal(train(params, jax.random.key(0, impl="rbg")), a)
    still = apply(model)(params, x, jnp.zeros(()))  # asks for no key
    np.testing.assert_allclose(still, apply(UNet(**TINIER))(params, x, jnp.zeros(())), atol=1e-6)


def test_sinusoidal_embedding_is_ddpms():
    """sin and cos of time / 10000^(i / (half - 1)), where 50 units of time are one of logsnr; float32 whatever comes in."""
    snr = np.asarray([-12.0, 0.0, 0.3, 7.5])
    got = Sinusoidal(16).apply({}, jnp.asarray(snr, jnp.float32))
    angle = 50 * snr[:, None] / 10000 ** (np.arange(8) / 7)
    np.testing.assert_allclose(got, np.concatenate([np.sin(angle), np.cos(angle)], -1), atol=1e-4)
    assert Sinusoidal(17).apply({}, jnp.zeros(2)).shape == (2, 17)


def test_learned_sinusoidal_embedding():
    frequencies = jnp.asarray([[0.1, 1.0, -2.0]])
    got = LearnedSinusoidal(6).apply({"params": {"frequencies": frequencies}}, jnp.asarray([0.3, -2.0]))
    angle = 2 * np.pi * np.asarray([[0.3], [-2.0]]) * np.asarray(frequencies)
    np.testing.assert_allclose(got, np.concatenate([[[0.3], [-2.0]], np.sin(angle), np.cos(angle)], -1), atol=1e-5)
    model, x = UNet(**TINIER, time=LearnedSinusoidal), image(1, 4, 4, 3)
    params = woken(model, x)
    assert params["params"]["time"]["frequencies"].shape == (1, 4)
    run = apply(model)
    assert jnp.abs(run(params, x, jnp.float32(0)) - run(params, x, jnp.float32(1))).max() > 1e-4
    assert jnp.isfinite(run(params, x, jnp.float32(30))).all()
