"""OpenAI's state dicts: what is read off shapes, where q, k and v are, what is refused. The numbers: test_reference_openai.py."""

import jax
import numpy as np
import pytest
from openai_layout import PUBLISHED, Spec, filled, layout

from jaxdiff import experiment
from jaxdiff.errors import InputError
from jaxdiff.interop import files, openai

FACTS = openai.Facts(8, heads=2, steps=1000, schedule="linear")
# Millions of parameters, of ADM's as published.
MILLIONS = {
    "64x64_diffusion.pt": 296,
    "128x128_diffusion.pt": 422,
    "256x256_diffusion.pt": 554,
    "512x512_diffusion.pt": 559,
    "64x64_classifier.pt": 65,
    "128x128_classifier.pt": 43,
    "256x256_classifier.pt": 54,
    "512x512_classifier.pt": 54,
}
EXACT = {
    "cifar10_uncond_50M_500K.pt": 52_546_438,
    "64x64_classifier.pt": 65_438_568,
    "128x128_classifier.pt": 42_568_040,
    "256x256_classifier.pt": 54_096_360,
}


def size_of(shapes):
    return sum(int(np.prod(shape)) for shape in shapes.values())


def parameters(config):
    """How many ours are, without the null label's."""
    shapes = jax.eval_shape(experiment.build(config).init, jax.random.key(0))["params"]
    null = shapes["label"]["embedding"].shape[1] if "label" in shapes else 0
    return sum(a.size for a in jax.tree.leaves(shapes)) - null


def test_every_published_file_is_known():
    assert set(openai.PUBLISHED) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_found_in_the_shapes(name):
    spec, facts = PUBLISHED[name], openai.facts_of(name, {})
    found = openai.plan(layout(spec), facts.image_size)
    assert found.blocks == spec.blocks and found.attention == spec.attention and found.classes == spec.classes
    assert [found.channels * m for m in found.multipliers] == [spec.channels * m for m in spec.multipliers]
    assert found.channels * found.factor == spec.channels and found.outputs == spec.outputs and found.colours == 3
    assert found.resblock_updown == spec.updown and found.scale_shift_norm == spec.shifts
    assert facts.image_size == spec.size


# Each network once: lsun_cat.pt, say, has the shapes of lsun_bedroom.pt.
NETWORKS = {spec: name for name, spec in reversed(PUBLISHED.items())}
QUICK = ("cifar10_uncond_50M_500K.pt", "512x512_diffusion.pt", "64x64_classifier.pt")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS.values()])
def test_networks_have_the_published_counts(name):
    spec, facts = PUBLISHED[name], openai.facts_of(name, {})
    count = parameters(openai.config_of(openai.plan(layout(spec), facts.image_size), facts))
    assert count == size_of(layout(spec))
    assert count == EXACT.get(name, count)
    assert round(count / 1e6) == MILLIONS.get(name, round(count / 1e6))


def test_flags_of_the_published_files():
    """Those of their READMEs that no shape shows, through to the config."""
    config = openai.config_of(openai.plan(layout(PUBLISHED["64x64_diffusion.pt"]), 64), openai.facts_of("64x64_diffusion.pt", {}))
    assert config.model.attend == "Attention(epsilon=1e-5, groups=32, width=64)"
    assert config.process.schedule == "cosine_beta(steps=1000)" and config.process.loss == "hybrid(0.001)"
    assert openai.PUBLISHED["64x64_diffusion.pt"].new_attention_order
    assert not any(facts.new_attention_order for name, facts in openai.PUBLISHED.items() if name != "64x64_diffusion.pt")
    spec = PUBLISHED["imagenet64_uncond_100M_1500K.pt"]
    config = openai.config_of(openai.plan(layout(spec), 64), openai.facts_of("imagenet64_uncond_100M_1500K.pt", {}))
    assert config.model.time == "CosineBetaSinusoidal(steps=4000, scale=0.25, shift=0, cos_first=1)"
    assert config.model.heads == 4 and config.sampling.solver == "ddpm_learned" and config.sampling.max_steps == 4000
    facts = openai.facts_of("512x512_diffusion.pt", {})
    config = openai.config_of(openai.plan(layout(PUBLISHED["512x512_diffusion.pt"]), 512), facts)
    assert config.model.embed == "Embed(factor=2)" and config.model.channels == 128


@pytest.mark.parametrize("apart", [openai.by_head, openai.by_part])
def test_q_k_and_v_are_taken_apart_in_both_orders(apart):
    """Attention of the parts is attention written with their indices: part p of head h begins at 3 h + p widths, or at 2 p + h."""
    rng = np.random.default_rng(0)
    heads, width, places = 2, 3, 5
    weight, x = rng.standard_normal((3 * heads * width, heads * width)), rng.standard_normal((heads * width, places))
    fused = weight @ x
    want = np.zeros((heads * width, places))
    for h in range(heads):
        first = [(3 * h + p if apart is openai.by_head else heads * p + h) * width for p in range(3)]
        q, k, v = (fused[at : at + width] for at in first)
        score = np.exp(q.T @ k / np.sqrt(width))
        want[h * width : (h + 1) * width] = v @ (score / score.sum(1, keepdims=True)).T
    q, k, v = (part @ x for part in apart(weight, heads))
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        score = np.exp(q[own].T @ k[own] / np.sqrt(width))
        np.testing.assert_allclose(v[own] @ (score / score.sum(1, keepdims=True)).T, want[own])
    assert all(np.array_equal(a, b) for a, b in zip(apart(weight[:, 0], heads), apart(weight, heads)[:, :, 0], strict=True))


def test_the_pooling_is_always_in_the_new_order():
    state = {
        "out.2.qkv_proj.weight": np.arange(12.0).reshape(12, 1, 1),
        "middle_block.1.qkv.weight": np.arange(12.0)[:, None, None],
    }
    split = openai.split_qkv(state, FACTS)
    np.testing.assert_array_equal(split["out.2.qkv_proj.weight[k]"].ravel(), [4, 5, 6, 7])
    np.testing.assert_array_equal(split["middle_block.1.qkv.weight[k]"].ravel(), [2, 3, 8, 9])


def refused(said, call, *args, **flags):
    with pytest.raises(InputError) as error:
        call(*args, **flags)
    assert said in str(error.value) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "own.pt is no published file, and no tensor tells --image_size; the published are cifar10_uncond_50M_500K.pt"),
        ({"image_size": 8}, "no tensor tells --steps"),
        ({"image_size": 8, "steps": 1000}, "no tensor tells --schedule"),
        ({"image_size": 8, "steps": 1000, "schedule": "linear"}, "no tensor tells --heads (or --head_channels)"),
        ({"image_size": 8, "steps": 4000, "schedule": "linear", "heads": 2}, "no tensor tells --rescale_timesteps"),
        ({"image_size": 8, "steps": 1000, "schedule": "sqrt", "heads": 2}, "--schedule='sqrt' is unknown; allowed: linear, cosine"),
        ({"image_size": 8, "steps": -1, "schedule": "linear", "heads": 2}, "--steps=-1 is out of range"),
        (
            {"image_size": 7, "steps": 1000, "schedule": "linear", "heads": 2},
            "--image_size=7 is not divisible by 2, as 2 levels need",
        ),
        ({"image_size": 8, "steps": 1000, "schedule": "linear", "heads": 3}, "--heads=3 does not divide the channels"),
        ({"image_size": 8, "steps": 1000, "schedule": "linear", "head_channels": 48}, "--head_channels=48 does not divide"),
        ({"image_size": 8, "heads": 2, "head_channels": 2}, "--heads and --head_channels both say"),
        ({"imagesize": 8}, "--imagesize is unknown; did you mean 'image_size'?; allowed: --image_size, --heads"),
        ({"rescale_timesteps": "yes", "image_size": 8, "steps": 9, "schedule": "linear", "heads": 2}, "it is True or False"),
    ],
)
def test_a_flag_that_is_missing_or_wrong_is_named(tmp_path, flags, said):
    files.write(tmp_path / "own.pt", filled(layout(Spec())))
    refused(said, openai.read, tmp_path / "own.pt", **flags)


def without(name):
    return lambda state: {k: a for k, a in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("input_blocks.1.0.in_layers.2.weight"), "tensor input_blocks.1.0.in_layers.2.weight is missing"),
        (without("middle_block.1.qkv.weight"), "tensor middle_block.1.qkv.weight[q] is missing (and 2 more)"),
        (without("input_blocks.1.0.out_layers.3.weight"), "tensor input_blocks.1.0.out_layers.3.weight is missing"),
        (lambda s: s | {"input_blocks.9.0.x": np.ones(1)}, "tensor input_blocks.9.0.x belongs to nothing"),
        (lambda s: s | {"out.0.weight": np.ones(33)}, "tensor out.0.weight has shape (33,), this architecture's has (32,)"),
        (lambda s: s | {"middle_block.1.qkv.bias": np.ones(97)}, "tensor middle_block.1.qkv.bias has shape (97,), which 2 heads"),
        (lambda s: s | {"out.2.weight": np.ones((5, 32, 3, 3))}, "out.2.weight gives 5 channels of 3; allowed: 3, or twice that"),
        (
            lambda s: s | {"time_embed.0.weight": np.ones(8)},
            "tensor time_embed.0.weight has shape (8,), this architecture's has 2 axes",
        ),
        (lambda s: s | {"time_embed.0.weight": np.ones((8, 33))}, "33 of time_embed.0.weight are not multiples of the first 32"),
    ],
)
def test_a_tensor_that_is_missing_of_nothing_or_misshapen_is_named(change, said):
    refused(said, openai.of, change(filled(layout(Spec()))), FACTS)


def test_what_is_none_of_these_networks_is_refused(tmp_path):
    up = filled(layout(Spec(colours=6, outputs=1)))
    refused("an upsampler, which also needs a small image, is not read", openai.of, up, FACTS)
    judge = layout(Spec(classes=3, outputs=0, updown=True))
    refused("--image_size=16 is none of a classifier", openai.plan, judge, 16)
    refused("only a classifier with attention pooling is read", openai.plan, without("out.2.positional_embedding")(judge), 8)
    files.write(tmp_path / "x.safetensors", {"a": np.ones(2, np.float32)})
    refused("x.safetensors holds none of OpenAI's diffusion models", openai.read, tmp_path / "x.safetensors")
    assert openai.matches(judge) and not openai.matches(["a"])


def test_files_of_half_precision_become_float32_and_the_null_label_zero(tmp_path):
    spec = Spec(classes=4, blocks=1)
    state = filled(layout(spec))
    files.write(tmp_path / "own.pt", {name: a.astype(np.float16) for name, a in state.items()})
    read = openai.read(tmp_path / "own.pt", image_size=8, heads=2, steps=1000, schedule="linear")
    params = read.params["params"]
    assert all(a.dtype == np.float32 for a in jax.tree.leaves(params))
    np.testing.assert_array_equal(params["label"]["embedding"][0], 0)
    np.testing.assert_array_equal(params["label"]["embedding"][1:], state["label_emb.weight"].astype(np.float16).astype(np.float32))
    assert read.config.process.drop_label == 0 and "flags say" in read.notes[0]
