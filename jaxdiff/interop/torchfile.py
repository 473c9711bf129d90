"""Tensors out of files that torch.save wrote, without torch, and without running anything that a pickle asks for.

A pickle is a program. This reader knows the few names that plain tensors in dicts and lists need and makes them itself, passes over
a few that published files have besides, and refuses any other. Both formats are read: the zip archive (torch 1.6 and newer) and the
older stream of pickles.
"""

import collections
import functools
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxdiff.errors import InputError

MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


# What the trainers of published files leave beside the tensors: numbers of NumPy, options and callbacks.
UNREAD = {
    ("_codecs", "encode"),
    ("argparse", "Namespace"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
}


class Unread:
    """Stands for what is no tensor: made of anything, it holds and does nothing."""

    def __init__(self, *unused: Any):
        pass

    def __setstate__(self, unused: Any) -> None:
        pass


class Storage(NamedTuple):
    """Where a tensor's numbers are: which entry of the file, and of which type."""

    key: str
    dtype: type


class Tensor(NamedTuple):
    """A tensor as a pickle describes it: numbers of a storage from `offset` on, with `stride` numbers from one to the next."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read(path: Path) -> Any:
    """What torch.save wrote: dicts, lists and numbers as they were, tensors as arrays.

    Raises InputError for a file that is cut short or damaged, and for a pickle that names anything but tensors.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        with path.open("rb") as file:
            return _read_stream(file)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle may fail anywhere
        raise InputError(f"{path} is no file of torch.save, or is cut short ({type(error).__name__}: {error})") from error


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise InputError("it was written on a big-endian machine, which is not read")
        tree = _Unpickler(io.BytesIO(archive.read(pickled))).load()
        return _filled(tree, lambda storage: np.frombuffer(archive.read(f"{folder}data/{storage.key}"), storage.dtype))


def _read_stream(file: BinaryIO) -> Any:
    if _Unpickler(file).load() != MAGIC:
        raise ValueError("it does not begin as one")
    _Unpickler(file).load()  # the version of the format
    if not _Unpickler(file).load()["little_endian"]:
        raise InputError("it was written on a big-endian machine, which is not read")
    names = _Unpickler(file)
    tree, keys, storages = names.load(), _Unpickler(file).load(), {}
    for key in keys:
        count, dtype = int.from_bytes(file.read(8), "little"), np.dtype(names.storages[key].dtype)
        storages[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)
    return _filled(tree, lambda storage: storages[storage.key])


class _Unpickler(pickle.Unpickler):
    """Knows tensors and ordered dicts, passes over UNREAD; what else a pickle may name is refused before it is called."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter"):
            return {"_rebuild_parameter": _parameter}.get(name, _tensor)
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) in UNREAD:
            return Unread
        raise InputError(f"its pickle asks for {module}.{name}, which is refused: only tensors, dicts and lists are read")

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, *rest = pid
        if kind != "storage" or (len(rest) > 2 and rest[2] is not None):
            raise ValueError(f"unknown reference {pid}")
        return self.storages.setdefault(key, Storage(key, dtype))


def _tensor(storage: Storage, offset: int, shape: tuple, stride: tuple, *unused: Any) -> Tensor:
    return Tensor(storage, offset, tuple(shape), tuple(stride))


def _parameter(tensor: Tensor, *unused: Any) -> Tensor:
    return tensor


def _filled(tree: Any, storage: Callable[[Storage], np.ndarray]) -> Any:
    """The tree with arrays for its tensors; each storage is read once."""
    return _fill(tree, functools.cache(storage))


def _fill(node: Any, storage: Callable[[Storage], np.ndarray]) -> Any:
    # No closure that calls itself: such a cycle would keep all tensors in memory after their last use.
    if isinstance(node, Tensor):
        return _view(storage(node.storage), node)
    if isinstance(node, dict):
        return {key: _fill(value, storage) for key, value in node.items()}
    return [_fill(value, storage) for value in node] if isinstance(node, list | tuple) else node


def _view(numbers: np.ndarray, tensor: Tensor) -> np.ndarray:
    # as_strided reads whatever memory it is told to: what reaches outside the storage is refused first.
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    sizes = (*tensor.shape, *tensor.stride, tensor.offset)
    if not all(isinstance(n, int) and n >= 0 for n in sizes) or (0 not in tensor.shape and last >= len(numbers)):
        raise ValueError(f"a tensor of shape {tensor.shape} reaches outside its storage of {len(numbers)} numbers")
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, numbers.dtype)
    steps = tuple(step * numbers.itemsize for step in tensor.stride)
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, steps, writeable=False)
