"""Both autoencoders in two foreign layouts: diffusers' AutoencoderKL and VQModel, and latent diffusion's own (CompVis).

They differ in the codebook, in the channels that the encoder gives, and in what their configs say; one mapping of names has both.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import models
from jaxdiff.errors import InputError
from jaxdiff.interop import files, folder, mapping, workdir
from jaxdiff.interop.mapping import Row
from jaxdiff.interop.workdir import Imported
from jaxdiff.names import whole

Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]

# diffusers' names of ours.
CLASSES = {"AutoencoderKL": "AutoencoderKL", "VQModel": "AutoencoderVQ"}
# Stable Diffusion's factor on latents; diffusers' default, and no part of a CompVis file.
SCALE = 0.18215
# What a CompVis file is taken to have: latent diffusion's own models of a codebook leave its latents as they are.
SCALES = {"AutoencoderKL": (SCALE, "Stable Diffusion's"), "AutoencoderVQ": (1.0, "as in latent diffusion's own models,")}
CODEBOOK = "quantize.embedding.weight"
# What a CompVis file puts before the names, where it holds a whole latent diffusion model.
PREFIX = "first_stage_model."
# What such a file holds besides, and what is only of use for training.
IGNORED = ("loss.", "model_ema.")

# diffusers' options that our network has one value of.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "AutoencoderKL": {
        "act_fn": ("silu",),
        "shift_factor": (None,),
        "latents_mean": (None,),
        "latents_std": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
    },
    "VQModel": {"act_fn": ("silu",), "norm_type": ("group",)},
}
# Which values the others may have.
KINDS: dict[str, folder.Kind] = {
    "sample_size": folder.SIZE,
    "in_channels": folder.COUNT,
    "out_channels": folder.COUNT,
    "block_out_channels": folder.COUNTS,
    "down_block_types": folder.WORDS,
    "up_block_types": folder.WORDS,
    "layers_per_block": folder.COUNT,
    "latent_channels": folder.COUNT,
    "norm_num_groups": folder.COUNT,
    "scaling_factor": folder.POSITIVE,
    "mid_block_add_attention": folder.FLAG,
    "num_vq_embeddings": folder.COUNT,
    "vq_embed_dim": folder.or_null(folder.COUNT),
}


class Block(NamedTuple):
    """diffusers' names of a level on the way down and on the way up."""

    down: str
    up: str


# Without attention, and with one after each block.
BLOCKS = (Block("DownEncoderBlock2D", "UpDecoderBlock2D"), Block("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"))
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
COMPVIS_ATTENTION = {name: name for name in ("norm", "q", "k", "v")} | {"out": "proj_out"}


def read(source: str | Path, image_size: int | None = None) -> Imported:
    """The autoencoder in a folder of diffusers or a CompVis file.

    `image_size` is that of the images, which a CompVis file does not say (256 where None). Raises InputError for what is neither.
    """
    source = Path(source)
    if image_size is not None and not whole(image_size, 1):
        raise InputError(f"--image_size={image_size!r} is out of range; it is a whole number, at least 1")
    if source.is_dir():
        theirs, state = folder.read(source)
        kind = f"diffusers' {theirs.get('_class_name', 'AutoencoderKL')}"
        return Imported(kind, *of_diffusers(theirs, state, image_size), (folder.weights(source),))
    config, params = of_compvis(files.read(source), image_size or 256)
    scale, whose = SCALES[config.model.name]
    notes = (f"the factor on latents is taken to be {whose} {scale}, which the file does not say",)
    of = " with a codebook" if config.model.name == "AutoencoderVQ" else ""
    return Imported(f"latent diffusion's autoencoder{of}", config, params, (source,), notes)


def of_diffusers(theirs: Mapping[str, Any], state: Mapping[str, np.ndarray], size: int | None = None) -> tuple[ConfigDict, Any]:
    """(config, params) of diffusers' config.json and tensors. Raises InputError for an architecture that ours is not."""
    config = _config_of_diffusers(theirs, size)
    shapes = _shapes(config)
    return config, mapping.load(shapes, rows(shapes), folder.renamed(state))


def to_diffusers(config: ConfigDict, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, tensors) for diffusers' AutoencoderKL or VQModel.

    Raises InputError for a scale that is not known yet, and for an attention in the middle that theirs has not.
    """
    model: Any = models.build(config.model)
    kind = next(theirs for theirs, ours in CLASSES.items() if ours == config.model.name)
    if model.scale is None:
        raise InputError(f"model.scale=None is measured with latents, and diffusers' {kind} needs its scaling_factor; set a number")
    if model.middle_attend not in (None, models.Attention, models.NoAttention):
        middle = config.model.middle_attend
        raise InputError(f"model.middle_attend={middle!r} has no place in diffusers' {kind}; allowed: Attention, NoAttention")
    channels = [model.channels * m for m in model.multipliers]
    theirs = {
        "_class_name": kind,
        "in_channels": config.data.shape[-1],
        "out_channels": config.data.shape[-1],
        "down_block_types": [BLOCKS[level in model.attention].down for level in range(len(channels))],
        "up_block_types": [BLOCKS[level in model.attention].up for level in reversed(range(len(channels)))],
        "block_out_channels": channels,
        "layers_per_block": model.blocks,
        "act_fn": "silu",
        "latent_channels": model.latent_channels,
        "norm_num_groups": _groups(model, kind),
        "sample_size": config.data.shape[0],
        "scaling_factor": model.scale,
        "mid_block_add_attention": model.middle_attend is not models.NoAttention,
    }
    if kind == "VQModel":
        theirs |= {"num_vq_embeddings": model.codes, "vq_embed_dim": model.code_channels}
    return theirs, mapping.save(params, rows(_shapes(config)))


def of_compvis(state: Mapping[str, np.ndarray], size: int = 256, scale: float | None = None) -> tuple[ConfigDict, Any]:
    """(config, params) of latent diffusion's own tensors; the architecture is read off their shapes.

    `size` is that of the images and `scale` the factor on latents, which the file does not say (SCALES where None). Raises
    InputError for a file of another kind.
    """
    state = files.below(state, "state_dict.") or state
    state = files.below(state, PREFIX) or state
    config = _config_of_compvis(state, size, scale)
    shapes = _shapes(config)
    return config, mapping.load(shapes, compvis_rows(shapes), state, IGNORED)


def rows(shapes: Any) -> list[Row]:
    """Our tensors by diffusers' names; its levels of the decoder count from the coarsest."""
    last = max(int(name[2:]) for name in ("up0", *(n for n in shapes["params"]["decoder"] if re.fullmatch(r"up\d+", n))))
    rules: Rules = [
        (r"down(\d+)_(\d+)_attention/(\w+)", lambda m: f"down_blocks.{m[1]}.attentions.{m[2]}/{ATTENTION[m[3]]}"),
        (r"up(\d+)_(\d+)_attention/(\w+)", lambda m: f"up_blocks.{last - int(m[1])}.attentions.{m[2]}/{ATTENTION[m[3]]}"),
        (r"down(\d+)_(\d+)_block", r"down_blocks.\1.resnets.\2"),
        (r"down(\d+)/", r"down_blocks.\1.downsamplers.0/"),
        (r"up(\d+)_(\d+)_block", lambda m: f"up_blocks.{last - int(m[1])}.resnets.{m[2]}"),
        (r"up(\d+)/", lambda m: f"up_blocks.{last - int(m[1])}.upsamplers.0/"),
        (r"middle_block(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}"),
        (r"middle_attention/(\w+)", lambda m: f"mid_block.attentions.0/{ATTENTION[m[1]]}"),
        (r"norm_out", "conv_norm_out"),
        (r"shortcut", "conv_shortcut"),
    ]
    return _rows(shapes, rules, mapping.dense)


def compvis_rows(shapes: Any) -> list[Row]:
    """Our tensors by latent diffusion's names."""
    rules: Rules = [
        (r"(down|up)(\d+)_(\d+)_block", r"\1.\2.block.\3"),
        (r"(down|up)(\d+)_(\d+)_attention/(\w+)", lambda m: f"{m[1]}.{m[2]}.attn.{m[3]}/{COMPVIS_ATTENTION[m[4]]}"),
        (r"(down|up)(\d+)/", r"\1.\2.\1sample/"),
        (r"middle_block(\d)", r"mid.block_\1"),
        (r"middle_attention/(\w+)", lambda m: f"mid.attn_1/{COMPVIS_ATTENTION[m[1]]}"),
        (r"shortcut", "nin_shortcut"),
    ]
    return _rows(shapes, rules, mapping.pointwise)


def _rows(shapes: Any, rules: Rules, attention: mapping.Layout) -> list[Row]:
    """A row for each of our tensors, whose module is named by the first rule that fits; `attention` is how its maps lie."""
    made = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
        ours = "/".join(entry.key for entry in path)
        if ours == "codebook":
            made.append(Row(ours, CODEBOOK, mapping.same))
            continue
        *_, module, kind = ours.split("/")
        name = ours
        for pattern, there in rules:
            name = re.sub(pattern, there, name, count=1)
        theirs = name.replace("/", ".").removesuffix(f".{kind}") + (".bias" if kind == "bias" else ".weight")
        layout = mapping.same
        if kind == "kernel":
            linear = attention if module in ("q", "k", "v", "out") else mapping.pointwise
            layout = mapping.conv if len(leaf.shape) == 4 else linear
        made.append(Row(ours, theirs, layout))
    return made


def _config(name: str, size: tuple[int, ...], image: int, **model: Any) -> ConfigDict:
    least = 2 ** (len(model["multipliers"]) - 1)
    if any(n % least for n in size):
        raise InputError(
            f"images of size {size} do not fit an autoencoder of {len(model['multipliers'])} levels: give --image_size, "
            f"a number divisible by {least}"
        )
    return ConfigDict(
        dict(
            seed=0,
            data=dict(name="", split="", shape=(*size, image), codec="pixels"),
            model=dict(name=name, out_channels=image, dtype="float32", **model),
            training=dict(ema=(workdir.EMA,)),
            sampling=dict(ema=workdir.EMA),
        )
    )


def _middle(attends: bool) -> dict[str, str]:
    return {} if attends else {"middle_attend": "NoAttention"}


def _config_of_diffusers(theirs: Mapping[str, Any], size: int | None) -> ConfigDict:
    kind = theirs.get("_class_name", "AutoencoderKL")
    if kind not in CLASSES:
        raise InputError(f"config.json is of a {kind}, no {' or '.join(CLASSES)}")
    folder.only("config.json", theirs, FIXED[kind])
    folder.check("config.json", theirs, KINDS)
    channels = list(theirs.get("block_out_channels", (64,)))
    attention = _attention_of_diffusers(kind, theirs, len(channels))
    image = theirs.get("in_channels", 3)
    if theirs.get("out_channels", 3) != image:
        raise InputError(f"{kind} with in_channels={image} and another number of out_channels is not read")
    if any(c % channels[0] for c in channels):
        raise InputError(f"{kind} with block_out_channels={channels} is not read; allowed: multiples of the first")
    sample, latents = theirs.get("sample_size", 32), theirs.get("latent_channels", 3 if kind == "VQModel" else 4)
    quantised = {"codes": theirs.get("num_vq_embeddings", 256), "code_channels": theirs.get("vq_embed_dim") or latents}
    return _config(
        CLASSES[kind],
        (size, size) if size else (sample, sample) if isinstance(sample, int) else tuple(sample),
        image,
        channels=channels[0],
        multipliers=tuple(c // channels[0] for c in channels),
        blocks=theirs.get("layers_per_block", 1),
        attention=attention,
        **_middle(theirs.get("mid_block_add_attention", True)),
        latent_channels=latents,
        **(quantised if kind == "VQModel" else {}),
        groups=theirs.get("norm_num_groups", 32),
        scale=theirs.get("scaling_factor", SCALE),
    )


def _attention_of_diffusers(kind: str, theirs: Mapping[str, Any], levels: int) -> tuple[int, ...]:
    """The levels whose blocks are followed by attention. Raises InputError where the way up has it at others than the way down."""
    plain, attends = BLOCKS
    down, up = list(theirs.get("down_block_types", [plain.down])), list(theirs.get("up_block_types", [plain.up]))
    found = tuple(level for level, name in enumerate(down) if name == attends.down)
    wanted = [BLOCKS[level in found] for level in range(levels)]
    if (down, up) != ([block.down for block in wanted], [block.up for block in reversed(wanted)]):
        raise InputError(
            f"{kind} with down_block_types={down}, up_block_types={up} is not read; allowed: one of {plain.down}, {attends.down} "
            f"a level, and of {plain.up}, {attends.up} at the same levels"
        )
    return found


def _config_of_compvis(state: Mapping[str, np.ndarray], size: int, scale: float | None) -> ConfigDict:
    found = [m for name in state if (m := re.match(r"encoder\.down\.(\d+)\.(block|attn)\.(\d+)\.", name))]
    blocks = {(int(m[1]), int(m[3])) for m in found if m[2] == "block"}
    needed = "encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight"
    if not blocks or (missing := [name for name in needed if name not in state]):
        missing = missing if blocks else ["encoder.down.0.block.0.conv1.weight"]
        raise InputError(f"tensor {missing[0]} is missing: the file holds no autoencoder of latent diffusion")
    levels = 1 + max(level for level, _ in blocks)
    widths = [state.get(f"encoder.down.{level}.block.0.conv1.weight", np.zeros(0)).shape[0] for level in range(levels)]
    channels, image = state["encoder.conv_in.weight"].shape[:2]
    name = "AutoencoderVQ" if CODEBOOK in state else "AutoencoderKL"
    quantised = dict(zip(("codes", "code_channels"), state[CODEBOOK].shape, strict=False)) if CODEBOOK in state else {}
    return _config(
        name,
        (size, size),
        image,
        channels=channels,
        multipliers=tuple(max(width // channels, 1) for width in widths),
        blocks=1 + max(i for _, i in blocks),
        attention=tuple(sorted({int(m[1]) for m in found if m[2] == "attn"})),
        **_middle(any(name.startswith("encoder.mid.attn_1.") for name in state)),
        latent_channels=state["post_quant_conv.weight"].shape[0],
        **quantised,
        groups=32,
        scale=SCALES[name][0] if scale is None else scale,
    )


def _groups(model: Any, kind: str) -> int:
    """The number of groups that all norms have. Raises InputError where they differ: diffusers knows one number."""
    from jaxdiff.models.parts import norm

    each: set[Any] = {model.groups or norm(model.channels * m, jnp.float32).num_groups for m in model.multipliers}
    if len(each) > 1:
        raise InputError(f"norms of {sorted(each)} groups have no place in diffusers' {kind}; set model.groups")
    return each.pop()


def _shapes(config: ConfigDict) -> Any:
    model: Any = models.build(config.model)
    image = jax.ShapeDtypeStruct((1, *(2 ** len(model.multipliers),) * 2, config.data.shape[-1]), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)
