"""A foreign layout is a mapping of names: rows of (our path, their name, how the axes lie), read in either direction."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdiff.errors import InputError


class Layout(NamedTuple):
    """How the axes of a tensor lie: `load` makes ours of theirs, `save` theirs of ours."""

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


class Row(NamedTuple):
    """One tensor: its path below our "params", such as "conv_in/kernel", its name there, and its layout."""

    ours: str
    theirs: str
    layout: Layout


same = Layout(np.asarray, np.asarray)
# PyTorch's convolution [out, in, *space] is [*space, in, out] here, its linear map [out, in] is [in, out].
conv = Layout(lambda a: np.moveaxis(a, (0, 1), (-1, -2)), lambda a: np.moveaxis(a, (-1, -2), (0, 1)))
dense = Layout(lambda a: a.T, lambda a: a.T)
# A convolution of images by 1x1 there, [out, in, 1, 1], is a linear map here.
pointwise = Layout(lambda a: a.reshape(a.shape[:2]).T, lambda a: a.T[:, :, None, None])
# The same in one axis, [out, in, 1].
pointwise1d = Layout(lambda a: a.reshape(a.shape[:2]).T, lambda a: a.T[:, :, None])
# Here row 0 of the labels is the null one. Without one it is never asked for, and zero; a trained one is the last of theirs.
without_null = Layout(lambda a: np.concatenate([np.zeros_like(a[:1]), a]), lambda a: a[1:])
null_last = Layout(lambda a: np.roll(a, 1, axis=0), lambda a: np.roll(a, -1, axis=0))


def load(shapes: Any, rows: Sequence[Row], state: Mapping[str, np.ndarray], ignored: Sequence[str] = ()) -> Any:
    """Our parameters, float32 and of these `shapes` (as of jax.eval_shape), out of their tensors `state`.

    Raises InputError that names a tensor which is missing, is none of a row's, has another shape than its row, or has numbers that
    are not finite; names that begin with one of `ignored` are passed over.
    """
    table = {row.ours: row for row in rows}
    used = {row.theirs for row in rows}
    extra = [name for name in state if name not in used and not name.startswith(tuple(ignored))]
    if missing := [row.theirs for row in rows if row.theirs not in state]:
        hint = f", but holds {extra[0]}" if extra else ""
        raise InputError(f"tensor {missing[0]} is missing{_more(missing)}: the file is not of this architecture{hint}")
    if extra:
        raise InputError(f"tensor {extra[0]} belongs to nothing{_more(extra)}: the file is not of this architecture")

    def fill(path: Any, want: Any) -> np.ndarray:
        row = table[_path(path)]
        theirs = np.asarray(state[row.theirs])
        expected = row.layout.save(np.empty(want.shape, np.uint8)).shape
        if theirs.shape != expected:
            raise InputError(f"tensor {row.theirs} has shape {theirs.shape}, this architecture's has {expected}")
        with np.errstate(over="ignore"):  # told below
            ours = np.asarray(row.layout.load(theirs), np.float32)  # no copy where it is one already
        if not np.isfinite(ours).all():
            raise InputError(f"tensor {row.theirs} has numbers that are not finite in float32: the file is damaged")
        return ours

    return jax.tree_util.tree_map_with_path(fill, shapes)


def save(params: Any, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Their tensors by name, float32, of our parameters."""
    ours = paths(params)
    return {row.theirs: np.ascontiguousarray(row.layout.save(np.asarray(ours[row.ours])), dtype=np.float32) for row in rows}


def within(rows: Sequence[Row], tree: Any) -> list[Row]:
    """Those rows whose path is in a tree of parameters, or of their shapes."""
    there = paths(tree)
    return [row for row in rows if row.ours in there]


def paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters by their paths below "params"."""
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def module(ours: str, theirs: str, kernel: Layout, bias: bool = True) -> list[Row]:
    """The rows of a convolution or linear map: kernel and, where it has one, bias."""
    rows = [Row(f"{ours}/kernel", f"{theirs}.weight", kernel)]
    return rows + ([Row(f"{ours}/bias", f"{theirs}.bias", same)] if bias else [])


def norm(ours: str, theirs: str) -> list[Row]:
    """The rows of a normalisation: scale and bias."""
    return [Row(f"{ours}/scale", f"{theirs}.weight", same), Row(f"{ours}/bias", f"{theirs}.bias", same)]


def _path(path: Any) -> str:
    return "/".join(entry.key for entry in path).removeprefix("params/")


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
