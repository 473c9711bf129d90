"""The names and shapes of OpenAI's state dicts, written down from their architecture, and random numbers in them. No torch."""

from typing import NamedTuple

import numpy as np


class Spec(NamedTuple):
    """A network: `attention` are levels, `outputs` are per colour and 0 for a classifier of images of `size`."""

    channels: int = 32
    multipliers: tuple[float, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (1,)
    classes: int = 0
    colours: int = 3
    outputs: int = 2
    updown: bool = False
    shifts: bool = True
    size: int = 8


def layout(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape; as in their files, the embedding is as wide as for `channels` whatever the multipliers."""
    out, width = {}, 4 * spec.channels
    levels = [int(spec.channels * m) for m in spec.multipliers]
    _affine(out, "time_embed.0", (width, spec.channels))
    _affine(out, "time_embed.2", (width, width))
    if spec.classes and spec.outputs:
        out["label_emb.weight"] = (spec.classes, width)
    _affine(out, "input_blocks.0.0", (levels[0], spec.colours, 3, 3))
    have, skips, n = levels[0], [levels[0]], 1
    for level, channels in enumerate(levels):
        for _ in range(spec.blocks):
            _block(out, f"input_blocks.{n}.0", have, channels, width, spec.shifts)
            if level in spec.attention:
                _attention(out, f"input_blocks.{n}.1", channels)
            have, n = channels, n + 1
            skips.append(have)
        if level < len(levels) - 1:
            _resample(out, f"input_blocks.{n}.0", "op", have, width, spec)
            n += 1
            skips.append(have)
    _block(out, "middle_block.0", have, have, width, spec.shifts)
    _attention(out, "middle_block.1", have)
    _block(out, "middle_block.2", have, have, width, spec.shifts)
    if spec.outputs:
        _up(out, levels, have, skips, width, spec)
        _affine(out, "out.0", (levels[0],))
        _affine(out, "out.2", (spec.outputs * spec.colours, levels[0], 3, 3))
    else:
        _affine(out, "out.0", (have,))
        side = spec.size // 2 ** (len(levels) - 1)
        out["out.2.positional_embedding"] = (have, side**2 + 1)
        _affine(out, "out.2.qkv_proj", (3 * have, have, 1))
        _affine(out, "out.2.c_proj", (spec.classes, have, 1))
    return out


def _up(out, levels, have, skips, width, spec):
    n = 0
    for level in reversed(range(len(levels))):
        for i in range(spec.blocks + 1):
            _block(out, f"output_blocks.{n}.0", have + skips.pop(), levels[level], width, spec.shifts)
            have = levels[level]
            if level in spec.attention:
                _attention(out, f"output_blocks.{n}.1", have)
            if level and i == spec.blocks:
                _resample(out, f"output_blocks.{n}.{1 + (level in spec.attention)}", "conv", have, width, spec)
            n += 1


def _affine(out, name, shape):
    out[f"{name}.weight"], out[f"{name}.bias"] = shape, shape[:1]


def _block(out, name, have, channels, width, shifts):
    _affine(out, f"{name}.in_layers.0", (have,))
    _affine(out, f"{name}.in_layers.2", (channels, have, 3, 3))
    _affine(out, f"{name}.emb_layers.1", ((1 + shifts) * channels, width))
    _affine(out, f"{name}.out_layers.0", (channels,))
    _affine(out, f"{name}.out_layers.3", (channels, channels, 3, 3))
    if have != channels:
        _affine(out, f"{name}.skip_connection", (channels, have, 1, 1))


def _attention(out, name, channels):
    _affine(out, f"{name}.norm", (channels,))
    _affine(out, f"{name}.qkv", (3 * channels, channels, 1))
    _affine(out, f"{name}.proj_out", (channels, channels, 1))


def _resample(out, name, conv, channels, width, spec):
    if spec.updown:
        _block(out, name, channels, channels, width, spec.shifts)
    else:
        _affine(out, f"{name}.{conv}", (channels, channels, 3, 3))


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of these shapes, all of them away from 0 and 1, of a size that keeps what goes through them near 1."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes.items():
        a = rng.standard_normal(shape)
        if len(shape) > 1 and not name.startswith(("label_emb", "out.2.pos")):
            a = a / np.sqrt(np.prod(shape[1:]))
        elif len(shape) == 1:
            a = 0.2 * a + (name.endswith("weight"))
        out[name] = a.astype(np.float32)
    return out


# The published networks, as their READMEs' flags lay them out.
_CIFAR = Spec(128, (1, 2, 2, 2), 3, (1, 2), size=32)
_64 = Spec(128, (1, 2, 3, 4), 3, (2, 3), size=64)
_LSUN = Spec(128, (1, 1, 2, 2, 4, 4), 2, (4,), shifts=False, size=256)
_256 = Spec(256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), updown=True, size=256)
_512 = Spec(256, (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6), 1000, updown=True, size=512)
_128 = Spec(256, (1, 1, 2, 3, 4), 2, (2, 3, 4), 1000, updown=True, size=128)
_JUDGE = dict(channels=128, classes=1000, outputs=0)
PUBLISHED = {
    "cifar10_uncond_50M_500K.pt": _CIFAR,
    "cifar10_uncond_vlb_50M_500K.pt": _CIFAR,
    "imagenet64_uncond_100M_1500K.pt": _64,
    "imagenet64_uncond_vlb_100M_1500K.pt": _64,
    "imagenet64_cond_270M_250K.pt": _64._replace(channels=192, classes=1000),
    "lsun_uncond_100M_1200K_bs128.pt": _LSUN,
    "lsun_uncond_100M_2400K_bs64.pt": _LSUN,
    "64x64_diffusion.pt": Spec(192, (1, 2, 3, 4), 3, (1, 2, 3), 1000, updown=True, size=64),
    "128x128_diffusion.pt": _128,
    "256x256_diffusion.pt": _256._replace(classes=1000),
    "256x256_diffusion_uncond.pt": _256,
    "512x512_diffusion.pt": _512,
    "lsun_bedroom.pt": _256,
    "lsun_cat.pt": _256,
    "lsun_horse.pt": _256,
    "lsun_horse_nodropout.pt": _256,
    "64x64_classifier.pt": Spec(128, (1, 2, 3, 4), 4, (1, 2, 3), 1000, outputs=0, updown=True, size=64),
    "128x128_classifier.pt": _128._replace(**_JUDGE),
    "256x256_classifier.pt": _256._replace(**_JUDGE),
    "512x512_classifier.pt": _512._replace(**_JUDGE),
}
