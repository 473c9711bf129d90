"""What numbers a network may have, and which sizes it takes: what would fail inside it, or be passed over without a word."""

import math
from typing import Any

from jaxdiff.errors import InputError
from jaxdiff.models.autoencoder import Autoencoder, AutoencoderKL, AutoencoderVQ
from jaxdiff.models.classifier import Classifier
from jaxdiff.models.dit import DiT, Rotary
from jaxdiff.models.parts import SpatialTransformer
from jaxdiff.models.unet import UNet
from jaxdiff.names import whole

# The whole numbers among a network's fields, and the least that each may be.
_AUTOENCODER = {"channels": 1, "blocks": 1, "latent_channels": 1, "out_channels": 1, "groups": 0}
LEAST: dict[type, dict[str, int]] = {
    UNet: {"channels": 1, "blocks": 1, "heads": 1, "classes": 0, "augment": 0},
    Classifier: {"channels": 1, "blocks": 1, "heads": 1, "classes": 2},
    DiT: {"patch": 1, "width": 4, "depth": 1, "heads": 1, "classes": 0},
    AutoencoderKL: _AUTOENCODER,
    AutoencoderVQ: _AUTOENCODER | {"codes": 2, "code_channels": 1},
}


def check(model: Any) -> None:
    """Raises InputError for a number that would fail inside the network, or be passed over there without a word."""
    if not isinstance(getattr(model, "attend_each", True), bool):
        raise InputError(f"model.attend_each={model.attend_each!r} is out of range; it is True or False")
    for key, least in LEAST[type(model)].items():
        if not whole(getattr(model, key), least):
            raise InputError(f"model.{key}={getattr(model, key)!r} is out of range; it is a whole number, at least {least}")
    if isinstance(model, DiT):
        _check_transformer(model)
        return
    _check_levels(model)
    if isinstance(model, Autoencoder):
        _check_autoencoder(model)
    else:
        _check_heads(model)
        _check_sequence(model)


def divisor(model: Any) -> tuple[int, str]:
    """The number that each size of what the network is given must be divisible by, and what of the config makes it so."""
    if isinstance(model, DiT):
        return model.patch, f"model.patch={model.patch}"
    levels = len(model.multipliers)
    return 2 ** (levels - 1), f"{levels} levels of model.multipliers"


def _check_levels(model: Any) -> None:
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


def _check_heads(model: UNet | Classifier) -> None:
    # The middle, at the last level, has attention too.
    levels = model.multipliers
    common = math.gcd(*(model.channels * levels[level] for level in (*model.attention, len(levels) - 1)))
    divisors = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    if common % model.heads:
        raise InputError(f"model.heads={model.heads} does not divide the channels where attention is; allowed: {divisors}")
    for role, part in _attends(model).items():
        width, depth = _numbers(part).get("width", 0), _numbers(part).get("depth", 1)
        if not whole(width, 0) or (width and common % width):
            raise InputError(f"model.{role}: width={width!r} does not divide the channels where attention is; allowed: {divisors}")
        if not whole(depth, 1):
            raise InputError(f"model.{role}: depth={depth!r} is out of range; it is a whole number, at least 1")


def _check_sequence(model: UNet | Classifier) -> None:
    """Raises InputError where a sequence is said that nothing hears, or that cannot be."""
    context = getattr(model, "context", None)
    if context is None:
        return
    name = f"model.context={_kind(context).__name__!r}"
    if not whole(_numbers(context).get("width", 1), 1):
        raise InputError(f"{name}: width={_numbers(context)['width']!r} is out of range; it is a whole number, at least 1")
    if not any(_kind(part) is SpatialTransformer for part in _attends(model).values()):
        raise InputError(f"{name} is heard by no attention; set model.attend to SpatialTransformer, or leave it out")
    if _kind(context).says_label and not model.classes:
        raise InputError(f"{name} says a label, and model.classes=0 knows none; set model.classes, or leave it out")


def _attends(model: Any) -> dict[str, Any]:
    """The parts of attention by role."""
    return {role: part for role in ("attend", "middle_attend") if (part := getattr(model, role)) is not None}


def _kind(part: Any) -> Any:
    return getattr(part, "func", part)


def _numbers(part: Any) -> dict[str, Any]:
    return getattr(part, "keywords", {})


def _check_transformer(model: DiT) -> None:
    if model.width % 4:
        raise InputError(f"model.width={model.width} is out of range; it is divisible by 4: two sines and two cosines a place")
    if model.width % model.heads:
        divisors = ", ".join(str(n) for n in range(1, model.width + 1) if model.width % n == 0)
        raise InputError(f"model.heads={model.heads} does not divide model.width={model.width}; allowed: {divisors}")
    _positive("mlp_epsilon", model.mlp_epsilon)
    for role in ("qk_norm", "rotate"):
        for name, value in getattr(getattr(model, role), "keywords", {}).items():
            _positive(f"{role}'s {name}", value)
    if getattr(model.rotate, "func", model.rotate) is Rotary and model.width // model.heads % 4:
        raise InputError(
            f"model.heads={model.heads} leaves {model.width // model.heads} channels a head, and model.rotate='Rotary' needs a "
            "multiple of 4"
        )


def _check_autoencoder(model: Autoencoder) -> None:
    common = math.gcd(*(model.channels * level for level in model.multipliers))
    if model.groups and common % model.groups:
        raise InputError(f"model.groups={model.groups} does not divide the channels of every level, multiples of {common}")
    if model.scale is not None:
        _positive("scale", model.scale)


def _positive(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"model.{key}={value!r} is out of range; it is a finite number above 0")
