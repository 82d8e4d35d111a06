"""Augmentation inside the step, against NumPy."""

import jax
import numpy as np
import pytest

from train.data import augment

IMAGES = np.random.default_rng(0).integers(1, 256, (600, 6, 5, 2), np.uint8)  # no black pixel
KEYS = jax.random.split(jax.random.key(0), len(IMAGES))


def windows(image, padding):
    """Every window of the image's size in the padded image, by (top, left)."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return {
        (top, left): padded[top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }


def test_a_crop_is_a_window_of_the_padded_image_and_all_are_equally_likely():
    crops = np.asarray(jax.jit(augment.random_crop, static_argnums=2)(IMAGES, KEYS, 2))
    counts = dict.fromkeys(windows(IMAGES[0], 2), 0)
    for image, crop in zip(IMAGES, crops, strict=True):
        (offset,) = [o for o, w in windows(image, 2).items() if np.array_equal(w, crop)]
        counts[offset] += 1
    expected = len(IMAGES) / 25
    # Chi-squared with 24 degrees of freedom: 51.2 is its 99.9 % point.
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 51.2


def test_a_flip_mirrors_left_to_right_half_of_the_time():
    flipped = np.asarray(jax.jit(augment.random_flip)(IMAGES, KEYS))
    mirrored = np.array(
        [np.array_equal(f, i[:, ::-1]) for f, i in zip(flipped, IMAGES, strict=True)]
    )
    np.testing.assert_array_equal(flipped[~mirrored], IMAGES[~mirrored])
    assert 250 < mirrored.sum() < 350  # four standard deviations


def test_normalisation_is_per_channel_of_pixels_in_0_to_1():
    got = augment.normalize(IMAGES, (0.5, 0.25), (0.2, 0.1))
    expected = (IMAGES.astype(np.float64) / 255 - [0.5, 0.25]) / [0.2, 0.1]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_without_crop_and_flip_it_is_normalisation():
    got = augment.augment_and_normalize(
        IMAGES, KEYS, mean=(0.5, 0.25), std=(0.2, 0.1), crop_padding=0, flip=False
    )
    np.testing.assert_array_equal(got, augment.normalize(IMAGES, (0.5, 0.25), (0.2, 0.1)))


@pytest.mark.parametrize("size", [1, 100])
def test_an_example_depends_on_its_own_key_alone(size):
    """However a batch is divided among devices, an example is augmented the same."""

    @jax.jit
    def preprocess(images, keys):
        return augment.augment_and_normalize(
            images, keys, mean=(0.5, 0.25), std=(0.2, 0.1), crop_padding=2, flip=True
        )

    whole = np.asarray(preprocess(IMAGES, KEYS))
    part = np.asarray(preprocess(IMAGES[40 : 40 + size], KEYS[40 : 40 + size]))
    np.testing.assert_array_equal(part, whole[40 : 40 + size])


def test_crop_and_flip_are_independent():
    """The same key must not decide both in the same way."""
    crop_keys, flip_keys = jax.vmap(jax.random.split, out_axes=1)(KEYS)
    offsets = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 9))(crop_keys)
    flips = jax.vmap(jax.random.bernoulli)(flip_keys)
    correlation = np.corrcoef(np.column_stack([offsets, flips]).T.astype(float))
    assert np.abs(correlation - np.eye(3)).max() < 0.15
