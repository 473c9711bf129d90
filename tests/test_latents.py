"""A data set's latents: encoded once, kept in parts, resumed after a stop, and the same to training as the images are."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import InputError, codec, data, first_stage, models
from jaxdiff.data import latents

ROOT = Path(__file__).parent.parent
SMALL = {
    "channels": 4,
    "multipliers": (1, 2),
    "blocks": 1,
    "latent_channels": 2,
    "out_channels": 1,
    "middle_attend": models.NoAttention,
}


def parameters(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) * 0.3, a.dtype), shapes)


def made(kind, digest="one", **settings):
    model = kind(**SMALL, **({"codes": 16, "code_channels": 3} if kind is models.AutoencoderVQ else {}))
    return first_stage.codec_of(model, parameters(model), codec.pixels(), digest=digest, pixels="pixels", **settings)


@pytest.fixture(scope="module")
def kl():
    return made(models.AutoencoderKL)


@pytest.fixture(scope="module")
def vq():
    return made(models.AutoencoderVQ)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(latents, "_ROWS", 16)


def some(n=50, name="toy"):
    images = np.random.default_rng(1).integers(0, 256, (n, 8, 8, 1)).astype(np.uint8)
    return data.Dataset(images, np.arange(n, dtype=np.int32) % 7, (), name)


def counting(made, seen, fails_at=None):
    """The codec, which notes each image that it encodes, and may fail at one."""

    def note(images):
        if fails_at is not None and len(seen) >= fails_at:
            raise KeyboardInterrupt
        seen.extend(np.asarray(images).reshape(len(images), -1)[:, :4].tolist())

    # Outside of jit, so that what is called is what is counted.
    def look(images):
        if not isinstance(images, jax.core.Tracer):
            note(images)
        return made.stage.look(images)

    return made._replace(stage=made.stage._replace(look=look))


@pytest.fixture
def unjitted(monkeypatch):
    """Encoding without a jit around the encoder's own, so that a test can count."""

    def seen(look, images, flip):
        sides = (images, images[:, :, ::-1]) if flip else (images,)
        return jnp.stack([look(side) for side in sides], axis=1).astype(jnp.float16)

    monkeypatch.setattr(latents, "_seen", seen)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_latents_are_what_the_encoder_says_of_every_image(kind, flip, request, small_parts, tmp_path, capsys):
    made, dataset = request.getfixturevalue(kind), some()
    got = latents.cached(dataset, made, flip, 12, cache_dir=tmp_path)
    assert [len(part) for part in got.parts] == [16, 16, 16, 2] and got.posterior == (kind == "kl")
    assert all(isinstance(part, np.memmap) and part.dtype == np.float16 for part in got.parts)
    want = made.stage.look(jnp.asarray(dataset.images))
    mirrored = made.stage.look(jnp.asarray(dataset.images[:, :, ::-1]))
    assert want.shape == (50, 4, 4, 4 if kind == "kl" else 3)
    all_of = np.concatenate(got.parts)
    for i, side in enumerate([want, mirrored][: 1 + flip]):
        np.testing.assert_allclose(all_of[:, i], side, rtol=2e-3, atol=2e-3)
    err = capsys.readouterr().err
    assert "encoding toy" in err and "50/50" in err
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert folder.name.startswith("toy-latents-") and str(folder) == got.folder


def test_a_stopped_encoding_goes_on_and_encodes_nothing_twice(kl, unjitted, small_parts, tmp_path):
    dataset, seen, once = some(48), [], []
    whole = latents.cached(dataset, counting(kl, once), True, 8, tmp_path / "whole")
    assert len(once) == 96  # each image and its mirror
    with pytest.raises(KeyboardInterrupt):
        latents.cached(dataset, counting(kl, seen, 70), True, 8, tmp_path / "parts")
    first = len(seen)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["meta.json", "part-00000.npy", "part-00001.npy"]
    went_on = []
    latents.cached(dataset, counting(kl, went_on), True, 8, tmp_path / "parts")
    # The third part was begun: of its 16 images those that were lost come again, no other.
    assert 64 <= first <= 80 and len(went_on) == 96 - 64
    assert bytes_of(tmp_path / "parts") == bytes_of(whole.folder)
    again = []
    latents.cached(dataset, counting(kl, again), True, 8, tmp_path / "parts")
    assert not again


def test_a_part_that_was_cut_short_is_encoded_again(kl, small_parts, tmp_path):
    dataset = some()
    whole = bytes_of(latents.cached(dataset, kl, False, 8, tmp_path / "x").folder)
    (tmp_path / "x" / "part-00001.npy").write_bytes(whole["part-00001.npy"][:-9])
    (tmp_path / "x" / "part-00002.npy.0123.partial").write_bytes(b"")  # what a killed process left
    assert bytes_of(latents.cached(dataset, kl, False, 8, tmp_path / "x").folder) == whole


def test_another_codec_other_data_or_flips_are_told_in_one_line(kl, tmp_path):
    dataset, folder = some(), tmp_path / "x"
    latents.cached(dataset, kl, False, 8, folder)
    other = dataset._replace(images=dataset.images ^ 1)
    digests = [latents.facts(d, kl, False)["images"][:16] for d in (dataset, other)]
    for arguments, text in (
        ((dataset, made(models.AutoencoderKL, "two"), False), "of another codec: codec digest one, and here it is two"),
        ((other, kl, False), f"of other images: images digest {digests[0]}, and here it is {digests[1]}"),
        ((dataset, kl, True), r"of another shape: shape \[50, 1, 4, 4, 4\], and here it is \[50, 2, 4, 4, 4\]"),
    ):
        with pytest.raises(InputError, match=text) as caught:
            latents.cached(*arguments, 8, folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    # Where no folder is named each has its own.
    for arguments in ((dataset, kl), (other, kl), (dataset, made(models.AutoencoderKL, "two"))):
        latents.cached(*arguments, False, 8, cache_dir=tmp_path / "caches")
    assert len([path for path in (tmp_path / "caches").iterdir() if path.is_dir()]) == 3


def test_a_folder_of_something_else_is_refused(kl, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files, and no meta\.json"):
        latents.cached(some(), kl, False, 8, tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(InputError, match="is damaged; remove the folder"):
        latents.cached(some(), kl, False, 8, tmp_path)
    with pytest.raises(InputError, match="cannot write latents in"):
        latents.cached(some(), kl, False, 8, tmp_path / "notes.txt" / "x")


def test_what_float16_cannot_hold_is_told(kl, tmp_path):
    large = kl._replace(stage=kl.stage._replace(look=jax.tree_util.Partial(lambda x: 1e6 * kl.stage.look(x))))
    with pytest.raises(InputError, match="says of image 0 what is no finite number of float16"):
        latents.cached(some(), large, False, 8, tmp_path / "x")


def test_batches_are_the_data_sets_and_a_function_of_the_step(kl, small_parts, tmp_path):
    dataset = some()
    stored = latents.cached(dataset, kl, True, 8, tmp_path / "x")
    everything = np.concatenate(stored.parts)
    known = {image.tobytes(): i for i, image in enumerate(dataset.images)}
    for step in (0, 3, 7):  # within an epoch, and across two
        batch, of_images = latents.batch_at(stored, 5, step, 12), data.batch_at(dataset, 5, step, 12)
        rows = [known[image.tobytes()] for image in of_images["image"]]
        np.testing.assert_array_equal(batch["latent"], everything[rows])
        np.testing.assert_array_equal(batch["label"], of_images["label"])
        halves = [latents.batch_at(stored, 5, step, 12, i, 2)["latent"] for i in range(2)]
        np.testing.assert_array_equal(np.concatenate(halves), batch["latent"])


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_statistics_are_those_of_draws(kind, request, small_parts, tmp_path):
    made = request.getfixturevalue(kind)
    stored = latents.cached(some(), made, True, 8, tmp_path / "x")
    mean, std = latents.statistics(stored)
    assert mean.dtype == std.dtype == np.float64
    seen = jnp.asarray(np.concatenate(stored.parts)).reshape(100, 4, 4, -1)
    draws = jax.vmap(lambda key: made.stage.draw(key, seen))(jax.random.split(jax.random.key(0), 400))
    z = np.asarray(draws, np.float64).reshape(-1, draws.shape[-1])
    error = z.std(0) / (len(z) / 100) ** 0.5  # draws of one image are no independent sample of what varies between images
    np.testing.assert_array_less(np.abs(z.mean(0) - mean), 5 * error + 1e-6)
    np.testing.assert_allclose(z.std(0), std, rtol=5e-3)
    if kind == "vq":  # nothing is drawn: to rounding
        np.testing.assert_allclose(z.mean(0), mean, rtol=1e-6)
        np.testing.assert_allclose(z.std(0), std, rtol=1e-6)


@pytest.mark.slow
def test_two_processes_share_one_folder(tmp_path):
    """Both come to the same latents, one of them waiting for the other."""
    script = """
        import sys
        import numpy as np
        sys.path.insert(0, "tests")
        from test_latents import latents, made, models, some
        latents._ROWS = 16
        got = latents.cached(some(200), made(models.AutoencoderKL), True, 8, sys.argv[1])
        print(sum(float(np.abs(part.astype(np.float64)).sum()) for part in got.parts))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "x")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    processes = [subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for _ in range(2)]  # fmt: skip
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert told[0][0] == told[1][0] and float(told[0][0]) > 0
    meta = json.loads((tmp_path / "x" / "meta.json").read_text())
    assert meta["shape"] == [200, 2, 4, 4, 4] and not list((tmp_path / "x").glob("*.partial"))


def test_blank_latents_have_the_shapes_and_take_no_room(kl):
    stored = latents.blank(some(), kl, True)
    batch = latents.batch_at(stored, 0, 0, 8)
    assert batch["latent"].shape == (8, 2, 4, 4, 4) and batch["latent"].dtype == np.float16
    many = latents.blank(data.Dataset(np.broadcast_to(np.uint8(0), (10**9, 8, 8, 1)), np.zeros(8, np.int32), (), ""), kl, True)
    assert many.parts[0].nbytes > 2**36  # more than there is
    assert latents.batch_at(many, 0, 0, 8)["latent"].shape == (8, 2, 4, 4, 4)
