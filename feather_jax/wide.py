"""Non-negative integers of 64 bits and more where JAX has 32: limbs of 16 bits, the lowest first.

A sum of up to 2**16 limbs fits into 32 bits, so sums are taken limb by limb and carried once.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, UInt32

Wide = UInt32[Array, "*shape limbs"]

_BITS = 16
_MASK = 2**_BITS - 1
# Of what is counted: 32 bits of weights times 32 bits of cost.
LIMBS = 4


def wide(numbers: Sequence[int], limbs: int = LIMBS) -> np.ndarray:
    """Python integers as limbs, of shape (len(numbers), limbs)."""
    rows = [[(number >> _BITS * i) & _MASK for i in range(limbs)] for number in numbers]
    return np.array(rows, np.uint32)


def carry(sums: Sequence[UInt32[Array, "*shape"]]) -> Wide:
    """Sums of limbs, as limbs below 2**16; what exceeds the last one is lost."""
    limbs, over = [], jnp.zeros_like(sums[0])
    for limb in sums:
        limbs.append((limb + over) & _MASK)
        over = (limb + over) >> _BITS
    return jnp.stack(limbs, axis=-1)


def product(
    a: UInt32[Array, "*shape"], b: UInt32[Array, "*shape limbs"], limbs: int
) -> list[Array]:
    """The limbs of a b for a below 2**32, to be summed up (2**12 of them at most) and carried."""
    factors = [a & _MASK, a >> _BITS]
    sums = [jnp.zeros(jnp.broadcast_shapes(a.shape, b.shape[:-1]), jnp.uint32)] * (limbs + 1)
    for i, factor in enumerate(factors):
        for j in range(b.shape[-1]):
            if i + j < limbs:
                term = factor * b[..., j]
                sums[i + j] = sums[i + j] + (term & _MASK)
                sums[i + j + 1] = sums[i + j + 1] + (term >> _BITS)
    return sums[:limbs]


def at_least(a: Wide, b: Wide) -> Bool[Array, "*shape"]:
    """Whether a >= b."""
    result = jnp.ones(jnp.broadcast_shapes(a.shape, b.shape)[:-1], bool)
    for i in range(a.shape[-1]):
        x, y = a[..., i], b[..., i]
        result = (x > y) | ((x == y) & result)
    return result


def difference(a: Wide, b: Wide) -> Float32[Array, "*shape"]:
    """a - b, rounded; exact differences of limbs keep it accurate where a and b are close."""
    apart = a.astype(jnp.int32) - b.astype(jnp.int32)
    result = jnp.zeros(apart.shape[:-1], jnp.float32)
    for i in reversed(range(apart.shape[-1])):
        result = result * 2.0**_BITS + apart[..., i].astype(jnp.float32)
    return result


def fraction_of(share: Float[Array, ""], total: int) -> Wide:
    """The product of a share in [0, 1] and `total`, below 2**64, rounded up to an integer.

    Exact for a float32 share; a float64's is the float64 product, rounded up.
    """
    if share.dtype == jnp.float64:
        whole = jnp.ceil(share * np.float64(total)).astype(jnp.uint64)
        return jnp.stack([(whole >> _BITS * i) & _MASK for i in range(LIMBS)]).astype(jnp.uint32)
    bits = lax.bitcast_convert_type(share.astype(jnp.float32), jnp.uint32)
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | jnp.where(exponent > 0, jnp.uint32(1 << 23), 0)
    shift = 150 - jnp.maximum(exponent, 1)  # share = mantissa / 2**shift
    exact = carry(product(mantissa, jnp.asarray(wide([total])[0]), LIMBS + 2))
    return _shifted_up(exact, shift)


def _shifted_up(a: Wide, shift: UInt32[Array, ""]) -> Wide:
    """a / 2**shift, rounded up to an integer; at most 150 bits."""
    words, bits = shift // _BITS, shift % _BITS
    padded = jnp.concatenate([a, jnp.zeros(LIMBS + 10, jnp.uint32)])
    upper = lax.dynamic_slice_in_dim(padded, words, LIMBS + 1)
    quotient = (upper[:-1] >> bits) | (upper[1:] << (_BITS - bits)) & _MASK
    places = jnp.arange(a.shape[-1], dtype=jnp.uint32)
    lost = jnp.where(places < words, a, jnp.where(places == words, a & ((1 << bits) - 1), 0))
    up = jnp.any(lost != 0).astype(jnp.uint32)
    return carry([quotient[0] + up, *quotient[1:]])
