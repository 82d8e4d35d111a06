"""Augmentation inside the step, against NumPy."""

import colorsys
import functools

import jax
import numpy as np
import pytest

from train.data import augment
from train.data.augment import Augmentation

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
        IMAGES, KEYS, augmentation=Augmentation(), mean=(0.5, 0.25), std=(0.2, 0.1)
    )
    np.testing.assert_array_equal(got, augment.normalize(IMAGES, (0.5, 0.25), (0.2, 0.1)))


ALL = Augmentation(
    random_resized_crop=0.3, crop_padding=2, flip=True, color_jitter=(0.4, 0.3, 0.2, 0.1)
)


@pytest.mark.parametrize("augmentation", [Augmentation(crop_padding=2, flip=True), ALL])
def test_an_example_depends_on_its_own_key_alone(augmentation):
    """However a batch is divided among devices, an example is augmented the same."""

    @jax.jit
    def preprocess(images, keys):
        return augment.augment_and_normalize(
            images, keys, augmentation=augmentation, mean=(0.5,) * 3, std=(0.2,) * 3
        )

    images = np.concatenate([IMAGES, IMAGES[..., :1]], axis=-1)
    whole = np.asarray(preprocess(images, KEYS))
    for size in (1, 100):
        part = np.asarray(preprocess(images[40 : 40 + size], KEYS[40 : 40 + size]))
        np.testing.assert_allclose(part, whole[40 : 40 + size], atol=2e-5)


def test_crop_and_flip_are_independent():
    """The same key must not decide both in the same way."""
    crop_keys = augment.stream(KEYS, augment.CROP)
    flip_keys = augment.stream(KEYS, augment.FLIP)
    offsets = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 9))(crop_keys)
    flips = jax.vmap(jax.random.bernoulli)(flip_keys)
    correlation = np.corrcoef(np.column_stack([offsets, flips]).T.astype(float))
    assert np.abs(correlation - np.eye(3)).max() < 0.15


@functools.partial(jax.jit, static_argnums=(1, 2))
def drawn(keys, height, width, least_area):
    return jax.vmap(lambda key: augment.random_box(key, height, width, least_area))(keys)


def boxes(height, width, least_area, count=2_000):
    """Boxes [count, (top, left, height, width)]."""
    keys = jax.random.split(jax.random.key(1), count)
    return np.stack(drawn(keys, height, width, least_area), axis=-1).astype(float)


@pytest.mark.parametrize("least_area", [0.08, 0.6])
def test_boxes_are_uniform_in_area_and_log_uniform_in_ratio(least_area):
    """On an image so wide and high that nearly every box fits, which it does not at ratio 1."""
    top, left, h, w = boxes(100, 100, least_area).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= 100.001).all()
    assert (left + w <= 100.001).all()
    area, ratio = h * w / 1e4, w / h
    assert least_area <= area.min() * 1.001
    assert 3 / 4 - 1e-4 <= ratio.min() <= ratio.max() <= 4 / 3 + 1e-4
    small = area < 3 / 4  # these fit at every ratio, so that nothing is drawn again
    if small.sum() > 500:
        uniform = (area[small] - least_area) / (3 / 4 - least_area)
        log_uniform = (np.log(ratio[small]) / np.log(4 / 3) + 1) / 2
        place = top[small] / (100 - h[small])
        for values in (uniform, log_uniform, place):
            worst = np.abs(np.sort(values) - np.linspace(0, 1, len(values))).max()
            assert worst < 1.95 / np.sqrt(len(values))  # Kolmogorov-Smirnov at 99.9 %


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10)])
def test_where_no_box_fits_the_largest_of_the_nearest_ratio_is_taken(height, width):
    expected = {
        (10, 100): (0, (100 - 40 / 3) / 2, 10, 40 / 3),
        (100, 10): ((100 - 40 / 3) / 2, 0, 40 / 3, 10),
    }
    for box in boxes(height, width, 0.9, count=20):
        np.testing.assert_allclose(box, expected[height, width], rtol=1e-5)


def bilinear(image, top, left, h, w):
    """The part of an image, stretched to its size: pixel by pixel, in float64."""
    height, width, _ = image.shape
    stretched = np.empty(image.shape)
    for i in range(height):
        for j in range(width):
            y = np.clip((i + 0.5) * h / height + top - 0.5, 0, height - 1)
            x = np.clip((j + 0.5) * w / width + left - 0.5, 0, width - 1)
            y0, x0 = min(int(y), height - 2), min(int(x), width - 2)
            a, b = y - y0, x - x0
            rows = image[y0 : y0 + 2, x0 : x0 + 2].astype(float)
            across = rows[:, 0] * (1 - b) + rows[:, 1] * b
            stretched[i, j] = across[0] * (1 - a) + across[1] * a
    return stretched


def test_a_random_resized_crop_is_bilinear():
    images, keys = IMAGES[:30], KEYS[:30]
    crops = np.asarray(jax.jit(augment.random_resized_crop, static_argnums=2)(images, keys, 0.2))
    assert crops.dtype == np.uint8
    for image, key, crop in zip(images, keys, crops, strict=True):
        box = [float(x) for x in augment.random_box(key, *image.shape[:2], 0.2)]
        assert np.abs(crop - bilinear(image, *box)).max() <= 0.51


def by_numpy(image, brightness, contrast, saturation, hue):
    """The four changes in the order in which they are made, with the standard library's YIQ."""
    image = np.clip(image * brightness, 0, 1)
    mean = image.mean((0, 1))
    image = np.clip((image - mean) * contrast + mean, 0, 1)
    changed = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        y, i, q = colorsys.rgb_to_yiq(*image[place])
        turned = saturation * complex(i, q) * np.exp(2j * np.pi * hue)
        changed[place] = colorsys.yiq_to_rgb(y, turned.real, turned.imag)
    return changed


def test_colour_jitter_is_what_numpy_gives():
    pixels = np.random.default_rng(3).uniform(size=(40, 5, 4, 3)).astype(np.float32)
    strengths = (0.4, 0.3, 0.8, 0.2)
    jitter = jax.jit(augment.color_jitter, static_argnums=2)
    got = np.asarray(jitter(pixels, KEYS[:40], strengths))
    for image, key, result in zip(pixels, KEYS, got, strict=False):
        draws = np.asarray(jax.random.uniform(key, (4,), minval=-1), float)
        factors = 1 + draws[:3] * strengths[:3]
        expected = by_numpy(image.astype(float), *factors, draws[3] * strengths[3])
        np.testing.assert_allclose(result, expected, atol=5e-5)


@pytest.mark.parametrize("changed", range(4))
def test_a_strength_of_0_leaves_things_as_they_are(changed):
    """Grey is changed by brightness and contrast, not by saturation and hue."""
    grey = np.repeat(np.random.default_rng(3).uniform(size=(9, 5, 4, 1)), 3, -1).astype(np.float32)
    strengths = tuple(0.5 if i == changed else 0.0 for i in range(4))
    got = np.asarray(augment.color_jitter(grey, KEYS[:9], strengths))
    if changed < 2:
        assert (np.abs(got - grey).max((1, 2, 3)) > 0.01).all()
    else:
        np.testing.assert_allclose(got, grey, atol=1e-6)


def test_one_channel_may_jitter_in_brightness_and_contrast():
    pixels = np.random.default_rng(3).uniform(size=(9, 5, 4, 1)).astype(np.float32)
    got = augment.color_jitter(pixels, KEYS[:9], (0.4, 0.4, 0.0, 0.0))
    assert got.shape == pixels.shape
    assert 0 <= got.min() < got.max() <= 1
