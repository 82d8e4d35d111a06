"""Augmentation and normalisation of a batch of images, inside the jitted step.

Each example's randomness comes from its own key alone, so it does not depend on how a batch is
divided among devices. Keys are used up in streams (see `stream`), one a kind of augmentation.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from train.data.photographs import CROP_RATIO, CROP_TRIES

CROP, FLIP, RESIZED_CROP, JITTER, MIX = range(5)
NETWORK = 8  # a network's dropout and stochastic depth


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What training does to images; each is off by default.

    Attributes:
      random_resized_crop: the least fraction of the area of a crop that is resized to the whole
        (see `random_resized_crop`), 0 for none; 0.08 is usual from scratch.
      crop_padding: pixels of padding for a random crop of the image's size, 0 for none.
      flip: whether images are mirrored at random.
      color_jitter: how much brightness, contrast, saturation and hue vary (see `color_jitter`).
    """

    random_resized_crop: float = 0.0
    crop_padding: int = 0
    flip: bool = False
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


def augment_and_normalize(
    images: UInt8[Array, "b h w c"],
    keys: Key[Array, " b"],
    *,
    augmentation: Augmentation,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "b h w c"]:
    """Training's preprocessing."""
    if augmentation.random_resized_crop:
        least_area = augmentation.random_resized_crop
        images = random_resized_crop(images, stream(keys, RESIZED_CROP), least_area)
    if augmentation.crop_padding:
        images = random_crop(images, stream(keys, CROP), augmentation.crop_padding)
    if augmentation.flip:
        images = random_flip(images, stream(keys, FLIP))
    if not any(augmentation.color_jitter):
        return normalize(images, mean, std)
    pixels = color_jitter(in_0_to_1(images), stream(keys, JITTER), augmentation.color_jitter)
    return standardize(pixels, mean, std)


def stream(keys: Key[Array, " b"], number: int) -> Key[Array, " b"]:
    """A key an example for one use of randomness, independent of the other uses."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def in_0_to_1(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Levels of 0 to 255 as float32 pixels in [0, 1]."""
    return images.astype(jnp.float32) / 255


def standardize(
    pixels: Float[Array, "b h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b h w c"]:
    """(pixels - mean) / std, by channel."""
    return (pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def normalize(
    images: UInt8[Array, "b h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b h w c"]:
    """(images / 255 - mean) / std, float32; mean and std are per channel, of pixels in [0, 1]."""
    return standardize(in_0_to_1(images), mean, std)


def random_crop(
    images: UInt8[Array, "b h w c"], keys: Key[Array, " b"], padding: int
) -> UInt8[Array, "b h w c"]:
    """Pads each image with black pixels on all sides, cuts a window of its own size at random.

    As torchvision's RandomCrop(size, padding), which likewise comes before the normalisation.
    """

    def crop(image, key):
        top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

    border = (padding, padding)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    return jax.vmap(crop)(padded, keys)


def random_resized_crop(
    images: UInt8[Array, "b h w c"], keys: Key[Array, " b"], least_area: float
) -> UInt8[Array, "b h w c"]:
    """Cuts a box out of each image at random and stretches it to the whole, bilinearly.

    The box is drawn as `photographs.random_box` draws it, but is not rounded to whole pixels.

    Args:
      images: the images.
      keys: one an example.
      least_area: of the box, as a fraction of the image's, in (0, 1].
    """
    height, width = images.shape[1:3]

    def crop(image, key):
        top, left, h, w = random_box(key, height, width, least_area)
        scale = jnp.stack([height / h, width / w])
        shift = -jnp.stack([top, left]) * scale
        stretched = jax.image.scale_and_translate(
            image.astype(jnp.float32), image.shape, (0, 1), scale, shift, method="linear"
        )
        return jnp.round(stretched).astype(jnp.uint8)

    return jax.vmap(crop)(images, keys)


def random_box(
    key: Key[Array, ""], height: int, width: int, least_area: float
) -> tuple[Float[Array, ""], ...]:
    """(top, left, height, width) of a box in an image, in pixels (see `random_resized_crop`)."""
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    areas = jax.random.uniform(area_key, (CROP_TRIES,), minval=least_area)
    low, high = map(math.log, CROP_RATIO)
    ratios = jnp.exp(jax.random.uniform(ratio_key, (CROP_TRIES,), minval=low, maxval=high))
    heights = jnp.sqrt(height * width * areas / ratios)
    widths = heights * ratios
    fits = (heights <= height) & (widths <= width)
    first = jnp.argmax(fits)
    # Without one that fits, the largest box of the nearest ratio, in the middle.
    nearest = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    h = jnp.where(fits.any(), heights[first], min(height, width / nearest))
    w = jnp.where(fits.any(), widths[first], min(width, height * nearest))
    place = jnp.where(fits.any(), jax.random.uniform(place_key, (2,)), 0.5)
    return place[0] * (height - h), place[1] * (width - w), h, w


def random_flip(images: UInt8[Array, "b h w c"], keys: Key[Array, " b"]) -> UInt8[Array, "b h w c"]:
    """Mirrors each image left to right with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def color_jitter(
    pixels: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    strengths: tuple[float, float, float, float],
) -> Float[Array, "b h w c"]:
    """Changes the brightness, contrast, saturation and hue of each image at random, in this order.

    Pixels' distances from black, from the image's mean and from the grey of the same luma are
    multiplied by numbers drawn from [1 - strength, 1 + strength]; the hue is turned by one from
    [-strength, strength], where 1 is the full circle, in the plane of I and Q of the NTSC's YIQ:
    a linear map, as in NVIDIA DALI, where HSV would decide by comparing channels, which rounding
    can turn over. After each of the first two and at the end pixels are clipped to [0, 1].

    Args:
      pixels: in [0, 1]; of one channel if the last two strengths are 0.
      keys: one an example.
      strengths: the first three in [0, 1], the last in [0, 0.5].
    """

    def jitter(image, key):
        draws = jax.random.uniform(key, (4,), minval=-1) * jnp.asarray(strengths)
        brightness, contrast, saturation = 1 + draws[:3]
        image = jnp.clip(brightness * image, 0, 1)
        mean = image.mean((0, 1))
        image = jnp.clip(mean + contrast * (image - mean), 0, 1)
        if strengths[2] or strengths[3]:
            image = jnp.clip(image @ _in_yiq(saturation, 2 * math.pi * draws[3]).T, 0, 1)
        return image

    return jax.vmap(jitter)(pixels, keys)


# The NTSC's colour space (1953): luma, and chroma by two differences from it.
_LUMA = np.array([0.30, 0.59, 0.11])
_RED, _BLUE = np.eye(3)[0] - _LUMA, np.eye(3)[2] - _LUMA
_YIQ = np.stack([_LUMA, 0.74 * _RED - 0.27 * _BLUE, 0.48 * _RED + 0.41 * _BLUE])


def _in_yiq(saturation: Float[Array, ""], angle: Float[Array, ""]) -> Float[Array, "3 3"]:
    """The map of RGB that stretches chroma and turns it."""
    cos, sin = saturation * jnp.cos(angle), saturation * jnp.sin(angle)
    turn = jnp.eye(3).at[1:, 1:].set(jnp.stack([cos, -sin, sin, cos]).reshape(2, 2))
    return jnp.linalg.multi_dot([np.linalg.inv(_YIQ), turn, _YIQ], precision="highest")
