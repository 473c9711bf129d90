"""What a SOURCE is, its own names tell; and the latent families from files to images, without torch."""

import json

import jax
import numpy as np
import pytest
from score_sde_layout import Spec, checkpoint
from test_autoencoder import first_config
from test_dit import woken

import jaxdiff as jd
from jaxdiff import models
from jaxdiff.errors import InputError
from jaxdiff.interop import autoencoder, dit, files, folder, scheduler, source, workdir

VAE = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "latent_channels": 4, "out_channels": 3, "groups": 4, "scale": 0.5}
DIT = {"patch": 2, "width": 16, "depth": 2, "heads": 2, "classes": 3, "mlp_epsilon": 1e-5}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A DiTPipeline's folder of a tiny transformer and autoencoder, as diffusers lays it out."""
    place = tmp_path_factory.mktemp("pipeline")
    config = first_config(**VAE)
    model = models.build(config.model)
    first = woken_first(model)
    folder.write(place / "vae", *autoencoder.to_diffusers(config, first))
    made = dit._config(16, 4, 8, scheduler.read({}), 1, **DIT)
    params = woken(models.build(made.model), np.zeros((1, 8, 8, 4), np.float32))
    folder.write(place / "transformer", *dit.to_diffusers(made, params, factor=2))
    (place / "scheduler").mkdir()
    table = {"_class_name": "DDIMScheduler", "clip_sample": False, "num_train_timesteps": 1000, "beta_schedule": "linear"}
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(table))
    (place / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    return place, params, first


def woken_first(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: (rng.standard_normal(a.shape) * 0.2).astype(np.float32), shapes)


def test_a_pipeline_is_a_model_with_its_first_stage(pipeline, tmp_path):
    place, params, first = pipeline
    read = source.read(place)
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    jax.tree.map(np.testing.assert_array_equal, read.first_stage[1], first)
    assert read.config.data.shape == (16, 16, 3) and read.config.model.time.startswith("LinearBetaSinusoidal(steps=1000")
    assert [path.parent.name for path in read.weights] == ["transformer", "vae"]
    workdir.write_imported(tmp_path / "w", read)
    assert (tmp_path / "w" / "first_stage" / "checkpoints" / "0").is_dir()


@pytest.mark.slow
def test_it_draws_images(pipeline, tmp_path):
    workdir.write_imported(tmp_path / "w", source.read(pipeline[0]))
    images = jd.load(tmp_path / "w").generate(jax.random.key(0), 2, steps=2, label=1)
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8 and images.std() > 1


def test_an_autoencoder_alone_is_a_codec(pipeline, tmp_path):
    workdir.write_imported(tmp_path / "w", source.read(pipeline[0] / "vae", image_size=8))
    codec = jd.load_codec(tmp_path / "w")
    shape = jax.eval_shape(codec.encode, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), np.uint8)).shape
    assert shape == (1, 4, 4, 4)


def test_a_transformer_alone_says_what_it_lacks(pipeline):
    read = source.read(pipeline[0] / "transformer")
    assert read.first_stage is None and "put one into WORKDIR/first_stage" in read.notes[0]


def test_files_are_told_apart_by_their_names(tmp_path):
    known = {
        "openai": ({"time_embed.0.weight", "input_blocks.0.0.weight"}, source.OPENAI),
        "dit": ({"x_embedder.proj.weight"}, source.TRANSFORMERS),
        "dit_ema": ({"ema.x_embedder.proj.weight"}, source.TRANSFORMERS),
        "compvis": ({"state_dict.first_stage_model.post_quant_conv.weight"}, source.AUTOENCODERS),
    }
    for name, (tensors, family) in known.items():
        files.write(tmp_path / name, {tensor: np.zeros(1, np.float32) for tensor in tensors})
        assert source._of_file(tmp_path / name) is family
    files.write(tmp_path / "score", files.flat(checkpoint(Spec())))
    assert source._of_file(tmp_path / "score") is source.SCORE_SDE


def test_a_flag_of_another_family_is_refused(pipeline):
    with pytest.raises(InputError, match=r"--sde says nothing of SOURCE=.*; allowed with it: --image_size$"):
        source.read(pipeline[0] / "vae", sde="vp")
    with pytest.raises(InputError, match=r"--steps says nothing of SOURCE=.*; allowed with it: none$"):
        source.read(pipeline[0], steps=1000)


def test_sizes_that_do_not_fit_are_refused_in_one_line(pipeline):
    place = pipeline[0]
    for size in (0, -8):
        with pytest.raises(InputError, match=f"^--image_size={size} is out of range; it is a whole number, at least 1$"):
            source.read(place / "vae", image_size=size)
    with pytest.raises(InputError, match=r"images of size \(9, 9\) do not fit an autoencoder of 2 levels: .* divisible by 2$"):
        source.read(place / "vae", image_size=9)
    theirs, state = folder.read(place / "vae")
    assert autoencoder.of_diffusers(theirs | {"sample_size": [8, 16]}, state)[0].data.shape == (8, 16, 3)
    with pytest.raises(InputError, match=r"^config.json: block_out_channels=3 is out of range"):
        autoencoder.of_diffusers(theirs | {"block_out_channels": 3}, state)
    theirs, state = folder.read(place / "transformer")
    with pytest.raises(InputError, match=r"^config.json: sample_size=7 is not divisible by patch_size=2$"):
        dit.of_diffusers(theirs | {"sample_size": 7}, state, {})
    with pytest.raises(InputError, match=r"^config.json: num_layers='x' is out of range; it is a whole number, at least 1$"):
        dit.of_diffusers(theirs | {"num_layers": "x"}, state, {})
