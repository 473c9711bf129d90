"""Long work in parts that are kept on disk, so that a stopped one goes on where it was."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from jaxdiff import mesh as meshes
from jaxdiff.errors import InputError


def digest(tree: Any) -> str:
    """A SHA-256 of all arrays of a pytree, such as a model's parameters, with their paths, shapes and dtypes."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(meshes.fetch(leaf) if isinstance(leaf, jax.Array) else leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        total.update(array.view(np.uint8).data)
    return total.hexdigest()


def drawn(folder: epath.Path, asked: dict[str, Any], n: int, size: int, draw: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The n images [n, ...] that `draw(rows)` makes, `size` rows at a time; each part is kept in `folder`, and not drawn again.

    `asked` says what is drawn, JSON that must not change between calls. Raises InputError where the folder holds the parts of
    another request.
    """
    text = json.dumps({**asked, "num": n, "part": size}, sort_keys=True, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    request = folder / "request.json"
    if request.exists() and request.read_text() != text:
        raise InputError(f"{folder} holds part of another request (see {request}); remove it, or give another --out")
    request.write_text(text)
    parts = []
    starts = range(0, n, size)
    there = [(folder / f"part_{start:07d}.npy").exists() for start in starts]
    bar = tqdm(total=n, initial=size * sum(there), desc="sampling", unit="image", disable=len(starts) == 1)
    for start, known in zip(starts, there):
        path = folder / f"part_{start:07d}.npy"
        if not known:
            images = draw(np.arange(start, min(start + size, n)))
            write(path, images)
            bar.update(len(images))
        with path.open("rb") as file:
            parts.append(np.load(file))
    bar.close()
    return np.concatenate(parts)


def write(path: epath.Path, array: np.ndarray) -> None:
    """Writes an array as .npy, whole or not at all: one that exists is never read half."""
    temporary = path.parent / (path.name + ".partial")
    with temporary.open("wb") as file:
        np.save(file, array)
    temporary.replace(path)
