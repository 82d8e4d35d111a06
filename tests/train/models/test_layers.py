"""The networks' layers against sums written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.models.layers import conv


@pytest.mark.parametrize(
    ("size", "strides", "height"), [(3, 1, 6), (3, 2, 6), (7, 2, 8), (1, 2, 6)]
)
def test_convolutions_are_padded_alike_on_both_sides(size, strides, height):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, height, height, 3))
    kernel = rng.standard_normal((size, size, 3, 4))
    with jax.enable_x64(True):
        module = conv(4, size, strides=strides, dtype=jnp.float64, name="conv")
        ours = module.apply({"params": {"kernel": kernel}}, images)

    pad = size // 2
    padded = np.pad(images, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    starts = range(0, height + 2 * pad - size + 1, strides)
    expected = [
        [np.einsum("bijc,ijco->bo", padded[:, y : y + size, x : x + size], kernel) for x in starts]
        for y in starts
    ]
    np.testing.assert_allclose(ours, np.moveaxis(expected, 2, 0), rtol=1e-12, atol=1e-12)
