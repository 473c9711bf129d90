"""Stable Diffusion's U-Net: what its files say, what is refused and in which words, and a whole pipeline as a workdir.

That the numbers are diffusers', tests/test_reference_cross_attention.py shows.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_autoencoder import first_config

import jaxdiff as jd
from jaxdiff import experiment, models
from jaxdiff.errors import InputError
from jaxdiff.interop import autoencoder, files, folder, mapping, source, unet2d_condition, workdir

# What unet/config.json and scheduler/scheduler_config.json of Stable Diffusion 1.4 and 1.5 say.
FIRST = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
TABLE = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
TINY = FIRST | {
    "sample_size": 4,
    "block_out_channels": [4, 8],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
}
VAE = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "latent_channels": 4, "out_channels": 3, "groups": 4, "scale": 0.5}


def shapes_of(config, channels=4):
    return jax.eval_shape(models.build(config.model).init, jax.random.key(0), jnp.zeros((1, 8, 8, channels)), jnp.zeros(()))


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: (rng.standard_normal(a.shape) * 0.2).astype(np.float32), shapes)


def unet(**changes):
    """(config.json, its tensors, our parameters of them), random."""
    config = unet2d_condition.config_of(TINY | changes, TABLE)
    params = drawn(shapes_of(config))
    return TINY | changes, mapping.save(params, unet2d_condition.rows(config, params)), params


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A StableDiffusionPipeline's folder of a tiny U-Net and autoencoder, and our parameters of the former."""
    place = tmp_path_factory.mktemp("pipeline")
    first = first_config(**VAE)
    image = np.zeros((1, 8, 8, 3), np.float32)
    inner = drawn(jax.eval_shape(models.build(first.model).init, jax.random.key(0), image))
    folder.write(place / "vae", *autoencoder.to_diffusers(first, inner))
    theirs, state, params = unet()
    folder.write(place / "unet", theirs, state)
    (place / "scheduler").mkdir()
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(TABLE))
    (place / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return place, params


def test_stable_diffusion_as_published():
    """1.x has eight heads at every level, 2.x heads of 64 channels and linear maps: the same network otherwise."""
    config = unet2d_condition.config_of(FIRST, TABLE)
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(shapes_of(config))) == 859_520_964
    assert config.data.shape == (512, 512, 3) and config.data.codec == "autoencoder('first_stage')"
    assert (config.model.heads, config.model.attend) == (8, "SpatialTransformer(depth=1, width=0, groups=32)")
    assert config.process.schedule == "scaled_linear_beta(steps=1000, first=0.00085, last=0.012)" and not config.sampling.clip
    time = "ScaledLinearBetaSinusoidal(steps=1000, first=0.00085, last=0.012, shift=0, cos_first=1)"
    assert (config.model.time, config.process.target) == (time, "eps")
    changes = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
    second = unet2d_condition.config_of(FIRST | changes, TABLE | {"prediction_type": "v_prediction"})
    assert second.model.attend == "SpatialTransformer(depth=1, width=64, groups=32)" and second.process.target == "v"
    assert second.model.context == "Tokens(width=1024)"


@pytest.mark.slow
def test_a_pipeline_is_a_model_with_its_first_stage(pipeline, tmp_path):
    place, params = pipeline
    read = source.read(place)
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    assert read.config.data.shape == (8, 8, 3) and [path.parent.name for path in read.weights] == ["unet", "vae"]
    assert "tokens of a text" in read.notes[0] and len(read.notes) == 1
    workdir.write_imported(tmp_path / "w", read)
    run = jd.load(tmp_path / "w")
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    net = experiment.build(run.config).net
    x, level = (
        jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 4)), jnp.float32),
        jd.schedules.cosine(jnp.float32(0.5)),
    )
    tokens = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 6)), jnp.float32)
    predict = jax.jit(lambda tokens: jd.denoiser(net(run.params, {"tokens": tokens}), jd.targets.eps)(x, level).x0)
    said = [predict(tokens), predict(1 + tokens)]
    assert jnp.abs(said[0] - said[1]).max() > 1e-4 and jnp.isfinite(said[0]).all()


def test_linear_maps_may_be_stored_as_convolutions_or_not(pipeline, tmp_path):
    theirs, state, params = unet()
    folder.write(tmp_path / "unet", theirs, state)
    (tmp_path / "unet" / "scheduler_config.json").write_text(json.dumps(TABLE))
    as_convolutions = {
        name: a[..., None, None] if name.endswith(("proj_in.weight", "proj_out.weight")) else a for name, a in state.items()
    }
    assert sum(a.ndim == 4 for a in as_convolutions.values()) > sum(a.ndim == 4 for a in state.values())
    one = source.read(tmp_path / "unet")
    files.write(tmp_path / "unet" / folder.WEIGHTS[0], as_convolutions)
    other = source.read(tmp_path / "unet")
    jax.tree.map(np.testing.assert_array_equal, one.params, params)
    jax.tree.map(np.testing.assert_array_equal, other.params, params)
    assert "put one into WORKDIR/first_stage" in one.notes[1]
    del state["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    files.write(tmp_path / "unet" / folder.WEIGHTS[0], state)
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.attn2\.to_k\.weight is missing: the file is not of"):
        source.read(tmp_path / "unet")
    (tmp_path / "unet" / "scheduler_config.json").unlink()
    with pytest.raises(InputError, match=r"has no scheduler_config\.json, which tells the table it was trained on"):
        source.read(tmp_path / "unet")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "UNet3DConditionModel"}, "_class_name='UNet3DConditionModel' is not read; allowed: UNet2DConditionModel"),
        (
            {"addition_embed_type": "text_time"},
            "addition_embed_type='text_time' is no setting of a UNet2DConditionModel that is read",
        ),
        ({"num_class_embeds": 7}, "num_class_embeds=7 is no setting of a UNet2DConditionModel that is read"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D' is not read; allowed: UNetMidBlock2DCrossAttn"),
        ({"only_cross_attention": True}, "only_cross_attention=True is not read; allowed: False"),
        ({"cross_attention_dim": [6, 6]}, "cross_attention_dim=(6, 6) is out of range; it is a whole number, at least 1"),
        ({"transformer_layers_per_block": 0}, "transformer_layers_per_block=0 is out of range; it is a whole number, at least 1"),
        ({"in_channels": 9}, "out_channels=4 is not read; allowed: in_channels, 9"),
        ({"sample_size": None}, "sample_size=null does not say how large the latents are"),
        ({"block_out_channels": [4, 6]}, "block_out_channels=(4, 6) are not whole multiples of the first"),
        ({"norm_num_groups": 3}, "norm_num_groups=3 does not divide block_out_channels=(4, 8)"),
        ({"time_embedding_dim": 5}, "time_embedding_dim=5 is not read; allowed: null, 16"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types has 'AttnDownBlock2D', which is not read"),
        ({"down_block_types": ["DownBlock2D"]}, "2 block_out_channels, but 1 down_block_types"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "has attention at other levels than down_block_types="),
        ({"attention_head_dim": 3}, "attention_head_dim=3 does not divide block_out_channels=(4, 8)"),
        ({"attention_head_dim": [1, 4]}, "attention_head_dim=(1, 4): neither heads nor their channels are the same at all levels"),
        (
            {"attention_head_dim": [2, 2, 2]},
            "attention_head_dim=(2, 2, 2) is out of range; it is a whole number, at least 1, or one",
        ),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(changes, said):
    with pytest.raises(InputError) as error:
        unet2d_condition.config_of(TINY | changes, TABLE)
    assert str(error.value).startswith("config.json: ") and said in str(error.value) and "\n" not in str(error.value)
