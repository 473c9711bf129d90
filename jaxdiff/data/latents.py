"""A data set's latents: what an encoder says of its images, computed once, and batches of that.

They lie in a folder as part-00000.npy, part-00001.npy ..., float16 each, beside meta.json, which says what they are of. A part is
written under another name and renamed when it is on disk, so what has its final name is whole, and a stopped encoding goes on
with the parts that are missing.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxdiff import compiling
from jaxdiff import mesh as meshes
from jaxdiff.codec import Codec
from jaxdiff.data.batches import rows_at
from jaxdiff.data.cache import fingerprint, place
from jaxdiff.data.dataset import Dataset
from jaxdiff.data.files import lock, move_when_synced, removed_at_the_end
from jaxdiff.errors import InputError

Array = jax.Array

_LAYOUT = 1  # raise it when the same codec and data would lie otherwise
# A part has at most so many images, and bytes.
_ROWS, _BYTES = 4096, 2**26
# Of a larger set the digest is of images spread evenly, as many as make up so much.
_DIGESTED = 2**31
# How an error says what a folder's latents are of, by the key of meta.json.
_OF = {"codec": "another codec", "pixels": "another codec of pixels", "images": "other images", "shape": "another shape"}


class Latents(NamedTuple):
    """What an encoder says of N images, in the order of their data set.

    `parts` are memory maps float16 [n, flips, h, w, m] of equally many images but for the last, where flips is 1, or 2 with the
    mirrored image second; m is twice the channels of a latent where `posterior` (mean and log variance). `labels` int32 [N].
    """

    parts: tuple[np.ndarray, ...]
    labels: np.ndarray
    posterior: bool
    folder: str


def cached(
    dataset: Dataset,
    codec: Codec,
    flip: bool,
    size: int,
    folder: str | os.PathLike[str] = "",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Latents:
    """The latents of a data set, and with `flip` of its mirrored images, encoded `size` at once where they are not there yet.

    They are kept in `folder`, or where that is empty in cache_dir (default: $XDG_CACHE_HOME/jaxdiff, else ~/.cache/jaxdiff) under
    the name of the set and a digest. Of several processes all encode and the first writes; others of the same disk wait. Raises
    InputError where the folder holds latents of another codec or of other images, cannot be written, or is not there for every
    process, and for what float16 cannot hold.
    """
    asked = facts(dataset, codec, flip)
    name = f"{dataset.name.replace('/', '-')}-latents-{fingerprint(asked)[:16]}"
    directory = Path(folder).expanduser() if folder else place(cache_dir) / name
    _check(directory, asked)
    if not meshes.agree(np.int32(all(part is not None for part in _parts(directory, asked)))):
        try:
            with _held(directory):
                _check(directory, asked)
                _make(directory, asked, dataset, codec, flip, size)
        except OSError as error:
            raise InputError(
                f"cannot write latents in {directory}: {error.strerror or error}; make room or set data.latents"
            ) from error
        meshes.agree(np.int32(0))  # the others wait until the last part is there
    parts = _parts(directory, asked)
    if missing := [i for i, part in enumerate(parts) if part is None]:
        raise InputError(f"{directory / _name(missing[0])} is not there; all processes must share the folder (data.latents)")
    return Latents(tuple(parts), dataset.labels, _posterior(codec, dataset.images.shape[1:]), str(directory))  # type: ignore[arg-type]


def shape(codec: Codec, image: Sequence[int], flip: bool) -> tuple[int, ...]:
    """What is kept of one image of shape `image` (H, W, C): (flips, h, w, m)."""
    seen = jax.eval_shape(codec.stage.look, jax.ShapeDtypeStruct((1, *image), jnp.uint8))  # type: ignore[union-attr]
    return (2 if flip else 1, *seen.shape[1:])


def facts(dataset: Dataset, codec: Codec, flip: bool) -> dict[str, Any]:
    """What latents are of and how they lie, as JSON: the codec's and the images' digests, the shape of all, images in a part."""
    n, one = len(dataset.images), shape(codec, dataset.images.shape[1:], flip)
    rows = min(_ROWS, max(1, _BYTES // (2 * math.prod(one))), n)
    of = {"codec": codec.stage.digest, "pixels": codec.stage.pixels, "images": _digest(dataset.images)}
    return {"layout": _LAYOUT, **of, "shape": [n, *one], "part": rows}


def batch_at(
    latents: Latents, seed: int, step: int, batch_size: int, process: int = 0, processes: int = 1
) -> dict[str, np.ndarray]:
    """Batch number `step`, `data.batch_at` of latents: {"latent": float16 [b, flips, h, w, m], "label": int32 [b]}.

    The images are those that it takes of the data set. Raises InputError as it does.
    """
    rows = rows_at(len(latents.labels), seed, step, batch_size, process, processes)
    each = len(latents.parts[0])
    taken = np.empty((len(rows), *latents.parts[0].shape[1:]), np.float16)
    for i in np.unique(rows // each):
        here = rows // each == i
        # A plain view: indexing np.memmap itself pays for its subclass.
        taken[here] = np.asarray(latents.parts[i])[rows[here] - i * each]
    return {"latent": taken, "label": latents.labels[rows]}


def statistics(latents: Latents) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of z over all images and places, float64 [C] each, in one pass.

    Of a posterior, Var z = Var mean + E variance.
    """
    sums, count = np.zeros((2, 1)), 0
    for part in latents.parts:
        for start in range(0, len(part), 256):
            seen = np.asarray(part[start : start + 256], np.float64).reshape(-1, part.shape[-1])
            mean, logvar = np.split(seen, 2, -1) if latents.posterior else (seen, None)
            spread = 0.0 if logvar is None else np.exp(logvar)
            sums, count = sums + np.stack([mean, mean**2 + spread]).sum(1), count + len(seen)
    mean, square = sums / count
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _posterior(codec: Codec, shape: tuple[int, ...]) -> bool:
    seen = jax.eval_shape(codec.stage.look, jax.ShapeDtypeStruct((1, *shape), jnp.uint8))
    return jax.eval_shape(codec.stage.draw, jax.random.key(0), seen).shape != seen.shape


def _digest(images: np.ndarray) -> str:
    row = math.prod(images.shape[1:])
    most = max(1, _DIGESTED // row)
    rows = np.arange(len(images)) if len(images) <= most else np.linspace(0, len(images) - 1, most).astype(int)
    total = hashlib.sha256(f"{images.shape} {images.dtype}".encode())
    for chunk in np.array_split(rows, math.ceil(len(rows) * row / 2**24)):
        total.update(np.ascontiguousarray(images[chunk]).data)
    return total.hexdigest()


def _check(directory: Path, asked: dict[str, Any]) -> None:
    """Raises InputError where a folder's meta.json says that it is of something else, or where it has parts and none."""
    try:
        held = json.loads((directory / "meta.json").read_text())
        differs = [key for key in asked if held[key] != asked[key]]
    except (FileNotFoundError, NotADirectoryError):
        # A process that begins there may be about to write it.
        if directory.is_dir() and any(path.suffix != ".partial" for path in directory.iterdir()):
            raise InputError(f"{directory} holds other files, and no meta.json of latents; give an empty or a new folder") from None
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{directory}/meta.json, which says what the latents there are of, is damaged; remove the folder"
        ) from error
    if differs:
        key = differs[0]
        was, now = (str(facts[key])[:16] if key in ("codec", "images") else facts[key] for facts in (held, asked))
        what = f"{key}{' digest' if key in ('codec', 'images') else ''} {was}, and here it is {now}"
        raise InputError(f"the latents in {directory} are of {_OF.get(key, 'another layout')}: {what}; give another data.latents")


@contextlib.contextmanager
def _held(directory: Path):
    """Holds a folder for the one run that encodes; what killed ones left unfinished is removed."""
    if not meshes.first_process():
        yield
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"jaxdiff: waiting for another process that encodes into {directory}"
    with lock(directory.parent / f"{directory.name}.lock", waiting) as held:
        for partial in directory.glob("*.partial") if held else ():
            partial.unlink(missing_ok=True)
        yield


def _make(directory: Path, asked: dict[str, Any], dataset: Dataset, codec: Codec, flip: bool, size: int) -> None:
    """Encodes the parts that are not there; all processes must call it."""
    # All processes take part in encoding, so all must know of the same parts.
    there = meshes.agree(np.array([part is not None for part in _parts(directory, asked)], np.int32)).astype(bool)
    if there.all():  # made by another process meanwhile
        return
    if meshes.first_process():
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "meta.json", lambda file: file.write(json.dumps(asked, indent=1).encode()))
    total, mesh = asked["shape"][0], meshes.make_mesh((-1, 1))
    size = -(-min(size, total) // mesh.size) * mesh.size
    starts = range(0, total, asked["part"])
    done = sum(min(asked["part"], total - start) for start, whole in zip(starts, there) if whole)
    bar = tqdm(total=total, initial=done, desc=f"encoding {dataset.name}", unit="image", disable=not meshes.first_process())
    with bar:
        for i, start in enumerate(starts):
            if there[i]:
                continue
            rows = np.arange(start, min(start + asked["part"], total))
            part = _encoded(dataset.images, rows, functools.partial(_seen, codec.stage.look, flip=flip), size, mesh, bar)
            if meshes.first_process():
                _write(directory / _name(i), functools.partial(np.save, arr=part))


def _encoded(images: np.ndarray, rows: np.ndarray, see: Callable[[Array], Array], size: int, mesh, bar) -> np.ndarray:
    """What `see` says of these images, `size` at once over all devices, float16 [rows, flips, h, w, m]."""
    out = []
    for start in range(0, len(rows), size):
        here = rows[start : start + size]
        # The last batch is filled up, so that one compiled program does for all.
        index = np.concatenate([here, np.full(size - len(here), here[-1])])

        def read(i: int, of: int, index: np.ndarray = index) -> dict[str, np.ndarray]:
            return {"image": np.asarray(images[np.split(index, of)[i]])}

        found = meshes.fetch(see(meshes.put(mesh, size, read)["image"]))[: len(here)]
        if not np.isfinite(found).all():
            wrong = here[~np.isfinite(found).all((1, 2, 3, 4))][0]
            raise InputError(f"the first stage says of image {wrong} what is no finite number of float16")
        out.append(found)
        bar.update(len(here))
    return np.concatenate(out)


@functools.partial(compiling.jit, static_argnames="flip")
def _seen(look: Callable[[Array], Array], images: Array, flip: bool) -> Array:
    sides = (images, images[:, :, ::-1]) if flip else (images,)
    return jnp.stack([look(side) for side in sides], axis=1).astype(jnp.float16)


def _name(i: int) -> str:
    return f"part-{i:05d}.npy"


def _parts(directory: Path, asked: dict[str, Any]) -> list[np.ndarray | None]:
    """Memory maps of the parts, None for one that is not there, or not whole."""
    total, *shape = asked["shape"]
    starts = range(0, total, asked["part"])
    return [_part(directory / _name(i), (min(asked["part"], total - start), *shape)) for i, start in enumerate(starts)]


def _part(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        part = np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError):  # NumPy calls a cut file a ValueError
        return None
    return part if (part.dtype, part.shape) == (np.float16, shape) else None


def _write(path: Path, save: Callable[[Any], Any]) -> None:
    """Writes a file by `save(file)`, whole and on disk or not at all."""
    partial = path.parent / f"{path.name}.{uuid.uuid4().hex[:8]}.partial"
    with removed_at_the_end(partial):
        with open(partial, "wb") as file:
            save(file)
        move_when_synced(partial, path)
