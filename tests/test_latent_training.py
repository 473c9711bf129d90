"""From an autoencoder's workdir to a trained diffusion of its latents: what is prepared, measured, kept and refused."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import jaxdiff as jd
from jaxdiff import InputError, codebook, codec, data, experiment, first_stage, models, shards, training
from jaxdiff.data import latents
from jaxdiff.training import checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent))

import train

FIELDS = dict(channels=8, multipliers=(1, 2), blocks=1, latent_channels=2, out_channels=1, middle_attend="NoAttention")
KINDS = {"kl": ("AutoencoderKL", {}), "vq": ("AutoencoderVQ", {"codes": 16, "code_channels": 3})}


def random(shapes, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(scale * rng.standard_normal(a.shape), a.dtype), shapes)


def first(kind, size=8, **fields):
    """What an autoencoder's workdir says, and its model."""
    name, more = KINDS[kind]
    model = dict(name=name, **FIELDS | more | fields)
    process = dict(loss="l2", discriminator="patch(weight=0.5)")
    c = ConfigDict(
        dict(
            data=dict(shape=(size, size, 1), codec="pixels"),
            model=model,
            process=process,
            training=dict(ema=(0.0, 0.5)),
            sampling=dict(ema=0.0),
        )
    )
    return c, models.build(c.model)


def params_of(model, seed=0):
    return random(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1))), seed)


def write(folder, config, averages):
    folder.mkdir(parents=True)
    with checkpoint.imported(folder) as checkpoints:
        checkpoint.save_snapshot(checkpoints, 0, averages, config)


@pytest.fixture(scope="module", params=["kl", "vq"])
def stage(request, tmp_path_factory):
    """The kind of an autoencoder, its model, its parameters and its workdir, without a scale."""
    config, model = first(request.param)
    params = params_of(model)
    where = tmp_path_factory.mktemp(request.param) / "first"
    # The second average is of other values, and both have a discriminator beside, which a codec knows nothing of.
    beside = {"discriminator": {"conv": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}}
    write(where, config, {"0.0": params | beside, "0.5": jax.tree.map(lambda a: a + 1, params) | beside})
    return request.param, model, params, where


def of(stage, **changes):
    text = f"autoencoder({str(stage[3])!r})"
    start = {"data.codec": text, "sampling.clip": False, "training.ema": (0.5,), "sampling.ema": 0.5}
    return tiny.config(**start | {"steps": 2, "batch_size": 4, "sampling.num": 2, "sampling.batch_size": 50} | changes)


def uint8(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.uint8)


def test_the_codec_is_the_named_average_without_its_discriminator(stage):
    kind, model, params, where = stage
    loaded = jd.load_codec(where)
    assert loaded.stage.digest == shards.digest({"params": params["params"]}) and not loaded.stage.scaled
    plain = first_stage.codec_of(model, params, codec.pixels())
    x = uint8(2, 8, 8, 1)
    z = loaded.encode(jax.random.key(1), x)
    np.testing.assert_array_equal(z, plain.encode(jax.random.key(1), x))
    assert z.shape == (2, 4, 4, 2 if kind == "kl" else 3)
    assert len(jax.tree.leaves(loaded.stage.look)) == len(jax.tree.leaves(params))


def test_measured_latents_are_shifted_and_divided_channel_by_channel(stage):
    _, model, params, where = stage
    plain = jd.load_codec(where)
    x = uint8(3, 8, 8, 1)
    z = plain.encode(jax.random.key(1), x)
    channels = z.shape[-1]
    mean, std = np.linspace(-1, 2, channels), np.linspace(0.5, 3, channels)
    scaled = jd.load_codec(where, mean=tuple(mean), std=tuple(std))
    got = scaled.encode(jax.random.key(1), x)
    np.testing.assert_allclose(got, (z - mean[None, None, None]) / std[None, None, None], rtol=1e-5, atol=1e-5)
    assert scaled.stage.scaled
    assert np.abs(np.asarray(scaled.decode(got), int) - np.asarray(plain.decode(z), int)).max() <= 1
    doubled = first_stage.codec_of(model, params, codec.pixels(), 2.0)
    np.testing.assert_allclose(doubled.stage.draw(jax.random.key(1), plain.stage.look(x)), 2 * z, rtol=1e-6)
    for wrong, text in (
        ({"mean": (0.0,)}, "mean and std go together"),
        ({"mean": (0.0,) * channels, "std": (1.0,) * channels, "scale": 1.0}, "without a scale"),
        ({"mean": (0.0,) * 5, "std": (1.0,) * 5}, f"are {channels} numbers each, one a channel of the latent, got 5 and 5"),
        ({"mean": (0.0,) * channels, "std": (0.0,) * channels}, r"std=0\.0 is not a finite number above 0"),
        ({"tile": -1}, "tile=-1 is not a whole number"),
    ):
        with pytest.raises(ValueError, match=text):
            first_stage.codec_of(model, params, codec.pixels(), **wrong)


def test_a_vq_codec_decodes_the_nearest_codes(stage):
    kind, model, params, where = stage
    z = jnp.asarray(np.random.default_rng(3).standard_normal((2, 4, 4, 3 if kind == "vq" else 2)), jnp.float32)
    codes = codebook.quantise(params["params"]["codebook"], z)[0] if kind == "vq" else z
    want = codec.pixels().decode(model.apply(params, codes, method="decode"))
    got = jd.load_codec(where).decode(z)
    assert np.abs(np.asarray(got, int) - np.asarray(want, int)).max() <= 1
    if kind == "vq":
        unquantised = codec.pixels().decode(model.apply(params, z, method="decode"))
        assert np.abs(np.asarray(unquantised, int) - np.asarray(want, int)).max() > 1


def test_large_latents_are_decoded_in_tiles(stage):
    kind, *_, where = stage
    z = jnp.asarray(np.random.default_rng(3).standard_normal((1, 12, 5, 3 if kind == "vq" else 2)), jnp.float32)
    tiled = jd.load_codec(where, tile=8)
    assert tiled.decode(z).shape == (1, 24, 10, 1)
    small = z[:, :8]
    np.testing.assert_array_equal(tiled.decode(small), jd.load_codec(where).decode(small))
    assert first_stage.facts(tiled) != first_stage.facts(jd.load_codec(where))


def test_latents_and_images_prepare_the_same(stage, tmp_path):
    """The same key gives the same flip, the same draw, the same noise, times and labels: to float16."""
    built = experiment.build(of(stage, **{"data.flip": True}))
    of_images, of_latents = (jax.jit(lambda key, batch: built.prepare((), key, batch)) for _ in range(2))
    digits = data.load("digits")._replace(name="toy")
    dataset = digits._replace(images=digits.images[:40], labels=digits.labels[:40])
    stored = latents.cached(dataset, built.codec, True, 40, tmp_path / "x")
    for step in range(3):
        key = jax.random.key(step)
        a = of_images(key, data.batch_at(dataset, 0, step, 16))
        b = of_latents(key, latents.batch_at(stored, 0, step, 16))
        assert a.keys() == b.keys()
        np.testing.assert_allclose(b["x0"], a["x0"], atol=3e-3 * float(jnp.abs(a["x0"]).max()))
        for name in ("eps", "t"):
            np.testing.assert_array_equal(a[name], b[name])
        np.testing.assert_array_equal(a["cond"]["label"], b["cond"]["label"])
    # The two sides differ by more than rounding, so the choice matters.
    sides = np.concatenate(stored.parts)
    assert np.abs(np.float32(sides[:, 0]) - np.float32(sides[:, 1])).max() > 0.1


def constants(function, *arguments):
    return sum(np.asarray(a).nbytes for a in jax.make_jaxpr(function)(*arguments).consts)


def test_the_first_stage_is_no_constant_of_the_train_step(stage):
    c = of(stage)
    built = experiment.build(c)
    optimizer = training.make_optimizer(c.optimizer)
    step = training.make_step(built, optimizer)
    state = jax.eval_shape(lambda key: training.init_state(built, optimizer, c.training.ema, key), jax.random.key(0))
    dataset = data.load("digits")
    kept = np.zeros((4, *latents.shape(built.codec, built.shape, False)), np.float16)
    of_latents = {"latent": kept, "label": dataset.labels[:4]}
    size = sum(a.nbytes for a in jax.tree.leaves(built.codec.stage.look))
    assert size > 20_000
    with_latents = jax.jit(step).lower(jax.random.key(0), state, of_latents).as_text()
    with_images = jax.jit(step).lower(jax.random.key(0), state, data.batch_at(dataset, 0, 0, 4)).as_text()
    # Written out as text, each byte of a constant takes two characters.
    assert len(with_images) - len(with_latents) > size
    assert constants(step, jax.random.key(0), state, of_latents) < 1000


@pytest.fixture
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "jaxdiff"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vq"], indirect=True)
def test_training_measures_keeps_and_goes_on(stage, caches, tmp_path, capsys):
    c = of(stage, **{"data.flip": True})
    train.train(c.copy_and_resolve_references(), tmp_path / "run")
    told = capsys.readouterr()
    assert "encoding digits" in told.err and "latents (2, 4, 4," in told.out
    _, kept, _ = checkpoint.restore_meta(tmp_path / "run")
    loaded = first_stage.of_config(kept.data.codec)
    assert f"digest='{loaded.stage.digest}'" in kept.data.codec and loaded.stage.scaled
    # What was measured brings the latents of the data to zero mean and unit deviation.
    dataset = data.load("digits")
    images = jnp.concatenate([dataset.images, dataset.images[:, :, ::-1]])
    z = np.asarray(loaded.encode(jax.random.key(0), images))
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(z.std((0, 1, 2)), 1, atol=0.02)
    # It goes on with the command it was begun with, encodes and measures nothing, and keeps the numbers though the cache is gone.
    shutil.rmtree(caches)
    c.steps = 3
    train.train(c.copy_and_resolve_references(), tmp_path / "run")
    assert "going on from step 2" in capsys.readouterr().out
    step, again, _ = checkpoint.restore_meta(tmp_path / "run")
    assert step == 3 and again.data.codec == kept.data.codec
    run = jd.load(tmp_path / "run")
    assert run.generate(jax.random.key(0), 2, steps=2, label=1).shape == (2, 8, 8, 1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3] and all(np.isfinite(row["loss"]) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["kl"], indirect=True)
def test_samples_of_another_first_stage_are_refused(stage, caches, tmp_path):
    kind, model, params, where = stage
    moved = shutil.copytree(where, tmp_path / "first")
    c = of(stage, **{"data.codec": f"autoencoder({str(moved)!r})"})
    train.train(c.copy_and_resolve_references(), tmp_path / "run")
    was = shards.digest({"params": params["params"]})
    config, _ = first(kind)
    other = params_of(model, seed=5)
    now = shards.digest({"params": other["params"]})
    shutil.rmtree(moved)
    write(moved, config, {"0.0": other, "0.5": other})
    said = f"the autoencoder in .* has the digest {now[:16]}, and this run was trained with one of digest {was[:16]}"
    c.steps = 3
    for call in (lambda: jd.load(tmp_path / "run"), lambda: train.train(c.copy_and_resolve_references(), tmp_path / "run")):
        with pytest.raises(InputError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_samples_on_devices_in_another_order_are_decoded():
    """As on a TPU, where JAX orders the devices of a mesh by its shape."""
    script = """
        import jax, numpy as np
        from jax.sharding import AxisType, Mesh
        from test_latents import codec, first_stage, models, parameters, SMALL
        from jaxdiff import mesh as meshes
        devices, kind = np.array(jax.devices()), {"axis_types": (AxisType.Auto,) * 2}
        loaded = Mesh(devices.reshape(4, 1), meshes.AXES, **kind)
        trained = Mesh(devices[[0, 1, 3, 2]].reshape(1, 4), meshes.AXES, **kind)
        model = models.AutoencoderKL(**SMALL)
        params = parameters(model)
        want = first_stage.codec_of(model, params, codec.pixels())
        made = first_stage.codec_of(model, jax.device_put(params, meshes.replicated(loaded)), codec.pixels())
        z = np.random.default_rng(0).standard_normal((4, 4, 4, 2)).astype(np.float32)
        there = jax.device_put(z, meshes.split(trained))
        try:
            made.decode(there)
        except ValueError as error:
            assert "incompatible devices" in str(error), error
        else:
            raise SystemExit("nothing to put right")
        got = first_stage.on(made, trained).decode(there)
        assert np.abs(np.asarray(got, int) - np.asarray(want.decode(z), int)).max() <= 1
        assert first_stage.on(made, loaded) is made
    """
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "NPROC": "16"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_what_is_measured_is_written_into_the_codecs_text(stage):
    _, _, _, where = stage
    text = f"autoencoder({str(where)!r}, tile=64)"
    built = first_stage.of_config(text)
    assert first_stage.measures(text, built) and first_stage.provisional(text) == text
    channels = len(built.encode(jax.random.key(0), uint8(1, 8, 8, 1))[0, 0, 0])
    written = first_stage.measured(text, built, (np.arange(channels) / 3, 1 + np.arange(channels) / 7))
    again = first_stage.of_config(written)
    assert again.stage.scaled and not first_stage.measures(written, again) and again.stage.tile == 64
    assert first_stage.measured(written, again, None) == written
    assert first_stage.kept(text, written) == written
    assert first_stage.kept(text, written.replace("tile=64", "tile=32")) == text
    assert first_stage.kept(f"autoencoder({str(where)!r}, tile=64, digest='x')", written).endswith("digest='x')")
    moved = first_stage.found(written, "/nowhere")
    assert moved == written
    # What the config says itself is gone on with too, the digest written beside it; other numbers are another codec.
    said = f"autoencoder({str(where)!r}, mean={(0.5,) * channels}, std={(2.0,) * channels})"
    begun = first_stage.measured(said, first_stage.of_config(said), None)
    assert begun != said and first_stage.kept(said, begun) == begun
    assert first_stage.kept(said.replace("0.5", "0.25"), begun) == said.replace("0.5", "0.25")
    assert first_stage.kept("pixels", begun) == "pixels" and first_stage.kept(said, "pixels") == said


def test_an_autoencoder_trained_anew_to_the_same_step_is_read_anew(stage, tmp_path):
    kind, model, _, _ = stage
    where, config, found = tmp_path / "first", first(kind)[0], []
    for seed in (0, 5):
        shutil.rmtree(where, ignore_errors=True)
        write(where, config, {"0.0": params_of(model, seed)})
        found.append(first_stage.autoencoder(str(where)))
    assert found[0].stage.digest != found[1].stage.digest
    assert first_stage.autoencoder(str(where)) is found[1]


def test_training_finds_a_first_stage_inside_the_workdir_as_loading_does(stage, tmp_path):
    shutil.copytree(stage[3], tmp_path / "run" / "first")
    c = of(stage, **{"data.codec": "autoencoder('first')"})
    assert train._built(c, tmp_path / "run").codec.stage.digest == jd.load_codec(stage[3]).stage.digest
    assert c.data.codec == "autoencoder('first')"
    with pytest.raises(InputError, match="names a first stage first, which is neither in the run's workdir nor in"):
        train._built(c, tmp_path / "other")


def test_pixels_are_measured_by_the_same_functions():
    assert first_stage.provisional("standardised") == "standardised((0.0,), (1.0,))"
    assert first_stage.measures("standardised", codec.pixels()) and not first_stage.measures("pixels", codec.pixels())
    written = first_stage.measured("standardised", codec.pixels(), (np.array([0.25]), np.array([0.5])))
    assert written == "standardised([0.25], [0.5])"
    assert first_stage.kept("standardised", written) == written
    assert first_stage.kept("pixels", written) == "pixels"
    assert first_stage.kept("standardised((0.0,), (1.0,))", written) == "standardised((0.0,), (1.0,))"
    assert first_stage.measured("pixels", codec.pixels(), None) == "pixels"
    assert first_stage.kept("centred", "centred") == "centred"


def test_a_folder_for_latents_needs_a_codec_that_makes_some():
    c = tiny.config()
    c.data.latents = "somewhere"
    with pytest.raises(InputError, match=r"data\.latents='somewhere' keeps latents, and data\.codec='pixels' makes none"):
        experiment.build(c)


@pytest.mark.parametrize("folder", [5, True, None, ("a",), "gs://bucket/latents"])
def test_what_names_no_folder_for_latents_is_told_in_one_line(folder):
    c = tiny.config()
    c.data = ConfigDict(c.data.to_dict() | {"latents": folder})
    with pytest.raises(InputError, match=r"data\.latents=.* is not the name of a folder on a disk") as caught:
        experiment.build(c)
    assert "\n" not in str(caught.value)


def test_a_workdir_that_is_not_whole_or_of_another_model_is_told_in_one_line(tmp_path):
    config, model = first("kl")
    params = params_of(model)
    without = {"params": {name: value for name, value in params["params"].items() if name != "quant_conv"}}
    for name, c, averages, text in (
        ("other", first("kl", channels=16)[0], {"0.0": params}, "is of another model"),
        ("part", config, {"0.0": without}, r"\['quant_conv'\]\['bias'\] is missing"),
        ("average", config, {"0.5": params}, "is missing"),
    ):
        write(tmp_path / name, c, averages)
        with pytest.raises(InputError, match=text) as caught:
            jd.load_codec(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model.name": "DiT", "patch": 3}, r"encodes it\) does not fit model.patch=3: .* each size divisible by 3"),
        ({"model.multipliers": (1, 1, 1, 1)}, r"encodes it\) does not fit 4 levels of model.multipliers: .* divisible by 8"),
        ({"out_channels": 1}, r"model.out_channels=1 is not what process.loss='simple' needs; allowed: None, \d"),
        ({"data.shape": (8, 9, 1)}, r"data.shape=\(8, 9, 1\) does not fit data.codec=.*divisible by 2"),
    ],
    ids=["patch", "levels", "channels", "downsampling"],
)
@pytest.mark.parametrize("stage", ["vq"], indirect=True)
def test_a_latent_that_does_not_fit_the_model_is_told_in_one_line(stage, changes, text):
    c = of(stage)
    if changes.get("model.name") == "DiT":
        c.model = ConfigDict(dict(name="DiT", width=8, depth=1, heads=1, classes=10, patch=changes["patch"]))
    elif "out_channels" in changes:
        c.model.out_channels = changes["out_channels"]
    else:
        c.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=text) as caught:
        experiment.build(c)
    assert "\n" not in str(caught.value)
