"""OpenAI's state dicts: the U-Nets of Improved DDPM and ADM, and ADM's classifiers of noisy images.

Their files hold tensors alone. What shapes tell, `plan` reads off them; what they do not (`Facts`) is known of the published files
by their names, and for any other file the caller says it. Names of tensors, flags and values: the public code and READMEs of
openai/improved-diffusion and openai/guided-diffusion.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import experiment
from jaxdiff.errors import InputError, nearest
from jaxdiff.interop import files, mapping, workdir
from jaxdiff.interop.mapping import Layout, Row, conv, dense, module, norm, pointwise, pointwise1d
from jaxdiff.names import whole

Shapes = Mapping[str, tuple[int, ...]]


class Facts(NamedTuple):
    """What no tensor tells, by the names of the flags: of attention `heads` or `head_channels`, of the time `steps` to the last.

    `rescale_timesteps`: the network hears the row's number times 1000 / steps. `new_attention_order`: all q stand before all k,
    not head by head. `objective` is what it was trained on, where it has learned sigmas.
    """

    image_size: int = 0
    heads: int = 0
    head_channels: int = 0
    steps: int = 0
    schedule: str = ""
    rescale_timesteps: bool = False
    new_attention_order: bool = False
    objective: str = "hybrid(0.001)"
    data: str = "folder"


# Those that a caller may say.
FLAGS = tuple(name for name in Facts._fields if name not in ("objective", "data"))


_IDDPM = Facts(heads=4, steps=4000, schedule="cosine", rescale_timesteps=True)
_IDDPM_LSUN = Facts(256, heads=1, steps=1000, schedule="linear")
_ADM = Facts(head_channels=64, steps=1000, schedule="linear")
_ADM_256 = _ADM._replace(image_size=256)

# The published files. A hybrid's share is 1 / steps where their loss is not rescaled. A classifier's schedule is that of the model
# which it is to guide.
PUBLISHED = {
    "cifar10_uncond_50M_500K.pt": _IDDPM._replace(image_size=32, data="cifar10"),
    "cifar10_uncond_vlb_50M_500K.pt": _IDDPM._replace(image_size=32, data="cifar10", objective="vlb"),
    "imagenet64_uncond_100M_1500K.pt": _IDDPM._replace(image_size=64),
    "imagenet64_uncond_vlb_100M_1500K.pt": _IDDPM._replace(image_size=64, objective="vlb"),
    "imagenet64_cond_270M_250K.pt": _IDDPM._replace(image_size=64, rescale_timesteps=False, objective="hybrid(0.00025)"),
    "lsun_uncond_100M_1200K_bs128.pt": _IDDPM_LSUN,
    "lsun_uncond_100M_2400K_bs64.pt": _IDDPM_LSUN,
    "64x64_diffusion.pt": _ADM._replace(image_size=64, schedule="cosine", new_attention_order=True),
    "128x128_diffusion.pt": _ADM._replace(image_size=128, heads=4, head_channels=0),
    "256x256_diffusion.pt": _ADM_256,
    "256x256_diffusion_uncond.pt": _ADM_256,
    "512x512_diffusion.pt": _ADM._replace(image_size=512),
    "lsun_bedroom.pt": _ADM_256,
    "lsun_cat.pt": _ADM_256,
    "lsun_horse.pt": _ADM_256,
    "lsun_horse_nodropout.pt": _ADM_256,
    "64x64_classifier.pt": _ADM._replace(image_size=64, schedule="cosine"),
    "128x128_classifier.pt": _ADM._replace(image_size=128),
    "256x256_classifier.pt": _ADM_256,
    "512x512_classifier.pt": _ADM._replace(image_size=512),
}

# schedule -> our table of that many steps, and the part that hears its rows.
SCHEDULES = {"linear": ("linear_beta", "LinearBetaSinusoidal"), "cosine": ("cosine_beta", "CosineBetaSinusoidal")}


class Plan(NamedTuple):
    """What shapes tell: of the U-Net, or where `outputs` is 0 the classifier; `outputs` is per colour, 2 with learned sigmas.

    `channels` are those at full size; the embedding is as wide as for `factor` times as many.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    factor: int
    classes: int
    colours: int
    outputs: int
    resblock_updown: bool
    scale_shift_norm: bool


def matches(names: Any) -> bool:
    """Whether tensors of these names are one of OpenAI's models."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight"} <= set(names)


def read(path: str | Path, **flags: Any) -> workdir.Imported:
    """The model of a file (.pt), whose `flags`, fields of Facts, say what is not known by its name.

    Raises InputError that names the flag that is missing or wrong, or the tensor that is missing, of nothing or misshapen.
    """
    path = Path(path)
    state = files.read(path)
    if not matches(state):
        raise InputError(f"{path} holds none of OpenAI's diffusion models, whose tensors begin with time_embed and input_blocks")
    facts = facts_of(path.name, flags)
    config, params = of(state, facts)
    kind = "classifier" if config.model.name == "Classifier" else "U-Net"
    notes = () if path.name in PUBLISHED else (f"{path.name} is not the name of a published file: what it is, the flags say",)
    return workdir.Imported(f"OpenAI's {kind}", config, params, (path,), notes)


def of(state: Mapping[str, np.ndarray], facts: Facts) -> tuple[ConfigDict, Any]:
    """Our config and parameters of their tensors."""
    found = plan({name: a.shape for name, a in state.items()}, facts.image_size)
    config = config_of(found, facts)
    shapes = jax.eval_shape(experiment.build(config).init, jax.random.key(0))
    return config, mapping.load(shapes, rows(found, shapes), split_qkv(state, facts))


def facts_of(name: str, flags: Mapping[str, Any]) -> Facts:
    """The facts of a published file, or those that the flags give, which are put over them.

    Raises InputError for a flag that is missing or wrong.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    for key in given:
        if key not in Facts._fields:
            raise InputError(f"--{key} is unknown{nearest(key, Facts._fields)}; allowed: {_flags(Facts._fields)}")
    if {"heads", "head_channels"} <= set(given):
        raise InputError("--heads and --head_channels both say how attention is split; give one")
    known = PUBLISHED.get(name, Facts())
    if "heads" in given or "head_channels" in given:
        known = known._replace(heads=0, head_channels=0)
    facts = _checked(known._replace(**given))
    needed = {flag: getattr(facts, flag) for flag in ("image_size", "steps", "schedule")}
    needed["heads (or --head_channels)"] = facts.heads or facts.head_channels
    if facts.steps not in (0, 1000) and name not in PUBLISHED and "rescale_timesteps" not in given:
        needed["rescale_timesteps (True or False; improved-diffusion's default is True)"] = None
    if missing := [flag for flag, value in needed.items() if not value]:
        raise InputError(
            f"{name} is no published file, and no tensor tells --{missing[0]}; the published are {', '.join(PUBLISHED)}"
        )
    return _checked(facts)


def _checked(facts: Facts) -> Facts:
    for flag in ("image_size", "heads", "head_channels", "steps"):
        if not whole(getattr(facts, flag), 0):
            raise InputError(f"--{flag}={getattr(facts, flag)!r} is out of range; it is a whole number, at least 1")
    for flag in ("rescale_timesteps", "new_attention_order"):
        if not isinstance(getattr(facts, flag), bool):
            raise InputError(f"--{flag}={getattr(facts, flag)!r} is out of range; it is True or False")
    if facts.schedule and facts.schedule not in SCHEDULES:
        raise InputError(f"--schedule={facts.schedule!r} is unknown; allowed: {', '.join(SCHEDULES)}")
    return facts


def _flags(names: Any) -> str:
    return ", ".join(f"--{name}" for name in names)


def plan(shapes: Shapes, image_size: int) -> Plan:
    """What the shapes of the tensors tell. Raises InputError for a network that there is none here of."""
    full, colours = _shape(shapes, "input_blocks.0.0.weight", 4)[:2]
    if colours == 6:
        raise InputError("input_blocks.0.0.weight hears 6 channels: an upsampler, which also needs a small image, is not read")
    classifies = not any(name.startswith("output_blocks.") for name in shapes)
    blocks, levels = _depth_of_classifier(shapes, image_size) if classifies else _depth(shapes)
    firsts = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    channels = [_shape(shapes, f"{first}.0.out_layers.3.weight", 4)[0] for first in firsts]
    embedded = _shape(shapes, "time_embed.0.weight", 2)[1]
    if any(n % full for n in (*channels, embedded)):
        raise InputError(
            f"channels {channels} and {embedded} of time_embed.0.weight are not multiples of the first {full}; not read"
        )
    return Plan(
        channels=full,
        multipliers=tuple(n // full for n in channels),
        blocks=blocks,
        attention=tuple(level for level, first in enumerate(firsts) if f"{first}.1.qkv.weight" in shapes),
        factor=embedded // full,
        classes=_classes(shapes, classifies),
        colours=colours,
        outputs=0 if classifies else _outputs(shapes, colours),
        resblock_updown=not any(name.endswith(".op.weight") for name in shapes),
        scale_shift_norm=_shape(shapes, f"{firsts[0]}.0.emb_layers.1.weight", 2)[0] == 2 * channels[0],
    )


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise InputError(f"tensor {name} is missing: the file is not of this architecture")
    if len(shapes[name]) != axes:
        raise InputError(f"tensor {name} has shape {tuple(shapes[name])}, this architecture's has {axes} axes")
    return tuple(shapes[name])


def _depth(shapes: Shapes) -> tuple[int, int]:
    """Blocks a level, and levels, of a U-Net: the first of its output blocks that also doubles the size is the last of a level."""
    count = _count(shapes, "output_blocks.")
    doubles = [n for n in range(count) for m in (1, 2) if _doubles(shapes, f"output_blocks.{n}.{m}.")]
    blocks = min(doubles) if doubles else count - 1
    if blocks < 1 or count % (blocks + 1):
        raise InputError(
            f"{count} output_blocks, one of {blocks + 1} doubling the size, are no whole levels: none of OpenAI's U-Nets"
        )
    return blocks, count // (blocks + 1)


def _doubles(shapes: Shapes, prefix: str) -> bool:
    return f"{prefix}conv.weight" in shapes or f"{prefix}in_layers.2.weight" in shapes


def _depth_of_classifier(shapes: Shapes, image_size: int) -> tuple[int, int]:
    """Blocks a level, and levels, of a classifier: by how many places its pooling has."""
    if "out.2.positional_embedding" not in shapes:
        raise InputError("tensor out.2.positional_embedding is missing: only a classifier with attention pooling is read")
    places = _shape(shapes, "out.2.positional_embedding", 2)[1]
    side, count = math.isqrt(places - 1), _count(shapes, "input_blocks.")
    levels = round(math.log2(image_size / side)) + 1 if side and image_size >= side else 0
    if side**2 + 1 != places or levels < 1 or side * 2 ** (levels - 1) != image_size or count % levels or count < 2 * levels:
        raise InputError(
            f"--image_size={image_size} is none of a classifier with {count} input_blocks that pools {side}x{side} places"
        )
    return count // levels - 1, levels


def _count(shapes: Shapes, prefix: str) -> int:
    numbers = {name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)}
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def _classes(shapes: Shapes, classifies: bool) -> int:
    if classifies:
        return _shape(shapes, "out.2.c_proj.weight", 3)[0]
    return _shape(shapes, "label_emb.weight", 2)[0] if "label_emb.weight" in shapes else 0


def _outputs(shapes: Shapes, colours: int) -> int:
    channels = _shape(shapes, "out.2.weight", 4)[0]
    if channels not in (colours, 2 * colours):
        raise InputError(
            f"out.2.weight gives {channels} channels of {colours}; allowed: {colours}, or twice that with learned sigmas"
        )
    return channels // colours


def config_of(found: Plan, facts: Facts) -> ConfigDict:
    """Our config of a network and its facts. Raises InputError for facts that it cannot have."""
    channels = [found.channels * found.multipliers[level] for level in (*found.attention, -1)]
    _check_heads(channels, facts)
    if facts.image_size % 2 ** (len(found.multipliers) - 1):
        raise InputError(
            f"--image_size={facts.image_size} is not divisible by {2 ** (len(found.multipliers) - 1)}, as {len(found.multipliers)} "
            "levels need"
        )
    schedule, time = _time(facts)
    process = dict(schedule=schedule, draw=f"draw_table({facts.steps})", data_std=1.0)
    sampling: dict[str, Any] = dict(batch_size=16)
    if not found.outputs:
        process["loss"] = "cross_entropy"
    else:
        learned = found.outputs == 2
        process |= dict(target="eps", weight="unit", loss=facts.objective if learned else "simple", drop_label=0.0)
        sampling |= dict(
            times=f"strided({facts.steps}, spacing='linspace')",
            solver="ddpm_learned" if learned else "ddpm_large",
            steps=min(250, facts.steps),
            max_steps=facts.steps,
            guidance=1.0,
            num=16,
            clip=True,
        )
    shape = (facts.image_size, facts.image_size, found.colours)
    config = workdir.describe(shape, model_of(found, facts) | {"time": time}, process, sampling)
    config.data.name = facts.data
    experiment.build(config)  # what none of the above looks at is told here
    return config


def _check_heads(channels: list[int], facts: Facts) -> None:
    flag = "heads" if facts.heads else "head_channels"
    if any(n % getattr(facts, flag) for n in channels):
        raise InputError(
            f"--{flag}={getattr(facts, flag)} does not divide the channels where attention is, {sorted(set(channels))}"
        )


def _time(facts: Facts) -> tuple[str, str]:
    """The schedule, and the part that hears its rows; betas of a linear table of other than 1000 rows are scaled to end alike."""
    schedule, part = SCHEDULES[facts.schedule]
    scale = 1000 / facts.steps
    betas = f", first={1e-4 * scale!r}, last={0.02 * scale!r}" if facts.schedule == "linear" else ""
    table = f"steps={facts.steps}{betas}"
    heard = scale if facts.rescale_timesteps else 1.0
    return f"{schedule}({table})", f"{part}({table}, scale={heard!r}, shift=0, cos_first=1)"


def model_of(found: Plan, facts: Facts) -> dict[str, Any]:
    """Our network's fields, all but `time`."""
    block = "ADMBlock" if found.scale_shift_norm else "ResBlock"
    numbers = "epsilon=1e-5, groups=32"
    width = f"{numbers}, width={facts.head_channels}"
    model = dict(
        name="UNet" if found.outputs else "Classifier",
        channels=found.channels,
        multipliers=found.multipliers,
        blocks=found.blocks,
        attention=found.attention,
        heads=facts.heads or 1,
        classes=found.classes,
        dropout=0.0,
        embed=f"Embed(factor={found.factor})",
        block=f"{block}({numbers})",
        attend=f"Attention({width})",
        down=f"{block}Down({numbers})" if found.resblock_updown else "ADMDown",
        dtype="float32",
        remat=False,
    )
    if not found.outputs:
        return model | dict(pool=f"AttentionPool({width})")
    up = f"{block}Up({numbers})" if found.resblock_updown else "Up"
    return model | dict(up=up, leave=f"Leave({numbers})", out_channels=found.outputs * found.colours)


def split_qkv(state: Mapping[str, np.ndarray], facts: Facts) -> dict[str, np.ndarray]:
    """The tensors with q, k and v, which theirs hold as one, apart: of "x.qkv.weight" "x.qkv.weight[q]", [k] and [v].

    Their channels are (head, q k v, channel of a head), in the new order and in the classifier's pooling (q k v, head, channel).
    """
    out = {}
    for name, a in state.items():
        layer, _, last = name.rpartition(".")
        kind = layer.rpartition(".")[2]
        if kind not in ("qkv", "qkv_proj") or last not in ("weight", "bias"):
            out[name] = a
            continue
        channels = a.shape[0] // 3 if a.ndim else 0
        heads = facts.heads or max(channels // facts.head_channels, 1)
        if not channels or a.shape[0] % (3 * heads):
            raise InputError(f"tensor {name} has shape {a.shape}, which {heads} heads of q, k and v do not divide")
        apart = by_part if facts.new_attention_order or kind == "qkv_proj" else by_head
        out |= {f"{name}[{part}]": each for part, each in zip("qkv", apart(a, heads))}
    return out


def by_head(a: np.ndarray, heads: int) -> np.ndarray:
    """[heads * 3 * C / heads, ...] -> q, k and v, [3, C, ...]."""
    return a.reshape(heads, 3, -1, *a.shape[1:]).swapaxes(0, 1).reshape(3, -1, *a.shape[1:])


def by_part(a: np.ndarray, heads: int) -> np.ndarray:
    """[3 * C, ...] -> q, k and v, [3, C, ...]; their heads lie as ours."""
    return a.reshape(3, -1, *a.shape[1:])


_places = Layout(lambda a: a.T[None], lambda a: a[0].T)


def rows(found: Plan, shapes: Any) -> list[Row]:
    """Where every parameter is among their tensors, q, k and v apart."""
    out = module("embed1", "time_embed.0", dense) + module("embed2", "time_embed.2", dense)
    out += [Row("label/embedding", "label_emb.weight", mapping.without_null)] + module("conv_in", "input_blocks.0.0", conv)
    blocks, last = found.blocks, len(found.multipliers) - 1
    for level in range(last + 1):
        for i in range(blocks):
            out += _block_and_attention(f"down{level}_{i}", f"input_blocks.{1 + level * (blocks + 1) + i}")
        out += _resample(f"down{level}", f"input_blocks.{(level + 1) * (blocks + 1)}.0", "op")
        for i in range(blocks + 1):
            out += _block_and_attention(f"up{level}_{i}", f"output_blocks.{(last - level) * (blocks + 1) + i}")
        attends = level in found.attention
        out += _resample(f"up{level}", f"output_blocks.{(last - level + 1) * (blocks + 1) - 1}.{1 + attends}", "conv")
    out += _block("middle_block1", "middle_block.0") + _attention("middle_attention", "middle_block.1")
    out += _block("middle_block2", "middle_block.2") + norm("norm_out", "out.0")
    return mapping.within(out + (module("conv_out", "out.2", conv) if found.outputs else _pool("out.2")), shapes)


def _block_and_attention(ours: str, theirs: str) -> list[Row]:
    return _block(f"{ours}_block", f"{theirs}.0") + _attention(f"{ours}_attention", f"{theirs}.1")


def _resample(ours: str, theirs: str, name: str) -> list[Row]:
    return _block(ours, theirs) + module(f"{ours}/conv", f"{theirs}.{name}", conv)


def _block(ours: str, theirs: str) -> list[Row]:
    out = norm(f"{ours}/norm1", f"{theirs}.in_layers.0") + module(f"{ours}/conv1", f"{theirs}.in_layers.2", conv)
    out += module(f"{ours}/embed", f"{theirs}.emb_layers.1", dense)
    out += norm(f"{ours}/norm2", f"{theirs}.out_layers.0") + module(f"{ours}/conv2", f"{theirs}.out_layers.3", conv)
    return out + module(f"{ours}/shortcut", f"{theirs}.skip_connection", pointwise)


def _attention(ours: str, theirs: str) -> list[Row]:
    out = norm(f"{ours}/norm", f"{theirs}.norm") + module(f"{ours}/out", f"{theirs}.proj_out", pointwise1d)
    return out + _parts(lambda part: f"{ours}/{part}", f"{theirs}.qkv")


def _pool(theirs: str) -> list[Row]:
    out = [Row("place", f"{theirs}.positional_embedding", _places)] + module("logits", f"{theirs}.c_proj", pointwise1d)
    return out + _parts(str, f"{theirs}.qkv_proj")


def _parts(ours: Callable[[str], str], theirs: str) -> list[Row]:
    kinds = (("kernel", "weight", pointwise1d), ("bias", "bias", mapping.same))
    return [Row(f"{ours(p)}/{kind}", f"{theirs}.{other}[{p}]", layout) for p in "qkv" for kind, other, layout in kinds]
