"""Mixup and CutMix, against what can be read off images that say whose each pixel is."""

import jax
import numpy as np
import pytest

from train.data.mix import mix

N, SIZE, CLASSES = 2_000, 12, 5
KEYS = jax.random.split(jax.random.key(0), N)
RNG = np.random.default_rng(0)
TARGETS = np.eye(CLASSES, dtype=np.float32)[RNG.integers(CLASSES, size=N)]
# Example i has the value i everywhere, so that own share and partner can be solved for.
IMAGES = np.broadcast_to(np.arange(N, dtype=np.float32)[:, None, None, None], (N, SIZE, SIZE, 1))


jitted = jax.jit(mix, static_argnames=("mixup", "cutmix"))


def mixed(images=IMAGES, targets=TARGETS, keys=KEYS, **alphas):
    return tuple(np.asarray(array) for array in jitted(images, targets, keys, **alphas))


def own_share(images):
    """How much of each pixel is the example's own, the rest being of example i XOR 1."""
    i = np.arange(N)[:, None, None]
    return (images[..., 0] - (i ^ 1)) / (i - (i ^ 1))


def check_targets(shares, targets):
    partner = TARGETS[np.arange(N) ^ 1]
    expected = shares[:, None] * TARGETS + (1 - shares[:, None]) * partner
    np.testing.assert_allclose(targets, expected, atol=2e-3)
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-5)


def moments(alpha):
    """Mean and variance of Beta(alpha, alpha)."""
    return 0.5, 1 / (4 * (2 * alpha + 1))


def test_without_either_nothing_changes():
    images, targets = mixed()
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(targets, TARGETS)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_blends_images_and_labels_alike_by_a_beta_distributed_share(alpha):
    images, targets = mixed(mixup=alpha)
    shares = own_share(images)
    assert np.ptp(shares, axis=(1, 2)).max() < 2e-3  # one share for all pixels
    check_targets(shares.mean((1, 2)), targets)
    mean, variance = moments(alpha)
    assert abs(shares[:, 0, 0].mean() - mean) < 4 * np.sqrt(variance / N)
    assert abs(shares[:, 0, 0].var() - variance) < 0.15 * variance


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cutmix_puts_one_rectangle_of_the_partner_in_and_counts_its_pixels(alpha):
    images, targets = mixed(cutmix=alpha)
    shares = own_share(images)
    own = shares > 0.5
    np.testing.assert_allclose(shares, own, atol=2e-3)  # a pixel is of one or of the other
    check_targets(own.mean((1, 2)), targets)
    for image in ~own[:300]:
        rows, columns = image.any(1), image.any(0)
        np.testing.assert_array_equal(image, np.outer(rows, columns))
        for line in (rows, columns):
            assert np.abs(np.diff(line.astype(int))).sum() <= 2  # contiguous
    centre = (~own)[:, SIZE // 2, SIZE // 2].mean()
    corner = (~own)[:, 0, 0].mean()
    assert centre > 1.3 * corner > 0  # rectangles are cut off at the border, not moved inside


def test_with_both_half_of_the_examples_take_each():
    images, targets = mixed(mixup=1.0, cutmix=1.0)
    shares = own_share(images)
    blended = (np.abs(shares - np.round(shares)) > 5e-3).any((1, 2))
    assert 0.45 < blended.mean() < 0.55
    check_targets(shares.mean((1, 2)), targets)


@pytest.mark.parametrize("parts", [2, N // 2])
def test_devices_and_parts_change_nothing(parts):
    """An example meets its partner wherever the batch is cut, between pairs."""
    images = RNG.uniform(size=(N, 4, 4, 3)).astype(np.float32)
    whole = mixed(images, mixup=0.8, cutmix=1.0)
    for k in (0, parts - 1):
        part = slice(k * N // parts, (k + 1) * N // parts)
        got = mixed(images[part], TARGETS[part], KEYS[part], mixup=0.8, cutmix=1.0)
        for a, b in zip(got, whole, strict=True):
            np.testing.assert_allclose(a, b[part], atol=1e-6)
