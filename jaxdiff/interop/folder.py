"""A model's folder as diffusers writes it: config.json beside the weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.interop import files

# In the order in which they are looked for; the first is what is written.
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.bin")


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the tensors by name. Raises InputError where one is not there or cannot be read."""
    config = read_json(Path(folder) / "config.json")
    here = [Path(folder) / name for name in WEIGHTS if (Path(folder) / name).is_file()]
    if not here:
        raise InputError(f"{folder} holds no weights; they are one of {', '.join(WEIGHTS)}")
    return config, files.read(here[0])


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


def only(config: Mapping[str, Any], what: str, allowed: Mapping[str, Any]) -> None:
    """Raises InputError for a key of a foreign config whose value is not the one that we know; a missing key is that one."""
    for key, value in allowed.items():
        if config.get(key, value) != value:
            raise InputError(f"{what} with {key}={config[key]!r} is not read; allowed: {value!r}")
