"""Networks in Flax linen: the only package that imports flax. Everything else sees `init` and `apply`."""

import dataclasses
import sys
from typing import Any

import flax.linen as nn

from jaxdiff.errors import InputError, nearest
from jaxdiff.models.unet import LearnedSinusoidal, Sinusoidal, UNet
from jaxdiff.names import named

__all__ = ["LearnedSinusoidal", "Sinusoidal", "UNet"]


def build(config) -> UNet:
    """The network of a config's `model` group: `name`, and its fields; parts are named by their class.

    Raises InputError for an unknown network, field or part.
    """
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in dict(config).items() if k != "name"}
    known = {f.name: f.type for f in dataclasses.fields(UNet) if f.name not in ("parent", "name")}
    if config.name != "UNet":
        raise InputError(f"model.name={config.name!r} is unknown{nearest(config.name, ['UNet'])}; allowed: UNet")
    if fields.get("dtype", "float32") not in ("float32", "bfloat16", "float16"):
        raise InputError(f"model.dtype={fields['dtype']!r} is unknown; allowed: float32, bfloat16, float16")
    for key, value in fields.items():
        if key not in known:
            raise InputError(f"model.{key} is unknown{nearest(key, known)}; allowed: {', '.join(known)}")
        if known[key] == type[nn.Module]:
            fields[key] = named(sys.modules[__name__], value, f"model.{key}")
    return UNet(**fields)
