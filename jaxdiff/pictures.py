"""Pictures: a batch of images as one grid, grids in time as an animation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

    _write(path, Image.fromarray(picture), "PNG")


def animate(path: str | Path | epath.Path, pictures: Sequence[np.ndarray], seconds: float = 3.0) -> None:
    """Writes pictures of one size, uint8 [H, W, 3], as a looping GIF of `seconds`, whose last frame stays for a second more."""
    from PIL import Image

    first, *rest = (Image.fromarray(picture) for picture in pictures)
    each = round(1000 * seconds / (1 + len(rest)))
    _write(path, first, "GIF", save_all=True, append_images=rest, duration=[each] * len(rest) + [each + 1000], loop=0)


def load(path: str | Path | epath.Path, shape: tuple[int, ...]) -> np.ndarray:
    """An image file as uint8 of `shape` (H, W, C), C 1 or 3.

    Raises InputError for what is no picture of 8 bits a channel, or of another size.
    """
    return _read(path, shape, "L" if shape[-1] == 1 else "RGB").reshape(shape)


def load_mask(path: str | Path | epath.Path, shape: tuple[int, ...]) -> np.ndarray:
    """A picture in black and white as bool of `shape` (H, W), True where it is white.

    Raises InputError for other values, such as the grey of a soft brush, for transparency, and where `load` does.
    """
    grey, opaque = np.moveaxis(_read(path, shape, "LA"), -1, 0)
    if (opaque != 255).any():
        raise InputError(f"{path} is transparent at {(opaque != 255).sum()} pixels; a mask is black (0) and white (255)")
    others = np.setdiff1d(grey, (0, 255))
    if others.size:
        named = ", ".join(str(value) for value in others[:3]) + (", ..." if others.size > 3 else "")
        raise InputError(f"{path} has pixels of value {named}; a mask is black (0) and white (255), which is drawn anew")
    return grey == 255


def _read(path: str | Path | epath.Path, shape: tuple[int, ...], mode: str) -> np.ndarray:
    from jaxdiff.data.images import read_image

    try:
        with epath.Path(path).open("rb") as file:
            image = read_image(file, mode)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and errors of its own
        raise InputError(f"{path} is not a picture that can be read: {error}") from error
    if image.size != (shape[1], shape[0]):
        raise InputError(f"{path} has {image.size[0]}x{image.size[1]} pixels; this model's images have {shape[1]}x{shape[0]}")
    return np.asarray(image, np.uint8)


def _write(path: str | Path | epath.Path, image: Any, kind: str, **options: Any) -> None:
    path = epath.Path(path)  # gs:// too
    if path.is_dir():
        raise InputError(f"a picture cannot be written to {path}: it is a directory; give the name of a file, such as samples.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / (path.name + ".partial")
    with temporary.open("wb") as file:
        image.save(file, kind, **options)
    temporary.replace(path)
