"""A model's folder as diffusers writes it: config.json beside the weights."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.interop import files
from jaxdiff.names import whole

# In the order in which they are looked for; the first is what is written.
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.bin")


class Kind(NamedTuple):
    """Which values a key of a foreign config may have, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


COUNT = Kind("a whole number, at least 1", lambda v: whole(v, 1))
OFFSET = Kind("a whole number, at least 0", lambda v: whole(v, 0))
NUMBER = Kind("a finite number, at least 0", lambda v: _finite(v) and v >= 0)
POSITIVE = Kind("a finite number above 0", lambda v: _finite(v) and v > 0)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
COUNTS = Kind("a list of whole numbers, each at least 1", lambda v: _listed(v) and all(whole(n, 1) for n in v))
WORDS = Kind("a list of names", lambda v: _listed(v) and all(isinstance(n, str) for n in v))
SIZE = Kind("a whole number, at least 1, or a list of two", lambda v: whole(v, 1) or (COUNTS.fits(v) and len(v) == 2))


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda v: v is None or kind.fits(v))


def check(file: str, config: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Raises InputError for a key of a foreign config whose value is not of its kind; a key may be missing."""
    for key, kind in kinds.items():
        if key in config and not kind.fits(config[key]):
            raise InputError(f"{file}: {key}={config[key]!r} is out of range; it is {kind.words}")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the tensors by name. Raises InputError where one is not there or cannot be read."""
    return read_json(Path(folder) / "config.json"), files.read(weights(folder))


def weights(folder: str | Path) -> Path:
    """The file of a folder's weights. Raises InputError where there is none."""
    here = [Path(folder) / name for name in WEIGHTS if (Path(folder) / name).is_file()]
    if not here:
        raise InputError(f"{folder} holds no weights; they are one of {', '.join(WEIGHTS)}")
    return here[0]


def read_json(path: str | Path) -> dict[str, Any]:
    """The dict of a JSON file. Raises InputError for any other file."""
    try:
        tree = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} is not the config of a model: it holds a {type(tree).__name__}")
    return tree


def write(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a folder that diffusers' `from_pretrained` takes. Raises InputError where one has weights already."""
    folder = Path(folder)
    if (folder / WEIGHTS[0]).exists():
        raise InputError(f"{folder} holds {WEIGHTS[0]} already; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / WEIGHTS[0], tensors)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")


def only(file: str, config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises InputError for a key of a foreign config that has none of the values that are read; a key may be missing."""
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise InputError(f"{file}: {key}={config[key]!r} is not read; allowed: {', '.join(map(str, values))}")


# The linear maps of attention, as they were called until 2023 (and in google's files still are).
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def renamed(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors by today's names; attention's maps as such where they are convolutions by 1x1."""
    pattern = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.")
    today = {pattern.sub(lambda found: f"{found[1]}{OLD[found[2]]}.", name): a for name, a in state.items()}
    return {k: a.reshape(a.shape[:2]) if ".attentions." in k and a.shape[2:] == (1, 1) else a for k, a in today.items()}
