"""The networks' layers against sums written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.errors import UserError
from train.models.layers import conv, dropout, fold_in


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


def keys_of(count):
    return jax.random.split(jax.random.key(7), count)


def test_dropout_leaves_the_expectation_and_zeroes_the_rate():
    x = jnp.full((50, 30, 20), 2.0)
    y = np.asarray(dropout(x, 0.25, keys_of(50)))
    assert set(np.unique(y)) == {0, np.float32(2 / 0.75)}
    # Each within five standard errors of a binomial of 30,000.
    assert abs(np.mean(y == 0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / y.size)
    assert abs(y.mean() - 2) < 5 * (2 / 0.75) * np.sqrt(0.25 * 0.75 / y.size)


def test_stochastic_depth_zeroes_whole_examples():
    y = np.asarray(dropout(jnp.ones((2000, 3, 2)), 0.4, keys_of(2000), whole=True))
    assert np.all(y == y[:, :1, :1])
    assert abs(np.mean(y[:, 0, 0] == 0) - 0.4) < 5 * np.sqrt(0.4 * 0.6 / 2000)


@pytest.mark.parametrize("whole", [False, True])
def test_what_an_example_loses_depends_on_its_own_key_alone(whole):
    x = jax.random.normal(jax.random.key(0), (8, 5))
    together = dropout(x, 0.5, keys_of(8), whole=whole)
    alone = [dropout(x[i : i + 1], 0.5, keys_of(8)[i : i + 1], whole=whole) for i in range(8)]
    np.testing.assert_array_equal(together, jnp.concatenate(alone))


def test_no_keys_or_no_rate_is_no_dropout_and_a_rate_of_one_is_refused():
    x = jnp.ones((3, 4))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, keys_of(3)) is x
    with pytest.raises(UserError, match=r"depth of 1\.0, which leaves nothing"):
        dropout(x, 1.0, keys_of(3))


def test_parts_of_a_network_have_keys_of_their_own():
    assert fold_in(None, 1) is None
    data = np.concatenate([jax.random.key_data(fold_in(keys_of(4), number)) for number in range(3)])
    assert len(np.unique(data, axis=0)) == 12
