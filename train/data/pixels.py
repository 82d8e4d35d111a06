"""From a file's bytes to pixels: whatever a folder of pictures may hold, as RGB or grey."""

import io
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

_EXIF_ORIENTATION = 0x0112
_EXIF_REACH = 1 << 16  # a JPEG's EXIF segment comes first, or after one or two small ones


class Turn(NamedTuple):
    """How stored pixels become upright: transposed, then turned upside down, then mirrored."""

    transpose: bool
    upside_down: bool
    mirror: bool

    def apply(self, image: UInt8[np.ndarray, "h w c"]) -> np.ndarray:
        """The upright image."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.upside_down else 1, :: -1 if self.mirror else 1]


UPRIGHT = Turn(False, False, False)

# By EXIF's orientation, which names the sides where the stored first row and first column are.
_TURNS = {
    2: Turn(False, False, True),
    3: Turn(False, True, True),
    4: Turn(False, True, False),
    5: Turn(True, False, False),
    6: Turn(True, False, True),
    7: Turn(True, True, True),
    8: Turn(True, True, False),
}


def decode(encoded: bytes, channels: int, *, upright: bool) -> UInt8[np.ndarray, "h w c"]:
    """All pixels of a picture.

    Transparent parts are shown on white. Of 16 bits a channel the upper 8 are taken, of several
    frames the first.

    Args:
      encoded: a file's bytes: JPEG, PNG, WebP, BMP, GIF or TIFF, in grey, RGB, CMYK or a palette,
        with or without alpha.
      channels: 3 for RGB, 1 for grey (ITU-R BT.601).
      upright: whether the picture is turned as its EXIF orientation says.

    Raises:
      ValueError: if the bytes are no picture, a truncated one, or one of 32 bits a channel.
    """
    mode = "RGB" if channels == 3 else "L"
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            upright_image = ImageOps.exif_transpose(image) if upright else image
            array = np.array(_eight_bits(upright_image).convert(mode))
    except UnidentifiedImageError as error:
        raise ValueError("Pillow can't decode it: it begins as no picture does") from error
    except Exception as error:  # Pillow's readers raise anything for damaged files
        raise ValueError(f"Pillow can't decode it: {error}") from error
    return array.reshape(*array.shape[:2], channels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel and no transparency."""
    if image.mode.startswith("I;16"):  # Pillow itself would clip, not scale
        return Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a channel")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque
    return image


def jpeg_turn(encoded: bytes) -> Turn:
    """How a JPEG becomes upright; `UPRIGHT` where it does not say or is none."""
    if encoded.find(b"Exif\0\0", 0, _EXIF_REACH) < 0:  # nearly free, unlike Pillow's look
        return UPRIGHT
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1), UPRIGHT)
    except Exception:  # damaged EXIF is no reason not to see the picture
        return UPRIGHT
