"""Feature networks: their sizes and names, how images are brought to them, what is refused, digests, a classifier's features.

That Inception and DINOv2 say what the published implementations say is in test_reference_inception.py, which needs those.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from test_classifier import saved
from test_unet import count, random_like

import jaxdiff as jd
from jaxdiff import experiment
from jaxdiff.denoiser import network_input
from jaxdiff.errors import InputError
from jaxdiff.evaluation import features
from jaxdiff.interop import mapping
from jaxdiff.models.dino import DINOv2, cubic, places
from jaxdiff.models.inception import Inception, average

GRID, DIM, DEPTH = 3, 64, 2  # of a DINOv2 for tests


def shapes(model, side):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))


@pytest.fixture(scope="module")
def inception():
    return shapes(Inception(), 299)


@pytest.fixture(scope="module")
def dino():
    """A small DINOv2's tensors as Meta names them."""
    made = shapes(DINOv2(DIM, DEPTH, 1, grid=GRID), 42)
    return mapping.save(random_like(made), features.rows(made))


def images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def written(tmp_path, state, name="weights.npz"):
    np.savez(tmp_path / name, **state)
    return tmp_path / name


def refused(call, *parts):
    """The one line that `call` is refused with, which names all `parts`."""
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), error.value


# The networks.


def test_inception_has_the_tensors_of_the_published_file(inception):
    """pytorch-fid's: 94 convolutions with batch normalisation, 1008 logits; 95,628,359 bytes, of which 87 kB are names."""
    rows = {row.theirs: row.ours for row in features.rows(inception)}
    assert len(rows) == 94 * 5 + 2 and count(inception) == 23_885_392
    assert rows["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == "Mixed_7c/branch3x3dbl_3b/bn/var"
    assert rows["Conv2d_1a_3x3.conv.weight"] == "Conv2d_1a_3x3/conv/kernel" and rows["fc.weight"] == "fc/kernel"
    wide = inception["params"]["Mixed_6d"]["branch7x7dbl_5"]["conv"]["kernel"]
    assert wide.shape == (1, 7, 160, 192)
    out = jax.eval_shape(Inception().apply, inception, jnp.zeros((2, 299, 299, 3)))
    assert {name: a.shape for name, a in out.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 7 * 17 * 17),
        "logits": (2, 1008),
        "logits_unbiased": (2, 1008),
    }


def test_average_pools_do_not_count_what_is_not_there():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    want = [[2, 2.5, 3], [3.5, 4, 4.5], [5, 5.5, 6]]  # of 4, 6 or 9 neighbours
    np.testing.assert_allclose(average(x)[0, ..., 0], want, rtol=1e-6)


@pytest.mark.parametrize("dim, depth, published", [(384, 12, 22_056_576), (768, 12, 86_580_480), (1024, 24, 304_368_640)])
def test_dinov2_has_the_published_parameters(dim, depth, published):
    """Meta's S, B and L of 22, 87 and 304 million, of which the mask token is not needed."""
    made = shapes(DINOv2(dim, depth, dim // 64), 224)
    each = 12 * dim**2 + 15 * dim  # qkv, proj, fc1, fc2; two norms, two scales
    by_hand = depth * each + (3 * 14**2 + 1) * dim + (37**2 + 1) * dim + dim + 2 * dim
    assert count(made) == by_hand == published - dim


def test_places_between_the_learned_ones():
    """Keys's cubic of a = -0.75 half-way between two points, and what the published rounding guard does to the step."""
    np.testing.assert_allclose(cubic(4, 1, 1 / 4)[0], [-0.09375, 0.59375, 0.59375, -0.09375])
    np.testing.assert_allclose(cubic(5, 5, 1.0), np.eye(5), atol=1e-15)
    guarded = cubic(37, 16, 16.1 / 37)
    np.testing.assert_allclose(guarded.sum(1), 1)
    assert np.abs(guarded - cubic(37, 16, 16 / 37)).max() > 0.1
    np.testing.assert_allclose(cubic(2, 4, 2.0)[0], cubic(2, 4, 2.0)[3][::-1])  # the borders go on
    learned = jnp.asarray(np.random.default_rng(0).standard_normal((37, 37, 2)), jnp.float32)
    assert places(learned, (37, 37)) is learned
    want = np.stack([guarded @ np.asarray(learned[..., i], np.float64) @ cubic(37, 18, 18.1 / 37).T for i in range(2)], -1)
    np.testing.assert_allclose(places(learned, (16, 18)), want, atol=1e-5)


# How images are brought to them.


@pytest.mark.parametrize("n", [2, 32, 120])
def test_a_ramp_stays_a_ramp_at_the_positions_that_each_resize_has(n):
    step = 255 // n
    ramp = (step * np.arange(n, dtype=np.uint8))[None, :, None, None]
    rows, columns = np.broadcast_to(ramp, (1, n, 5, 1)), np.broadcast_to(ramp.swapaxes(1, 2), (1, 7, n, 1))
    centres = ((np.arange(299) + 0.5) * n / 299 - 0.5).clip(0, n - 1)
    corners = (np.arange(299) * n / 299).clip(0, n - 1)
    for image, axis in ((rows, 1), (columns, 2)):
        for resize, want in (
            (features.resize_pytorch, step * centres / 127.5 - 1),
            (features.resize_tensorflow, (step * corners - 128) / 128),
        ):
            got = np.asarray(resize(jnp.asarray(image)))
            assert got.shape == (1, 299, 299, 1) and got.dtype == np.float32
            want = np.broadcast_to(np.expand_dims(want, (0, 3 - axis, 3)), got.shape)
            np.testing.assert_allclose(got, want, atol=2e-6)


def test_an_image_of_the_right_size_is_only_scaled():
    x = images(2, 299, 299, 3)
    np.testing.assert_allclose(features.resize_pytorch(jnp.asarray(x)), x / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(features.resize_tensorflow(jnp.asarray(x)), (x.astype(np.float32) - 128) / 128)


def test_smaller_by_two_is_every_second_pixel_for_tensorflow_and_the_mean_of_two_for_pytorch():
    x = images(1, 598, 598, 1).astype(np.float64)
    np.testing.assert_allclose(features.resize_tensorflow(jnp.asarray(x)), (x[:, ::2, ::2] - 128) / 128, atol=1e-6)
    mean = x.reshape(1, 299, 2, 299, 2, 1).mean((2, 4))
    np.testing.assert_allclose(features.resize_pytorch(jnp.asarray(x)), mean / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (224, 60), (301, 518)])
def test_dinov2_sees_what_pillow_makes(size):
    x = images(2, *size, 3)
    bicubic = [np.asarray(Image.fromarray(each).resize((224, 224), Image.Resampling.BICUBIC)) for each in x]
    got = np.asarray(features.resize_pillow(jnp.asarray(x))) * features.IMAGENET_STD + features.IMAGENET_MEAN
    off = np.abs(np.round(got * 255) - np.stack(bicubic))
    assert off.max() <= 1 and (off > 0).mean() < 1e-3, (off.max(), (off > 0).mean())  # Pillow's weights have 22 bits


# Whole networks from files, and what is refused.


def test_dinov2_from_a_file_of_either_layout(tmp_path, dino):
    made = features.dinov2(written(tmp_path, dino | {"mask_token": np.zeros((1, DIM))}))
    grey, sizes = images(3, 20, 30, 1), jnp.asarray(images(2, 16, 16, 3))
    out = made.apply(grey)["pool"]
    assert made.name == "dinov2_vit64" and out.shape == (3, DIM) and out.dtype == jnp.float32
    np.testing.assert_allclose(made.apply(np.repeat(grey, 3, axis=-1))["pool"], out, atol=1e-6)
    np.testing.assert_allclose(made.apply(grey[[2, 0, 1]])["pool"], out[jnp.asarray([2, 0, 1])], atol=1e-5)
    theirs = {}
    for name, a in dino.items():
        for new, old in (("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("blocks.", "encoder.layer.")):
            name = name.replace(new, old)
        name = name.replace("pos_embed", "embeddings.position_embeddings").replace("cls_token", "embeddings.cls_token")
        name = name.replace("attn.proj", "attention.output.dense").replace("attn.qkv", "attention.attention.{}")
        name = name.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")
        name = name.replace("norm.", "layernorm.") if name.startswith("norm.") else name
        parts = ("query", "key", "value") if "{}" in name else ("",)
        theirs |= {name.format(part): each for part, each in zip(parts, np.split(a, len(parts)))}
    other = features.dinov2(written(tmp_path, theirs, "theirs.npz"))
    assert other.digest == made.digest
    np.testing.assert_array_equal(other.apply(sizes)["pool"], made.apply(sizes)["pool"])


def test_a_program_is_compiled_once_for_each_shape_and_shared(tmp_path, dino):
    jax.clear_caches()
    path = written(tmp_path, dino)
    for made in (features.dinov2(path), features.dinov2(path)):
        for size in (8, 9, 8):
            made.apply(images(2, size, size, 3))
    assert features._run.jitted()._cache_size() == 1


def test_the_digest_is_of_the_weights_and_the_resize(tmp_path, dino):
    path = written(tmp_path, dino)
    made = features.dinov2(path)
    assert len(made.digest) == 64 and features.dinov2(path).digest == made.digest
    changed = dino | {"norm.bias": np.nextafter(dino["norm.bias"], np.float32(9))}
    others = [features.dinov2(written(tmp_path, changed, "b.npz")), features.dinov2(path, features.resize_pytorch)]
    assert len({made.digest, *(each.digest for each in others)}) == 3


def test_images_of_another_kind_are_refused(tmp_path, dino):
    made = features.dinov2(written(tmp_path, dino))
    refused(lambda: made.apply(np.zeros((2, 8, 8, 3), np.float32)), "float32", "uint8")
    refused(lambda: made.apply(images(2, 8, 8, 4)), "[8, 8, 4]", "[H, W, 1] or [H, W, 3]")
    refused(lambda: made.apply(images(8, 8, 3)), "[8, 3]", "[H, W, 1] or [H, W, 3]")
    refused(lambda: made.apply([[0]]), "list")


@pytest.mark.parametrize("load, wanted", [(features.inception, features.INCEPTION), (features.dinov2, features.DINOV2)])
def test_without_weights_a_line_says_where_they_are(tmp_path, load, wanted):
    every = (wanted.file, wanted.digest, wanted.address, wanted.flag)
    refused(lambda: load(None), "no file is given", *every)
    refused(lambda: load(tmp_path / "gone.pth"), f"{tmp_path / 'gone.pth'} is not there", *every)
    assert wanted.file.endswith(".pth") and len(wanted.digest) == 64
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut short")
    refused(lambda: load(tmp_path / "cut.pth"), "cut.pth")


def test_tensors_that_are_missing_too_many_or_misshapen_are_named(tmp_path, dino, inception, monkeypatch):
    def without(name):
        return {key: a for key, a in dino.items() if key != name}

    for state, parts in (
        (without("blocks.1.ls2.gamma"), ["blocks.1.ls2.gamma", "missing"]),
        (without("pos_embed"), ["pos_embed", "missing"]),
        (dino | {"register_tokens": np.zeros((1, 4, DIM))}, ["register_tokens"]),
        (dino | {"norm.weight": np.zeros(DIM + 1)}, ["norm.weight", "(65,)", "(64,)"]),
        (dino | {"pos_embed": np.zeros((1, 9, DIM))}, ["pos_embed", "(1, 9, 64)"]),
        (dino | {"encoder.layer.0.attention.attention.query.bias": np.zeros(4)}, ["attention.attention.key.bias", "missing"]),
    ):
        refused(lambda state=state: features.dinov2(written(tmp_path, state)), str(tmp_path / "weights.npz"), *parts)

    empty = {row.theirs: a for row, a in zip(features.rows(inception), _as_theirs(inception), strict=True)}
    unused = {"AuxLogits.fc.bias": np.zeros(3), "Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros(())}
    path = written(tmp_path, {})
    of = iter(
        [
            empty | unused,
            empty,
            {key: a for key, a in empty.items() if key != "Mixed_6a.branch3x3.bn.running_mean"},
            empty | {"fc.weight": np.zeros((1000, 2048)), "fc.bias": np.zeros(1000)},
        ]
    )
    monkeypatch.setattr(features.files, "read", lambda path: next(of))
    made, other = features.inception(path), features.inception(path, features.resize_tensorflow)
    assert (made.name, other.name) == ("inception", "inception, resize_tensorflow") and made.digest != other.digest
    refused(lambda: features.inception(path), "Mixed_6a.branch3x3.bn.running_mean", "missing", "weights.npz")
    refused(lambda: features.inception(path), "fc.", "1000", "1008")  # of today's libraries


def _as_theirs(inception):
    """Zeros in the shapes of the published file."""
    rows = features.rows(inception)
    return [row.layout.save(np.zeros(a.shape, np.float32)) for row, a in zip(rows, jax.tree.leaves(inception), strict=True)]


# A classifier's.


def test_a_classifiers_features_are_what_its_logits_are_made_of(tmp_path):
    saved(tmp_path, c := tiny.classifier())
    made, trained = features.classifier(tmp_path), jd.load_classifier(tmp_path)
    x = images(5, 8, 8, 1)
    out = made.apply(x)
    last = trained.params["params"]["logits"]
    np.testing.assert_allclose(out["pool"] @ last["kernel"] + last["bias"][None], out["logits"], atol=1e-5)
    assert out["pool"].shape == (5, 8) and out["pool"].dtype == jnp.float32 and out["pool"].std(0).min() > 1e-3
    level = jd.schedules.cosine(jnp.float32(0.001))  # where tiny's draw begins
    x0 = trained.codec.encode(jax.random.key(0), x)
    net = experiment.build(c).net(trained.params, None)
    np.testing.assert_allclose(out["logits"], jax.jit(lambda x: net(*network_input(x, level))[0])(level.alpha * x0), atol=1e-5)
    refused(lambda: made.apply(images(5, 8, 8, 3)), "[8, 8, 3]", "[8, 8, 1]")
    refused(lambda: made.apply(x.astype(np.float32)), "float32")


def test_a_classifiers_digest_is_of_its_weights_and_of_how_it_sees(tmp_path):
    changes = [{}, {"data.codec": "centred"}, {"process.draw": "draw_uniform(0.01, 0.999)"}]
    for i, each in enumerate(changes):
        saved(tmp_path / str(i), tiny.classifier(**each))
    digests = [features.classifier(tmp_path / str(i)).digest for i in range(len(changes))]
    assert len(set(digests)) == len(changes) and features.classifier(tmp_path / "0").digest == digests[0]


def test_a_model_that_draws_has_no_features(tmp_path):
    saved(tmp_path, tiny.config())
    refused(lambda: features.classifier(tmp_path), "no classifier")


def test_a_file_that_is_not_the_published_one_is_told(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert features.doubt(tmp_path / "w.pth", features.INCEPTION._replace(digest=digest)) == ""
    told = features.doubt(tmp_path / "w.pth", features.INCEPTION)
    assert f"is not pt_inception-2015-12-05-6726825d.pth itself (SHA-256 {digest[:12]}, not 6726825d0af5)" in told
