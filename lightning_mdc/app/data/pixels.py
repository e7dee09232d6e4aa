"""Pictures as models read them: upright, in gray or RGB, 8 bits per channel."""

import numpy as np
from PIL import Image, ImageOps

from lightning_mdc.errors import DataError

_NO_RANGE = {"I": "32-bit whole numbers", "F": "floating-point numbers", "LAB": "LAB colours"}


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """What there is to see, in PIL's ``mode`` (L or RGB).

    The orientation that a camera notes is applied. 16 bits are scaled to 8; PIL clips them, and all above 255 is
    white. Transparency is left out as PIL, timm and torchvision do; see `is_see_through`.

    Raises:
        DataError: no 8 bits can be made of it, as the file does not say what is black and what is white.
    """
    ImageOps.exif_transpose(image, in_place=True)
    # PIL has 16-bit PNG and PGM as mode I in some releases, scaled to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        sixteen = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((sixteen * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in _NO_RANGE:
        raise DataError(
            f"holds {_NO_RANGE[image.mode]} (PIL's mode {image.mode!r}), and not what is black and white in them; "
            "convert it to 8 or 16 bits, e.g. a PNG"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # of which PIL warns when it is left out
    return image if image.mode == mode else image.convert(mode)


def opened(path: str) -> Image.Image:
    """The image of a file as it is, with nothing left open."""
    with Image.open(path) as image:
        image.load()
    return image


def is_see_through(image: Image.Image) -> bool:
    """Whether any pixel is not opaque."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return False
    return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)
