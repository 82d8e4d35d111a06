"""Crop, flip and normalisation of a batch of images, inside the jitted step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8


def normalize(
    images: UInt8[Array, "b h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "b h w c"]:
    """(images / 255 - mean) / std, float32; mean and std are per channel, of pixels in [0, 1]."""
    pixels = images.astype(jnp.float32) / 255
    return (pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


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


def random_flip(images: UInt8[Array, "b h w c"], keys: Key[Array, " b"]) -> UInt8[Array, "b h w c"]:
    """Mirrors each image left to right with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def augment_and_normalize(
    images: UInt8[Array, "b h w c"],
    keys: Key[Array, " b"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_padding: int,
    flip: bool,
) -> Float[Array, "b h w c"]:
    """Training's preprocessing: random crop with padding, random flip, normalisation.

    Each example's randomness comes from its own key alone, so it does not depend on how a batch is
    divided among devices.
    """
    crop_keys, flip_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    if crop_padding:
        images = random_crop(images, crop_keys, crop_padding)
    if flip:
        images = random_flip(images, flip_keys)
    return normalize(images, mean, std)
