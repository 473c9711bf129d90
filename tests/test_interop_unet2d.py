"""diffusers' UNet2DModel: what its files say, what is refused and in which words, and that nothing is lost on the way out and back.

That the numbers are theirs, tests/test_reference_unet2d.py shows.
"""

import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import jaxdiff as jd
from jaxdiff import experiment
from jaxdiff import run as runs
from jaxdiff.errors import InputError
from jaxdiff.interop import files, mapping, scheduler, source, unet2d, workdir
from jaxdiff.interop import folder as folders

ROOT = Path(jd.__file__).parent.parent

# What config.json of google/ddpm-cifar10-32 says, and its scheduler_config.json.
CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
TABLE = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}
# google/ddpm-celebahq-256, -church-256 and -bedroom-256.
LARGE = CIFAR10 | {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*4 * ["DownBlock2D"], "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *4 * ["UpBlock2D"]],
}
TINY = {
    "sample_size": 4,
    "block_out_channels": [4, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}
RESNET = {"downsample_type": "resnet", "upsample_type": "resnet"}
RESNET |= {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]}
RESNET |= {"up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"]}
# Networks beside TINY, with their schedulers: every key that is read has each of its values somewhere.
KINDS = [
    ({}, {}),
    ({"downsample_padding": 0, "freq_shift": 1, "flip_sin_to_cos": False, "attention_head_dim": None}, {"clip_sample": False}),
    (
        {"num_class_embeds": 3, "dropout": 0.1, "norm_eps": 1e-6},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    ),
    ({"resnet_time_scale_shift": "scale_shift"}, {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}),
    ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4, **RESNET}, {"timestep_spacing": "trailing"}),
    ({"add_attention": False, **RESNET}, {"num_train_timesteps": 40}),
    ({"sample_size": [4, 8], "in_channels": 1, "out_channels": 2}, {"variance_type": "learned_range"}),
]


def sizes(config):
    return mapping.paths(jax.eval_shape(experiment.build(config).init, jax.random.key(0)))


def count(config):
    return sum(math.prod(a.shape) for a in sizes(config).values())


def random_like(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(experiment.build(config).init, jax.random.key(0))
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shapes)


def state_of(config):
    return mapping.save(random_like(config), unet2d.rows(config, random_like(config)))


def made(folder, unet=None, table=None, state=None):
    """A folder as of google's models: everything in one place."""
    folder.mkdir()
    unet, table = TINY | (unet or {}), table or {}
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **unet}))
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler", **table}))
    files.write(folder / folders.WEIGHTS[0], state or state_of(unet2d.config_of(unet, table)))
    return folder


def refused(call, *said):
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    for words in said:
        assert words in str(error.value)


def test_the_published_cifar10_model_is_that_of_the_paper():
    config = unet2d.config_of(CIFAR10, TABLE)
    assert count(config) == 35_746_307
    process = config.process
    assert (process.schedule, process.target) == ("linear_beta(steps=1000, first=0.0001, last=0.02)", "eps")
    assert (config.sampling.times, config.sampling.solver, config.sampling.clip) == ("strided(1000)", "ddim", True)
    assert config.model.time == "LinearBetaSinusoidal(steps=1000, first=0.0001, last=0.02, shift=1, cos_first=0)"
    assert (config.data.shape, config.data.size, config.model.attention) == ((32, 32, 3), 32, (1,))
    experiment.check_keys(config)
    runs.check(config, experiment.build(config))


def test_our_own_configs_have_files_like_the_published(monkeypatch):
    """configs/cifar.py, hearing its table, is google/ddpm-cifar10-32 with dropout; configs/cifar_iddpm.py has a file as well."""
    monkeypatch.syspath_prepend(ROOT / "configs")
    cifar, iddpm = (importlib.import_module(name).get_config() for name in ("cifar", "cifar_iddpm"))
    cifar.model.time = "LinearBetaSinusoidal"
    said = unet2d.settings(cifar, jax.eval_shape(experiment.build(cifar).init, jax.random.key(0)))
    assert {key: said.get(key, unet2d.DEFAULTS.get(key)) for key in CIFAR10 if key[0] != "_"} == {
        key: value for key, value in CIFAR10.items() if key[0] != "_"
    }
    assert (said["dropout"], said["resnet_time_scale_shift"], said["num_class_embeds"]) == (0.1, "default", None)
    table = scheduler.write(cifar)
    assert {key: table[key] for key in TABLE if key in table} == {k: v for k, v in TABLE.items() if k in table} | {
        "variance_type": "fixed_small"
    }
    iddpm.model.time = "CosineBetaSinusoidal(steps=4000)"
    said = unet2d.settings(iddpm, jax.eval_shape(experiment.build(iddpm).init, jax.random.key(0)))
    assert [said[key] for key in ("attention_head_dim", "attn_norm_num_groups", "out_channels", "downsample_padding")] == [
        64,
        32,
        6,
        1,
    ]
    assert (scheduler.write(iddpm)["variance_type"], said["resnet_time_scale_shift"]) == ("learned_range", "scale_shift")


def test_the_published_models_of_256_pixels_have_the_papers_114_million_parameters():
    config = unet2d.config_of(LARGE, TABLE)
    assert round(count(config) / 1e6) == 114
    assert (config.model.multipliers, config.model.attention, config.data.shape) == ((1, 1, 2, 2, 4, 4), (4,), (256, 256, 3))


def test_the_names_of_the_tensors_are_theirs():
    """All of them, of the smallest network with everything in it."""
    unet = TINY | {"block_out_channels": [4, 4], "num_class_embeds": 2}
    block = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2"]
    attention = ["group_norm", "to_q", "to_k", "to_v", "to_out.0"]
    places = {"conv_in": [], "conv_norm_out": [], "conv_out": [], "time_embedding": ["linear_1", "linear_2"]}
    places |= {f"{way}_blocks.0.resnets.0": block for way in ("down", "up")} | {"down_blocks.1.resnets.0": block}
    places |= {f"{way}_blocks.1.resnets.0": block for way in ("down", "up")}
    places |= {"up_blocks.0.resnets.1": block, "up_blocks.1.resnets.1": block}
    places |= {f"mid_block.resnets.{i}": block for i in (0, 1)}
    places |= {f"up_blocks.{i}.resnets.{j}": [*block, "conv_shortcut"] for i in (0, 1) for j in (0, 1)}
    places |= {f"{at}.attentions.0": attention for at in ("down_blocks.1", "mid_block", "up_blocks.0")}
    places |= {"up_blocks.0.attentions.1": attention}
    places |= {"down_blocks.0.downsamplers.0": ["conv"], "up_blocks.0.upsamplers.0": ["conv"]}
    modules = [f"{place}.{part}" if part else place for place, parts in places.items() for part in parts or [""]]
    want = {f"{name}.{leaf}" for name in modules for leaf in ("weight", "bias")} | {"class_embedding.weight"}
    state = state_of(unet2d.config_of(unet, {}))
    assert set(state) == want
    assert state["class_embedding.weight"].shape == (2, 16)
    assert state["up_blocks.0.resnets.0.conv_shortcut.weight"].shape == (4, 8, 1, 1)
    assert state["up_blocks.0.resnets.0.conv1.weight"].shape == (4, 8, 3, 3)


@pytest.mark.parametrize(("unet", "table"), KINDS)
def test_out_and_back_nothing_is_lost(unet, table, tmp_path):
    config = unet2d.config_of(TINY | unet, table)
    params = random_like(config)
    if config.model.classes:
        params["params"]["label"]["embedding"][0] = 0  # there is no null label
    run = runs.of(config, experiment.build(config), params)
    unet2d.export(run, tmp_path / "out")
    back = source.read(tmp_path / "out")
    assert back.config == config
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    said = folders.read_json(tmp_path / "out" / "unet" / "config.json")
    whole = unet2d.DEFAULTS | {k: tuple(v) if isinstance(v, list) else v for k, v in (TINY | unet).items()}
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()} == {
        k: v for k, v in whole.items() if k in said
    } | {"_class_name": "UNet2DModel"}  # fmt: skip
    refused(
        lambda: unet2d.export(run, tmp_path / "out"),
        f"{tmp_path / 'out' / 'unet'} holds {folders.WEIGHTS[0]} already; give a new folder",
    )


def test_a_null_label_is_the_last_class_there(tmp_path):
    config = unet2d.config_of(TINY | {"num_class_embeds": 3}, {}, null_class=True)
    assert (config.model.classes, config.process.drop_label) == (2, 0.1)
    run = runs.of(config, experiment.build(config), random_like(config))
    unet2d.export(run, tmp_path / "out")
    table = files.read(tmp_path / "out" / "unet" / folders.WEIGHTS[0])["class_embedding.weight"]
    np.testing.assert_array_equal(table, run.params["params"]["label"]["embedding"][[1, 2, 0]])
    jax.tree.map(np.testing.assert_array_equal, source.read(tmp_path / "out", null_class=True).params, run.params)
    refused(lambda: unet2d.config_of(TINY, {}, null_class=True), "num_class_embeds=None leaves no class that could be the null")


def test_a_model_trained_here_that_hears_a_table_goes_out_and_comes_back(tmp_path):
    """With the parts that it has by default: 128 channels have 32 groups, and padding on the right."""
    time = "LinearBetaSinusoidal(steps=1000, first=0.0001, last=0.02)"
    changes = {"model.time": time, "process.schedule": "linear_beta(steps=1000)", "process.draw": "draw_table(1000)"}
    config = tiny.config(**changes, **{"model.channels": 128, "process.target": "eps"})
    run = runs.of(config, experiment.build(config), random_like(config))
    unet2d.export(run, tmp_path / "out")
    back = source.read(tmp_path / "out", null_class=True)
    jax.tree.map(np.testing.assert_array_equal, back.params, run.params)
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    level = jd.Level(*(a[0] for a in jd.grid(jd.schedules.linear_beta(), np.array([0.3]))))
    label = np.array([4, -1])
    one, other = (
        experiment.build(c).net(p, {"label": label})(x, jd.logsnr(level))[0] for c, p in ((config, run.params), back[1:3])
    )
    np.testing.assert_array_equal(one, other)
    assert np.abs(one).max() > 0.1


@pytest.mark.parametrize(
    ("unet", "said"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier' is not read; allowed: positional"),
        ({"center_input_sample": True}, "center_input_sample=True is not read; allowed: False"),
        ({"mid_block_scale_factor": 1.41}, "mid_block_scale_factor=1.41 is not read; allowed: 1"),
        ({"mid_block_type": None}, "mid_block_type=None is not read; allowed: UNetMidBlock2D"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not read; allowed: None"),
        ({"act_fn": "gelu"}, "act_fn='gelu' is not read; allowed: silu, swish"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial' is not read; allowed: default, scale_shift"),
        ({"downsample_padding": 2}, "downsample_padding=2 is not read; allowed: 0, 1"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "('UpBlock2D', 'AttnUpBlock2D') has attention at other levels"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types has 'SkipDownBlock2D', which is not read"),
        ({"up_block_types": ["UpBlock2D"]}, "2 block_out_channels, but 2 down and 1 up_block_types"),
        (RESNET | {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"], "block_out_channels": 3 * [4]}
         | {"up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}, "change the size in two ways, which is not read"),
        ({"block_out_channels": [4, 6]}, "block_out_channels=(4, 6) are not whole multiples of the first"),
        ({"norm_num_groups": 3}, "norm_num_groups=3 does not divide block_out_channels=(4, 8)"),
        ({"attention_head_dim": 3}, "attention_head_dim=3 does not divide block_out_channels=(4, 8)"),
        ({"attn_norm_num_groups": 3}, "attn_norm_num_groups=3 does not divide the last of block_out_channels, 8"),
        ({"time_embedding_dim": 3}, "time_embedding_dim=3 is not read; allowed: null, 16"),
        ({"freq_shift": 2}, "freq_shift=2 is no less than half of block_out_channels[0]=4"),
        ({"flip_sin_to_cos": "no"}, "flip_sin_to_cos='no' is out of range; it is true or false"),
        ({"down_block_types": None}, "down_block_types=None is out of range; it is a list of names"),
        ({"block_out_channels": 4}, "block_out_channels=4 is out of range; it is a list of whole numbers, each at least 1"),
        ({"sample_size": None}, "sample_size=null does not say how large the images are"),
        ({"sample_size": 5}, "data.shape=(5, 5, 3) does not fit 2 levels"),
        ({"out_channels": 6}, "out_channels=6 with in_channels=3 is not read"),
        ({"in_channels": 4, "out_channels": 4}, "has 4 channels; allowed: 1 (grey) or 3 (colour)"),
        ({"cross_attention_dim": 8}, "cross_attention_dim=8 is no setting of a UNet2DModel that is read"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name='UNet2DConditionModel' is not read; allowed: UNet2DModel"),
    ],
)  # fmt: skip
def test_a_network_that_is_none_here_is_refused_in_one_line(unet, said):
    refused(lambda: unet2d.config_of(TINY | unet, {}), said)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "_class_name='ScoreSdeVeScheduler' is not read; allowed: DDPMScheduler, "),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid' is not read; allowed: linear, scaled_linear, squaredcos_cap_v2"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas=[0.1, 0.2] is not read; allowed: None"),
        ({"thresholding": True}, "thresholding=True is not read; allowed: False"),
        ({"variance_type": "learned"}, "variance_type='learned' is not read"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True is not read"),
        ({"clip_sample_range": 2.0}, "clip_sample_range=2.0 is not read; allowed: 1.0"),
        ({"prediction_type": "flow"}, "prediction_type='flow' is not read; allowed: epsilon, v_prediction, sample"),
        ({"_class_name": ["DDPMScheduler"]}, "is not read; allowed: DDPMScheduler, "),
        ({"num_train_timesteps": "x"}, "num_train_timesteps='x' is out of range; it is a whole number from 1 to 100,000"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps=1000000000 is out of range"),
        ({"beta_end": None}, "beta_end=None is out of range; it is a finite number above 0"),
        ({"clip_sample": None}, "clip_sample=None is out of range; it is true or false"),
        ({"beta_start": 0.5}, "linear_beta needs steps >= 1 and 0 < first <= last < 1"),
    ],
)
def test_a_scheduler_without_such_a_table_is_refused_in_one_line(table, said):
    refused(lambda: unet2d.config_of(TINY, table), said)


def test_a_scheduler_that_says_nothing_of_clipping_is_taken_at_its_word():
    clips = {name: unet2d.config_of(TINY, {"_class_name": name}).sampling.clip for name in scheduler.CLIPS}
    assert clips == {"DDPMScheduler": True, "DDIMScheduler": True, "PNDMScheduler": False}


def test_a_missing_extra_or_misshapen_tensor_is_named(tmp_path):
    state = state_of(unet2d.config_of(TINY, {}))
    name = "mid_block.attentions.0.to_q.weight"
    wrong = {
        "missing": ({k: v for k, v in state.items() if k != name}, f"tensor {name} is missing"),
        "extra": (state | {"down_blocks.0.attentions.0.to_q.weight": state[name]}, "tensor down_blocks.0.attentions.0.to_q.weight"),
        "shape": (state | {name: state[name][:4]}, f"tensor {name} has shape (4, 8), this architecture's has (8, 8)"),
    }
    for kind, (tensors, said) in wrong.items():
        folder = made(tmp_path / kind, state=tensors)
        refused(lambda folder=folder: source.read(folder), said)


def test_attention_by_its_older_names_and_as_convolutions(tmp_path):
    state = state_of(unet2d.config_of(TINY, {}))
    old = {}
    for name, a in state.items():
        for was, now in folders.OLD.items():
            name = name.replace(f".{now}.", f".{was}.")
        old[name] = a[:, :, None, None] if name.endswith("proj_attn.weight") else a
    assert "mid_block.attentions.0.proj_attn.bias" in old and "mid_block.attentions.0.query.weight" in old
    one, other = (source.read(made(tmp_path / name, state=s)).params for name, s in (("new", state), ("old", old)))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_folder_without_a_scheduler_is_ddpms_table_and_told(tmp_path):
    folder = made(tmp_path / "a")
    assert source.read(folder).notes == ()
    (folder / "scheduler_config.json").unlink()
    read = source.read(folder)
    assert "there is no scheduler_config.json" in read.notes[0]
    assert read.config.process.schedule == "linear_beta(steps=1000, first=0.0001, last=0.02)"


def test_a_pipelines_folder_and_its_network_alone_find_the_scheduler(tmp_path):
    config = unet2d.config_of(TINY, {"num_train_timesteps": 40})
    unet2d.export(runs.of(config, experiment.build(config), random_like(config)), tmp_path / "p")
    assert source.read(tmp_path / "p").config == source.read(tmp_path / "p" / "unet").config == config


def test_a_source_that_is_of_no_family_is_refused_in_one_line(tmp_path):
    allowed = "is of a family that is not read; allowed: a folder that diffusers wrote (UNet2DModel"
    refused(lambda: source.read(tmp_path / "nothing"), f"SOURCE={tmp_path / 'nothing'} is not there")
    refused(lambda: source.read(tmp_path), "(neither model_index.json nor config.json)", allowed)
    (tmp_path / "model_index.json").write_text('{"_class_name": "LDMPipeline"}')
    refused(lambda: source.read(tmp_path), f"SOURCE={tmp_path} (LDMPipeline) {allowed}")
    (tmp_path / "model_index.json").write_text("[]")
    refused(lambda: source.read(tmp_path), "model_index.json is not the config of a model: it holds a list")
    (tmp_path / "model_index.json").write_text("{")
    refused(lambda: source.read(tmp_path), "model_index.json cannot be read")
    files.write(tmp_path / "a.safetensors", {"blocks.0": np.zeros(1)})
    refused(lambda: source.read(tmp_path / "a.safetensors"), "a file whose first tensor is blocks.0", allowed)
    files.write(tmp_path / "b.safetensors", state_of(unet2d.config_of(TINY, {})))
    refused(lambda: source.read(tmp_path / "b.safetensors"), "without its config.json; give the folder")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    refused(lambda: source.read(tmp_path), "config.json cannot be read: [Errno 2] No such file")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    refused(lambda: source.read(tmp_path), "holds no weights; they are one of diffusion_pytorch_model.safetensors, ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.time": "Sinusoidal"}, "model.time='Sinusoidal' cannot be exported: diffusers' networks hear the row of a table; "
         "train with model.time='LinearBetaSinusoidal(steps=1000, first=0.0001, last=0.02)'"),
        ({"process.schedule": "linear_beta(1000, 0.0001, 0.03)"}, "last=0.03)'"),
        ({"process.schedule": "cosine"}, "process.schedule='cosine' cannot be exported; allowed: linear_beta, "),
        ({"process.schedule": "cosine_beta(1000, 0.1)"}, "process.schedule='cosine_beta(1000, 0.1)' cannot be exported"),
        ({"process.target": "flow"}, "process.target='flow' cannot be exported; allowed: eps, v, x0"),
        ({"process.data_std": 0.5}, "process.data_std=0.5 cannot be exported"),
        ({"data.codec": "standardised((0.5,), (0.5,))"}, "data.codec='standardised((0.5,), (0.5,))' cannot be"),
        ({"model.block": "DDPMppBlock"}, "model.block='DDPMppBlock' cannot be exported; allowed: ResBlock, ADMBlock"),
        ({"model.down": "ADMBlockDown"}, "model.down='ADMBlockDown' cannot be exported; allowed: Down, ADMDown, ResBlockDown"),
        ({"model.enter": "FourierEnter"}, "model.enter='FourierEnter' cannot be exported; allowed: Enter"),
        ({"model.attend": "Attention(groups=4, scale=0.5)"}, "cannot be exported; allowed: Attention, with no scale"),
        ({"model.augment": 9}, "model.augment=9 cannot be exported"),
        ({"model.attention": (0,), "model.attend_each": False}, "model.attend_each=False cannot be exported"),
        ({"model.block": "ResBlock"}, "they have 2, 4 groups, and UNet2DModel has one norm_num_groups"),
        ({"model.attend": "Attention(groups=4, epsilon=0.1)"}, "they have epsilon=1e-06, 0.1, and UNet2DModel has one norm_eps"),
        ({"model.heads": 2, "model.attention": (0,), "model.multipliers": (1, 2)}, "its heads have 4, 8 channels"),
    ],
)  # fmt: skip
def test_a_model_that_diffusers_has_nothing_like_is_refused_in_one_line(changes, said, tmp_path):
    table = {"process.schedule": "linear_beta(steps=1000)", "process.draw": "draw_table(1000)", "process.target": "eps"}
    table |= {"model.time": "LinearBetaSinusoidal", "model.block": "ResBlock(groups=4)", "model.attend": "Attention(groups=4)"}
    table |= {"model.leave": "Leave(groups=4)"}
    config = tiny.config()
    for key, value in (table | changes).items():
        group, name = key.split(".")
        config[group][name] = value
    params = jax.tree.map(lambda a: np.zeros(a.shape), jax.eval_shape(experiment.build(config).init, jax.random.key(0)))
    run = runs.of(config, experiment.build(config), params)
    refused(lambda: unet2d.export(run, tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()


def test_a_classifier_is_not_exported(tmp_path):
    config = tiny.classifier()
    run = runs.Run(config, None, *6 * [None], None)
    refused(lambda: unet2d.export(run, tmp_path / "out"), "model.name='Classifier' cannot be exported; allowed: UNet")


@pytest.mark.slow
def test_what_is_read_is_drawn_from(tmp_path):
    read = source.read(made(tmp_path / "a", {"num_class_embeds": 3}, {"num_train_timesteps": 40}))
    workdir.write(tmp_path / "w", read.config, read.params)
    run = jd.load(tmp_path / "w")
    assert run.generate(jax.random.key(0), 2, steps=2, label=1).shape == (2, 4, 4, 3)
    refused(lambda: run.generate(jax.random.key(0), 2, steps=2), "this model knows only labelled images: give a label, 0 to 2")


def command(*arguments):
    """(exit code, what it printed, what it said of its trouble) of `python ...`, run where the scripts are."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_command_makes_a_workdir_that_sample_draws_from_and_writes_it_back(tmp_path):
    interop = "-m", "jaxdiff.interop"
    folder, out = made(tmp_path / "a", {"num_class_embeds": 3}), tmp_path / "w"
    code, printed, err = command(*interop, folder, out)
    assert code == 0, err
    state = (folder / folders.WEIGHTS[0]).read_bytes()
    config = unet2d.config_of(TINY | {"num_class_embeds": 3}, {})
    assert f"diffusers' UNet2DModel: {count(config):,} parameters, images of 4x4x3, 3 classes" in printed
    assert "schedule linear_beta(steps=1000, first=0.0001, last=0.02), target eps, codec pixels, clip True" in printed
    assert f"sha256 {hashlib.sha256(state).hexdigest()}" in printed
    assert f"python sample.py --workdir={out} --label=0" in printed
    code, _, err = command("sample.py", f"--workdir={out}", "--label=0", "--num=2", "--steps=2", f"--out={tmp_path / 'a.npz'}")
    assert code == 0, err
    assert np.load(tmp_path / "a.npz")["images"].shape == (2, 4, 4, 3)
    code, printed, err = command(*interop, "--export=diffusers", out, tmp_path / "back")
    assert code == 0 and "DDPMPipeline.from_pretrained" in printed, err
    written = files.read(tmp_path / "back" / "unet" / folders.WEIGHTS[0])
    for name, a in files.read(folder / folders.WEIGHTS[0]).items():
        np.testing.assert_array_equal(written[name], a)
    for arguments, said in (
        ((folder, out), f"interop: workdir {out} holds a checkpoint already (step 0); give a new folder"),
        ((folder,), "interop: WORKDIR is missing; the command is written SOURCE WORKDIR"),
        ((folder, tmp_path / "w2", "--ema=0.9"), "interop: --ema and --step choose what is exported"),
    ):
        code, printed, err = command(*interop, *arguments)
        assert (code, printed, err.count("\n")) == (2, "", 1) and err.startswith(said)
