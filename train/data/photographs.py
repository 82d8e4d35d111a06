"""From an encoded photograph to a square of pixels: which part of it, and how to get at it fast."""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float, Float64, UInt8

from train.data import pixels

UNIFORMS = 24  # random numbers that a photograph may use; a multiple of Philox's block of 4

CROP_TRIES = 10
CROP_RATIO = (3 / 4, 4 / 3)

cv2.setNumThreads(0)  # threads and processes that decode are the parallelism


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def uniforms(seed: int, step: int, first: int, count: int) -> Float64[np.ndarray, "count 24"]:
    """Numbers in [0, 1) for the examples [first, first + count) of the global batch of a step.

    Those of one example depend on (seed, step, its index in the global batch) alone: the
    generator is Philox with the seed as its key and (index, step) as its counter, for a batch at
    once because constructing one takes 50 microseconds.

    References:
      Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    generator = np.random.Philox(key=seed, counter=[first * UNIFORMS // 4, 0, 0, step])
    bits = generator.random_raw(count * UNIFORMS).reshape(count, UNIFORMS)
    return (bits >> 11) * 2.0**-53


def random_box(
    height: int, width: int, u: Float[np.ndarray, " 24"], least_area: float = 0.08
) -> Box:
    """A box of at least a part of the image's area, and of aspect ratio 3/4 to 4/3.

    The area is uniform, the ratio log-uniform; a box that does not fit is drawn again up to ten
    times, after which the largest central box of the nearest ratio is taken.

    Args:
      height: of the image.
      width: of the image.
      u: uniform numbers in [0, 1); the last two are left to the caller.
      least_area: of the box, as a fraction of the image's, in (0, 1].

    References:
      Szegedy et al., Going deeper with convolutions (CVPR 2015), section 6; torchvision's
      RandomResizedCrop for the fallback.
    """
    log_low, log_high = map(math.log, CROP_RATIO)
    for a, r in zip(u[:CROP_TRIES].tolist(), u[CROP_TRIES : 2 * CROP_TRIES].tolist(), strict=True):
        area = height * width * (least_area + (1 - least_area) * a)
        ratio = math.exp(log_low + (log_high - log_low) * r)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(u[2 * CROP_TRIES] * (height - h + 1))
            left = int(u[2 * CROP_TRIES + 1] * (width - w + 1))
            return Box(top, left, h, w)
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def center_box(height: int, width: int, part: float) -> Box:
    """The central square whose side is a part of the shorter side.

    With 0.875 and resized to 224, it is what resizing the shorter side to 256 and cropping 224
    gives.
    """
    side = max(1, round(min(height, width) * part))
    return Box((height - side) // 2, (width - side) // 2, side, side)


def crop_and_resize(
    encoded: bytes,
    choose: Callable[[int, int], Box],
    out: UInt8[np.ndarray, "s s c"],
    *,
    fast: bool,
    upright: bool = False,
) -> None:
    """Decodes a picture and resizes a part of it.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the part has no fewer pixels than `out`
    then; libjpeg-turbo does that in the inverse DCT, which saves time and averages where bilinear
    interpolation would skip pixels. What is below the part is not decoded.

    Args:
      encoded: a file's bytes: a JPEG (RGB, greyscale or CMYK) or what `pixels.decode` takes.
      choose: gives the part from the image's height and width.
      out: where the part is written, RGB or one channel of grey.
      fast: whether to be quick and to overlook damage below the part: with libjpeg-turbo's fast
        DCT, chroma repeated instead of interpolated, and only the rows that are needed, a quarter
        of the time is saved.
      upright: whether the picture is turned as its EXIF orientation says.

    Raises:
      ValueError: if the bytes are no picture, or a truncated one.
    """
    size, channels = out.shape[1:]
    turn = pixels.jpeg_turn(encoded) if upright else pixels.UPRIGHT
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
        box = _as_stored(choose, height, width, turn)
        scale = next(s for s in (8, 4, 2, 1) if s == 1 or min(box.height, box.width) >= s * size)
        rows = height
        content: bytes | bytearray = encoded
        position = _height_position(encoded) if fast else None
        if position is not None:
            # libjpeg-turbo stops after as many rows as the header says, which is bound to surprise
            # it (hence strict), but gives the same pixels.
            rows = box.top + box.height
            content = bytearray(encoded)
            content[position : position + 2] = rows.to_bytes(2, "big")
        image = simplejpeg.decode_jpeg(
            content,
            colorspace="RGB" if channels == 3 else "GRAY",
            fastdct=fast,
            fastupsample=fast,
            min_height=-(-rows // scale),
            min_width=-(-width // scale),
            strict=position is None,
        )
    except ValueError:  # another format, or a harmless oddity that Pillow passes over
        image, scale, turn = pixels.decode(encoded, channels, upright=upright), 1, pixels.UPRIGHT
        box = choose(*image.shape[:2])
    top, left, height, width = (round(value / scale) for value in box)
    part = image[top : top + height, left : left + width]
    resized = cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)
    out[...] = turn.apply(resized.reshape(out.shape))


def _as_stored(
    choose: Callable[[int, int], Box], height: int, width: int, turn: pixels.Turn
) -> Box:
    """The part that `choose` gives of the turned picture, in the picture as it is stored."""
    if turn.transpose:
        height, width = width, height
    top, left, h, w = choose(height, width)
    if turn.upside_down:
        top = height - top - h
    if turn.mirror:
        left = width - left - w
    return Box(left, top, w, h) if turn.transpose else Box(top, left, h, w)


def _height_position(encoded: bytes) -> int | None:
    """Where the header of a JPEG has the image's height, if its rows come one after another.

    Which they do in a sequential JPEG (frame marker SOF0 or SOF1) of a single scan. None otherwise,
    and for a file that does not end as it should.

    References:
      ITU-T T.81, annex B.
    """
    frame, i = None, 2
    while i + 9 < len(encoded) and encoded[i] == 0xFF and encoded.endswith(b"\xff\xd9"):
        marker, length = encoded[i + 1], int.from_bytes(encoded[i + 2 : i + 4], "big")
        if marker in (0xC0, 0xC1):
            frame = i
        elif marker == 0xDA and frame is not None:
            single = encoded[i + 4] == encoded[frame + 9]  # the scan has all of the components
            return frame + 5 if single else None
        i += 2 + length
    return None
