"""Ranks are exact products, whatever the number of weights."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from feather_jax.rank import ranks

SIZES = [1, 2, 3, 1000, 2**24 + 3, 25_502_912, 2**29 + 1, 2**31 - 1, 2**31 + 12_345, 2**32 - 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_traced_rank_is_the_exact_product(size, dtype):
    rng = np.random.default_rng(4)
    edges = [0, 1, 1 - 2**-24, 0.5, 0.25, 2**-8, 2**-9, 2**-31, 2**-32, 2**-33, 0.1, 0.9, 2e-38]
    sparsities = np.concatenate(
        [edges, rng.random(300), 2 ** rng.uniform(-70, 0, 300), 1 - 2 ** rng.uniform(-24, 0, 300)]
    ).astype(np.float32)
    with jax.enable_x64(dtype == "float64"):
        rank = jax.jit(lambda s: ranks(list(s), [size] * len(s), jnp.dtype(dtype)))(sparsities)
    for sparsity, floor, fraction in zip(sparsities, rank.floor, rank.fraction, strict=True):
        position = Fraction(float(sparsity)) * (size - 1)
        assert int(floor) == int(position), (size, sparsity)
        # Rounded once: the nearest of three neighbours to the exact fraction.
        exact = position - int(position)
        nearest = np.asarray(float(exact)).astype(dtype)
        candidates = [np.nextafter(nearest, -1), nearest, np.nextafter(nearest, 2)]
        errors = [abs(Fraction(float(candidate)) - exact) for candidate in candidates]
        assert abs(Fraction(float(fraction)) - exact) == min(errors), (size, sparsity)


def test_number_has_the_rank_that_numpy_computes():
    rng = np.random.default_rng(5)
    for size in SIZES:
        for sparsity in rng.random(100):
            rank = ranks([sparsity], [size], jnp.float32)
            position = np.float64(sparsity) * np.float64(size - 1)
            assert rank.floor == np.floor(position)
            assert rank.fraction == np.float32(position - np.floor(position))
