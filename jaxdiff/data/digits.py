"""The packaged set: 1797 real handwritten digits of 8x8 pixels (source and licence in digits.txt)."""

import importlib.resources
import io

import numpy as np

from jaxdiff.data.images import fit
from jaxdiff.errors import InputError, nearest


def digits(split: str, size: int | None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images uint8 [N, 8, 8, 1] (or size x size), labels int32 [N] and class names of a split.

    Every sixth image (index % 6 == 5) is "test", 299 in all; the other 1498 are "train".

    Raises InputError for another split.
    """
    if split not in ("train", "test"):
        raise InputError(f"digits has no split {split!r}, only train and test{nearest(split, ('train', 'test'))}")
    with np.load(io.BytesIO(importlib.resources.files("jaxdiff.data").joinpath("digits.npz").read_bytes())) as arrays:
        images, labels = arrays["images"], arrays["labels"].astype(np.int32)
    chosen = (np.arange(len(labels)) % 6 == 5) == (split == "test")
    images, labels = images[chosen], labels[chosen]
    if size is not None:
        images = _resized(images, size)
    return images, labels, tuple(str(digit) for digit in range(10))


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    return np.stack([np.asarray(fit(Image.fromarray(image[..., 0]), size))[..., None] for image in images])
