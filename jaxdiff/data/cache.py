"""The decoded copy of a source: one uint8 .npy memory map a split, written once and opened in no time afterwards.

A copy is a directory ``NAME-VERSION-SPLIT-SIZE-FINGERPRINT`` with images.npy, labels.npy and meta.json. It is written
under another name (``*.partial``) and renamed when it is complete and on disk: what has the final name is whole.
"""

import concurrent.futures
import functools
import hashlib
import json
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from jaxdiff.data.files import first_line, lock, move_when_synced, remove, removed_at_the_end
from jaxdiff.data.images import fit
from jaxdiff.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

_LAYOUT = 1  # raise it when the same source would decode to other bytes
_CHUNK = 64  # images decoded and written at a time
_LARGE = 2**17  # pixels of an image from which threads pay: 1.9 times on 2 cores from 500x500 JPEG, nothing at 300x300


class Item(NamedTuple):
    """One example that is still to be decoded."""

    what: str  # how an error message names it
    label: int
    open: Callable[[], "Image"]


class Source(NamedTuple):
    """One split of a set that has to be decoded before use."""

    name: str
    version: str  # "" where there is none
    split: str
    classes: tuple[str, ...]
    fingerprint: str  # of the bytes on disk, from `fingerprint`
    total: int
    items: Callable[[int, int], list[Item]]  # the examples start ... stop - 1


def fingerprint(facts: Any) -> str:
    """A hexadecimal digest of facts (anything JSON can hold) that change when the source does."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def place(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Where caches are kept: cache_dir, or where None $XDG_CACHE_HOME/jaxdiff, else ~/.cache/jaxdiff."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxdiff"
    return default if cache_dir is None else Path(cache_dir).expanduser()


def bordered(source: Source, size: int | None, pad: int) -> Source:
    """The source with its images fitted to `size`, and then a black border of `pad` pixels on each side."""

    def around(item: Item) -> "Image":
        from PIL import ImageOps

        image = item.open()
        return ImageOps.expand(image if size is None else fit(image, size), pad, 0)

    def items(start: int, stop: int) -> list[Item]:
        return [item._replace(open=functools.partial(around, item)) for item in source.items(start, stop)]

    return source._replace(items=items, fingerprint=fingerprint([source.fingerprint, size, pad]))


def cached(source: Source, size: int | None, cache_dir: str | os.PathLike[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C], a read-only memory map, and labels int32 [N] of a source, decoded on first use.

    Raises InputError where an image cannot be read, images differ in size, or cache_dir cannot be written.
    """
    if source.total == 0:
        raise InputError(f"split {source.split!r} of {source.name} holds no images")
    root = place(cache_dir)
    parts = [source.name.replace("/", "-"), source.version, source.split, str(size or "full")]
    directory = root / "-".join([part for part in parts if part] + [fingerprint([_LAYOUT, source.fingerprint])[:16]])
    try:
        return _opened(directory) or _built(directory, source, size)
    except OSError as error:
        raise InputError(
            f"cannot write the cache in {root}: {error.strerror or error}; make room or give another cache_dir"
        ) from error


def _opened(directory: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The arrays of a finished copy, or None where it is not there or not what its meta.json says."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
        images = np.load(directory / "images.npy", mmap_mode="r")
        labels = np.load(directory / "labels.npy")
        expected = (meta["images"], meta["labels"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):  # NumPy and json call a cut file a ValueError
        return None
    kinds = (images.dtype, labels.dtype) == (np.uint8, np.int32)
    return (images, labels) if kinds and (list(images.shape), list(labels.shape)) == expected else None


def _built(directory: Path, source: Source, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    root = directory.parent
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    with lock(root / f"{directory.name}.lock", f"jaxdiff: waiting for another process that writes {directory}"):
        arrays = _opened(directory)  # that other process may have made it meanwhile
        if arrays is None:
            if directory.exists():
                print(f"jaxdiff: the cache {directory} is damaged; making it again", file=sys.stderr)
                remove(directory)
            partial = root / f"{directory.name}.{uuid.uuid4().hex[:8]}.partial"
            with removed_at_the_end(partial):
                _write(partial, source, size)
                move_when_synced(partial, directory)
            arrays = _opened(directory)
    if arrays is None:
        raise InputError(f"the cache {directory} does not read back as written; give a cache_dir on another disk")
    return arrays


def _remove_leftovers(root: Path) -> None:
    """Remove what killed builds left: a partial directory whose lock is free has no living writer."""
    for partial in root.glob("*.partial"):
        with lock(root / f"{partial.name.rsplit('.', 2)[0]}.lock", waiting=None) as held:
            if held:
                remove(partial)


def _write(partial: Path, source: Source, size: int | None) -> None:
    partial.mkdir()
    labels = np.empty(source.total, np.int32)
    # Written as a file: through a memory map, a full disk would kill the process (SIGBUS) instead of raising OSError.
    with open(partial / "images.npy", "wb") as file:
        start, shape = 0, (0,)
        for chunk, chunk_labels in _decoded(source, size):
            if start == 0:
                shape = chunk.shape[1:]
                _write_header(file, (source.total, *shape))
            file.write(chunk.data)
            labels[start : start + len(chunk)] = chunk_labels
            start += len(chunk)
    np.save(partial / "labels.npy", labels)
    described = {key: value for key, value in source._asdict().items() if key != "items"}
    meta = described | {"size": size, "images": [source.total, *shape], "labels": [source.total]}
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _decoded(source: Source, size: int | None) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Chunks of images uint8 [b, H, W, C] with their labels, in order, behind a progress bar."""
    first = source.items(0, 1)[0]
    expected = _decode(first, size).shape
    # PIL frees the interpreter lock while it decodes, but for small images the hand-over costs more than it gives.
    threads = math.prod(_image(first).size) >= _LARGE
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=source.total, desc=f"decoding {source.name} {source.split}", unit="img", file=sys.stderr) as bar,
    ):
        for start in range(0, source.total, _CHUNK):
            items = source.items(start, min(start + _CHUNK, source.total))
            images = list((pool.map if threads else map)(_decode, items, [size] * len(items)))
            for item, image in zip(items, images, strict=True):
                if image.shape != expected:
                    raise InputError(
                        f"{first.what} is {_extent(expected)} but {item.what} is {_extent(image.shape)}: "
                        "give size= to bring all images to one size"
                    )
            yield np.stack(images), [item.label for item in items]
            bar.update(len(items))


def _decode(item: Item, size: int | None) -> np.ndarray:
    image = _image(item)
    array = np.asarray(image if size is None else fit(image, size))
    return array if array.ndim == 3 else array[:, :, None]


def _image(item: Item) -> "Image":
    try:
        return item.open()
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and errors of its own
        raise InputError(f"{item.what} is not a readable image: {first_line(error)}") from error


def _extent(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
