"""Integers of 64 bits in limbs are Python's integers."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_jax.wide import LIMBS, at_least, carry, difference, fraction_of, product, wide

numbers = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**16, 2**32 - 1, 2**63, 2**64 - 1])


def value(limbs):
    limbs = np.asarray(limbs)
    assert limbs.max(initial=0) < 2**16
    return sum(int(limb) << 16 * i for i, limb in enumerate(limbs))


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**26 - 1)), min_size=5, max_size=5
    )
)
def test_sum_of_products(pairs):
    counts = jnp.array([a for a, _ in pairs], jnp.uint32)
    terms = product(counts, jnp.asarray(wide([b for _, b in pairs], 2)), LIMBS)
    total = carry([limb.sum(dtype=jnp.uint32) for limb in terms])
    assert value(total) == sum(a * b for a, b in pairs)


@given(numbers, numbers)
def test_order_and_difference(a, b):
    x, y = (jnp.asarray(limbs) for limbs in wide([a, b]))
    assert at_least(x, y) == (a >= b)
    assert float(difference(x, y)) == pytest.approx(a - b, rel=1e-6)


@pytest.mark.parametrize("total", [1, 5, 2**32 - 1, 2**40 + 12_345, 2**64 - 1, 4_089_284_608])
def test_share_is_rounded_up_exactly(total):
    rng = np.random.default_rng(0)
    edges = [0, 1, 0.5, 0.25, 0.9, 1 - 2**-24, 2**-30, 2**-33, 2**-100, 2e-38]
    found = jax.jit(lambda share: fraction_of(share, total))
    for share in np.concatenate([edges, rng.random(50)]).astype(np.float32):
        assert value(found(share)) == math.ceil(Fraction(float(share)) * total)
    with jax.enable_x64(True):
        assert value(found(np.float64(0.9))) == math.ceil(0.9 * np.float64(total))
