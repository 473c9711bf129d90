"""Long work in parts that are kept on disk, so that a stopped one goes on where it was."""

import hashlib
import json
import uuid
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


def begun(folder: epath.Path) -> bool:
    """Whether a folder holds parts of a request; without a part there is nothing to lose, whatever else is there."""
    return folder.is_dir() and any(folder.glob("part_*.npy"))


def drawn(folder: epath.Path, asked: dict[str, Any], n: int, size: int, draw: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The n images [n, ...] that `draw(rows)` makes, `size` rows at a time; each part is kept in `folder`, and not drawn again.

    `asked` says what is drawn, JSON that must not change between calls. A part that cannot be read is drawn again. Of several
    processes all draw, the first writes, and all read the one folder. Raises InputError where the folder holds the parts of another
    request, does not say of which, or is not there for every process.
    """
    text = json.dumps({**asked, "num": n, "part": size}, sort_keys=True, indent=1)
    request = folder / "request.json"
    if goes_on := begun(folder):
        _check_request(folder, request, text)
    starts = range(0, n, size)
    parts = [_read(_part(folder, start), min(size, n - start)) for start in starts]
    # All processes take part in drawing, so all must know of the same parts.
    whole_ones = meshes.agree(np.array([part is not None for part in parts], np.int32)).astype(bool)
    if lost := [start for start, part, there in zip(starts, parts, whole_ones) if there and part is None]:
        raise InputError(f"{_part(folder, lost[0])} is not there for every process; the folder must be one that all share")
    parts = [part if there else None for part, there in zip(parts, whole_ones)]
    there = sum(len(part) for part in parts if part is not None)
    quiet = len(starts) == 1 or not meshes.first_process()
    with tqdm(total=n, initial=there, desc="sampling", unit="image", disable=quiet) as bar:
        for i, start in enumerate(starts):
            if parts[i] is not None:
                continue
            parts[i] = images = draw(np.arange(start, min(start + size, n)))
            if meshes.first_process():
                if not goes_on:
                    # Before the first part, so that no part is without; after drawing, so that what cannot be drawn leaves nothing.
                    folder.mkdir(parents=True, exist_ok=True)
                    whole(request, lambda file: file.write(text.encode()))
                    goes_on = True
                write(_part(folder, start), images)
            bar.update(len(images))
    return np.concatenate(parts)  # type: ignore[arg-type]


def _part(folder: epath.Path, start: int) -> epath.Path:
    return folder / f"part_{start:07d}.npy"


def _check_request(folder: epath.Path, request: epath.Path, text: str) -> None:
    try:
        asked = request.read_text()
        json.loads(asked)
    except (FileNotFoundError, ValueError):
        damaged = f"{folder} holds parts, but {request.name} there, which says of what, is damaged or not there"
        raise InputError(f"{damaged}; remove the folder, or write elsewhere") from None
    if asked != text:
        raise InputError(f"{folder} holds part of another request (see {request}); remove it, or write elsewhere")


def _read(path: epath.Path, rows: int) -> np.ndarray | None:
    """The part of so many rows, None where it is not there or damaged."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        try:
            images = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError, SyntaxError):  # NumPy calls a cut file a ValueError
            return None
    return images if images.ndim and len(images) == rows else None


def write(path: epath.Path, array: np.ndarray) -> None:
    """Writes an array as .npy, whole or not at all: one that exists is never read half."""
    whole(path, lambda file: np.save(file, array))


def whole(path: epath.Path, save: Callable[[Any], Any]) -> None:
    """Writes a file by `save(file)`, whole or not at all; of several that write it at once, as a shared cache, the last stays."""
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        with temporary.open("wb") as file:
            save(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
