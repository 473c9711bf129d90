"""Networks in Flax linen: the only package that imports flax. Everything else sees `init` and `apply`."""

import dataclasses
import functools
import math
import sys
from typing import Any, get_args

from jaxdiff.errors import InputError, nearest
from jaxdiff.models.autoencoder import AutoencoderKL, AutoencoderVQ
from jaxdiff.models.checks import check
from jaxdiff.models.classifier import Classifier
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.models.dit import DiT, NoNorm, NoPlaces, NoRotation, RMSNorm, Rotary, SinCosPlaces
from jaxdiff.models.parts import (
    ADMBlock,
    ADMBlockDown,
    ADMBlockUp,
    ADMDown,
    Attention,
    AttentionPool,
    BareAttention,
    CosineBetaSinusoidal,
    DDPMppAttention,
    DDPMppBlock,
    DDPMppDown,
    DDPMppUp,
    Down,
    Embed,
    Enter,
    FourierEnter,
    LabelTokens,
    LearnedSinusoidal,
    Leave,
    LinearBetaSinusoidal,
    NoAttention,
    OneHotEmbed,
    ResBlock,
    ResBlockDown,
    ResBlockUp,
    ResidualLeave,
    ScaledLinearBetaSinusoidal,
    Sinusoidal,
    SpatialTransformer,
    SubVPEnter,
    SubVPSinusoidal,
    Tokens,
    Up,
    VDMBlock,
    VPSinusoidal,
)
from jaxdiff.models.unet import Part, UNet
from jaxdiff.names import parse

__all__ = [
    "ADMBlock",
    "ADMBlockDown",
    "ADMBlockUp",
    "ADMDown",
    "Attention",
    "AttentionPool",
    "AutoencoderKL",
    "AutoencoderVQ",
    "BareAttention",
    "Classifier",
    "CosineBetaSinusoidal",
    "DDPMppAttention",
    "DDPMppBlock",
    "DDPMppDown",
    "DDPMppUp",
    "DiT",
    "Down",
    "Embed",
    "Enter",
    "FourierEnter",
    "LabelTokens",
    "LearnedSinusoidal",
    "Leave",
    "LinearBetaSinusoidal",
    "NoAttention",
    "NoNorm",
    "NoPlaces",
    "NoRotation",
    "OneHotEmbed",
    "PatchDiscriminator",
    "RMSNorm",
    "ResBlock",
    "ResBlockDown",
    "ResBlockUp",
    "ResidualLeave",
    "Rotary",
    "ScaledLinearBetaSinusoidal",
    "SinCosPlaces",
    "Sinusoidal",
    "SpatialTransformer",
    "SubVPEnter",
    "SubVPSinusoidal",
    "Tokens",
    "UNet",
    "Up",
    "VDMBlock",
    "VPSinusoidal",
]

# Which parts fit which role.
PARTS: dict[str, tuple[type, ...]] = {
    "time": (
        Sinusoidal,
        LearnedSinusoidal,
        LinearBetaSinusoidal,
        ScaledLinearBetaSinusoidal,
        CosineBetaSinusoidal,
        VPSinusoidal,
        SubVPSinusoidal,
    ),
    "embed": (Embed, OneHotEmbed),
    "enter": (Enter, FourierEnter, SubVPEnter),
    "block": (ResBlock, ADMBlock, DDPMppBlock, VDMBlock),
    "context": (LabelTokens, Tokens),
    "attend": (Attention, DDPMppAttention, SpatialTransformer),
    "middle_attend": (Attention, DDPMppAttention, BareAttention, NoAttention, SpatialTransformer),
    "down": (Down, ADMDown, ADMBlockDown, ResBlockDown, DDPMppDown),
    "up": (Up, ADMBlockUp, ResBlockUp, DDPMppUp),
    "leave": (Leave, ResidualLeave),
    "pool": (AttentionPool,),
    "places": (SinCosPlaces, NoPlaces),
    "qk_norm": (NoNorm, RMSNorm),
    "rotate": (NoRotation, Rotary),
}
# The fields of a part that the network fills in; a config may give the others.
_GIVEN = {"parent", "name", "features", "channels", "dropout", "dtype", "heads", "classes", "augment", "time", "out_channels"}

Network = UNet | Classifier | DiT | AutoencoderKL | AutoencoderVQ
NETWORKS = ("UNet", "Classifier", "DiT", "AutoencoderKL", "AutoencoderVQ")
# Those of them that make latents, and diffuse nothing.
AUTOENCODERS = ("AutoencoderKL", "AutoencoderVQ")


def _fields(network: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(network) if f.name not in ("parent", "name"))  # type: ignore[arg-type]


# What a config's `model` group may hold, some of it for one network only.
FIELDS = ("name", *dict.fromkeys(field for kind in get_args(Network) for field in _fields(kind)))


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
    check(model)
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
