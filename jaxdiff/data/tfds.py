"""Sets that TensorFlow Datasets has prepared as ArrayRecord, read without TensorFlow and without the set's own code."""

import functools
import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.data.cache import Item, Source, fingerprint
from jaxdiff.data.files import first_line
from jaxdiff.data.images import read_image
from jaxdiff.errors import InputError, nearest

_NAME = re.compile(r"(\w[\w.+-]*(?:/\w[\w.+-]*)?)(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_KNOWN = ("digits", "folder", "cifar10", "mnist")  # sets that need no TensorFlow, prepared or not
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # PIL's name for a number of channels


def default_data_dir() -> Path:
    """Where TFDS itself keeps its sets: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def tfds_source(name: str, split: str, data_dir: str | os.PathLike[str] | None) -> Source:
    """A split of the set ``name[/config][:version]`` in data_dir; the newest version unless one is given.

    The image is the set's first Image feature and the label its first ClassLabel feature: those that the set names as
    its supervised keys if it does (cifar100 has two labels), else by alphabet.

    Raises InputError where the set or the split is not there, is not ArrayRecord, or has no 8-bit image.
    """
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    directory = _find(name, root)
    require_array_record(directory, directory.parent.relative_to(root).as_posix())
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(directory)
        info = builder.info
        features = _in_order(dict(info.features), info.supervised_keys)
    except Exception as error:  # damaged JSON ends in errors of protobuf, json and TFDS itself
        raise InputError(f"{directory} is not a readable TFDS set: {first_line(error)}") from error
    if split not in info.splits:
        raise InputError(f"{name} has no split {split!r}, only {', '.join(info.splits)}{nearest(split, info.splits)}")
    missing = [path for path in info.splits[split].filepaths if not Path(path).is_file()]
    if missing:
        raise InputError(f"{missing[0]} is missing: copy or prepare {name} again")
    image, mode = _image_feature(name, features, tfds.features)
    label = next((key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)), None)
    data = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()}, file_format="array_record")

    def items(start: int, stop: int) -> list[Item]:
        try:
            records = data.__getitems__(range(start, stop))
            named = [(f"example {i} of {name} {split}", r) for i, r in enumerate(records, start)]
            return [_item(what, record, image, label, mode) for what, record in named]
        except Exception as error:  # a cut file ends in errors of array_record or protobuf, or in empty records
            raise InputError(f"cannot read {name} in {directory}: copy or prepare it again ({first_line(error)})") from error

    classes = tuple(features[label].names) if label else ()
    return Source(info.name, directory.name, split, classes, _fingerprint(directory), len(data), items)


def _in_order(features: dict[str, Any], supervised: Any) -> dict[str, Any]:
    """The features with the supervised ones first; TFDS returns them in another order in every process."""
    first = [key for key in supervised or () if isinstance(key, str) and key in features]
    return {key: features[key] for key in [*first, *sorted(features)]}


def _item(what: str, record: dict[str, Any], image: str, label: str | None, mode: str) -> Item:
    number = int(record[label]) if label else -1
    return Item(what, number, functools.partial(read_image, io.BytesIO(record[image]), mode))


def _image_feature(name: str, features: dict[str, Any], kinds: Any) -> tuple[str, str]:
    """The name and the PIL mode of the first image; a LabeledImage is a map of classes, not a picture."""
    for key, feature in features.items():
        if isinstance(feature, kinds.Image) and not isinstance(feature, kinds.LabeledImage):
            if np.dtype(feature.np_dtype) != np.uint8 or feature.shape[-1] not in _MODES:
                raise InputError(f"the feature {key!r} of {name} is {feature}: only uint8 images of 1 to 4 channels")
            return key, _MODES[feature.shape[-1]]
    held = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
    raise InputError(f"{name} has no image feature, only {held}")


def _find(name: str, root: Path) -> Path:
    """The directory of a prepared set's version."""
    match = _NAME.fullmatch(str(name))
    if match is None:
        raise InputError(f"{name!r} is not the name of a set: digits, folder, or name[/config][:version] of TFDS")
    path, version = match.groups()
    if not root.is_dir():
        near = nearest(path, _KNOWN)
        raise InputError(f"{name} is not prepared{near}; data_dir {root} does not exist; {_how_to_get(path, root)}")
    versions = _versions(root / path)
    if not versions:
        held = _held(root)
        inner = [other for other in held if other.startswith(f"{path}/")]
        if inner:
            raise InputError(f"{path} has configurations, name one of them: {', '.join(inner)}")
        near = nearest(path, [*held, *_KNOWN])
        listed = ", ".join(held) or "no prepared set"
        raise InputError(f"{name} is not in {root}, which holds {listed}{near}; {_how_to_get(path, root)}")
    if version and version not in versions:
        raise InputError(f"{name} is not in {root}, which holds {path} in version {', '.join(versions)}")
    return root / path / (version or versions[-1])


def _how_to_get(path: str, root: Path | str) -> str:
    if path in ("cifar10", "mnist"):
        return f"to get it: python -m jaxdiff.data.prepare {path} --data_dir={root}"
    return f'to get it: pip install "jaxdiff[tf]" and tfds build {path} --file_format=array_record --data_dir={root}'


def _versions(folder: Path) -> list[str]:
    """Prepared versions in a folder, oldest first."""
    found = [info.parent.name for info in folder.glob("*/dataset_info.json") if _VERSION.fullmatch(info.parent.name)]
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def _held(root: Path) -> list[str]:
    """Names (with configuration) of all sets prepared below root."""
    infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
    found = {i.parent.parent.relative_to(root).as_posix() for i in infos if _VERSION.fullmatch(i.parent.name)}
    return sorted(found)


def require_array_record(directory: Path, path: str) -> None:
    """Raises InputError where the prepared set `path` (name[/config]) in a directory is in another format only."""
    try:
        info = json.loads((directory / "dataset_info.json").read_text())
        formats = [info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", [])]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{directory / 'dataset_info.json'} is not readable: {first_line(error)}") from error
    if "array_record" not in formats:
        raise InputError(
            f"{directory} holds {', '.join(formats)} files, and only array_record can be read; "
            f"{_how_to_get(path, 'ANOTHER_DIR')}, then give that data_dir"
        )


def _fingerprint(directory: Path) -> str:
    """Changes when the description of the set (hashed) or a record file (name and size) does."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    texts = {path for path in files if path.suffix in (".json", ".txt")}
    return fingerprint([[f.name, hashlib.sha256(f.read_bytes()).hexdigest() if f in texts else f.stat().st_size] for f in files])
