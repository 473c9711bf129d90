"""DiT in two foreign layouts: diffusers' DiTTransformer2DModel with its pipeline, and the authors' own (facebookresearch)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import models
from jaxdiff.errors import InputError
from jaxdiff.interop import autoencoder, files, folder, mapping, scheduler, workdir
from jaxdiff.interop.mapping import Row
from jaxdiff.interop.workdir import Imported
from jaxdiff.models.dit import places

# Of the authors' sizes, S, B, L and XL: heads by width, which a file does not say.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# The autoencoder that the published ones were trained on makes a pixel of latents of 8 x 8 pixels.
FACTOR = 8

# diffusers' options that our network has one value of.
FIXED = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "dropout": (0.0,),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
}
# Which values the others may have.
KINDS: dict[str, folder.Kind] = {
    "sample_size": folder.COUNT,
    "in_channels": folder.COUNT,
    "out_channels": folder.or_null(folder.COUNT),
    "patch_size": folder.COUNT,
    "num_attention_heads": folder.COUNT,
    "attention_head_dim": folder.COUNT,
    "num_layers": folder.COUNT,
    "num_embeds_ada_norm": folder.COUNT,
    "norm_eps": folder.POSITIVE,
}
# The parts that both layouts have.
PARTS = {"places": "SinCosPlaces", "qk_norm": "NoNorm", "rotate": "NoRotation"}
# What every block of diffusers' holds its own copy of.
EMBEDDER = "norm1.emb."


def read(source: str | Path) -> Imported:
    """A pipeline's folder of diffusers, with its autoencoder as first stage, a transformer's folder alone, or the authors' file.

    Raises InputError for what is none of them.
    """
    source = Path(source)
    if not source.is_dir():
        return _alone("DiT", *of_original(files.read(source)), source)
    if (source / "config.json").is_file():
        config, params = of_diffusers(*folder.read(source), {})
        return _alone("diffusers' DiTTransformer2DModel", config, params, folder.weights(source))
    first = autoencoder.read(source / "vae")
    factor = 2 ** (len(first.config.model.multipliers) - 1)
    table = folder.read_json(source / "scheduler" / "scheduler_config.json")
    config, params = of_diffusers(*folder.read(source / "transformer"), table, factor)
    weights = folder.weights(source / "transformer")
    return Imported("diffusers' DiTPipeline", config, params, (weights, *first.weights), first_stage=(first.config, first.params))


def _alone(family: str, config: ConfigDict, params: Any, weights: Path) -> Imported:
    inside = f"WORKDIR/{workdir.FIRST_STAGE}"
    note = f"it has no autoencoder: put one into {inside}, with python -m jaxdiff.interop VAE {inside}"
    return Imported(family, config, params, (weights,), (note,))


def of_diffusers(
    theirs: Mapping[str, Any], state: Mapping[str, np.ndarray], table: Mapping[str, Any], factor: int = FACTOR
) -> tuple[ConfigDict, Any]:
    """(config, params) of diffusers' config.json, tensors and scheduler_config.json; `factor` is an image's size to a latent's.

    Raises InputError for an architecture that ours is not, for blocks whose embedders are not all the same, and for a scheduler
    that is not read.
    """
    kind = theirs.get("_class_name", "DiTTransformer2DModel")
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise InputError(f"config.json is of a {kind}, no DiTTransformer2DModel")
    folder.only("config.json", theirs, FIXED)
    folder.check("config.json", theirs, KINDS)
    size, patch = theirs.get("sample_size", 32), theirs.get("patch_size", 2)
    if size % patch:
        raise InputError(f"config.json: sample_size={size!r} is not divisible by patch_size={patch!r}")
    channels = theirs.get("in_channels", 4)
    heads = theirs.get("num_attention_heads", 16)
    config = _config(
        size=size * factor,
        channels=channels,
        out_channels=theirs.get("out_channels") or channels,
        table=scheduler.read(table),
        shift=1,
        patch=patch,
        width=heads * theirs.get("attention_head_dim", 72),
        depth=theirs.get("num_layers", 28),
        heads=heads,
        classes=theirs.get("num_embeds_ada_norm", 1000),
        mlp_epsilon=theirs.get("norm_eps", 1e-5),
    )
    shapes = unstacked(_shapes(config, channels))
    return config, stacked(mapping.load(shapes, rows(shapes), _one_embedder(state)))


def to_diffusers(config: ConfigDict, params: Any, factor: int = FACTOR) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, tensors) for diffusers' DiTTransformer2DModel; each block gets a copy of the embedder.

    Raises InputError for parts other than theirs, or no classes, which theirs always has.
    """
    model = config.model
    heard = getattr(models.build(model).time, "keywords", {})
    if not model.classes or heard.get("cos_first") != 1 or heard.get("shift", 1) != 1:
        raise InputError(
            f"model.time={model.time!r} with model.classes={model.classes} is no DiT of diffusers'; allowed: classes and "
            "LinearBetaSinusoidal(cos_first=1)"
        )
    for role, part in PARTS.items():
        if model.get(role, part) != part:
            raise InputError(f"model.{role}={model[role]!r} is no DiT of diffusers'; allowed: {part}")
    patches = params["params"]["patches"]["kernel"]
    theirs = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "in_channels": patches.shape[2],
        "out_channels": params["params"]["leave"]["bias"].shape[0] // model.patch**2,
        "num_layers": model.depth,
        "sample_size": config.data.shape[0] // factor,
        "patch_size": model.patch,
        "num_embeds_ada_norm": model.classes,
        "norm_eps": model.get("mlp_epsilon", 1e-6),
        **{key: values[0] for key, values in FIXED.items()},
    }
    apart = unstacked(params)
    state = mapping.save(apart, rows(apart))
    shared = files.below(state, f"transformer_blocks.0.{EMBEDDER}")
    for i in range(1, model.depth):
        state |= {f"transformer_blocks.{i}.{EMBEDDER}{name}": a for name, a in shared.items()}
    return theirs, state


def of_original(state: Mapping[str, np.ndarray], factor: int = FACTOR) -> tuple[ConfigDict, Any]:
    """(config, params) of the authors' own tensors, the average where the file holds one; read off their shapes.

    A SiT's file has the same names and shapes and is not told from a DiT's, but was trained on another path and target.
    Raises InputError for a file of another kind, or a width that is none of S, B, L and XL.
    """
    state = files.below(state, "ema.") or state
    needed = "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.bias", "pos_embed"
    if missing := [name for name in needed if name not in state]:
        raise InputError(f"tensor {missing[0]} is missing: the file holds no DiT")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    if width not in HEADS:
        raise InputError(f"a DiT of width {width} is not read: how many heads it has the file does not say; allowed: {list(HEADS)}")
    side = math.isqrt(state["pos_embed"].shape[1])
    here = places(side, side, width)[None]
    if state["pos_embed"].shape != here.shape or not np.allclose(state["pos_embed"], here, atol=1e-3):
        raise InputError("tensor pos_embed is not the sines of places that a DiT has: the file holds another model")
    config = _config(
        size=side * patch * factor,
        channels=channels,
        out_channels=state["final_layer.linear.bias"].size // patch**2,
        table=scheduler.read({}),
        shift=0,
        patch=patch,
        width=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        heads=HEADS[width],
        classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        mlp_epsilon=1e-6,
    )
    shapes = unstacked(_shapes(config, channels))
    return config, stacked(mapping.load(shapes, original_rows(shapes), _split_qkv(state), ("pos_embed",)))


SHARED = {"patches": "pos_embed.proj", "modulation": "proj_out_1", "leave": "proj_out_2"}
HEARD = {
    "embed1": f"{EMBEDDER}timestep_embedder.linear_1",
    "embed2": f"{EMBEDDER}timestep_embedder.linear_2",
    "label": f"{EMBEDDER}class_embedder.embedding_table",
}
BLOCK = {
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "out": "attn1.to_out.0",
    "mlp1": "ff.net.0.proj",
    "mlp2": "ff.net.2",
    "modulation": "norm1.linear",
}
ORIGINAL_SHARED = {
    "patches": "x_embedder.proj",
    "modulation": "final_layer.adaLN_modulation.1",
    "leave": "final_layer.linear",
    "embed1": "t_embedder.mlp.0",
    "embed2": "t_embedder.mlp.2",
    "label": "y_embedder.embedding_table",
}
ORIGINAL_BLOCK = {
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "out": "attn.proj",
    "mlp1": "mlp.fc1",
    "mlp2": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}


def rows(shapes: Any) -> list[Row]:
    """Our tensors, unstacked, by diffusers' names; the embedder is that of block 0."""
    shared = SHARED | {ours: f"transformer_blocks.0.{theirs}" for ours, theirs in HEARD.items()}
    return _rows(shapes, shared, "transformer_blocks", BLOCK)


def original_rows(shapes: Any) -> list[Row]:
    """Our tensors, unstacked, by the authors' names, q, k and v apart."""
    return _rows(shapes, ORIGINAL_SHARED, "blocks", ORIGINAL_BLOCK)


def _rows(shapes: Any, shared: Mapping[str, str], blocks: str, block: Mapping[str, str]) -> list[Row]:
    made = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
        *outer, module, kind = (entry.key for entry in path)
        theirs = f"{blocks}.{outer[1]}.{block[module]}" if outer else shared[module]
        kernel = mapping.conv if len(leaf.shape) == 4 else mapping.dense
        layout = {"kernel": kernel, "bias": mapping.same, "embedding": mapping.null_last}[kind]
        made.append(Row("/".join((*outer, module, kind)), f"{theirs}.{'bias' if kind == 'bias' else 'weight'}", layout))
    return made


def unstacked(params: Any) -> Any:
    """Our tree with blocks/0, blocks/1 ... in place of a first axis of blocks; arrays or shapes."""
    blocks = params["params"]["blocks"]
    depth = jax.tree.leaves(blocks)[0].shape[0]

    def of(i: int) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) if _is_shape(a) else np.asarray(a[i]), blocks)

    return {"params": params["params"] | {"blocks": {str(i): of(i) for i in range(depth)}}}


def stacked(params: Any) -> Any:
    """What `unstacked` undoes."""
    blocks = params["params"]["blocks"]
    each = [blocks[str(i)] for i in range(len(blocks))]
    return {"params": params["params"] | {"blocks": jax.tree.map(lambda *a: np.stack(a), *each)}}


def _is_shape(a: Any) -> bool:
    return isinstance(a, jax.ShapeDtypeStruct)


def _one_embedder(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with the embedder of block 0 alone. Raises InputError where another block's is not the same."""
    kept = {}
    for name, a in state.items():
        at = name.split(".")
        if EMBEDDER not in name or at[:2] == ["transformer_blocks", "0"]:
            kept[name] = a
            continue
        first = ".".join([at[0], "0", *at[2:]])
        if first in state and not np.array_equal(state[first], a):
            raise InputError(f"tensor {name} differs from {first}: blocks with embedders of their own are not read")
    return kept


def _split_qkv(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with each attn.qkv, [3 width, ...], as attn.q, attn.k and attn.v."""
    made = {}
    for name, a in state.items():
        if ".attn.qkv." not in name:
            made[name] = a
        elif len(a) % 3:
            raise InputError(f"tensor {name} has shape {a.shape}, whose first size is not divisible by 3")
        else:
            made |= {name.replace(".qkv.", f".{part}."): each for part, each in zip("qkv", np.split(a, 3))}
    return made


def _config(
    size: int, channels: int, out_channels: int, table: Mapping[str, Any], shift: int, classes: int, **model: Any
) -> ConfigDict:
    """The config of a DiT on `size` x `size` images, trained on the table of a whole scheduler_config.json."""
    if out_channels not in (channels, 2 * channels):
        raise InputError(f"a DiT of {channels} channels in and {out_channels} out is not read; allowed: {channels}, {2 * channels}")
    learned = out_channels == 2 * channels
    return workdir.describe(
        (size, size, 3),
        dict(
            name="DiT",
            classes=classes,
            time=scheduler.hears(table, cos_first=1, shift=shift),
            out_channels=out_channels,
            dtype="float32",
            remat=False,
            **model,
        ),
        scheduler.process(dict(table) | {"variance_type": "learned_range" if learned else "fixed_small"}, 0.1 if classes else 0.0),
        scheduler.sampling(table) | dict(guidance=4.0 if classes else 1.0, num=8, batch_size=8, clip=False),
        f"autoencoder({workdir.FIRST_STAGE!r})",
    )


def _shapes(config: ConfigDict, channels: int) -> Any:
    model: Any = models.build(config.model)
    latent = jax.ShapeDtypeStruct((1, model.patch, model.patch, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), latent, jax.ShapeDtypeStruct((), jnp.float32))
