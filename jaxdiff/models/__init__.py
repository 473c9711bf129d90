"""Networks in Flax linen: the only package that imports flax. Everything else sees `init` and `apply`."""

import dataclasses
import functools
import math
import sys
from typing import Any

from jaxdiff.errors import InputError, nearest
from jaxdiff.models.classifier import Classifier
from jaxdiff.models.parts import (
    ADMBlock,
    ADMBlockDown,
    ADMBlockUp,
    ADMDown,
    Attention,
    AttentionPool,
    CosineBetaSinusoidal,
    DDPMppAttention,
    DDPMppBlock,
    DDPMppDown,
    DDPMppUp,
    Down,
    Embed,
    Enter,
    FourierEnter,
    LearnedSinusoidal,
    Leave,
    LinearBetaSinusoidal,
    OneHotEmbed,
    ResBlock,
    ResidualLeave,
    Sinusoidal,
    SubVPEnter,
    SubVPSinusoidal,
    Up,
    VDMBlock,
    VPSinusoidal,
)
from jaxdiff.models.unet import Part, UNet
from jaxdiff.names import parse, whole

__all__ = [
    "ADMBlock",
    "ADMBlockDown",
    "ADMBlockUp",
    "ADMDown",
    "Attention",
    "AttentionPool",
    "Classifier",
    "CosineBetaSinusoidal",
    "DDPMppAttention",
    "DDPMppBlock",
    "DDPMppDown",
    "DDPMppUp",
    "Down",
    "Embed",
    "Enter",
    "FourierEnter",
    "LearnedSinusoidal",
    "Leave",
    "LinearBetaSinusoidal",
    "OneHotEmbed",
    "ResBlock",
    "ResidualLeave",
    "Sinusoidal",
    "SubVPEnter",
    "SubVPSinusoidal",
    "UNet",
    "Up",
    "VDMBlock",
    "VPSinusoidal",
]

# Which parts fit which role.
PARTS: dict[str, tuple[type, ...]] = {
    "time": (Sinusoidal, LearnedSinusoidal, LinearBetaSinusoidal, CosineBetaSinusoidal, VPSinusoidal, SubVPSinusoidal),
    "embed": (Embed, OneHotEmbed),
    "enter": (Enter, FourierEnter, SubVPEnter),
    "block": (ResBlock, ADMBlock, DDPMppBlock, VDMBlock),
    "attend": (Attention, DDPMppAttention),
    "down": (Down, ADMDown, ADMBlockDown, DDPMppDown),
    "up": (Up, ADMBlockUp, DDPMppUp),
    "leave": (Leave, ResidualLeave),
    "pool": (AttentionPool,),
}
# The fields of a part that the network fills in; a config may give the others.
_GIVEN = {"parent", "name", "features", "channels", "dropout", "dtype", "heads", "classes", "augment", "time", "out_channels"}

Network = UNet | Classifier
NETWORKS = ("UNet", "Classifier")


def _fields(network: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(network) if f.name not in ("parent", "name"))  # type: ignore[arg-type]


# What a config's `model` group may hold, some of it for one network only.
FIELDS = ("name", *dict.fromkeys((*_fields(UNet), *_fields(Classifier))))


def network(name: str) -> type[Network]:
    """The class that a config's model.name names. Raises InputError for another name."""
    if name not in NETWORKS:
        raise InputError(f"model.name={name!r} is unknown{nearest(name, NETWORKS)}; allowed: {', '.join(NETWORKS)}")
    return getattr(sys.modules[__name__], name)


def build(config) -> Network:
    """The network of a config's `model` group: `name`, and its fields; parts are named by their class.

    A part may be given numbers of its own, "Sinusoidal(rate=0.125)". Raises InputError for an unknown network, field or part, or a
    number that no network can have.
    """
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in dict(config).items() if k != "name"}
    kind = network(config.name)
    known = _fields(kind)
    if fields.get("dtype", "float32") not in ("float32", "bfloat16", "float16"):
        raise InputError(f"model.dtype={fields['dtype']!r} is unknown; allowed: float32, bfloat16, float16")
    for key, value in fields.items():
        if key not in known:
            of = "" if kind is UNet else f" to model.name={config.name!r}"
            raise InputError(f"model.{key} is unknown{of}{nearest(key, known)}; allowed: {', '.join(known)}")
        if key in PARTS:
            fields[key] = _part(key, value)
    model = kind(**fields)
    _check(model)
    return model


def _part(key: str, text: str) -> Part:
    """The class that `text` names among the parts of a role, holding the numbers it gives. Raises InputError for others."""
    part, args, kwargs = parse(sys.modules[__name__], text, f"model.{key}", [p.__name__ for p in PARTS[key]])
    own = [f.name for f in dataclasses.fields(part) if f.name not in _GIVEN]  # type: ignore[arg-type]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in kwargs.values())
    if args or not numbers or not set(kwargs) <= set(own):
        takes = f"numbers by name: {', '.join(own)}" if own else "nothing in brackets"
        raise InputError(f"model.{key}={text!r} does not fit: {part.__name__} takes {takes}")
    return functools.partial(part, **kwargs) if kwargs else part


def _check(model: Network) -> None:
    """Raises InputError for a number that would fail inside the network, or be passed over there without a word."""
    if isinstance(model, UNet) and not isinstance(model.attend_each, bool):
        raise InputError(f"model.attend_each={model.attend_each!r} is out of range; it is True or False")
    numbers = {"classes": 0, "augment": 0} if isinstance(model, UNet) else {"classes": 2}
    for key, least in ({"channels": 1, "blocks": 1, "heads": 1} | numbers).items():
        if not whole(getattr(model, key), least):
            raise InputError(f"model.{key}={getattr(model, key)!r} is out of range; it is a whole number, at least {least}")
    if not isinstance(model.dropout, int | float) or not 0 <= model.dropout < 1:
        raise InputError(f"model.dropout={model.dropout!r} is out of range; it is at least 0 and below 1")
    levels, attention = model.multipliers, model.attention
    if not isinstance(levels, tuple) or not levels or not all(whole(m, 1) for m in levels):
        raise InputError(f"model.multipliers={levels!r} is out of range; it has one whole number a level, each at least 1")
    if not isinstance(attention, tuple) or not all(whole(a, 0) and a < len(levels) for a in attention):
        raise InputError(
            f"model.attention={attention!r} names a level that is not there; allowed: "
            f"{', '.join(str(level) for level in range(len(levels)))} (levels of model.multipliers, 0 is full size; not sizes)"
        )
    # The middle, at the last level, has attention too.
    common = math.gcd(*(model.channels * levels[level] for level in (*attention, len(levels) - 1)))
    if common % model.heads:
        divisors = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise InputError(f"model.heads={model.heads} does not divide the channels where attention is; allowed: {divisors}")
