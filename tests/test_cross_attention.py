"""Conditions that are sequences: what a U-Net hears of them, where, and what it must not hear."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from test_unet import apply, count, image, random_like, shapes, woken

import jaxdiff as jd
from jaxdiff import data, experiment, models, training
from jaxdiff import run as runs
from jaxdiff.errors import InputError
from jaxdiff.interop import unet2d
from jaxdiff.models import parts
from jaxdiff.models.unet import UNet

WIDTH = 6
# Attention in the middle alone compiles soonest.
TINY = {"channels": 8, "multipliers": (1,), "blocks": 1, "attention": (), "heads": 2, "attend": parts.SpatialTransformer}
TEXT = TINY | {"context": functools.partial(parts.Tokens, width=WIDTH)}


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def moved(a, b):
    """The largest change of each sample."""
    return np.asarray(jnp.abs(a - b).max(axis=tuple(range(1, a.ndim))))


@pytest.fixture(scope="module")
def text():
    """A network that hears tokens, with random parameters, as a function of a condition, on one noisy image four times."""
    model, x = UNet(**TEXT), jnp.broadcast_to(image(1, 4, 4, 3), (4, 4, 4, 3))
    params, run = woken(model, x), apply(model)
    return lambda cond, params=params: run(params, x, jnp.zeros(()), cond), params


def sequences(n=4, length=3, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((n, length, WIDTH)), jnp.float32)


def test_attention_to_a_context_is_the_softmax_over_its_tokens():
    """One head by hand: softmax(q k / sqrt(C)) v over the tokens that are there."""
    h, tokens = image(2, 5, 8), sequences(2, 4)
    there = jnp.asarray([[True, True, False, True], [False, True, False, False]])
    part = parts.CrossAttention(1)
    params = random_like(jax.eval_shape(lambda: part.init(jax.random.key(0), h, (tokens, there))))
    p = {name: np.asarray(each["kernel"]) for name, each in params["params"].items()}
    assert {name for name, each in params["params"].items() if "bias" in each} == {"out"}
    bias = np.asarray(params["params"]["out"]["bias"])

    def head(b, of):
        seen = np.asarray(tokens[b])[np.asarray(there[b])]
        logits = np.asarray(h[b]) @ p["q"][:, of] @ (seen @ p["k"][:, of]).T / np.sqrt(p["q"][:, of].shape[1])
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return share @ seen @ p["v"][:, of]

    for b in range(2):
        one = head(b, slice(0, 8))
        two = np.concatenate([head(b, slice(0, 4)), head(b, slice(4, 8))], axis=1)  # each has its half of the channels
        close(part.apply(params, h, (tokens, there))[b], one @ p["out"] + bias)
        close(parts.CrossAttention(2).apply(params, h, (tokens, there))[b], two @ p["out"] + bias)


def test_a_block_is_self_attention_cross_attention_and_geglu():
    h, context = image(2, 5, 8), (sequences(2), jnp.ones((2, 3), bool))
    part = parts.TransformerBlock(2)
    params = random_like(jax.eval_shape(lambda: part.init(jax.random.key(0), h, context)))
    p = jax.tree.map(np.asarray, params["params"])

    def normed(name, h):
        h = np.asarray(h)
        return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * p[name]["scale"] + p[name]["bias"]

    look = parts.CrossAttention(2)
    want = h + look.apply({"params": p["self_attention"]}, normed("norm1", h), None)
    want = want + look.apply({"params": p["cross_attention"]}, normed("norm2", want), context)
    both = normed("norm3", want) @ p["mlp1"]["kernel"] + p["mlp1"]["bias"]
    assert both.shape[-1] == 2 * 4 * 8
    gated = both[..., :32] * np.asarray(jax.scipy.stats.norm.cdf(both[..., 32:])) * both[..., 32:]
    close(part.apply(params, h, context), np.asarray(want) + gated @ p["mlp2"]["kernel"] + p["mlp2"]["bias"], 1e-4)


def test_a_spatial_transformer_begins_as_nothing_and_has_as_many_blocks_as_told():
    x, context = image(2, 4, 4, 8), (sequences(2), jnp.ones((2, 3), bool))
    begun = jax.jit(parts.SpatialTransformer(2).init)(jax.random.key(0, impl="rbg"), x, context)
    np.testing.assert_array_equal(parts.SpatialTransformer(2).apply(begun, x, context), x)
    params = random_like(jax.eval_shape(lambda: parts.SpatialTransformer(2, depth=2).init(jax.random.key(0), x, context)))
    assert set(params["params"]) == {"norm", "enter", "block0", "block1", "leave"}
    out = parts.SpatialTransformer(2, depth=2).apply(params, x, context)
    np.testing.assert_array_equal(parts.SpatialTransformer(width=4, depth=2).apply(params, x, context), out)
    assert np.abs(out - parts.SpatialTransformer(4, depth=2).apply(params, x, context)).max() > 1e-3
    assert np.abs(out - parts.SpatialTransformer(2, depth=1).apply(params, x, context)).max() > 1e-3


def test_without_a_context_the_image_is_looked_at_twice():
    x = image(2, 4, 4, 8)
    part = parts.SpatialTransformer(2)
    params = random_like(jax.eval_shape(lambda: part.init(jax.random.key(0), x, None)))
    assert params["params"]["block0"]["cross_attention"]["k"]["kernel"].shape == (8, 8)
    h = part.apply(params, x, None)
    assert h.shape == x.shape and np.abs(h - x).max() > 1e-2


def test_every_token_is_heard_and_only_by_its_own_sample(text):
    run, _ = text
    tokens = sequences()
    out = run({"tokens": tokens})
    assert moved(out, jnp.roll(out, 1, 0)).min() > 1e-3  # one image, four sequences
    for i in range(3):
        change = moved(run({"tokens": tokens.at[1, i].add(1.0)}), out)
        assert change[1] > 1e-3 and change[[0, 2, 3]].max() == 0
    close(run({"tokens": tokens[:, ::-1]}), out)  # a sequence without places is a set
    close(run({"tokens": tokens[0]})[3], out[0])  # one for all


@pytest.mark.parametrize("junk", [0.0, 1e3, np.nan])
def test_what_is_masked_out_says_nothing(text, junk):
    run, _ = text
    tokens, mask = sequences(), jnp.asarray([[True, True, False], [False, True, False], [True, True, True], [False] * 3])
    out = run({"tokens": tokens, "mask": mask})
    assert jnp.isfinite(out).all()
    np.testing.assert_array_equal(run({"tokens": jnp.where(mask[..., None], tokens, junk), "mask": mask}), out)
    np.testing.assert_array_equal(run({"tokens": tokens, "mask": mask.astype(int)}), out)  # as tokenizers write it
    close(run({"tokens": tokens[:, :2], "mask": mask[:, :2]})[:2], out[:2])  # shorter is the same as masked
    close(run({"tokens": tokens.at[:2, 2].set(tokens[:2, 2] + 1), "mask": mask})[:2], out[:2])
    assert moved(run({"tokens": tokens}), out)[[0, 1, 3]].min() > 1e-3


def test_a_row_without_tokens_is_the_null_condition(text):
    """So guidance may stack conditions with and without tokens into one batch."""
    run, _ = text
    tokens, mask = sequences(), jnp.ones((4, 3), bool).at[jnp.asarray([1, 3])].set(False)
    out = run({"tokens": tokens, "mask": mask})
    none = run(None)
    close(out[jnp.asarray([1, 3])], none[jnp.asarray([1, 3])])
    close(run({"tokens": tokens})[jnp.asarray([0, 2])], out[jnp.asarray([0, 2])])
    assert moved(out, none)[[0, 2]].min() > 1e-3
    for empty in (
        {},
        {"tokens": None},
        {"tokens": tokens, "mask": jnp.zeros((4, 3), bool)},
        {"tokens": tokens, "mask": jnp.zeros(3)},
    ):
        close(run(empty), none)


def test_gradients_flow_to_the_tokens_that_are_there(text):
    run, _ = text
    tokens, mask = sequences(), jnp.asarray([[True, True, False], [False, True, False], [True, True, True], [False] * 3])

    def size(tokens):
        return jnp.square(run({"tokens": tokens, "mask": mask})).sum()

    slope = jax.grad(size)(tokens)
    assert jnp.isfinite(slope).all()
    np.testing.assert_array_equal(jnp.abs(slope).max(-1) > 1e-6, mask)
    step = 1e-2 * jnp.asarray(np.random.default_rng(1).standard_normal(tokens.shape), jnp.float32)
    numeric = (size(tokens + step) - size(tokens - step)) / 2
    np.testing.assert_allclose((slope * step).sum(), numeric, rtol=2e-2)


def test_a_label_as_a_token_is_in_the_attention_and_not_in_the_embedding():
    fields = TINY | {"classes": 3, "attention": (0,)}
    model, x = UNet(**fields, context=functools.partial(parts.LabelTokens, width=5)), image(4, 4, 4, 3)
    x = jnp.broadcast_to(x[:1], x.shape)
    params = woken(model, x)
    assert params["params"]["label"]["embedding"].shape == (4, 5)
    assert params["params"]["down0_0_attention"]["block0"]["cross_attention"]["k"]["kernel"].shape == (5, 8)
    run = apply(model)
    out = run(params, x, jnp.zeros(()), {"label": jnp.asarray([0, 1, 2, -1])})
    assert min(moved(out, jnp.roll(out, i, 0)).min() for i in (1, 2, 3)) > 1e-3
    close(run(params, x, jnp.zeros(()))[0], out[3])  # -1 is no condition
    close(run(params, x, jnp.zeros(()), {"label": 2}), jnp.broadcast_to(out[2], out.shape))
    # Row 0 of the table is the null label, and the attention is all that hears it.
    params["params"]["label"]["embedding"] = params["params"]["label"]["embedding"].at[0].add(1.0)
    change = moved(run(params, x, jnp.zeros(()), {"label": jnp.asarray([0, 1, 2, -1])}), out)
    assert change[:3].max() == 0 and change[3] > 1e-3
    for name in ("down0_0_attention", "middle_attention", "up0_0_attention", "up0_1_attention"):
        v = params["params"][name]["block0"]["cross_attention"]["v"]
        v["kernel"] = jnp.zeros_like(v["kernel"])
    deaf = run(params, x, jnp.zeros(()), {"label": jnp.asarray([0, 1, 2, -1])})
    close(deaf, jnp.broadcast_to(deaf[:1], deaf.shape))


def test_tokens_and_a_label_are_both_heard():
    model, x = UNet(**TEXT, classes=3), image(2, 4, 4, 3)
    params, run = woken(model, x), apply(model)
    assert params["params"]["label"]["embedding"].shape == (4, 32)
    tokens = sequences(2)
    out = run(params, x, jnp.zeros(()), {"label": jnp.asarray([0, 1]), "tokens": tokens})
    other = run(params, x, jnp.zeros(()), {"label": jnp.asarray([1, 1]), "tokens": tokens})
    assert moved(out, other)[0] > 1e-3 and moved(out, other)[1] == 0
    assert moved(out, run(params, x, jnp.zeros(()), {"label": jnp.asarray([0, 1])})).min() > 1e-3


def test_any_number_of_axes():
    for axes in (1, 3):
        model, x = UNet(**TEXT), jnp.zeros((2, *(4,) * axes, 3))
        out = jax.eval_shape(model.apply, shapes(model, x), x, jnp.zeros(()), {"tokens": sequences(2)})
        assert out.shape == x.shape and out.dtype == jnp.float32


def test_each_level_and_the_middle_may_hear_or_not():
    tokens = jnp.zeros((1, 3, WIDTH))
    for deaf, fields in (("down0_0", {"attend": parts.Attention}), ("middle", {"middle_attend": parts.BareAttention})):
        model = UNet(**TEXT | {"attention": (0,), "middle_attend": parts.SpatialTransformer} | fields)
        params = shapes(model, jnp.zeros((1, 4, 4, 3)), {"tokens": tokens})["params"]
        hears = {name.removesuffix("_attention") for name, each in params.items() if "block0" in each}
        assert deaf not in hears and hears and set(params[f"{deaf}_attention"]) >= {"q", "k", "v", "out"}


def test_in_low_precision(text):
    run, params = text
    x, tokens = jnp.broadcast_to(image(1, 4, 4, 3), (4, 4, 4, 3)), sequences()
    model = UNet(**TEXT, dtype=jnp.bfloat16)
    low, full = apply(model)(params, x, jnp.zeros(()), {"tokens": tokens}), run({"tokens": tokens})
    assert low.dtype == jnp.float32 and 1e-6 < jnp.abs(low - full).max() / jnp.abs(full).max() < 0.05
    assert {a.dtype for a in jax.tree.leaves(shapes(model, x))} == {np.dtype("float32")}


@pytest.mark.slow
def test_rematerialised_gradients_of_the_tokens_are_the_same():
    x, tokens = image(2, 4, 4, 3), sequences(2)
    params = woken(UNet(**TEXT), x)

    def slope(**changes):
        model = UNet(**TEXT, **changes)
        return jax.jit(jax.grad(lambda tokens: jnp.square(model.apply(params, x, jnp.zeros(()), {"tokens": tokens})).sum()))(tokens)

    want = slope()
    assert jnp.abs(want).max() > 1e-2
    close(slope(remat=True), want, 1e-5 * float(jnp.abs(want).max()))


def test_tokens_of_another_width_are_refused():
    x = jnp.zeros((1, 4, 4, 3))
    with pytest.raises(ValueError, match=r"the network hears tokens of width 6, got \(1, 3, 7\)"):
        shapes(UNet(**TEXT), x, {"tokens": jnp.zeros((1, 3, 7))})


def built(**fields):
    base = {"name": "UNet", "channels": 8, "multipliers": (1,), "attention": (0,), "attend": "SpatialTransformer"}
    return models.build(ConfigDict(base | fields))


def test_a_config_names_them():
    model = built(context="Tokens(width=6)", attend="SpatialTransformer(depth=2, width=4)", middle_attend="NoAttention")
    params = shapes(model, jnp.zeros((1, 4, 4, 3)))["params"]
    assert params["down0_0_attention"]["block1"]["cross_attention"]["v"]["kernel"].shape == (6, 8)
    assert shapes(built(context="LabelTokens", classes=2), jnp.zeros((1, 4, 4, 3)))["params"]["label"]["embedding"].shape == (
        3,
        512,
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"context": "Token"}, "model.context='Token' is unknown; did you mean 'Tokens'?; allowed: LabelTokens, Tokens"),
        ({"context": "Tokens(5)"}, "model.context='Tokens(5)' does not fit: Tokens takes numbers by name: width"),
        ({"context": "Tokens(width=0)"}, "model.context='Tokens': width=0 is out of range; it is a whole number, at least 1"),
        (
            {"context": "Tokens", "attend": "Attention"},
            "model.context='Tokens' is heard by no attention; set model.attend to Spatial",
        ),
        ({"context": "LabelTokens"}, "model.context='LabelTokens' says a label, and model.classes=0 knows none; set model.classes"),
        (
            {"attend": "SpatialTransformer(width=3)"},
            "model.attend: width=3 does not divide the channels where attention is; allowed: 1",
        ),
        (
            {"middle_attend": "Attention(width=0.5)"},
            "model.middle_attend: width=0.5 does not divide the channels where attention is",
        ),
        ({"attend": "SpatialTransformer(depth=0)"}, "model.attend: depth=0 is out of range; it is a whole number, at least 1"),
        ({"middle_attend": "SpatialTransformer(depth=1.5)"}, "model.middle_attend: depth=1.5 is out of range"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields, said):
    with pytest.raises(InputError) as error:
        built(**fields)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_networks_without_a_context_may_have_the_part_too():
    """A classifier, which reads no condition, and an autoencoder's middle: both attentions look at the image."""
    x = jnp.zeros((1, 8, 8, 3))
    classifier = built(name="Classifier", classes=2)
    params = shapes(classifier, x)
    assert params["params"]["middle_attention"]["block0"]["cross_attention"]["k"]["kernel"].shape == (8, 8)
    assert jax.eval_shape(classifier.apply, params, x, jnp.zeros(())).shape == (1, 2)
    first = models.build(
        ConfigDict({"name": "AutoencoderKL", "channels": 8, "multipliers": (1,), "middle_attend": "SpatialTransformer"})
    )
    params = jax.eval_shape(first.init, jax.random.key(0), x)
    assert "block0" in params["params"]["encoder"]["middle_attention"]


def test_a_network_that_hears_sequences_is_no_unet2dmodel():
    c = labelled()
    params = jax.eval_shape(experiment.build(c).init, jax.random.key(0))
    with pytest.raises(InputError, match=r"model\.attend='SpatialTransformer' cannot be exported; allowed: Attention"):
        unet2d.settings(c, params)


def labelled(**changes):
    c = tiny.config(**changes)
    c.model.update(attend="SpatialTransformer", context="LabelTokens(width=16)")
    return c


@pytest.mark.slow
def test_an_experiment_guides_and_exports_what_its_tokens_say(tmp_path):
    """Labels of a batch, guidance that stacks them with the null one, and the exported sampler, by the same code as any model's."""
    c = labelled()
    made = experiment.build(c)
    params = tiny.noisy(jax.random.key(1), jax.jit(made.init)(jax.random.key(0)))
    one, key = runs.of(c, made, params), jax.random.key(7)
    images = one.generate(key, 3, steps=2, label=[1, 2, 3], guidance=2.5)
    same = one.generate(jd.sample_keys(key, 3), 3, steps=2, label=[1, 2, 4], guidance=2.5)
    np.testing.assert_array_equal(images[:2], same[:2])
    assert (images[2] != same[2]).any()
    jd.export(one, tmp_path / "sampler", "ddim")
    exported = jd.load_exported(tmp_path / "sampler").generate(key, 3, steps=2, label=[1, 2, 3], guidance=2.5)
    np.testing.assert_array_equal(exported, images)


@pytest.mark.slow
def test_a_small_one_trained_on_digits_hears_their_labels():
    """Held-out digits cost less under their own label than under none, and most under another; the attention alone says it."""
    c = labelled(**{"model.channels": 16, "model.multipliers": (1, 2), "model.dropout": 0.0, "optimizer.learning_rate": 3e-3})
    made, optimizer = experiment.build(c), training.make_optimizer(c.optimizer)
    state = training.init_state(made, optimizer, (0.98,), jax.random.key(0))
    step = jax.jit(training.make_step(made, optimizer), donate_argnums=1)
    digits, rng = data.load("digits"), np.random.default_rng(0)
    for _ in range(200):
        rows = rng.integers(0, len(digits.images), 64)
        state, _ = step(jax.random.key(0), state, {"image": digits.images[rows], "label": digits.labels[rows]})
    held = data.load("digits", "test")

    @jax.jit
    def cost(label):
        """The same times and noise under each label."""
        example = made.prepare((), jax.random.key(1), {"image": jnp.asarray(held.images), "label": label})
        return made.loss(state.ema["0.98"], (), None, example | {"cond": {"label": label}})[0].mean()

    own, none, others = (float(cost(jnp.asarray(of))) for of in (held.labels, 0 * held.labels - 1, (held.labels + 3) % 10))
    assert 0.1 < own < 0.95 * none and none < 0.95 * others, (own, none, others)


def sizes(model, channels):
    return count(shapes(model, jnp.zeros((1, 64, 64, channels))))


def test_stable_diffusions_unet_has_its_parameters():
    """Of Stable Diffusion 1.x: 859,520,964, as its files hold and diffusers counts them."""
    fields = {"channels": 320, "multipliers": (1, 2, 4, 4), "attention": (0, 1, 2), "heads": 8, "context": parts.Tokens}
    assert sizes(UNet(**fields, attend=parts.SpatialTransformer), 4) == 859_520_964
