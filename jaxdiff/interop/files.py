"""Files of tensors: .safetensors, .npz, what torch.save wrote (without torch), and folders of safetensors with an index."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxdiff.errors import InputError
from jaxdiff.interop import torchfile

# What is not among the types that NumPy has itself.
DTYPES = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
NAMES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?"}


def read(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a file by name, in the type they have there; the names of nested dicts and lists are joined by dots.

    What the file is, its content says and not its name: safetensors, .npz, or what torch.save wrote. An `.index.json` of
    safetensors in parts gives all parts. Raises InputError for a file that is not there, cut short, of another kind, or whose
    pickle would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path} is not there, or no file; a weight file is .safetensors, .npz, or .pth, .pt or .bin of torch.save"
        )
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    with path.open("rb") as file:
        head = file.read(9)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = any(name.endswith("/data.pkl") for name in archive.namelist())
        return flat(torchfile.read(path)) if pickled else _read_npz(path)
    if head.startswith(b"PK"):
        raise InputError(f"{path} is cut short: it begins as an archive, .npz or torch.save's, and has no end")
    return _read_safetensors(path) if head[8:9] == b"{" else flat(torchfile.read(path))


def write(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a .safetensors file, whole or not at all, with the note on its format that PyTorch's readers look for."""
    from safetensors.numpy import save_file

    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays of nested dicts and lists, their names joined by dots; what is no array is left out."""
    if isinstance(tree, np.ndarray):
        return {prefix.removesuffix("."): tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {name: a for key, value in pairs for name, a in flat(value, f"{prefix}{key}.").items()}


def below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): a for name, a in tensors.items() if name.startswith(prefix)}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file, or is cut short ({error})") from error
    return {name: np.frombuffer(e["data"], _dtype(path, e["dtype"])).reshape(e["shape"]) for name, e in entries}


def _dtype(path: Path, name: str) -> np.dtype:
    if name not in NAMES and name not in DTYPES:
        raise InputError(f"{path} holds tensors of type {name}, which is not read; allowed: {', '.join((*NAMES, *DTYPES))}")
    return np.dtype(DTYPES.get(name, NAMES.get(name)))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        reason = "it holds Python objects, whose pickle could run code" if "allow_pickle" in str(error) else str(error)
        raise InputError(f"{path} cannot be read: {reason}") from error


def _read_parts(path: Path) -> dict[str, np.ndarray]:
    try:
        where = {str(name): Path(part).name for name, part in json.loads(path.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no index of safetensors in parts: it has no weight_map of names to files") from error
    parts = {name: read(path.parent / name) for name in sorted(set(where.values()))}
    if lost := [name for name, part in where.items() if name not in parts[part]]:
        raise InputError(f"{path} names {lost[0]}, which {where[lost[0]]} does not hold")
    return {name: parts[part][name] for name, part in where.items()}
