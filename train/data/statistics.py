"""The mean and the deviation of pixels, computed from some of the pictures."""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Int, UInt8

LARGEST_SAMPLE = 2_048

_SMALLEST_STD = 1 / 255  # of channels that hardly vary


def mean_and_std(
    images: Iterable[UInt8[np.ndarray, "h w c"]],
) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` of all pixels in [0, 1], by channel, rounded as people write them."""
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for image in images:
        pixels = image.reshape(-1, image.shape[-1]) / 255
        count += len(pixels)
        total = total + pixels.sum(0)
        squares = squares + np.square(pixels).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    std = np.maximum(std, _SMALLEST_STD)
    return {name: tuple(v.round(4).tolist()) for name, v in (("mean", mean), ("std", std))}


def of_sample(
    image: Callable[[int], UInt8[np.ndarray, "h w c"]], count: int
) -> dict[str, tuple[float, ...]]:
    """`mean_and_std` over at most `LARGEST_SAMPLE` of `count` images, evenly spaced."""
    return mean_and_std(map(image, _evenly_spaced(count).tolist()))


def _evenly_spaced(count: int) -> Int[np.ndarray, " n"]:
    size = min(count, LARGEST_SAMPLE)
    return np.arange(size) * count // size
