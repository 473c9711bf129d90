"""Stable Diffusion's U-Net, diffusers' UNet2DConditionModel: config.json by `config_of`, the tensors by `rows`.

Names and meanings: diffusers 0.42, models/unets/unet_2d_condition.py; older files only lack some of the keys. What makes tokens of
a text is not read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import models
from jaxdiff.errors import InputError
from jaxdiff.interop import autoencoder, folder, mapping, scheduler, unet2d, workdir
from jaxdiff.interop.mapping import Row, dense, module, norm
from jaxdiff.interop.scheduler import text
from jaxdiff.interop.workdir import Imported

# The autoencoder that the published ones were trained on makes a pixel of latents of 8 x 8 pixels.
FACTOR = 8
# What config.json may say, and what UNet2DConditionModel takes where it says nothing.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "time_embedding_dim": None,
}
# The keys that say nothing but for these values; with any other the network is one that there is none of here.
READ: dict[str, tuple[Any, ...]] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "downsample_padding": (0, 1),
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "only_cross_attention": (False,),
    "mid_block_scale_factor": (1,),
    "dual_cross_attention": (False,),
    "upcast_attention": (False, True),  # of low precision alone
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "addition_embed_type_num_heads": (64,),  # of an embedding that is not there
}
# Which values the others may have.
KINDS: dict[str, folder.Kind] = {
    "sample_size": folder.or_null(folder.SIZE),
    "in_channels": folder.COUNT,
    "flip_sin_to_cos": folder.FLAG,
    "freq_shift": folder.OFFSET,
    "down_block_types": folder.WORDS,
    "up_block_types": folder.WORDS,
    "block_out_channels": folder.COUNTS,
    "layers_per_block": folder.COUNT,
    "dropout": folder.NUMBER,
    "norm_num_groups": folder.COUNT,
    "norm_eps": folder.POSITIVE,
    "cross_attention_dim": folder.COUNT,
    "transformer_layers_per_block": folder.COUNT,
    "use_linear_projection": folder.FLAG,
}
# A block's type -> whether it has attention.
DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


def read(source: str | Path) -> Imported:
    """The U-Net of a pipeline's folder, with its autoencoder as first stage, or a U-Net's folder alone.

    Raises InputError that names a value, or a tensor, that there is no network here of, and where no scheduler_config.json tells
    the table that it was trained on.
    """
    source = Path(source)
    place = source / "unet" if (source / "unet").is_dir() else source
    first = autoencoder.read(source / "vae") if (source / "vae").is_dir() else None
    factor = FACTOR if first is None else 2 ** (len(first.config.model.multipliers) - 1)
    theirs, state = folder.read(place)
    config = config_of(theirs, folder.read_json(_table(source)), factor)
    params, weights = params_of(config, state), (folder.weights(place),)
    inside = f"WORKDIR/{workdir.FIRST_STAGE}"
    notes = (
        "it hears the tokens of a text, cond['tokens'], which sample.py does not make: the text's network is not read",
        f"it has no autoencoder: put one into {inside}, with python -m jaxdiff.interop VAE {inside}",
    )
    family = "diffusers' UNet2DConditionModel"
    if first is None:
        return Imported(family, config, params, weights, notes)
    return Imported(family, config, params, (*weights, *first.weights), notes[:1], (first.config, first.params))


def _table(source: Path) -> Path:
    around = (source / "scheduler", source, source.parent / "scheduler")
    for each in around:
        if (each / "scheduler_config.json").is_file():
            return each / "scheduler_config.json"
    raise InputError(
        f"SOURCE={source} has no scheduler_config.json, which tells the table it was trained on; put it into the folder"
    )


def config_of(theirs: Mapping[str, Any], table: Mapping[str, Any], factor: int = FACTOR) -> ConfigDict:
    """Our config of what config.json and scheduler_config.json say; `factor` is an image's size to a latent's.

    Raises InputError that names what is not read.
    """
    said, table = _said(theirs), scheduler.read(table)
    if said["sample_size"] is None:
        raise InputError("config.json: sample_size=null does not say how large the latents are; write it there")
    sizes = said["sample_size"] if isinstance(said["sample_size"], tuple) else (said["sample_size"],) * 2
    time = scheduler.hears(table, shift=said["freq_shift"], cos_first=int(said["flip_sin_to_cos"]))
    return workdir.describe(
        (sizes[0] * factor, sizes[1] * factor, 3),
        model_of(said) | {"time": time},
        scheduler.process(table),
        scheduler.sampling(table) | dict(num=8, batch_size=8, clip=False),
        f"autoencoder({workdir.FIRST_STAGE!r})",
    )


def model_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields, all but time, of a whole config.json. Raises InputError for a network that is none here."""
    channels, groups = said["block_out_channels"], {"groups": said["norm_num_groups"]}
    norms = {"epsilon": float(said["norm_eps"])} | groups
    attention = _placement(said)
    heads, width = _heads(said, attention)
    return dict(
        name="UNet",
        channels=channels[0],
        multipliers=tuple(n // channels[0] for n in channels),
        blocks=said["layers_per_block"],
        attention=attention,
        heads=heads,
        classes=0,
        dropout=float(said["dropout"] or 0),
        context=text("Tokens", width=said["cross_attention_dim"]),
        block=text("ResBlock", **norms),
        attend=text("SpatialTransformer", depth=said["transformer_layers_per_block"], width=width, **groups),
        down=unet2d.PADDED[said["downsample_padding"]],
        up="Up",
        leave=text("Leave", **norms),
        dtype="float32",
        remat=False,
    )


def _said(theirs: Mapping[str, Any]) -> dict[str, Any]:
    said = unet2d.said_by("UNet2DConditionModel", theirs, DEFAULTS, READ, KINDS)
    if said["out_channels"] != said["in_channels"]:
        raise InputError(
            f"config.json: out_channels={said['out_channels']!r} is not read; allowed: in_channels, {said['in_channels']}"
        )
    return said


def _placement(said: Mapping[str, Any]) -> tuple[int, ...]:
    """The levels with attention. Raises InputError where they differ on the way up, or a block is of another type."""
    levels = len(said["block_out_channels"])
    found = []
    for key, known in (("down_block_types", DOWN), ("up_block_types", UP)):
        if strange := [name for name in said[key] if name not in known]:
            raise InputError(f"config.json: {key} has {strange[0]!r}, which is not read; allowed: {', '.join(known)}")
        if len(said[key]) != levels:
            raise InputError(f"config.json: {levels} block_out_channels, but {len(said[key])} {key}")
        found.append([known[name] for name in said[key]])
    if found[0] != found[1][::-1]:
        raise InputError(
            f"config.json: up_block_types={said['up_block_types']!r} has attention at other levels than "
            f"down_block_types={said['down_block_types']!r}, which is not read"
        )
    return tuple(level for level, attends in enumerate(found[0]) if attends)


def _heads(said: Mapping[str, Any], attention: tuple[int, ...]) -> tuple[int, int]:
    """Our `heads` and `width`, one of them the same at all levels: what they call attention_head_dim is how many heads there are.

    Raises InputError where neither is.
    """
    channels, given = said["block_out_channels"], said["attention_head_dim"]
    each = given if isinstance(given, tuple) else (given,) * len(channels)
    if not folder.COUNTS.fits(each) or len(each) != len(channels):
        raise InputError(
            f"config.json: attention_head_dim={given!r} is out of range; it is a whole number, at least 1, or one a level"
        )
    found = {(each[level], channels[level] / each[level]) for level in (*attention, len(channels) - 1)}
    heads, widths = ({row[i] for row in found} for i in (0, 1))
    if any(width % 1 for width in widths):
        raise InputError(f"config.json: attention_head_dim={given!r} does not divide block_out_channels={channels!r}")
    if len(heads) > 1 and len(widths) > 1:
        raise InputError(f"config.json: attention_head_dim={given!r}: neither heads nor their channels are the same at all levels")
    return (heads.pop(), 0) if len(heads) == 1 else (1, int(widths.pop()))


def params_of(config: ConfigDict, state: Mapping[str, np.ndarray]) -> Any:
    """Our parameters of their tensors. Raises InputError that names a tensor which is missing, of nothing or misshapen."""
    model: Any = models.build(config.model)
    channels = state["conv_in.weight"].shape[1] if "conv_in.weight" in state and state["conv_in.weight"].ndim == 4 else 4
    side = 2 ** (len(config.model.multipliers) - 1)
    latent = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), latent, jax.ShapeDtypeStruct((), jnp.float32))
    return mapping.load(shapes, rows(config, shapes), folder.renamed(state))


def rows(config: ConfigDict, params: Any) -> list[Row]:
    """Where every parameter (or its shape) of a U-Net that hears tokens is among their tensors, 1x1 convolutions as linear maps."""
    depth = len({path.split("/")[1] for path in mapping.paths(params) if "/block" in path})
    return unet2d.rows(config, params, lambda ours, theirs: _transformer(ours, theirs, depth))


def _transformer(ours: str, theirs: str, depth: int) -> list[Row]:
    out = norm(f"{ours}/norm", f"{theirs}.norm")
    out += module(f"{ours}/enter", f"{theirs}.proj_in", dense) + module(f"{ours}/leave", f"{theirs}.proj_out", dense)
    for i in range(depth):
        out += _block(f"{ours}/block{i}", f"{theirs}.transformer_blocks.{i}")
    return out


def _block(ours: str, theirs: str) -> list[Row]:
    out = module(f"{ours}/mlp1", f"{theirs}.ff.net.0.proj", dense) + module(f"{ours}/mlp2", f"{theirs}.ff.net.2", dense)
    for name in ("norm1", "norm2", "norm3"):
        out += norm(f"{ours}/{name}", f"{theirs}.{name}")
    for name, other in (("self_attention", "attn1"), ("cross_attention", "attn2")):
        for part in "qkv":
            out += module(f"{ours}/{name}/{part}", f"{theirs}.{other}.to_{part}", dense, bias=False)
        out += module(f"{ours}/{name}/out", f"{theirs}.{other}.to_out.0", dense)
    return out
