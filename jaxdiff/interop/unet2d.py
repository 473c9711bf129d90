"""diffusers' UNet2DModel in and out: config.json by `model_of` and `settings`, the tensors by `rows`; `scheduler` has the table.

Names and meanings: diffusers 0.42, models/unets/unet_2d.py; older files only lack some of the keys.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import experiment, models
from jaxdiff.errors import InputError
from jaxdiff.interop import folder, mapping, scheduler, workdir
from jaxdiff.interop.mapping import Row, conv, dense, module, norm
from jaxdiff.interop.scheduler import text
from jaxdiff.models.parts import group_count
from jaxdiff.run import Run

# What config.json may say, and what UNet2DModel takes where it says nothing.
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# The keys of which some values are read; with any other the network is one that there is none of here.
READ: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
# Which values the others may have.
KINDS: dict[str, folder.Kind] = {
    "sample_size": folder.or_null(folder.SIZE),
    "in_channels": folder.COUNT,
    "out_channels": folder.COUNT,
    "freq_shift": folder.OFFSET,
    "flip_sin_to_cos": folder.FLAG,
    "down_block_types": folder.WORDS,
    "up_block_types": folder.WORDS,
    "block_out_channels": folder.COUNTS,
    "layers_per_block": folder.COUNT,
    "dropout": folder.NUMBER,
    "attention_head_dim": folder.or_null(folder.COUNT),
    "norm_num_groups": folder.COUNT,
    "attn_norm_num_groups": folder.or_null(folder.COUNT),
    "norm_eps": folder.POSITIVE,
    "add_attention": folder.FLAG,
    "num_class_embeds": folder.or_null(folder.COUNT),
}
# A block's type -> whether it has attention, and how it changes the size; None is what downsample_type or upsample_type says.
DOWN = {"DownBlock2D": (False, "conv"), "ResnetDownsampleBlock2D": (False, "resnet"), "AttnDownBlock2D": (True, None)}
UP = {"UpBlock2D": (False, "conv"), "ResnetUpsampleBlock2D": (False, "resnet"), "AttnUpBlock2D": (True, None)}
# resnet_time_scale_shift -> our block; one that changes the size is named with Down or Up behind.
BLOCKS = {"default": "ResBlock", "scale_shift": "ADMBlock"}
PADDED = ("Down", "ADMDown")  # by downsample_padding

# The rows of a part, by its place here and there.
Rows = Callable[[str, str], list[Row]]

# A model that can be guided was trained with its label dropped; how often, its files do not tell. Ho and Salimans' choice.
DROPPED = 0.1


def read(source: str | Path, null_class: bool = False) -> workdir.Imported:
    """The UNet2DModel of a pipeline's folder (unet/ and scheduler/), or of one with config.json and the weights in it.

    With `null_class` the last of its classes is the null label, as of models trained to be guided without a classifier. Raises
    InputError that names a value, or a tensor, that there is no network here of.
    """
    pipeline = Path(source)
    place = pipeline / "unet" if (pipeline / "unet").is_dir() else pipeline
    around = (pipeline / "scheduler", pipeline, pipeline.parent / "scheduler")
    found = [at for at in (each / "scheduler_config.json" for each in around) if at.is_file()]
    theirs, state = folder.read(place)
    config = config_of(theirs, folder.read_json(found[0]) if found else {}, null_class)
    missing = "there is no scheduler_config.json: the table is taken to be DDPM's, of 1000 linear betas, and the target eps"
    notes = () if found else (missing,)
    return workdir.Imported("diffusers' UNet2DModel", config, params_of(config, state), (folder.weights(place),), notes)


def config_of(theirs: Mapping[str, Any], table: Mapping[str, Any], null_class: bool = False) -> ConfigDict:
    """Our config of what config.json and scheduler_config.json say. Raises InputError that names what is not read."""
    said, table = _said(theirs), scheduler.read(table)
    time = scheduler.hears(table, shift=said["freq_shift"], cos_first=int(said["flip_sin_to_cos"]))
    config = workdir.describe(
        _shape(said, table["variance_type"] == "learned_range"),
        model_of(said) | {"classes": _classes(said, null_class), "time": time},
        scheduler.process(table, DROPPED if null_class else 0.0),
        scheduler.sampling(table),
    )
    experiment.build(config)  # what none of the above looks at is told here
    return config


def model_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """Our model's fields, all but classes and time, of a whole config.json. Raises InputError for a network that is none here."""
    channels, norms = said["block_out_channels"], {"epsilon": float(said["norm_eps"]), "groups": said["norm_num_groups"]}
    attention, down, up = _placement(said)
    block, head = BLOCKS[said["resnet_time_scale_shift"]], said["attention_head_dim"] or 0
    for level in (*attention, len(channels) - 1):
        if head and channels[level] % head:
            raise InputError(f"config.json: attention_head_dim={head} does not divide block_out_channels={channels!r}")
    attend, middle = text("Attention", **norms, width=head), _middle(said, norms | {"width": head})
    return dict(
        name="UNet",
        channels=channels[0],
        multipliers=tuple(n // channels[0] for n in channels),
        blocks=said["layers_per_block"],
        attention=attention,
        heads=1,
        dropout=float(said["dropout"] or 0),
        block=text(block, **norms),
        attend=attend,
        **({} if middle == attend else {"middle_attend": middle}),
        down=PADDED[said["downsample_padding"]] if down == "conv" else text(f"{block}Down", **norms),
        up="Up" if up == "conv" else text(f"{block}Up", **norms),
        leave=text("Leave", **norms),
        dtype="float32",
        remat=False,
    )


def _middle(said: Mapping[str, Any], numbers: dict[str, Any]) -> str:
    """The middle's attention: theirs has no norm where the blocks scale and shift, unless attn_norm_num_groups gives it one."""
    groups, last = said["attn_norm_num_groups"], said["block_out_channels"][-1]
    if groups is not None and last % groups:
        raise InputError(f"config.json: attn_norm_num_groups={groups!r} does not divide the last of block_out_channels, {last}")
    if not said["add_attention"]:
        return "NoAttention"
    if groups is None and said["resnet_time_scale_shift"] == "scale_shift":
        return text("BareAttention", width=numbers["width"])
    return text("Attention", **numbers | ({} if groups is None else {"groups": groups}))


def said_by(
    kind: str,
    theirs: Mapping[str, Any],
    defaults: Mapping[str, Any],
    read: Mapping[str, tuple[Any, ...]],
    kinds: Mapping[str, folder.Kind],
) -> dict[str, Any]:
    """The whole of a U-Net's config.json, whose class is `kind`, in tuples: what it says over the defaults of its class.

    Raises InputError for keys and values that are not read.
    """
    if (name := theirs.get("_class_name", kind)) != kind:
        raise InputError(f"config.json: _class_name={name!r} is not read; allowed: {kind}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items() if not k.startswith("_")}
    if unknown := [key for key in given if key not in {*defaults, *read} and given[key] is not None]:
        raise InputError(f"config.json: {unknown[0]}={given[unknown[0]]!r} is no setting of a {kind} that is read")
    said = {**defaults, **given}
    folder.only("config.json", said, read)
    folder.check("config.json", said, kinds)
    channels, groups = said["block_out_channels"], said["norm_num_groups"]
    if any(n % channels[0] for n in channels):
        raise InputError(f"config.json: block_out_channels={channels!r} are not whole multiples of the first, which are read alone")
    if channels[0] % groups:
        raise InputError(f"config.json: norm_num_groups={groups!r} does not divide block_out_channels={channels!r}")
    if said["time_embedding_dim"] not in (None, 4 * channels[0]):
        raise InputError(
            f"config.json: time_embedding_dim={said['time_embedding_dim']!r} is not read; allowed: null, {4 * channels[0]}"
        )
    return said


def _said(theirs: Mapping[str, Any]) -> dict[str, Any]:
    said = said_by("UNet2DModel", theirs, DEFAULTS, READ, KINDS)
    if 2 * said["freq_shift"] >= said["block_out_channels"][0]:
        raise InputError(
            f"config.json: freq_shift={said['freq_shift']!r} is no less than half of "
            f"block_out_channels[0]={said['block_out_channels'][0]}"
        )
    return said


def _placement(said: Mapping[str, Any]) -> tuple[tuple[int, ...], str, str]:
    """The levels with attention, and how all levels change the size on the way down and up. Raises InputError where they differ."""
    levels = len(said["block_out_channels"])
    types = said["down_block_types"], said["up_block_types"]
    if any(len(each) != levels for each in types):
        raise InputError(f"config.json: {levels} block_out_channels, but {len(types[0])} down and {len(types[1])} up_block_types")
    down, up = (_kinds(*each) for each in zip(("down", "up"), (DOWN, UP), types, (said["downsample_type"], said["upsample_type"])))
    up = up[::-1]
    if [a for a, _ in down] != [a for a, _ in up]:
        raise InputError(
            f"config.json: up_block_types={types[1]!r} has attention at other levels than down_block_types={types[0]!r}, which is "
            "not read"
        )
    return tuple(i for i, (a, _) in enumerate(down) if a), _one("down", types[0], down[:-1]), _one("up", types[1], up[1:])


def _kinds(way: str, known: Mapping[str, tuple[bool, str | None]], types: Any, otherwise: str) -> list[tuple[bool, str]]:
    plain = [name.removeprefix("UNetRes") for name in types]  # as they were called in 2022
    if strange := [name for name in plain if name not in known]:
        raise InputError(f"config.json: {way}_block_types has {strange[0]!r}, which is not read; allowed: {', '.join(known)}")
    return [(attends, how or otherwise) for attends, how in map(known.__getitem__, plain)]


def _one(way: str, types: Any, kinds: list[tuple[bool, str]]) -> str:
    """The one way to change the size that all levels have."""
    ways = {how for _, how in kinds} or {"conv"}
    if len(ways) > 1:
        raise InputError(f"config.json: {way}_block_types={types!r} change the size in two ways, which is not read")
    return ways.pop()


def _shape(said: Mapping[str, Any], learned: bool) -> tuple[int, int, int]:
    size, channels = said["sample_size"], said["in_channels"]
    if size is None:
        raise InputError("config.json: sample_size=null does not say how large the images are; write it there")
    if said["out_channels"] != channels * (1 + learned):
        raise InputError(
            f"config.json: out_channels={said['out_channels']!r} with in_channels={channels!r} is not read; allowed: as many, or "
            "twice as many where scheduler_config.json says variance_type=learned_range"
        )
    return (*size, channels) if isinstance(size, tuple) else (size, size, channels)


def _classes(said: Mapping[str, Any], null_class: bool) -> int:
    count = said["num_class_embeds"] or 0
    if null_class and count < 2:
        raise InputError(f"config.json: num_class_embeds={said['num_class_embeds']!r} leaves no class that could be the null label")
    return count - null_class


def params_of(config: ConfigDict, state: Mapping[str, np.ndarray]) -> Any:
    """Our parameters of their tensors. Raises InputError that names a tensor which is missing, of nothing or misshapen."""
    shapes = jax.eval_shape(experiment.build(config).init, jax.random.key(0))
    return mapping.load(shapes, rows(config, shapes), folder.renamed(state))


def rows(config: ConfigDict, params: Any, attend: Rows | None = None) -> list[Row]:
    """Where every parameter (or its shape) of a U-Net is among their tensors; `attend` gives the rows of its attention."""
    attend = attend or _attend
    out = module("conv_in", "conv_in", conv) + module("conv_out", "conv_out", conv) + norm("norm_out", "conv_norm_out")
    out += module("embed1", "time_embedding.linear_1", dense) + module("embed2", "time_embedding.linear_2", dense)
    out += [
        Row("label/embedding", "class_embedding.weight", mapping.null_last if config.process.drop_label else mapping.without_null)
    ]
    last, blocks = len(config.model.multipliers) - 1, config.model.blocks
    for level in range(last + 1):
        for way, theirs, sampler, count in (
            ("down", f"down_blocks.{level}", "downsamplers", blocks),
            ("up", f"up_blocks.{last - level}", "upsamplers", blocks + 1),
        ):
            for i in range(count):
                out += _block(f"{way}{level}_{i}_block", f"{theirs}.resnets.{i}")
                out += attend(f"{way}{level}_{i}_attention", f"{theirs}.attentions.{i}")
            out += module(f"{way}{level}/conv", f"{theirs}.{sampler}.0.conv", conv)
            out += _block(f"{way}{level}", f"{theirs}.{sampler}.0")
    out += _block("middle_block1", "mid_block.resnets.0") + _block("middle_block2", "mid_block.resnets.1")
    return mapping.within(out + attend("middle_attention", "mid_block.attentions.0"), params)


def _block(ours: str, theirs: str) -> list[Row]:
    """A residual block's rows; whether it has a shortcut, its channels decide."""
    out = norm(f"{ours}/norm1", f"{theirs}.norm1") + module(f"{ours}/conv1", f"{theirs}.conv1", conv)
    out += module(f"{ours}/embed", f"{theirs}.time_emb_proj", dense)
    out += norm(f"{ours}/norm2", f"{theirs}.norm2") + module(f"{ours}/conv2", f"{theirs}.conv2", conv)
    return out + module(f"{ours}/shortcut", f"{theirs}.conv_shortcut", mapping.pointwise)


def _attend(ours: str, theirs: str) -> list[Row]:
    out = norm(f"{ours}/norm", f"{theirs}.group_norm")
    for name, other in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
        out += module(f"{ours}/{name}", f"{theirs}.{other}", dense)
    return out


def export(run: Run, to: str | Path) -> None:
    """Writes the model of a run as diffusers' DDPMPipeline, which DDIMPipeline loads as well: model_index.json, unet/, scheduler/.

    Where the null label was trained it becomes the last class. Read again it is the same, bit by bit. Raises InputError for a
    network that no UNet2DModel is, above all one that does not hear the rows of a table, and where the folder has a model already.
    """
    to, config = Path(to), run.config
    unet, table = settings(config, run.params), scheduler.write(config)
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", table["_class_name"]],
        "unet": ["diffusers", unet["_class_name"]],
    }
    folder.write(to / "unet", unet, mapping.save(run.params, rows(config, run.params)))
    (to / "scheduler").mkdir(exist_ok=True)
    for at, said in (("scheduler/scheduler_config", table), ("model_index", index)):
        (to / f"{at}.json").write_text(json.dumps(said, indent=2) + "\n")


class Part(NamedTuple):
    """A part of a network by name, with the numbers it holds."""

    name: str
    numbers: dict[str, Any]


def settings(config: ConfigDict, params: Any) -> dict[str, Any]:
    """config.json of our U-Net. Raises InputError that names what no UNet2DModel has."""
    if config.model.name != "UNet":
        raise InputError(f"model.name={config.model.name!r} cannot be exported; allowed: UNet")
    model, built = models.build(config.model), experiment.build(config)
    parts = {role: _part(getattr(model, role)) for role in ("embed", "enter", "block", "attend", "down", "up", "leave")}
    parts["middle_attend"] = _part(model.middle_attend or model.attend)
    _check_parts(config, model, parts)
    height, width, channels = built.shape
    return {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels * built.objective.outputs,
        **_time(config, _part(model.time)),
        "down_block_types": _types(model, parts["down"], DOWN),
        "up_block_types": _types(model, parts["up"], UP)[::-1],
        "block_out_channels": [model.channels * m for m in model.multipliers],
        "layers_per_block": model.blocks,
        "downsample_padding": PADDED.index(parts["down"].name) if parts["down"].name in PADDED else 1,
        "downsample_type": _change(parts["down"]),
        "upsample_type": _change(parts["up"]),
        "dropout": model.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head(model, parts),
        **_norms(params, parts),
        "resnet_time_scale_shift": next(k for k, v in BLOCKS.items() if v == parts["block"].name),
        "add_attention": parts["middle_attend"].name != "NoAttention",
        "num_class_embeds": model.classes + bool(config.process.drop_label) if model.classes else None,
    }


def _part(part: Any) -> Part:
    kind = getattr(part, "func", part)
    fields = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    return Part(kind.__name__, fields | getattr(part, "keywords", {}))


def _check_parts(config: ConfigDict, model: Any, parts: Mapping[str, Part]) -> None:
    """Raises InputError for a part that a UNet2DModel has nothing like."""
    block = parts["block"].name
    allowed = {
        "embed": ("Embed",),
        "enter": ("Enter",),
        "block": tuple(BLOCKS.values()),
        "attend": ("Attention",),
        "middle_attend": ("Attention", "NoAttention", *(["BareAttention"] if block == "ADMBlock" else [])),
        "down": (*PADDED, f"{block}Down"),
        "up": ("Up", f"{block}Up"),
        "leave": ("Leave",),
    }
    for role, able in allowed.items():
        name, numbers = parts[role]
        if name not in able or numbers.get("scale", 1.0) != 1:
            said = config.model.get(role, name)
            raise InputError(f"model.{role}={said!r} cannot be exported; allowed: {', '.join(able)}, with no scale")
    if model.augment or (model.attention and not model.attend_each):
        key = "augment" if model.augment else "attend_each"
        raise InputError(f"model.{key}={getattr(model, key)!r} cannot be exported: UNet2DModel has nothing like it")


def _time(config: ConfigDict, time: Part) -> dict[str, Any]:
    """How they are to hear the row of the table. Raises InputError where the network hears something else."""
    table, numbers = scheduler.table_of(config)
    hears = scheduler.TABLES[table][1]
    if time.name != hears or any(time.numbers[key] != value for key, value in numbers.items()) or time.numbers["scale"] != 1:
        raise InputError(
            f"model.time={config.model.get('time', time.name)!r} cannot be exported: diffusers' networks hear the row of a table; "
            f"train with model.time={text(hears, **numbers)!r}"
        )
    return {
        "time_embedding_type": "positional",
        "freq_shift": time.numbers["shift"],
        "flip_sin_to_cos": bool(time.numbers["cos_first"]),
    }


def _change(part: Part) -> str:
    return "resnet" if "Block" in part.name else "conv"


def _types(model: Any, part: Part, known: Mapping[str, tuple[bool, str | None]]) -> list[str]:
    """A block's type for every level."""
    plain = next(name for name, row in known.items() if row == (False, _change(part)))
    attends = next(name for name, row in known.items() if row[0])
    return [attends if level in model.attention else plain for level in range(len(model.multipliers))]


def _head(model: Any, parts: Mapping[str, Part]) -> int | None:
    """The channels of a head, None where there is one head. Raises InputError where heads differ."""
    last = len(model.multipliers) - 1
    looks = [(level, parts["attend"]) for level in model.attention]
    looks += [] if parts["middle_attend"].name == "NoAttention" else [(last, parts["middle_attend"])]
    sizes = [(model.channels * model.multipliers[level], part.numbers["width"]) for level, part in looks]
    heads = [width or channels // model.heads for channels, width in sizes]
    if all(head == channels for head, (channels, _) in zip(heads, sizes, strict=True)):
        return None
    if len(set(heads)) > 1:
        raise InputError(
            f"model.heads={model.heads!r} cannot be exported: its heads have {_listed(heads)} channels, and UNet2DModel has one "
            "attention_head_dim; train with model.attend='Attention(width=8)', say"
        )
    return heads[0]


def _norms(params: Any, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Their groups and epsilon. Raises InputError where the norms of the network do not agree on them."""
    found = [(_role(path), a.shape[0]) for path, a in mapping.paths(params).items() if path.endswith("/scale")]
    counts = {(role, group_count(channels, parts[role].numbers["groups"])) for role, channels in found}
    middle = {count for role, count in counts if role == "middle_attend"}
    groups = {count for role, count in counts if role != "middle_attend"}
    if len(groups) > 1:
        raise InputError(
            f"the norms cannot be exported: they have {_listed(groups)} groups, and UNet2DModel has one norm_num_groups; "
            f"give block, attend and leave of model one number, as in model.attend='Attention(groups={min(groups)})'"
        )
    epsilons = {parts[role].numbers["epsilon"] for role, _ in found}
    if len(epsilons) > 1:
        raise InputError(
            f"the norms cannot be exported: they have epsilon={_listed(epsilons)}, and UNet2DModel has one norm_eps; "
            f"give block, attend and leave of model one number, as in model.attend='Attention(epsilon={min(epsilons)})'"
        )
    itself = parts["block"].name == "ResBlock" and middle == groups
    return {
        "norm_num_groups": groups.pop(),
        "norm_eps": epsilons.pop(),
        "attn_norm_num_groups": None if itself or not middle else middle.pop(),
    }


def _role(path: str) -> str:
    """The role of the part that a norm is in."""
    place = path.split("/")[0]
    named = {"norm_out": "leave", "middle_attention": "middle_attend"}
    if place in named:
        return named[place]
    return "attend" if place.endswith("_attention") else "block" if "_block" in place else place.rstrip("0123456789")


def _listed(numbers: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(set(numbers))))
