"""Configs of papers hold networks of known size: their parameters, counted through the config and once more by hand."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdiff import experiment, models, run, training
from jaxdiff.interop import workdir

ROOT = Path(__file__).parent.parent
GROUPS = {
    "data": {"name", "split", "shape", "size", "codec", "flip", "augment"},
    "process": {"schedule", "target", "draw", "weight", "loss", "data_std", "drop_label"},
    "optimizer": {"name", "learning_rate", "schedule", "clip"},
}

# Of EDM, Nichol and Dhariwal 2021 and Song et al. 2021 as their public code builds them; of VDM less 514 (test_vdms_count_by_hand);
# for flow matching DDPM's network, where Lipman et al. 2023 have one of 256 channels.
KNOWN = {
    "cifar_iddpm": 52_546_438,
    "cifar_iddpm_vlb": 52_546_438,
    "cifar_edm": 55_733_891,
    "cifar_vdm": 30_577_667,
    "cifar_score_sde": 61_804_419,
    "cifar_subvp": 61_804_419,
    "cifar_flow": 35_746_307,
    "imagenet256_ldm": 401_433_091,  # Rombach et al. 2022, table 3: 400M
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_of(name, **changes):
    config = load(name).get_config()
    for key, value in changes.items():
        config.model[key] = value
    return config.model


def parameters(model):
    shapes = jax.eval_shape(models.build(model).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(()))
    return sum(a.size for a in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", KNOWN)
def test_each_config_has_the_parameters_of_its_network(name):
    module = load(name)
    config = module.get_config()
    assert f"--config=configs/{name}.py" in module.__doc__ and "docs/results.md" in module.__doc__
    assert f"{KNOWN[name]:,}" in module.__doc__ or name in ("cifar_iddpm_vlb", "cifar_subvp")
    assert set(config.model) <= set(models.FIELDS)
    for group, keys in GROUPS.items():
        assert set(config[group]) - {"latents"} == keys
    assert parameters(config.model) == KNOWN[name]


def test_edms_class_conditional_network():
    assert parameters(model_of("cifar_edm", classes=10)) == 55_735_299


def test_songs_deep_network():
    assert parameters(model_of("cifar_subvp", blocks=8)) == 106_632_579


# By hand, from the papers' descriptions alone.


def conv(i, o, taps=9):
    return i * o * taps + o


def norm(c):
    return 2 * c


def attention(c):
    return norm(c) + 4 * conv(c, c, 1)


def block(i, o, shortcut=None, embed=None):
    """A residual block; a shortcut is there where channels change, or where asked; `embed` weighs the embedding's layer."""
    embed = 512 * o + o if embed is None else embed
    shortcut = i != o if shortcut is None else shortcut
    return norm(i) + conv(i, o) + embed + norm(o) + conv(o, o) + shortcut * conv(i, o, 1)


def mlp(width=128):
    return conv(width, 512, 1) + conv(512, 512, 1)


def test_song_et_als_count_by_hand():
    c = 256
    down = 4 * block(128, 128) + block(128, 128, True)  # 32x32, and the block that halves
    down += block(128, c) + 3 * block(c, c) + 4 * attention(c) + block(c, c, True)  # 16x16
    down += 4 * block(c, c) + block(c, c, True) + 4 * block(c, c)  # 8x8, 4x4
    middle = 2 * block(c, c) + attention(c)
    up = 5 * block(2 * c, c) + block(c, c, True)  # 4x4
    up += 5 * block(2 * c, c) + block(c, c, True)  # 8x8
    up += 4 * block(2 * c, c) + block(c + 128, c) + attention(c) + block(c, c, True)  # 16x16; attention after the last alone
    up += block(c + 128, 128) + 4 * block(256, 128)
    assert mlp() + conv(3, 128) + down + middle + up + norm(128) + conv(128, 3) == KNOWN["cifar_score_sde"]


def test_edms_count_by_hand():
    c = 256
    down = block(128, c) + 3 * block(c, c) + block(c, c, True)  # 32x32
    down += 4 * block(c, c) + 4 * attention(c) + block(c, c, True)  # 16x16
    down += 4 * block(c, c)  # 8x8
    middle = 2 * block(c, c) + attention(c)
    up = 5 * block(2 * c, c) + block(c, c, True)
    up += 5 * block(2 * c, c) + attention(c) + block(c, c, True)
    up += 4 * block(2 * c, c) + block(c + 128, c)
    total = mlp() + 9 * 128 + conv(3, 128) + down + middle + up + norm(c) + conv(c, 3)
    assert total == KNOWN["cifar_edm"]
    assert total + conv(10, 128, 1) == 55_735_299  # one-hot labels into the 128 features of the noise level


def test_vdms_count_by_hand():
    """Their public code has 514 more: a scalar condition, always 0 on CIFAR-10 (512), and the schedule's two ends."""
    same = block(128, 128, embed=512 * 128)
    up = block(256, 128, embed=512 * 128)
    fourier = 3 + 3 * 2 * 2  # x, and the sine and cosine of two frequencies
    total = mlp() + conv(fourier, 128) + 32 * same + 2 * same + attention(128) + 33 * up + norm(128) + conv(128, 3)
    assert total == KNOWN["cifar_vdm"]


def test_improved_ddpms_count_by_hand():
    c = 256

    def scaled(i, o):
        return block(i, o, embed=512 * 2 * o + 2 * o)

    down = 3 * scaled(128, 128) + conv(128, 128)
    down += scaled(128, c) + 2 * scaled(c, c) + 3 * attention(c) + conv(c, c)  # 16x16
    down += 3 * scaled(c, c) + 3 * attention(c) + conv(c, c)  # 8x8
    down += 3 * scaled(c, c)
    middle = 2 * scaled(c, c) + attention(c)
    up = 4 * scaled(2 * c, c) + conv(c, c)
    up += 4 * scaled(2 * c, c) + 4 * attention(c) + conv(c, c)
    up += 3 * scaled(2 * c, c) + scaled(c + 128, c) + 4 * attention(c) + conv(c, c)
    up += scaled(c + 128, 128) + 3 * scaled(256, 128)
    assert mlp() + conv(3, 128) + down + middle + up + norm(128) + conv(128, 6) == KNOWN["cifar_iddpm"]


def test_latent_diffusions_count_by_hand():
    """Of its 401M, 1001 x 512 are the labels' tokens, which the authors count apart: 400.92M are left."""

    def residual(i, o):
        return block(i, o, embed=768 * o + o)

    def look(c):
        itself, cross, mlp = 4 * c * c + c, 2 * c * c + 2 * 512 * c + c, conv(c, 8 * c, 1) + conv(4 * c, c, 1)
        return norm(c) + conv(c, c, 1) + 3 * norm(c) + itself + cross + mlp + conv(c, c, 1)

    c = [192, 384, 576, 960]
    down, up = 2 * residual(c[0], c[0]) + conv(c[0], c[0]), 0
    skips = [c[0], c[0], c[0], c[0]]
    for level in (1, 2, 3):
        down += residual(c[level - 1], c[level]) + residual(c[level], c[level]) + 2 * look(c[level])
        down += conv(c[level], c[level]) if level < 3 else 0
        skips += (3 if level < 3 else 2) * [c[level]]
    middle, h = 2 * residual(960, 960) + look(960), 960
    for level in (3, 2, 1, 0):
        for _ in range(3):
            up += residual(h + skips.pop(), c[level]) + (look(c[level]) if level else 0)
            h = c[level]
        up += conv(h, h) if level else 0
    embed = conv(192, 768, 1) + conv(768, 768, 1)
    network = embed + conv(3, 192) + down + middle + up + norm(192) + conv(192, 3)
    assert not skips and network == 400_920_579
    assert network + 1001 * 512 == KNOWN["imagenet256_ldm"]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_config_of_latents_can_be_told_where_they_are_to_be_kept(path):
    """On the command line a key that a config lacks cannot be set, and ImageNet's take tens of gigabytes."""
    data = load(path.stem).get_config().data
    assert ("latents" in data) == data.codec.startswith("autoencoder(")


def test_latent_diffusion_is_of_latents_of_64x64x3(tmp_path):
    """The whole experiment, its first stage a tiny one of the same factor; shapes alone, nothing is computed."""
    config = load("imagenet256_ldm").get_config()
    first = dict(name="AutoencoderKL", channels=4, multipliers=(1, 1, 1), blocks=1, middle_attend="NoAttention", latent_channels=3)
    first |= dict(scale=1.0)
    shapes = jax.eval_shape(models.build(ConfigDict(first)).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    described = ConfigDict(dict(data=dict(shape=(256, 256, 3), codec="pixels"), model=first, training=dict(ema=(0.0,))))
    described.sampling = dict(ema=0.0)
    workdir.write(tmp_path / "kl", described, jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes))
    config.data.codec = config.data.codec.replace("runs/imagenet256_kl", str(tmp_path / "kl"))
    built = experiment.build(config)
    params = jax.eval_shape(built.init, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(params)) == KNOWN["imagenet256_ldm"]
    batch = {"image": jax.ShapeDtypeStruct((4, 256, 256, 3), jnp.uint8), "label": jax.ShapeDtypeStruct((4,), jnp.int32)}
    example = jax.eval_shape(lambda key, batch: built.prepare((), key, batch), jax.random.key(0), batch)
    assert example["x0"].shape == (4, 64, 64, 3) and example["cond"]["label"].shape == (4,)
    each, _, _ = jax.eval_shape(lambda p, key, e: built.loss(p, (), key, e), params, jax.random.key(0), example)
    assert each.shape == (4,)
    training.make_optimizer(config.optimizer)
    run.check(config, built)
