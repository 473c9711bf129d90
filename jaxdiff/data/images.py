"""Reading one image with PIL, and bringing it to a square of a given size. PIL is imported when first needed."""

from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(file: str | IO[bytes], mode: str) -> "Image":
    """The image in a file, in a PIL mode of 8 bits a channel ("L", "LA", "RGB", "RGBA").

    Raises what PIL raises on a damaged file, and ValueError for 16-bit and float images, which PIL would clip to white.
    """
    from PIL import Image

    with Image.open(file) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(f"PIL mode {image.mode}, more than 8 bits a channel")
        return image.convert(mode)


def read_photo(path: str) -> "Image":
    """The image in a file, RGB and upright: a camera stores a turned picture and says so in EXIF."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(read_image(path, "RGB"))


def fit(image: "Image", size: int) -> "Image":
    """The image with its shorter side scaled to `size` pixels, then cropped to the central square.

    PIL's bicubic filter widens with the reduction, so shrinking does not alias. Its cost grows with the photo, so
    reducing_gap first averages whole blocks of pixels (a box filter), down to no less than twice the size.
    """
    from PIL import Image

    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    scaled = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    left, top = (width - size) // 2, (height - size) // 2
    return scaled.crop((left, top, left + size, top + size))
