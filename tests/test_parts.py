"""The parts of the U-Net: each does what its paper says, and any set of them makes a network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from test_unet import count, image, random_like, shapes, woken

from jaxdiff import models, schedules, times
from jaxdiff.denoiser import network_input
from jaxdiff.errors import InputError
from jaxdiff.level import Level, logsnr
from jaxdiff.models import parts
from jaxdiff.models.unet import UNet

DDPMPP = {
    "block": parts.DDPMppBlock,
    "attend": parts.DDPMppAttention,
    "down": parts.DDPMppDown,
    "up": parts.DDPMppUp,
    "embed": parts.OneHotEmbed,
    "time": functools.partial(parts.Sinusoidal, rate=0.125),
    "attend_each": False,
}
ADM = {
    "block": parts.ADMBlock,
    "attend": functools.partial(parts.Attention, epsilon=1e-5),
    "down": parts.ADMDown,
    "leave": functools.partial(parts.Leave, epsilon=1e-5),
}
VDM = {"block": parts.VDMBlock, "enter": parts.FourierEnter, "leave": parts.ResidualLeave}
FAMILIES = pytest.mark.parametrize("family", [DDPMPP, ADM, VDM], ids=["ddpmpp", "adm", "vdm"])
TINY = {"channels": 8, "multipliers": (1, 1), "blocks": 1, "attention": (1,), "classes": 3, "augment": 9}


def close(a, b, **tolerance):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), **{"atol": 1e-5} | tolerance)


def woken_embed(embed):
    return random_like(jax.eval_shape(lambda: embed.init(jax.random.key(0), jnp.zeros(1), None)))


def called(part, *args, params=None):
    """A part on its arguments, with random parameters or the given ones: (output, parameters)."""
    if params is None:
        params = random_like(jax.eval_shape(lambda: part.init(jax.random.key(0), *args)))
    return part.apply(params, *args), params


@FAMILIES
def test_a_network_of_any_family(family):
    model, x = UNet(**TINY | family, dropout=0.5), image(4, 4, 4, 3)
    x = jnp.broadcast_to(x[:1], x.shape)
    params = woken(model, x)
    run = jax.jit(lambda snr, cond: model.apply(params, x, snr, cond))
    change = jnp.zeros((4, 9))
    label = jnp.asarray([0, 1, -1, -1])
    out = run(jnp.zeros(()), {"label": label, "augment": change.at[3, 4].set(1.0)})
    assert out.shape == x.shape and out.dtype == jnp.float32 and jnp.isfinite(out).all()
    for i in range(4):
        for j in range(i):
            assert jnp.abs(out[i] - out[j]).max() > 1e-4, (i, j)  # labels and augmentation are seen
    assert jnp.abs(run(jnp.ones(()), {"label": label, "augment": change}) - out).max() > 1e-4  # and the noise level
    # What a condition does not say is no label and no augmentation.
    close(model.apply(params, x[:3], jnp.zeros(()), {"label": label[:3]}), out[:3])
    close(model.apply(params, x[:1], jnp.zeros(()))[0], out[2])
    embed = model.embed(8, 3, 9, model.time)
    params = woken_embed(embed)
    close(embed.apply(params, jnp.zeros(1), {"augment": change[:1]}), embed.apply(params, jnp.zeros(1), {"label": -1}))


@FAMILIES
def test_rematerialisation_and_low_precision_of_any_family(family):
    """What rematerialisation saves, and its gradients, are in test_training; here, that every part takes it, in training too."""
    x, key = image(1, 4, 4, 3), jax.random.key(1, impl="rbg")
    fields = TINY | family | {"attention": (), "dropout": 0.5}
    params = woken(UNet(**fields), x)

    def run(**changes):
        model = UNet(**fields, **changes)
        return jax.jit(lambda p: model.apply(p, x, jnp.zeros(()), None, train=True, rngs={"dropout": key}))(params)

    plain, again, low = run(), run(remat=True), run(dtype=jnp.bfloat16)
    close(plain, again)
    assert low.dtype == jnp.float32
    assert 1e-6 < jnp.abs(low - plain).max() / jnp.abs(plain).max() < 0.1


@FAMILIES
@pytest.mark.parametrize("axes", [1, 3])
def test_any_number_of_axes(family, axes):
    model, x = UNet(**TINY | family), jnp.zeros((2, *(4,) * axes, 3))
    params = shapes(model, x)
    out = jax.eval_shape(model.apply, params, x, jnp.zeros(()), {"label": jnp.zeros(2, int), "augment": jnp.zeros((2, 9))})
    assert out.shape == x.shape and out.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_where_the_attention_is_and_how_the_parameters_are_named():
    params = shapes(UNet(**TINY | DDPMPP | {"blocks": 2}), jnp.zeros((1, 4, 4, 3)))["params"]
    attention = sorted(name.removesuffix("_attention") for name in params if name.endswith("_attention"))
    assert attention == ["down1_0", "down1_1", "middle", "up1_2"]
    assert {"augment", "conv_in", "conv_out", "embed1", "embed2", "label", "norm_out"} <= set(params)
    assert params["label"]["kernel"].shape == (3, 8) and "bias" not in params["augment"]
    assert set(params["down0"]) == {"norm1", "conv1", "embed", "norm2", "conv2", "shortcut"}


def test_an_augmentation_adds_its_linear_map_alone():
    x = jnp.zeros((1, 4, 4, 3))
    without = {k: v for k, v in TINY.items() if k != "augment"}
    assert count(shapes(UNet(**TINY), x)) - count(shapes(UNet(**without), x)) == 9 * 8


def test_a_network_that_adds_its_input_says_it_at_first():
    model, x = UNet(**TINY | VDM | {"multipliers": (1,), "attention": ()}), image(2, 4, 4, 3)
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), x, jnp.zeros(()))
    np.testing.assert_array_equal(model.apply(params, x, jnp.zeros(())), x)
    assert not any(block["embed"]["kernel"].any() for name, block in params["params"].items() if "block" in name)


def test_a_scale_and_shift_of_nothing_is_a_shift_of_nothing():
    x, embedding = image(2, 4, 4, 8), image(2, 32)
    out, params = called(parts.ADMBlock(8, epsilon=1e-6), x, embedding, False)
    assert params["params"]["embed"]["kernel"].shape == (32, 16)
    with_nothing = {"params": {**params["params"], "embed": jax.tree.map(jnp.zeros_like, params["params"]["embed"])}}
    a, _ = called(parts.ADMBlock(8, epsilon=1e-6), x, embedding, False, params=with_nothing)
    with_nothing["params"]["embed"] = {"kernel": jnp.zeros((32, 8)), "bias": jnp.zeros(8)}
    b, _ = called(parts.ResBlock(8), x, embedding, False, params=with_nothing)
    assert jnp.abs(a - out).max() > 1e-3
    close(a, b)


def test_scale_and_shift_come_after_the_norm():
    x = image(2, 4, 4, 8)
    _, params = called(parts.ADMBlock(8), x, jnp.zeros((2, 32)), False)
    p = dict(params["params"])
    # scale -1 and shift s leave silu(s) everywhere: the last convolution sees a constant.
    s = jnp.linspace(-1, 1, 8)
    p["embed"] = {"kernel": jnp.zeros((32, 16)), "bias": jnp.concatenate([-jnp.ones(8), s])}
    out, _ = called(parts.ADMBlock(8), x, jnp.zeros((2, 32)), False, params={"params": p})
    centre = jnp.einsum("hwio,i->o", p["conv2"]["kernel"], jax.nn.silu(s)) + p["conv2"]["bias"]
    close((out - x)[:, 1:-1, 1:-1], jnp.broadcast_to(centre, (2, 2, 2, 8)))


def test_blocks_that_resample_average_and_repeat_on_both_ways():
    x, embedding = image(2, 4, 6, 8), image(2, 32)
    mean = np.asarray(x).reshape(2, 2, 2, 3, 2, 8).mean((2, 4))
    twice = np.asarray(x).repeat(2, 1).repeat(2, 2)
    close(parts.halve(x), mean)
    close(parts.double(x), twice)
    for part, small in ((parts.DDPMppDown(8), mean), (parts.DDPMppUp(8), twice)):
        out, params = called(part, x, embedding, False)
        p = dict(params["params"])
        assert out.shape == small.shape
        p["conv2"] = jax.tree.map(jnp.zeros_like, p["conv2"])
        shortcut, _ = called(part, x, embedding, False, params={"params": p})
        kernel, bias = (np.asarray(p["shortcut"][name]) for name in ("kernel", "bias"))
        close(shortcut, (small @ kernel + bias) * np.sqrt(0.5), atol=1e-4)


@pytest.mark.parametrize("part", [parts.ResBlockDown, parts.ResBlockUp, parts.ADMBlockDown, parts.ADMBlockUp])
def test_blocks_that_resample_without_a_linear_map(part):
    """Where the branch says nothing, just the neighbours' mean or the repeated positions; other channels need a map."""
    x, embedding = image(2, 4, 6, 8), image(2, 32)
    small = parts.halve(x) if part.__name__.endswith("Down") else parts.double(x)
    out, params = called(part(8), x, embedding, False)
    p = params["params"]
    assert set(p) == {"norm1", "conv1", "embed", "norm2", "conv2"} and jnp.abs(out - small).max() > 1e-3
    assert p["embed"]["bias"].shape == (16 if part.__name__.startswith("ADM") else 8,)
    p = {**p, "conv2": jax.tree.map(jnp.zeros_like, p["conv2"])}
    close(called(part(8), x, embedding, False, params={"params": p})[0], small)
    assert "shortcut" in called(part(4), x, embedding, False)[1]["params"]


def test_attention_without_a_norm_looks_at_its_input_itself():
    x = image(2, 4, 4, 8)
    out, params = called(parts.Attention(2), x)
    p = dict(params["params"])
    seen = parts.norm(8, jnp.float32).apply({"params": p.pop("norm")}, x)
    bare, _ = called(parts.BareAttention(2), seen, params={"params": p})
    close(bare - seen, out - x)
    assert set(called(parts.BareAttention(2), x)[1]["params"]) == {"q", "k", "v", "out"}


def test_a_middle_without_attention_is_one_whose_attention_adds_nothing():
    x, fields = image(2, 4, 4, 3), TINY | {"multipliers": (1,), "attention": (0,), "remat": True}
    params = woken(UNet(**fields), x)
    p = dict(params["params"])
    p["middle_attention"] = jax.tree.map(jnp.zeros_like, p["middle_attention"])
    want = UNet(**fields).apply({"params": p}, x, jnp.zeros(()))
    del p["middle_attention"]
    got = UNet(**fields, middle_attend=parts.NoAttention).apply({"params": p}, x, jnp.zeros(()))
    np.testing.assert_array_equal(got, want)
    assert jnp.abs(UNet(**fields).apply(params, x, jnp.zeros(())) - want).max() > 1e-4


def test_a_sum_scaled_by_the_root_of_a_half():
    x, embedding = image(2, 4, 4, 8), image(2, 32)
    out, params = called(parts.ResBlock(8), x, embedding, False)
    close(called(parts.DDPMppBlock(8), x, embedding, False, params=params)[0], out * np.sqrt(0.5))
    out, params = called(parts.Attention(2), x)
    close(called(parts.DDPMppAttention(2), x, params=params)[0], out * np.sqrt(0.5))


@pytest.mark.parametrize("part, first", [(parts.Down, 0), (parts.ADMDown, -1)])
def test_strided_convolutions_pad_as_their_frameworks_did(part, first):
    x = image(1, 8, 1)
    kernel = jnp.zeros((3, 1, 1)).at[0].set(1.0)  # the first tap of three
    params = {"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}
    out, _ = called(part(1), x, jnp.zeros((1, 4)), False, params=params)
    padded = np.pad(np.asarray(x)[0, :, 0], (1, 1))
    close(out[0, :, 0], padded[[1 + first + 2 * i for i in range(4)]])


def test_fourier_features_show_the_last_bits_of_a_pixel():
    x = jnp.asarray([[[100 / 127.5 - 1], [101 / 127.5 - 1]]], jnp.float32)
    got = parts.FourierEnter(4).features(x, None)
    want = np.concatenate(
        [x, *(np.sin(2**n * np.pi * np.asarray(x)) for n in (7, 8)), *(np.cos(2**n * np.pi * np.asarray(x)) for n in (7, 8))], -1
    )
    close(got, want, atol=1e-4)
    assert parts.FourierEnter(4, jnp.bfloat16).features(x.astype(jnp.bfloat16), None).dtype == jnp.float32
    params = shapes(UNet(**TINY | VDM), jnp.zeros((1, 4, 4, 3)))["params"]
    assert params["conv_in"]["kernel"].shape == (3, 3, 15, 8)


def test_the_rate_an_embedding_turns_at():
    """EDM's features of c_noise = ln(sigma) / 4 at alpha = 1, where the logsnr is -2 ln(sigma)."""
    sigma = np.asarray([0.002, 0.3, 80.0])
    got = parts.Sinusoidal(16, rate=0.125).apply({}, jnp.asarray(-2 * np.log(sigma), jnp.float32))
    angle = np.log(sigma)[:, None] / 4 / 10000 ** (np.arange(8) / 7)
    close(got, np.concatenate([-np.sin(angle), np.cos(angle)], -1))


def test_one_hot_labels_enter_before_the_layers():
    part = parts.OneHotEmbed(8, 3, 0, parts.Sinusoidal)
    snr = jnp.zeros(4)
    out, params = called(part, snr, {"label": jnp.asarray([0, 1, 2, -1])})
    p = params["params"]
    for i, label in enumerate((0, 1, 2, None)):
        h = parts.Sinusoidal(8).apply({}, snr[:1])[0] + p["label"]["bias"]
        h = h if label is None else h + np.sqrt(3) * p["label"]["kernel"][label]
        h = jax.nn.silu(h @ p["embed1"]["kernel"] + p["embed1"]["bias"]) @ p["embed2"]["kernel"] + p["embed2"]["bias"]
        close(out[i], h)
    assert "label" not in called(parts.OneHotEmbed(8, 0, 0, parts.Sinusoidal), snr, None)[1]["params"]


def built(**fields):
    return models.build(ConfigDict({"name": "UNet", "channels": 8, "multipliers": (1,), "attention": ()} | fields))


def owner(role, **fields):
    """A network that has a part of this role."""
    if role in ("places", "qk_norm", "rotate"):
        return models.build(ConfigDict({"name": "DiT"} | fields))
    whose = {"pool": {"name": "Classifier", "classes": 2}, "context": {"attend": "SpatialTransformer", "classes": 2}}
    return built(**whose.get(role, {}), **fields)


def test_parts_are_named_in_configs_and_may_hold_numbers():
    assert set(models.__all__) == {
        *models.NETWORKS,
        "PatchDiscriminator",
        *(part.__name__ for row in models.PARTS.values() for part in row),
    }
    for role, row in models.PARTS.items():
        for part in row:
            for text in (part.__name__, f"{part.__name__}()"):
                assert getattr(owner(role, **{role: text}), role) is part
    model = built(time="Sinusoidal(rate=0.125)", enter="FourierEnter(low=3, high=5)")
    close(model.time(4).apply({}, jnp.ones(1)), parts.Sinusoidal(4, 0.125).apply({}, jnp.ones(1)))
    assert shapes(model, jnp.zeros((1, 4, 4, 3)))["params"]["conv_in"]["kernel"].shape[2] == 3 + 3 * 2 * 3


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"block": "ADMBlok"}, "model.block='ADMBlok' is unknown; did you mean 'ADMBlock'?; allowed: ADMBlock, "),
        ({"block": "Attention"}, "model.block='Attention' is unknown"),
        ({"time": "UNet"}, "model.time='UNet' is unknown"),
        ({"block": "ADMBlock(3)"}, "model.block='ADMBlock(3)' does not fit: ADMBlock takes numbers by name: epsilon, scale"),
        ({"block": "ADMBlock(channels=3)"}, "takes numbers by name: epsilon, scale"),
        ({"block": "ADMBlock(epsilon='a')"}, "takes numbers by name"),
        ({"up": "Up(scale=2)"}, "Up takes nothing in brackets"),
        ({"augment": -1}, "model.augment=-1 is out of range; it is a whole number, at least 0"),
        ({"attend_each": 1}, "model.attend_each=1 is out of range; it is True or False"),
    ],
)
def test_parts_that_cannot_be_are_refused_in_one_line(fields, said):
    with pytest.raises(InputError) as error:
        built(**fields)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "schedule"),
    [
        (models.LinearBetaSinusoidal(8, shift=0, cos_first=1), schedules.linear_beta()),
        (models.CosineBetaSinusoidal(8, steps=4000, scale=0.25), schedules.cosine_beta(4000)),
        (models.ScaledLinearBetaSinusoidal(8), schedules.scaled_linear_beta()),
    ],
)
def test_a_table_of_levels_is_heard_as_its_rows(part, schedule):
    """At every row the features are those of the integer itself, but for the angle's rounding; between two they lie between."""
    steps = part.steps
    levels = times.grid(schedule, np.arange(1, steps + 1) / steps)
    rows = np.arange(steps) * part.scale
    rates = np.exp(-np.log(10000) * np.arange(4) / (4 - part.shift))
    want = [np.sin(rows[:, None] * rates), np.cos(rows[:, None] * rates)]
    got = part.apply({}, logsnr(Level(*map(jnp.asarray, levels))))
    np.testing.assert_allclose(got, np.concatenate(want[::-1] if part.cos_first else want, axis=1), atol=1e-4)
    halfway = times.grid(schedule, np.array([100.4, 100.6]) / steps)
    number = part.apply({}, logsnr(Level(*map(jnp.asarray, halfway))), method="number")
    np.testing.assert_allclose(number, [99.4, 99.6], atol=0.02)


@pytest.mark.parametrize(
    ("part", "schedule"), [(models.VPSinusoidal(8), schedules.vp()), (models.SubVPSinusoidal(8), schedules.subvp())]
)
def test_continuous_times_are_heard_as_999_t(part, schedule):
    t = np.concatenate([np.geomspace(1e-5, 1e-2, 20), np.linspace(0.02, 1, 50)])
    snr = logsnr(Level(*map(jnp.asarray, times.grid(schedule, t))))
    np.testing.assert_allclose(part.apply({}, snr, method="number"), 999 * t, rtol=1e-5, atol=2e-4)
    angle = 999 * t[:, None] * np.exp(-np.log(10000) * np.arange(4) / 3)
    np.testing.assert_allclose(part.apply({}, snr), np.concatenate([np.sin(angle), np.cos(angle)], 1), atol=3e-4)


def test_other_betas_are_heard_too():
    part, t = models.VPSinusoidal(8, beta_min=0.5, beta_max=0.5), np.linspace(0.1, 1, 9)
    snr = logsnr(Level(*map(jnp.asarray, times.grid(schedules.vp(0.5, 0.5), t))))
    np.testing.assert_allclose(part.apply({}, snr, method="number"), 999 * t, rtol=1e-5)


def test_sub_vp_images_enter_as_the_schedule_makes_them():
    level = times.grid(schedules.subvp(), np.array([1e-4, 0.1, 0.4, 1.0]))
    level = Level(*(jnp.asarray(a).reshape(-1, 1, 1, 1) for a in level))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 2, 3)), jnp.float32)
    unit, snr = network_input(x, level)
    assert float(jnp.abs(unit / x - 1).max()) > 0.08
    np.testing.assert_allclose(models.SubVPEnter(4).features(unit, snr), x, rtol=1e-5)


def test_an_embedding_may_be_wider_than_its_channels():
    plain, wide = (
        shapes(built(classes=3, channels=n, embed=e), jnp.zeros((1, 4, 4, 3)))["params"]
        for n, e in ((16, "Embed"), (8, "Embed(factor=2)"))
    )
    for name in ("embed1", "embed2", "label"):
        assert jax.tree.map(lambda a: a.shape, plain[name]) == jax.tree.map(lambda a: a.shape, wide[name])
    assert wide["conv_in"]["kernel"].shape[-1] == 8


def test_pooling_in_heads_of_a_width_is_pooling_in_as_many_heads():
    h = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 2, 8)), jnp.float32)
    params = tiny.noisy(jax.random.key(1), models.AttentionPool(3).init(jax.random.key(0), h))
    by_width = models.AttentionPool(3, width=2, groups=4).apply(params, h)
    close(by_width, models.AttentionPool(3, heads=4, groups=4).apply(params, h))
    assert not np.allclose(by_width, models.AttentionPool(3, heads=2, groups=4).apply(params, h))
    assert not np.allclose(by_width, models.AttentionPool(3, width=2, groups=2).apply(params, h))


@pytest.mark.parametrize("shape, groups", [((2, 4, 4, 32), 8), ((3, 6, 12), 3), ((2, 2, 2, 2, 8), 1)])
def test_group_norm_and_its_gradients_are_flax_s(shape, groups):
    x, weight = 3 * jax.random.normal(jax.random.key(0), shape) + 1, jax.random.normal(jax.random.key(1), shape)
    ours, theirs = parts.GroupNorm(groups, 1e-5), nn.GroupNorm(groups, epsilon=1e-5)
    params = random_like(jax.eval_shape(lambda: theirs.init(jax.random.key(0), x)))
    close(ours.apply(params, x), theirs.apply(params, x))

    def gradients(module):
        return jax.grad(lambda params, x: (weight * module.apply(params, x)).sum(), (0, 1))(params, x)

    for a, b in zip(jax.tree.leaves(gradients(ours)), jax.tree.leaves(gradients(theirs))):
        close(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-6, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999])
def test_dropout_drops_that_share_and_keeps_the_mean(rate):
    x = 1 + jax.random.uniform(jax.random.key(0), (64, 16, 16, 7))
    y = parts.Dropout(rate).apply({}, x, True, rngs={"dropout": jax.random.key(1)})
    kept = np.asarray(y != 0)
    share, deviation = 1 - round(rate * 2**16) / 2**16, np.sqrt(rate * (1 - rate) / x.size)
    assert abs(kept.mean() - share) <= 4 * deviation
    close(np.asarray(y)[kept], np.asarray(x / share)[kept], rtol=1e-6)
    # One entry says nothing of its neighbours, in the pairs of one word and elsewhere.
    for axis in (1, 2, 3):
        together = (kept & np.roll(kept, 1, axis)).mean()
        assert abs(together - share**2) <= 6 * np.sqrt(share**2 * (1 - share**2) / x.size)
    assert (parts.Dropout(rate).apply({}, x, False) == x).all()


def test_layers_are_flax_s_and_their_random_start_too():
    x = image(2, 8, 8, 5)
    for ours, theirs in (
        (parts.Dense(4, kernel_init=parts.INIT), nn.Dense(4, kernel_init=parts.INIT)),
        (parts.Dense(4, use_bias=False), nn.Dense(4, use_bias=False)),
        (parts.conv(4, 3, 2, jnp.float32), nn.Conv(4, (3, 3), kernel_init=parts.INIT)),
        (parts.conv(4, 3, 2, jnp.float32, stride=2, padding=1), nn.Conv(4, (3, 3), 2, 1, kernel_init=parts.INIT)),
        (parts.conv(4, 2, 2, jnp.float32, stride=2, padding="VALID"), nn.Conv(4, (2, 2), 2, "VALID", kernel_init=parts.INIT)),
    ):
        a, b = (module.init(jax.random.key(3), x) for module in (ours, theirs))
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert all((p == q).all() for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
        params = random_like(jax.eval_shape(lambda b=b: b))
        close(ours.apply(params, x), theirs.apply(params, x), atol=1e-5)


@pytest.mark.parametrize("layer", [parts.Dense(3, dtype=jnp.bfloat16), parts.conv(3, 3, 2, jnp.bfloat16)], ids=["dense", "conv"])
def test_the_gradient_of_a_bias_is_a_sum_in_float32(layer):
    """Of 16,384 numbers near 1: bfloat16 has 8 bits, and adds nothing to 256 any more."""
    x, weight = image(4, 64, 64, 2), 1 + jax.random.uniform(jax.random.key(0), (4, 64, 64, 1))
    weight = weight.astype(jnp.bfloat16).astype(jnp.float32)
    params = layer.init(jax.random.key(1), x)
    got = jax.jit(jax.grad(lambda params: (weight * layer.apply(params, x).astype(jnp.float32)).sum()))(params)
    close(got["params"]["bias"], np.full(3, np.asarray(weight, np.float64).sum()), rtol=1e-5)


class Device:
    def __init__(self, **said):
        self.__dict__.update(said)


@pytest.mark.parametrize(
    "device, dtype, width, fits",
    [
        ({"compute_capability": "9.0"}, jnp.bfloat16, 256, True),
        ({"compute_capability": "8.0"}, jnp.float16, 128, True),
        ({"compute_capability": "8.6"}, jnp.bfloat16, 256, False),
        ({"compute_capability": "10.0"}, jnp.bfloat16, 64, True),
        ({"compute_capability": "7.5"}, jnp.float16, 64, False),
        ({"compute_capability": "9.0"}, jnp.float32, 64, False),
        ({"compute_capability": "9.0"}, jnp.bfloat16, 36, False),
        ({"compute_capability": "gfx90a"}, jnp.bfloat16, 64, False),
        ({}, jnp.bfloat16, 64, False),
    ],
)
def test_where_attention_is_fused(device, dtype, width, fits):
    assert parts.fuses(Device(**device), dtype, width) == fits


def test_fused_attention_has_the_parameters_of_attention_and_is_it_on_a_cpu():
    x = image(2, 4, 4, 16)
    for dtype in (jnp.float32, jnp.bfloat16):
        plain, params = called(parts.Attention(2, dtype), x)
        fused, _ = called(parts.FusedAttention(2, dtype), x, params=params)
        assert (plain == fused).all()
