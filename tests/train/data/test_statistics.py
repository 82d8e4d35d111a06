"""Means and deviations of pixels, against NumPy over all of them."""

import numpy as np
import pytest

from train.data import statistics

RNG = np.random.default_rng(0)


def test_images_of_any_shapes_count_by_their_pixels():
    images = [RNG.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((5, 4), (30, 20), (1, 1))]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    found = statistics.mean_and_std(images)
    assert found["mean"] == pytest.approx(pixels.mean(0), abs=5.1e-5)
    assert found["std"] == pytest.approx(pixels.std(0), abs=5.1e-5)


def test_a_channel_that_does_not_vary_can_be_divided_by():
    found = statistics.mean_and_std([np.full((4, 4, 1), 255, np.uint8)])
    assert found["mean"] == (1.0,)
    assert 0 < found["std"][0] < 0.01


@pytest.mark.parametrize("count", [1, 5, 2_048, 2_049, 100_000])
def test_the_sample_is_spread_over_all_images(count):
    seen = []

    def image(number):
        seen.append(number)
        return np.zeros((1, 1, 1), np.uint8)

    statistics.of_sample(image, count)
    assert len(seen) == len(set(seen)) == min(count, statistics.LARGEST_SAMPLE)
    assert 0 <= min(seen) <= max(seen) < count
    gaps = np.diff([*sorted(seen), count])
    assert gaps.max() - gaps.min() <= 1
