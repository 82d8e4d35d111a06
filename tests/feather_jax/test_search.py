"""The search ends soon, whatever the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from feather_jax.search import order_statistics
from feather_jax.survey import Leaf
from tests.feather_jax.sorting import ADVERSARIAL


@jax.jit
def rounds(array, rank):
    return order_statistics([Leaf(array, (0,), 1, ())], rank[None], jnp.float32)[1]


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_search_ends_soon_for_adversarial_weights(name):
    array = ADVERSARIAL[name]
    ranks = np.linspace(0, array.size - 1, 23).astype(np.uint32)
    taken = np.array([rounds(array, rank) for rank in ranks])
    # Five rounds, then every other one divides the 31 bits by four.
    assert taken.max() <= 5 + 2 * 16
    if name in ("normal", "sorted"):
        assert taken.mean() <= 5
    if name in ("all zero", "all equal", "few values", "ternary"):
        assert taken.max() <= 4


def test_search_ends_soon_where_the_sample_is_everything():
    array = np.random.default_rng(1).standard_normal(1000, dtype=np.float32)
    assert max(int(rounds(array, np.uint32(rank))) for rank in range(0, 1000, 50)) <= 4
