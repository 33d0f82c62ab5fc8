"""Bytes of an image file to pixels: the one decoder of `sam-repro write` and of every reader.

It is Pillow's `convert("RGB")`, as in timm and torchvision, so that weights of others see what they were trained on.
Alpha is dropped, the first frame of an animation is taken, and EXIF orientation is not applied. Of 16-bit grey images
the high byte is taken, where Pillow would make everything above 255 white; grey images of floats or of 32 bits, whose
range nobody knows, are refused. JPEGs have the pixels of libjpeg-turbo's accurate transform, which `jpeg.render_jpeg`
gives, too.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from sam_repro.errors import UserError

Buffer = bytes | bytearray | memoryview
SIXTEEN_BITS = {"I;16", "I;16L", "I;16B", "I;16N"}


def decode(data: Buffer, name: str) -> np.ndarray:
    """uint8 [H, W, 3] RGB, C-contiguous, of an encoded image. Raises UserError, which says `name`, when it cannot."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return rgb(image)
    except Exception as error:  # Pillow raises many types for damaged files
        raise UserError(f"cannot decode {name}: {reason(error)}") from None


def rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] RGB of an opened image. Raises ValueError where the range of its values is not known."""
    image.load()
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 0 ... 65535
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, 2)
    if image.mode in ("I", "F"):
        kind = "32-bit numbers" if image.mode == "I" else "floats"
        raise ValueError(f"its pixels are {kind} of unknown range; store it with 8 or 16 bits")
    return np.array(image.convert("RGB"))


def reason(error: Exception) -> str:
    """What an exception of Pillow says, without the address of our buffer."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image that Pillow knows"
    return str(error) or type(error).__name__
