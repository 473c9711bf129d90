"""The dataset type, and `load`, which chooses the source by name."""

import os
from typing import NamedTuple

import numpy as np

from jaxdiff.data.cache import bordered, cached
from jaxdiff.data.digits import digits
from jaxdiff.data.folder import folder_source
from jaxdiff.data.tfds import tfds_source
from jaxdiff.errors import InputError
from jaxdiff.names import whole

PathLike = str | os.PathLike[str]


class Dataset(NamedTuple):
    """One split, in memory order; images are usually a read-only memory map."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]; -1 throughout where the set has no labels
    classes: tuple[str, ...]  # class names; empty where there are none
    name: str


def load(
    name: str,
    split: str = "train",
    data_dir: PathLike | None = None,
    cache_dir: PathLike | None = None,
    size: int | None = None,
    pad: int = 0,
) -> Dataset:
    """One split of a set: ``"digits"``, ``"folder"``, or one that TFDS prepared, as ``"cifar10"`` or ``"a/b:1.2.3"``.

    digits is packaged and needs neither directory. For "folder", data_dir is the folder of images. For a TFDS set,
    name[/config][:version], it is where TFDS prepared it (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets). Both
    are decoded once, into cache_dir (default: $XDG_CACHE_HOME/jaxdiff, else ~/.cache/jaxdiff). size (pixels) scales the
    shorter side and crops the centre; pad then adds a black border of so many pixels on each side.

    Raises InputError for a set, split, folder, size or border that does not exist, and for images that cannot be read.

        load("cifar10", "test").images.shape == (10000, 32, 32, 3)
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1):
        raise InputError(f"size {size!r} is not a positive number of pixels")
    if not whole(pad, 0):
        raise InputError(f"pad {pad!r} is not a number of pixels: it is whole, and at least 0")
    if name == "digits":
        images, labels, classes = digits(split, size)
        return Dataset(np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0))), labels, classes, name)
    source = folder_source(split, data_dir) if name == "folder" else tfds_source(name, split, data_dir)
    if pad:
        source, size = bordered(source, size, int(pad)), None
    images, labels = cached(source, size, cache_dir)
    return Dataset(images, labels, source.classes, name)


def of_config(config, split: str | None = None, data_dir: PathLike | None = None) -> Dataset:
    """The images that a config's group `data` names; of another `split`, or in another `data_dir`, where given.

    Raises InputError as `load` does.
    """
    named, pad = config.data, config.data.get("pad", 0)
    return load(named.name, split or named.split, data_dir or config.data_dir or None, size=named.size or None, pad=pad)


def statistics(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over all pixels of each channel, float64 [C] each, of images scaled to [-1, 1].

    Counts of the 256 values hold all there is to know: exact integers, gathered about 16 MB at a time.
    """
    images = np.asarray(dataset.images)
    count, height, width, channels = images.shape
    chunk = max(1, 2**24 // (height * width * channels))
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, count, chunk):
        pixels = images[start : start + chunk].reshape(-1, channels)
        counts += np.stack([np.bincount(pixels[:, c], minlength=256) for c in range(channels)])
    share = counts / (count * height * width)
    values = np.arange(256) / 127.5 - 1
    mean = share @ values
    variance = (share * (values[None, :] - mean[:, None]) ** 2).sum(axis=1)
    return mean, np.sqrt(variance)
