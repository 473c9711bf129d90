"""The KL autoencoder: its size, its posterior, as a codec; and a diffusion of its latents, from workdirs to images."""

import json
import os
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import jaxdiff as jd
from jaxdiff import InputError, codec, evaluation, experiment, first_stage, models, run
from jaxdiff.interop import workdir
from jaxdiff.models.autoencoder import AutoencoderKL

TINY = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "latent_channels": 2, "out_channels": 1}


def shapes(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x)


def woken(model, x):
    """Random parameters of the model's shapes, none of them zero."""
    scale = jax.tree.map(lambda a: np.prod(a.shape[:-1]) ** -0.5 if len(a.shape) > 1 else 0.3, shapes(model, x))
    return jax.tree.map(lambda a, s: s * a, drawn(shapes(model, x)), scale)


def drawn(shapes, scale=1.0):
    """Normal numbers of these shapes, by hand: nothing is compiled."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(scale * rng.standard_normal(a.shape), a.dtype), shapes)


def image(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def uint8(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def first_config(**fields):
    """What an autoencoder's workdir says."""
    return ConfigDict(
        dict(
            data=dict(shape=(8, 8, fields.get("out_channels", 1)), codec="pixels"),
            model=dict(name="AutoencoderKL", **TINY | fields),
            training=dict(ema=(0.0,)),
            sampling=dict(ema=0.0),
        )
    )


def latent_config(**changes):
    """The tiny config as a diffusion of a first stage's latents, 4 x 4 x 2."""
    start = {"data.codec": "autoencoder('first_stage')", "sampling.clip": False, "training.ema": (0.0,), "sampling.ema": 0.0}
    return tiny.config(**start | changes)


@pytest.fixture(scope="module")
def small():
    model = AutoencoderKL(**TINY)
    return model, woken(model, jnp.zeros((1, 8, 8, 1)))


@pytest.fixture(scope="module")
def place(tmp_path_factory, small):
    """A workdir of a diffusion of latents, with its first stage inside."""
    where = tmp_path_factory.mktemp("runs") / "ldm"
    workdir.write(where / "first_stage", first_config(scale=0.5), small[1])
    c = latent_config(**{"data.codec": f"autoencoder({str(where / 'first_stage')!r})"})
    built = experiment.build(c)
    workdir.write(where, latent_config(), drawn(jax.eval_shape(built.init, jax.random.key(0)), 0.2))
    return where


def test_stable_diffusions_parameters_and_latents():
    model = AutoencoderKL()
    image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    params = shapes(model, image)
    assert sum(a.size for a in jax.tree.leaves(params)) == 83_653_863
    mean, logvar = jax.eval_shape(lambda p, x: model.apply(p, x, method="encode"), params, image)
    assert mean.shape == logvar.shape == (1, 32, 32, 4)
    assert jax.eval_shape(lambda p, z: model.apply(p, z, method="decode"), params, mean).shape == image.shape


def test_attention_is_in_the_middle_and_where_it_is_asked_for():
    def where(**fields):
        params = shapes(AutoencoderKL(**TINY | fields), jnp.zeros((1, 8, 8, 1)))["params"]
        return sorted(f"{way}/{n[:-10]}" for way in ("encoder", "decoder") for n in params[way] if n.endswith("_attention"))

    assert where() == ["decoder/middle", "encoder/middle"]
    assert where(middle_attend=models.NoAttention) == []
    assert where(attention=(1,), middle_attend=models.NoAttention) == ["decoder/up1_0", "decoder/up1_1", "encoder/down1_0"]


def test_every_norm_has_the_groups_asked_for():
    """Those of a part that the config names too, unless it says a number of its own."""

    def groups(**fields):
        model = models.build(first_config(groups=2, **fields).model)
        counts = []

        def note(next_fun, args, kwargs, context):
            if type(context.module).__name__ == "GroupNorm":
                counts.append((context.module.name, context.module.num_groups))
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(note):
            shapes(model, jnp.zeros((1, 8, 8, 1)))
        return sorted(set(counts))

    plain = groups()
    assert {count for _, count in plain} == {2} and len(plain) > 3
    for middle in ("Attention", "DDPMppAttention", "SpatialTransformer"):
        assert groups(middle_attend=middle) == plain
    assert ("norm", 4) in groups(middle_attend="Attention(groups=4)")
    assert groups(middle_attend="NoAttention") == [each for each in plain if each[0] != "norm"]


def test_the_log_variance_stays_within_bounds(small):
    model, params = small
    run_all = jax.jit(lambda p, x: model.apply(p, x, method="encode"))
    x = image(1, 4, 4, 1)
    plain = run_all(params, x)
    bias = jnp.asarray([0.0, 0.0, 1e3, -1e3])
    moved = {"params": params["params"] | {"quant_conv": params["params"]["quant_conv"] | {"bias": bias}}}
    mean, logvar = run_all(moved, x)
    np.testing.assert_array_equal(logvar, jnp.broadcast_to(jnp.asarray([20.0, -30.0]), logvar.shape))
    np.testing.assert_allclose(mean, plain[0] - params["params"]["quant_conv"]["bias"][None, None, None, :2], atol=1e-5)
    assert jnp.abs(plain[1]).max() < 20


def test_sizes_that_do_not_divide_are_refused(small):
    with pytest.raises(ValueError, match="divisible by 2"):
        shapes(small[0], jnp.zeros((1, 5, 4, 1)))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"latent_channels": 0}, "model.latent_channels=0 is out of range"),
        ({"middle_attend": "Nothing"}, "model.middle_attend='Nothing' is unknown"),
        ({"groups": 3}, "model.groups=3 does not divide the channels of every level, multiples of 8"),
        ({"scale": 0.0}, "model.scale=0.0 is out of range; it is a finite number above 0"),
        ({"attention": (2,)}, "model.attention=.2,. names a level that is not there; allowed: 0, 1"),
        ({"heads": 2}, "model.heads is unknown to model.name='AutoencoderKL'"),
    ],
)
def test_wrong_fields_are_refused_in_one_line(fields, text):
    with pytest.raises(InputError, match=text) as caught:
        models.build(first_config(**fields).model)
    assert "\n" not in str(caught.value)


def test_the_codec_draws_the_posterior_and_scales(small):
    model, params = small
    x, scale = uint8(3, 8, 8, 1), 0.25
    made = first_stage.codec_of(model, params, codec.pixels(), scale)
    mean, logvar = jax.jit(lambda p, x: model.apply(p, x, method="encode"))(params, x / np.float32(127.5) - 1)
    many = jax.vmap(lambda key: made.encode(key, jnp.asarray(x)))(jax.random.split(jax.random.key(0), 1000)) / scale
    std = jnp.exp(logvar / 2)
    assert many.shape == (1000, 3, 4, 4, 2)
    np.testing.assert_array_less(jnp.abs(many.mean(0) - mean) / std, 5 / 1000**0.5)
    np.testing.assert_allclose(many.std(0) / std, 1, atol=5 / 2000**0.5)
    np.testing.assert_array_equal(made.encode(jax.random.key(7), x), made.encode(jax.random.key(7), x))
    # What is decoded is not scaled, and comes out as pixels do.
    pixels = jax.jit(lambda p, z: model.apply(p, z, method="decode"))(params, mean)
    want = jnp.round(jnp.clip((pixels + 1) * 127.5, 0, 255)).astype(int)
    got = made.decode(scale * mean)
    assert got.dtype == jnp.uint8 and got.shape == x.shape and got.std() > 5
    assert jnp.abs(got.astype(int) - want).max() <= 1


def test_a_codec_is_a_pytree_of_its_parameters(small):
    """Under a jit that it is an argument of, the parameters are traced and no constants."""
    model, params = small
    made = first_stage.codec_of(model, params, codec.pixels(), 1.0)
    assert len(jax.tree.leaves(made.decode)) == len(jax.tree.leaves(params)) + 2  # and what latents are scaled by
    z = image(1, 4, 4, 2)
    through = jax.jit(lambda decode, z: decode(z))
    np.testing.assert_array_equal(through(made.decode, z), made.decode(z))
    text = jax.make_jaxpr(lambda decode, z: decode(z))(made.decode, z)
    assert not text.consts


@pytest.mark.slow
def test_a_workdir_draws_through_the_first_stage_inside_it(place, tmp_path, monkeypatch):
    """Wherever the process stands; what the network gives are latents, and what is drawn is their decoding."""
    monkeypatch.chdir(tmp_path)
    loaded = jd.load(place)
    assert loaded.shape == (8, 8, 1) and str(place) in loaded.config.data.codec
    images = loaded.generate(jax.random.key(0), 3, steps=3, label=[0, 1, -1])
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    built = experiment.build(loaded.config)  # as scripts do, from run.config alone
    assert run.latent_shape(built, 5) == (5, 4, 4, 2)
    # The same by hand: noise of the latents' shape through the solver, then the decoder.
    keys = jd.sample_keys(jax.random.key(0), 3)
    levels = run.grid(loaded.config, built, loaded.params, 3)
    denoise = loaded.denoiser(np.array([0, 1, -1]))
    z = run.draw_samples(keys, jd.solvers.ddim(denoise), jax.tree.map(jnp.asarray, levels), 1.0, None, (3, 4, 4, 2), None)
    assert np.abs(np.asarray(loaded.codec.decode(z)).astype(int) - images).max() <= 1
    # Pictures of the way, and from a picture on.
    told = loaded.trajectory(jax.random.key(0), 2, frames=2, steps=3)
    assert told.x0.shape == told.x.shape == (2, 2, 8, 8, 1)
    edited = loaded.edit(jax.random.key(0), images, strength=0.7, steps=4)
    assert edited.shape == images.shape
    with pytest.raises(InputError, match="a mask is of pixels"):
        loaded.edit(jax.random.key(0), images, np.ones((8, 8)), steps=4)


def test_what_samples_depend_on_is_the_first_stages_weights_and_not_its_place(place, small, tmp_path):
    def asked(where):
        return run.asked(jd.load(where), 0, None, {"steps": 3})

    moved, other = shutil.copytree(place, tmp_path / "moved"), shutil.copytree(place, tmp_path / "other")
    shutil.rmtree(other / "first_stage")
    workdir.write(other / "first_stage", first_config(scale=0.5), jax.tree.map(lambda a: a * 1.01, small[1]))
    here, elsewhere, changed = (asked(where) for where in (place, moved, other))
    assert json.dumps(elsewhere) == json.dumps(here)
    assert {key for key in here if changed[key] != here[key]} == {"codec"}


def test_the_first_stage_is_found_inside_then_here(place, tmp_path, monkeypatch):
    text = "autoencoder('first_stage', scale=2.0)"
    assert first_stage.found(text, place) == f"autoencoder('{place}/first_stage', scale=2.0)"
    assert first_stage.found(text, tmp_path) == text  # there is none inside: it stays relative to the current directory
    assert first_stage.found("pixels", place) == "pixels"
    monkeypatch.chdir(place)
    x = jnp.asarray(uint8(1, 8, 8, 1))
    half, two = (first_stage.of_config(t).encode(jax.random.key(0), x) for t in ("autoencoder('first_stage')", text))
    np.testing.assert_allclose(4 * half, two, rtol=1e-5)  # model.scale is 0.5
    np.testing.assert_array_equal(half, jd.load_codec(place / "first_stage").encode(jax.random.key(0), x))


@pytest.mark.slow
def test_an_exported_sampler_has_its_decoder_in_it(place, tmp_path):
    loaded = jd.load(place)
    jd.export(loaded, tmp_path / "sampler", platforms=("cpu",))
    got = jd.load_exported(tmp_path / "sampler").generate(jax.random.key(3), 2, steps=3, label=4)
    want = loaded.generate(jax.random.key(3), 2, steps=3, label=4)
    assert np.abs(got.astype(int) - want).max() <= 1


@pytest.mark.slow
def test_training_sees_latents(place):
    """What is prepared is the codec's encoding; both losses that latents may have are finite, and have a gradient."""
    for changes in ({}, {"process.loss": "hybrid(0.001)", "process.schedule": "linear_beta(50)", "process.draw": "draw_table(50)"}):
        c = latent_config(**{"data.codec": f"autoencoder({str(place / 'first_stage')!r})", **changes})
        built = experiment.build(c)
        batch = {"image": jnp.asarray(uint8(4, 8, 8, 1)), "label": jnp.arange(4)}
        example = jax.jit(lambda key, batch, built=built: built.prepare((), key, batch))(jax.random.key(0), batch)
        assert example["x0"].shape == (4, 4, 4, 2)
        params = drawn(jax.eval_shape(built.init, jax.random.key(0)), 0.2)
        assert params["params"]["conv_out"]["bias"].shape == ((4,) if changes else (2,))
        loss = jax.jit(jax.grad(lambda p, e, built=built: built.loss(p, (), jax.random.key(2), e)[0].mean()))
        gradient = loss(params, example)
        assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(gradient))
        assert jnp.abs(gradient["params"]["conv_out"]["kernel"]).max() > 0


def test_what_is_no_fit_is_refused_in_one_line(place, tmp_path, monkeypatch):
    codec_here = {"data.codec": f"autoencoder({str(place / 'first_stage')!r})"}

    def refused(text, call):
        with pytest.raises(InputError, match=text) as caught:
            call()
        assert "\n" not in str(caught.value)

    def building(**changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        return lambda: experiment.build(latent_config(**codec_here | changes))

    refused("holds an autoencoder, which draws no images; jaxdiff.load_codec loads it", lambda: jd.load(place / "first_stage"))
    refused("holds a UNet, no autoencoder; jaxdiff.load loads it", lambda: jd.load_codec(place))
    refused("is not there", lambda: jd.load_codec(tmp_path / "nothing"))
    refused(r"\(8, 8, 1\) .\(4, 4, 2\) as data.codec encodes it. does not fit 4 levels of model.multipliers.*divisible by 8",
            building(model__multipliers=(1, 1, 1, 1)))  # fmt: skip
    refused(r"\(9, 8, 1\) does not fit data.codec.*divisible by 2", building(data__shape=(9, 8, 1)))
    refused("does not fit data.codec.*of images of 1 channels, got 3", building(data__shape=(8, 8, 3)))
    table = {"process__schedule": "linear_beta(50)", "process__draw": "draw_table(50)"}
    refused("process.loss='vlb' is a bound on 256 pixel values.*allowed: simple, hybrid", building(process__loss="vlb", **table))
    refused("process.loss='bound' is a bound on 256 pixel values", building(process__loss="bound"))
    refused("data.augment='edm.0.12.' moves pixels", building(data__augment="edm(0.12)"))
    refused(r"scale=0\.0 is not a finite number above 0", building(data__codec=codec_here["data.codec"][:-1] + ", scale=0)"))
    c = latent_config(**codec_here, **{"sampling.clip": True})
    built = experiment.build(c)
    refused("sampling.clip=True clips to the values of pixels.*set it to False", lambda: run.check(c, built))
    c.sampling.clip = False
    refused("metrics='bpd_elbo' is of pixels.*gives latents",
            lambda: evaluation.estimator("bpd_elbo", c, built, None, evaluation.Settings()))  # fmt: skip
    refused("data.codec='autoencoder' is|data.codec='autoencoder..'", building(data__codec="autoencoder"))
    monkeypatch.chdir(tmp_path)
    refused(f"names a first stage first_stage, which is neither in the run's workdir nor in {os.getcwd()}",
            building(data__codec="autoencoder('first_stage')"))  # fmt: skip


@pytest.mark.slow
def test_a_classifier_guides_in_the_latents_of_the_same_first_stage_alone(place, small, tmp_path):
    loaded = jd.load(place)

    def of(text):
        c = tiny.classifier(**{"data.codec": text})
        built = experiment.build(c)
        return run.classifier_of(c, built, drawn(jax.eval_shape(built.init, jax.random.key(0)), 0.2))

    same = of(f"autoencoder({str(place / 'first_stage')!r})")
    images = loaded.generate(jax.random.key(0), 2, steps=2, label=3, classifier=same, classifier_scale=2.0)
    assert images.shape == (2, 8, 8, 1)
    workdir.write(tmp_path / "other", first_config(scale=0.5), jax.tree.map(lambda a: 1.1 * a, small[1]))
    for text in (f"autoencoder({str(tmp_path / 'other')!r})", "pixels"):
        with pytest.raises(InputError, match=r"another data\.codec"):
            loaded.generate(jax.random.key(0), 2, steps=2, label=3, classifier=of(text))
