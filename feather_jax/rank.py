"""Where a sparsity lies among sorted weights: ranks, exact for up to 2**32 - 1 of them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, ScalarLike, UInt32

from feather_jax.schedule import check_sparsity


class Rank(NamedTuple):
    """Positions in the sorted magnitudes of groups of weights, sparsity (size - 1) in each."""

    floor: UInt32[Array, " groups"]
    fraction: Float[Array, " groups"]  # in the threshold's dtype; may round up to 1; NaN for a NaN
    is_zero: Bool[Array, " groups"]  # whether the sparsity is


def ranks(sparsities: Sequence[ScalarLike], sizes: Sequence[int], dtype: DTypeLike) -> Rank:
    """The ranks of `sparsities` in groups of `sizes` weights.

    Args:
      sparsities: numbers, whose ranks are computed in float64 as `np.quantile` does, or JAX
        arrays, whose ranks are the exact products of their float32 values (the float64 products
        of float64 values), clipped to [0, 1].
      sizes: the number of weights in each group, below 2**32.
      dtype: of the fractions.

    Raises:
      ValueError: a number is outside [0, 1).
    """
    last = np.asarray(sizes, np.uint64) - 1
    numbers = [
        0.0 if isinstance(sparsity, jax.Array) else check_sparsity(float(np.asarray(sparsity)))
        for sparsity in sparsities
    ]
    static = _static_rank(np.array(numbers), last, dtype)
    traced = np.array([isinstance(sparsity, jax.Array) for sparsity in sparsities])
    if not traced.any():
        return static
    alike = all(sparsity is sparsities[0] for sparsity in sparsities)
    arrays = [jnp.asarray(sparsity) for sparsity in sparsities[: 1 if alike else None]]
    exact = _traced_rank(arrays[0] if alike else jnp.stack(arrays), last, dtype)
    return jax.tree.map(partial(jnp.where, traced), exact, static)


def _static_rank(sparsity: np.ndarray, last: np.ndarray, dtype: DTypeLike) -> Rank:
    position = sparsity * last
    floor = np.floor(position)
    fraction = jnp.asarray(position - floor, dtype)
    return Rank(jnp.asarray(floor.astype(np.uint32)), fraction, jnp.asarray(sparsity == 0))


def _traced_rank(sparsity: Array, last: np.ndarray, dtype: DTypeLike) -> Rank:
    sparsity = lax.stop_gradient(sparsity)
    if sparsity.dtype == jnp.float64:
        position = jnp.clip(sparsity, 0, 1) * last.astype(np.float64)
        floor = jnp.floor(position)
        return Rank(floor.astype(jnp.uint32), (position - floor).astype(dtype), sparsity <= 0)

    # A float32 product would be off by whole ranks above 2**24 weights, so it is taken in integers:
    # sparsity = mantissa / 2**shift. In XLA, a shift by 32 and more (or below zero) gives zero.
    bits = lax.bitcast_convert_type(jnp.clip(sparsity.astype(jnp.float32), 0, 1), jnp.uint32)
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | jnp.where(exponent > 0, jnp.uint32(1 << 23), 0)
    shift = 150 - jnp.maximum(exponent, 1)
    high, low = _wide_product(mantissa, last.astype(np.uint32))
    floor = (low >> shift) | (high << (32 - shift)) | (high >> (shift - 32))

    one = jnp.uint32(1)
    low &= (one << shift) - 1
    high &= (one << (jnp.maximum(shift, 32) - 32)) - 1
    if dtype == jnp.float64:
        fraction = jnp.ldexp(high.astype(dtype) * 2**32 + low, -shift.astype(jnp.int32))
    else:
        # The leading 32 bits, the last of them standing for all that follow, are rounded once.
        zeros = lax.clz(high)
        leading = (high << zeros) | (low >> (32 - zeros)) | jnp.minimum(low << zeros, 1)
        fraction = jnp.ldexp(leading.astype(dtype), (32 - zeros - shift).astype(jnp.int32))
    return Rank(floor, jnp.where(jnp.isnan(sparsity), jnp.nan, fraction), sparsity <= 0)


def _wide_product(a: UInt32[Array, "..."], b: np.ndarray) -> tuple[Array, Array]:
    """The high and the low word of a b, from halves of words; a is below 2**24."""
    a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a1 * b0 + (a0 * b0 >> 16)
    middle_low = a0 * b1 + (middle & 0xFFFF)
    return a1 * b1 + (middle >> 16) + (middle_low >> 16), (middle_low << 16) | (a0 * b0 & 0xFFFF)
