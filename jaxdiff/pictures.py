"""Pictures: a batch of images as one grid."""

from pathlib import Path

import numpy as np
from etils import epath

from jaxdiff.errors import InputError


def tile(images: np.ndarray, columns: int | None = None, gap: int = 1, smallest: int = 32) -> np.ndarray:
    """A grid, uint8 [H', W', 3], of images uint8 [N, H, W, C], row by row; C is 1 or 3.

    The grid is as square as N allows unless `columns` is given; images below `smallest` pixels are repeated to at least that.
    Raises ValueError for other shapes or dtypes.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"tile needs uint8 [N, H, W, 1 or 3], got {images.dtype} {images.shape}")
    factor = -(-smallest // max(images.shape[1:3]))
    images = np.broadcast_to(images, (*images.shape[:3], 3)).repeat(factor, 1).repeat(factor, 2)
    n, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[y : y + height, x : x + width] = image
    return canvas


def save(path: str | Path | epath.Path, picture: np.ndarray) -> None:
    """Writes a picture, uint8 [H, W, 3], as PNG, whole or not at all. Raises InputError where `path` is a directory."""
    from PIL import Image

    path = epath.Path(path)  # gs:// too
    if path.is_dir():
        raise InputError(f"a picture cannot be written to {path}: it is a directory; give the name of a file, such as samples.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / (path.name + ".partial")
    with temporary.open("wb") as file:
        Image.fromarray(picture).save(file, "PNG")
    temporary.replace(path)
