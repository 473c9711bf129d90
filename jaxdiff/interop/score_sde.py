"""score_sde's models of the VP and sub-VP SDE, DDPM and DDPM++: what its PyTorch port saved (.pth), and the JAX originals.

Both files hold the average of the parameters, which is read. The modules are a list there, by number or by kind and number, in the
order in which `modules` goes through our network. Which SDE the model was trained on no tensor tells: of the published ones the
folder's name does, of others the caller. Names and numbers: the public code of yang-song/score_sde and score_sde_pytorch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgpack
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import experiment
from jaxdiff.errors import InputError, nearest
from jaxdiff.interop import files, mapping, workdir
from jaxdiff.interop.mapping import Layout, Row, conv, dense, pointwise, same
from jaxdiff.names import whole

State = Mapping[str, np.ndarray]

# What a network was trained on -> the curve, the times, how it hears the time, how the image enters, and the times to draw with.
SDES = {
    "vp": ("vp(0.1, 20.0)", "draw_uniform(1e-5, 1.0)", "VPSinusoidal", "Enter", "linear(lo=0.001, hi=1.0)"),
    "vp_discrete": ("linear_beta(steps=1000)", "draw_table(1000)", "LinearBetaSinusoidal", "Enter", "strided(1000)"),
    "subvp": ("subvp(0.1, 20.0)", "draw_uniform(1e-5, 1.0)", "SubVPSinusoidal", "SubVPEnter", "linear(lo=0.001, hi=1.0)"),
}
# The folders of the published checkpoints, all of CIFAR-10.
PUBLISHED = {
    "vp/cifar10_ddpm": "vp_discrete",
    "vp/cifar10_ddpm_continuous": "vp",
    "vp/cifar10_ddpmpp": "vp_discrete",
    "vp/cifar10_ddpmpp_continuous": "vp",
    "vp/cifar10_ddpmpp_deep_continuous": "vp",
    "subvp/cifar10_ddpm_continuous": "subvp",
    "subvp/cifar10_ddpmpp_continuous": "subvp",
    "subvp/cifar10_ddpmpp_deep_continuous": "subvp",
}


class Kind(NamedTuple):
    """A family's parts: what the JAX code calls its blocks and attention, and our parts by role."""

    block: str
    attention: str
    parts: dict[str, str]


# Theirs have a quarter as many groups as channels, at most 32 (DDPM: 32 always), which is ours but for odd numbers of channels.
DDPMPP = Kind(
    "ResnetBlockBigGANpp",
    "AttnBlockpp",
    dict(block="DDPMppBlock", attend="DDPMppAttention", down="DDPMppDown", up="DDPMppUp", leave="Leave"),
)
DDPM = Kind(
    "ResnetBlockDDPM",
    "AttnBlock",
    dict(block="ResBlock(groups=32)", attend="Attention(groups=32)", down="Down", up="Up", leave="Leave(groups=32)"),
)


class Plan(NamedTuple):
    """What the tensors tell of the network."""

    kind: Kind
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    colours: int


class Style(NamedTuple):
    """How a framework names and lays out what a module holds."""

    weight: str
    scale: str
    conv: Layout
    dense: Layout
    pointwise: Layout


TORCH = Style("weight", "weight", conv, dense, pointwise)
# Flax's convolution by 1x1 is [1, 1, in, out].
FLAX = Style("kernel", "scale", same, same, Layout(lambda a: a.reshape(a.shape[-2:]), lambda a: a[None, None]))


def matches(names: Any) -> bool:
    """Whether tensors of these names, of a .pth of score_sde or the flat parameters of its JAX original, are one of its models."""
    return any("all_modules.0." in name or name.startswith("params_ema.") for name in names)


def is_flax(path: str | Path) -> bool:
    """Whether a file begins as the msgpack of a dict with names, what Flax's checkpoints are: `tensors` reads it."""
    with Path(path).open("rb") as file:
        head = file.read(9).ljust(9, b"\0")
    begins = 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)
    return begins and head[8:9] != b"{"  # which is where a safetensors file begins its header


def read(path: str | Path, sde: str | None = None, image_size: int | None = None) -> workdir.Imported:
    """The averaged model of a checkpoint_N.pth, or a checkpoint_N of the JAX code.

    `sde`, one of SDES, and `image_size` say what is not known by the folder's name. Raises InputError that names the flag that is
    missing or wrong, or the tensor that is missing, of nothing or misshapen.
    """
    path = Path(path)
    sde, image_size = _said(path, sde, image_size)
    state = tensors(path)
    if not matches(state):
        raise InputError(f"{path} is no checkpoint of score_sde: it has neither all_modules nor params_ema")
    config, params = of(state, sde, image_size)
    return workdir.Imported("score_sde's " + ("DDPM" if config.model.block != "DDPMppBlock" else "DDPM++"), config, params, (path,))


def tensors(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of such a file by name, as `files.read` has them. Raises InputError for a file that cannot be read."""
    path = Path(path)
    if not path.is_file() or not is_flax(path):
        return files.read(path)
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_extension, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise InputError(f"{path} is no checkpoint of Flax, or is cut short ({type(error).__name__}: {error})") from error
    return files.flat(tree)


def _extension(code: int, data: bytes) -> Any:
    """Flax writes an array (1) or a number (3) as its shape, the name of its type and its bytes."""
    if code not in (1, 3):
        return None
    shape, dtype, raw = msgpack.unpackb(data, raw=False)
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape)


def _said(path: Path, sde: str | None, image_size: int | None) -> tuple[str, int]:
    """What was trained on, and the images' size, given or by the folder's name."""
    folders = ["/".join((above.parent.name, above.name)) for above in path.resolve().parents]
    known = next((folder for folder in folders if folder in PUBLISHED), None)
    if sde is None and known is None:
        raise InputError(
            f"no tensor of {path} tells --sde, and its folder is none of {', '.join(PUBLISHED)}; allowed: {', '.join(SDES)}"
        )
    if sde is not None and sde not in SDES:
        raise InputError(f"--sde={sde!r} is unknown{nearest(sde, SDES)}; allowed: {', '.join(SDES)}")
    if image_size is None and known is None:
        raise InputError(f"no tensor of {path} tells --image_size, and its folder is none of {', '.join(PUBLISHED)}")
    if image_size is not None and not whole(image_size, 1):
        raise InputError(f"--image_size={image_size!r} is out of range; it is a whole number, at least 1")
    return sde or PUBLISHED[known or ""], image_size or 32


def of(state: State, sde: str, image_size: int) -> tuple[ConfigDict, Any]:
    """Our config and parameters of the tensors of such a file."""
    flax = any(name.startswith("params_ema.") for name in state)
    average = {k: _flat_norm(k, a) for k, a in files.below(state, "params_ema.").items()} if flax else averaged(state)
    found = plan_of_flax(average, image_size) if flax else plan(average)
    config = config_of(found, sde, image_size)
    shapes = jax.eval_shape(experiment.build(config).init, jax.random.key(0))
    names = flax_names(modules(found), found.kind) if flax else [f"all_modules.{i}" for i in range(len(modules(found)))]
    return config, mapping.load(shapes, rows(found, names, FLAX if flax else TORCH, shapes), average)


def averaged(state: State) -> dict[str, np.ndarray]:
    """The averages that a .pth has without names, in the order of the network's parameters, by those parameters' names."""
    model = {name.rpartition("module.")[2]: a for name, a in files.below(state, "model.").items() if "all_modules." in name}
    shadows = files.below(state, "ema.shadow_params.")
    if not model or len(shadows) != len(model):
        raise InputError(f"the file has {len(shadows)} averages (ema.shadow_params) of the {len(model)} parameters of its model")
    out = {name: shadows[str(i)] for i, name in enumerate(model)}
    for name, a in model.items():
        if a.shape != out[name].shape:
            raise InputError(f"the average of tensor {name} has shape {out[name].shape}, the tensor {a.shape}")
    return out


def _flat_norm(name: str, a: np.ndarray) -> np.ndarray:
    # The Flax of 2021 kept a norm's scale and bias as [1, 1, 1, C].
    return a.reshape(-1) if "GroupNorm" in name else a


def plan(state: State) -> Plan:
    """What the tensors of the PyTorch port tell. Raises InputError for a network that there is none here of."""
    held: dict[int, set[str]] = {}
    for name in state:
        number, _, rest = name.removeprefix("all_modules.").partition(".")
        if not number.isdecimal():
            raise InputError(f"tensor {name} has no number: the file is not of this architecture")
        held.setdefault(int(number), set()).add(rest.split(".")[0])
    strange = [(number, each) for number in sorted(held) for each in sorted(held[number]) if each not in _READ]
    if strange:
        raise InputError(f"tensor all_modules.{strange[0][0]}.{strange[0][1]} is of no DDPM or DDPM++, the models of the VP SDE")
    order = sorted(held)
    blocks = [_block_of(state, f"all_modules.{i}", "weight") for i in order if "GroupNorm_1" in held[i]]
    before = {n: i for n, i in enumerate(i for i in order if "GroupNorm_1" in held[i])}
    attended = [n for n, i in before.items() if "NIN_3" in held.get(i + 1, set())]
    found = _plan(blocks, attended, sum(held[i] == {"Conv_0"} for i in order), _shape(state, "all_modules.2.weight"))
    listed = [name for name in state if name.endswith(("GroupNorm_1.weight", "Conv_0.weight"))]
    if found.kind is DDPM and listed[0].endswith("Conv_0.weight"):
        raise InputError(f"tensor {listed[0]} comes before GroupNorm_1: blocks of the type ddpm in NCSN++, which are not read")
    return found


# What the modules of these networks hold.
_READ = ("weight", "bias", "GroupNorm_0", "GroupNorm_1", "Conv_0", "Conv_1", "Conv_2", "Dense_0", *(f"NIN_{i}" for i in range(4)))


class Block(NamedTuple):
    """A residual block: its channels, and whether it has a shortcut by a convolution."""

    have: int
    gives: int
    shortcut: bool


def _block_of(state: State, name: str, weight: str) -> Block:
    kernel = _shape(state, f"{name}.Conv_0.{weight}")
    have, gives = (kernel[1], kernel[0]) if weight == "weight" else kernel[-2:]
    return Block(have, gives, f"{name}.Conv_2.{weight}" in state)


def _shape(state: State, name: str) -> tuple[int, ...]:
    if name not in state or state[name].ndim != 4:
        raise InputError(f"tensor {name} is missing, or has not 4 axes: the file is not of this architecture")
    return state[name].shape


def _plan(blocks: Sequence[Block], attended: Sequence[int], resamples: int, entry: tuple[int, ...]) -> Plan:
    """Of all residual blocks in order, those (`attended`) that attention follows, and the kernel [out, in, 3, 3] that is first."""
    # In DDPM++ what changes the size is a block too, the only kind with a shortcut between as many channels.
    plain = [n for n, block in enumerate(blocks) if not (block.shortcut and block.have == block.gives)]
    changes = len(blocks) - len(plain) + resamples
    levels, odd = divmod(changes, 2)
    levels += 1
    per_level, rest = divmod(len(plain) - 2 - levels, 2 * levels)
    if odd or rest or per_level < 1 or (resamples and len(plain) < len(blocks)):
        raise InputError(
            f"{len(plain)} residual blocks, and {changes} changes of size, are no DDPM or DDPM++, the models of the VP SDE"
        )
    firsts = [plain[level * per_level] for level in range(levels)]
    channels = [blocks[n].gives for n in firsts]
    full, colours = entry[:2]
    if any(n % full for n in channels):
        raise InputError(f"channels {channels} are not multiples of the first {full}, which are read alone")
    kind = DDPMPP if any(block.shortcut for block in blocks) else DDPM
    attention = tuple(level for level, n in enumerate(firsts) if n in attended)
    return Plan(kind, full, tuple(n // full for n in channels), per_level, attention, colours)


def plan_of_flax(state: State, image_size: int) -> Plan:
    """What the tensors of the JAX code tell. Where attention is they do not: at 16x16, as in all of its configs of these models."""
    tops = {name.split(".")[0] for name in state}
    kinds = [kind for kind in (DDPMPP, DDPM) if f"{kind.block}_0" in tops]
    if not kinds:
        raise InputError(f"module {sorted(tops)[0]} is of no DDPM or DDPM++, the models of the VP SDE")
    count = sum(top.startswith(f"{kinds[0].block}_") for top in tops)
    blocks = [_block_of(state, f"{kinds[0].block}_{n}", "kernel") for n in range(count)]
    resamples = sum(top.startswith(("Downsample_", "Upsample_")) for top in tops)
    entry = _shape(state, "Conv_0.kernel")[::-1]
    found = _plan(blocks, (), resamples, entry)._replace(kind=kinds[0])
    attention = tuple(level for level in range(len(found.multipliers)) if image_size == 16 * 2**level)
    have = sum(top.startswith(f"{found.kind.attention}_") for top in tops)
    if have != 1 + len(attention) * (found.blocks + 1):
        raise InputError(
            f"--image_size={image_size} has attention at {len(attention)} levels (16x16), but the file {have} modules of it"
        )
    return found._replace(attention=attention)


def config_of(found: Plan, sde: str, image_size: int) -> ConfigDict:
    """Our config of a network and what it was trained on. Raises InputError for an image size that it cannot have."""
    levels = len(found.multipliers)
    if image_size % 2 ** (levels - 1):
        raise InputError(f"--image_size={image_size} is not divisible by {2 ** (levels - 1)}, as {levels} levels need")
    schedule, draw, time, enter, grid = SDES[sde]
    model = dict(
        name="UNet",
        channels=found.channels,
        multipliers=found.multipliers,
        blocks=found.blocks,
        attention=found.attention,
        attend_each=False,
        heads=1,
        classes=0,
        dropout=0.1,
        time=time,
        enter=enter,
        **found.kind.parts,
        dtype="float32",
        remat=False,
    )
    process = dict(schedule=schedule, target="eps", draw=draw, weight="unit", loss="simple", data_std=1.0, drop_label=0.0)
    sampling = dict(times=grid, solver="ddim", steps=50, max_steps=1000, guidance=1.0, num=64, batch_size=64, clip=True)
    config = workdir.describe((image_size, image_size, found.colours), model, process, sampling)
    config.data.name = "cifar10" if image_size == 32 else config.data.name
    experiment.build(config)  # what none of the above looks at is told here
    return config


def modules(found: Plan) -> list[tuple[str, str]]:
    """Our path and the kind of each of their modules, in their order."""
    last = len(found.multipliers) - 1
    resample = "block" if found.kind is DDPMPP else "Downsample", "block" if found.kind is DDPMPP else "Upsample"
    out = [("embed1", "Dense"), ("embed2", "Dense"), ("conv_in", "Conv")]
    for level in range(last + 1):
        for i in range(found.blocks):
            out.append((f"down{level}_{i}_block", "block"))
            out += [(f"down{level}_{i}_attention", "attention")] if level in found.attention else []
        out += [(f"down{level}", resample[0])] if level < last else []
    out += [("middle_block1", "block"), ("middle_attention", "attention"), ("middle_block2", "block")]
    for level in reversed(range(last + 1)):
        out += [(f"up{level}_{i}_block", "block") for i in range(found.blocks + 1)]
        out += [(f"up{level}_{found.blocks}_attention", "attention")] if level in found.attention else []
        out += [(f"up{level}", resample[1])] if level else []
    return [*out, ("norm_out", "GroupNorm"), ("conv_out", "Conv")]


def flax_names(order: Sequence[tuple[str, str]], kind: Kind) -> list[str]:
    """What Flax calls these modules: by class, and how many of the class there were before."""
    called = [{"block": kind.block, "attention": kind.attention}.get(what, what) for _, what in order]
    return [f"{name}_{called[:n].count(name)}" for n, name in enumerate(called)]


def rows(found: Plan, names: Sequence[str], style: Style, shapes: Any) -> list[Row]:
    """Where every parameter is among their tensors, whose modules have these names."""
    out: list[Row] = []
    for (ours, what), theirs in zip(modules(found), names, strict=True):
        if what == "block":
            out += _block(ours, theirs, style)
            out += _shortcut(f"{ours}/shortcut", theirs, found.kind, style)
        elif what == "attention":
            out += _group_norm(f"{ours}/norm", f"{theirs}.GroupNorm_0", style)
            out += [row for i, part in enumerate(("q", "k", "v", "out")) for row in _nin(f"{ours}/{part}", f"{theirs}.NIN_{i}")]
        elif what == "GroupNorm":
            out += _group_norm(ours, theirs, style)
        elif what in ("Downsample", "Upsample"):
            out += _weighted(f"{ours}/conv", f"{theirs}.Conv_0", style, style.conv)
        else:
            out += _weighted(ours, theirs, style, style.dense if what == "Dense" else style.conv)
    return mapping.within(out, shapes)


def _block(ours: str, theirs: str, style: Style) -> list[Row]:
    out = [row for i in (0, 1) for row in _group_norm(f"{ours}/norm{i + 1}", f"{theirs}.GroupNorm_{i}", style)]
    out += [row for i in (0, 1) for row in _weighted(f"{ours}/conv{i + 1}", f"{theirs}.Conv_{i}", style, style.conv)]
    return out + _weighted(f"{ours}/embed", f"{theirs}.Dense_0", style, style.dense)


def _shortcut(ours: str, theirs: str, kind: Kind, style: Style) -> list[Row]:
    return _nin(ours, f"{theirs}.NIN_0") if kind is DDPM else _weighted(ours, f"{theirs}.Conv_2", style, style.pointwise)


def _weighted(ours: str, theirs: str, style: Style, layout: Layout) -> list[Row]:
    return [Row(f"{ours}/kernel", f"{theirs}.{style.weight}", layout), Row(f"{ours}/bias", f"{theirs}.bias", same)]


def _group_norm(ours: str, theirs: str, style: Style) -> list[Row]:
    return [Row(f"{ours}/scale", f"{theirs}.{style.scale}", same), Row(f"{ours}/bias", f"{theirs}.bias", same)]


def _nin(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/kernel", f"{theirs}.W", same), Row(f"{ours}/bias", f"{theirs}.b", same)]
