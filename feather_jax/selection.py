"""One threshold for all weights: the exact quantile of their magnitudes, by counting, not sorting.

A round of the search reads the weights once and learns, of a few candidates for the threshold, how
many weights lie at or below each and which weights lie nearest on either side. A small sorted
sample of the weights proposes the first candidates, interpolation between the counts the next
ones, and about four rounds leave no weight in between. Whatever the sample says, the counts are
the proof, so the result is that of sorting, for every input.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32, PyTree, ScalarLike, UInt, UInt32

from feather_jax.masks import Mask, no_prunable_weight, prunable_leaves

# The candidates of a round, in standard deviations about the estimated position. More of them would
# take fewer rounds, each limited by arithmetic instead of memory.
_SPREAD = np.array([-1.2, 0, 1.2], np.float32)
# Sorting the sample takes a fraction of a round if it is this fraction of the weights.
_SAMPLE_FRACTION = 2**-10
_LEAST_SAMPLE = 2**12
# Leaves of at most as many weights are copied into one array.
_SMALL_LEAF = 2**18


def global_threshold(
    params: PyTree, sparsity: ScalarLike, *, prunable: Mask | None = None
) -> Float[Array, ""]:
    """The magnitude below which the fraction `sparsity` of all prunable weights lies.

    With N prunable weights and their magnitudes sorted into a, the rank is m = sparsity (N - 1),
    f = m - floor(m), lo = a[floor(m)], hi = a[min(floor(m) + 1, N - 1)], and the threshold is
    lo + (hi - lo) f, kept below hi where lo < hi. So exactly floor(m) + 1 weights have
    |w| <= threshold when there are no ties, whatever N and the sparsity. The result is
    bit-identical to sorting, but nothing is sorted except a small sample, and no large leaf copied.

    Args:
      params: a pytree of arrays of any shapes and floating-point dtypes.
      sparsity: the fraction of zeros, in [0, 1). A Python or NumPy number, whose rank is computed
        in float64 as `np.quantile` does; or a JAX array, traced or not, whose rank is the exact
        product of its float32 value and N - 1 (the float64 product if it is float64). The value of
        an array cannot be checked: it is clipped to [0, 1].
      prunable: the leaves that count, a mask; `prunable_weights` by default.

    Returns:
      A scalar, float32, or float64 if a prunable leaf is. Zero where `sparsity` is zero, infinite
      where lo is, NaN if a prunable weight or the sparsity is. Denormals count as zeros where the
      backend flushes them. The derivative is zero.

    Raises:
      ValueError: no weight is prunable, 2**32 or more are, or a `sparsity` given as a number is
        outside [0, 1).

    References:
      The global backbone of Feather, Glentis Georgoulakis et al., BMVC 2023
      (https://arxiv.org/abs/2310.02448), whose released code sorts all weights.
    """
    leaves, size, dtype = _prunable(params, prunable)
    if isinstance(sparsity, jax.Array):
        rank = _traced_rank(lax.stop_gradient(sparsity), size, dtype)
    else:
        rank = _static_rank(float(np.asarray(sparsity)), size, dtype)
    return _threshold_at(leaves, rank, dtype)


def scheduled_threshold(
    params: PyTree,
    growing: Float[Array, ""],
    final: float,
    reached: Bool[Array, ""],
    *,
    prunable: Mask | None = None,
) -> Float[Array, ""]:
    """`global_threshold` at `final` once it is `reached`, at `growing` before: one search for both.

    `final` is a number, whose rank in float64 may differ from that of the same number in float32.
    """
    leaves, size, dtype = _prunable(params, prunable)
    ranks = _static_rank(final, size, dtype), _traced_rank(growing, size, dtype)
    rank = jax.tree.map(functools.partial(jnp.where, reached), *ranks)
    return _threshold_at(leaves, rank, dtype)


def _prunable(params: PyTree, prunable: Mask | None) -> tuple[list[Array], int, DTypeLike]:
    """The prunable leaves that hold weights, how many these are, and the threshold's dtype."""
    arrays = [lax.stop_gradient(jnp.asarray(leaf)) for leaf in prunable_leaves(params, prunable)]
    leaves = [leaf for leaf in arrays if leaf.size]
    size = sum(leaf.size for leaf in leaves)
    if not size:
        raise no_prunable_weight(params)
    if size >= 2**32:
        raise ValueError(
            f"One threshold can be selected from at most 2**32 - 1 weights, and {size} are "
            "prunable; exclude some with `prunable`."
        )
    return leaves, size, jnp.result_type(jnp.float32, *leaves)


def _threshold_at(leaves: list[Array], rank: "_Rank", dtype: DTypeLike) -> Float[Array, ""]:
    lo, hi, largest = _order_statistics(leaves, rank.floor, dtype)
    # abs keeps compilers from contracting the product and the sum into one rounding.
    between = lo + jnp.abs((hi - lo) * rank.fraction)
    inside = (lo < hi) & (rank.fraction > 0)
    threshold = jnp.where(inside, jnp.minimum(between, jnp.nextafter(hi, lo)), lo)
    threshold = jnp.where(rank.is_zero, 0, _flush(threshold))
    return jnp.where(jnp.isnan(largest) | jnp.isnan(rank.fraction), jnp.nan, threshold)


def _flush(magnitude: Float[Array, ""]) -> Float[Array, ""]:
    """Zero for a denormal where the backend flushes them, as comparisons do but bits do not."""
    return jnp.where(magnitude > 0, magnitude, 0)


class _Rank(NamedTuple):
    """A position in the sorted magnitudes, sparsity (N - 1)."""

    floor: UInt32[Array, ""]
    fraction: Float[Array, ""]  # in the threshold's dtype; may round up to 1; NaN for a NaN
    is_zero: bool | Bool[Array, ""]  # whether the sparsity is


def _static_rank(sparsity: float, size: int, dtype: DTypeLike) -> _Rank:
    if not 0 <= sparsity < 1:
        raise ValueError(f"The sparsity must be in [0, 1), the fraction of zeros; got {sparsity}.")
    position = sparsity * (size - 1)
    floor = math.floor(position)
    fraction = jnp.asarray(position - floor, dtype)
    return _Rank(jnp.asarray(floor, jnp.uint32), fraction, sparsity == 0)


def _traced_rank(sparsity: Array, size: int, dtype: DTypeLike) -> _Rank:
    if sparsity.dtype == jnp.float64:
        position = jnp.clip(sparsity, 0, 1) * (size - 1)
        floor = jnp.floor(position)
        return _Rank(floor.astype(jnp.uint32), (position - floor).astype(dtype), sparsity <= 0)

    # A float32 product would be off by whole ranks above 2**24 weights, so it is taken in integers:
    # sparsity = mantissa / 2**shift. In XLA, a shift by 32 and more (or below zero) gives zero.
    bits = lax.bitcast_convert_type(jnp.clip(sparsity.astype(jnp.float32), 0, 1), jnp.uint32)
    exponent = bits >> 23
    mantissa = (bits & 0x7FFFFF) | jnp.where(exponent > 0, jnp.uint32(1 << 23), 0)
    shift = 150 - jnp.maximum(exponent, 1)
    high, low = _wide_product(mantissa, size - 1)
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
    return _Rank(floor, jnp.where(jnp.isnan(sparsity), jnp.nan, fraction), sparsity <= 0)


def _wide_product(a: UInt32[Array, ""], b: int) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """The high and the low word of a b, from halves of words; a is below 2**24."""
    a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a1 * b0 + (a0 * b0 >> 16)
    middle_low = a0 * b1 + (middle & 0xFFFF)
    return a1 * b1 + (middle >> 16) + (middle_low >> 16), (middle_low << 16) | (a0 * b0 & 0xFFFF)


class _Bracket(NamedTuple):
    """What the search knows: the bits of lo lie in [first, last]."""

    first: UInt[Array, ""]
    below: UInt32[Array, ""]  # the number of weights below first
    last: UInt[Array, ""]
    upto: UInt32[Array, ""]  # the number of weights at or below last
    beyond: UInt[Array, ""]  # the nearest weight above last
    largest: UInt[Array, ""]  # of all weights; NaNs are above infinity
    candidates: UInt[Array, " k"]  # of the round to come
    rounds: Int32[Array, ""]


@functools.partial(jax.jit, static_argnames="dtype")
def _order_statistics(
    leaves: list[Array], rank: UInt32[Array, ""], dtype: DTypeLike
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The magnitudes at `rank` and `rank` + 1 in sorted order, and the largest."""
    size = sum(leaf.size for leaf in leaves)
    found = _search(_join_small(leaves, dtype), rank, dtype)
    # What ended the search: lo is last, or first is last, or they are lo and hi.
    lo = jnp.where(found.upto == rank + 1, found.last, found.first)
    hi_beyond = (found.upto == rank + 1) & (found.upto < size)
    hi = jnp.where(hi_beyond, found.beyond, found.last)
    lo, hi, largest = (lax.bitcast_convert_type(x, dtype) for x in (lo, hi, found.largest))
    return _flush(lo), _flush(hi), largest


def _join_small(leaves: list[Array], dtype: DTypeLike) -> list[Array]:
    """The same weights, those of all small leaves in one array.

    Each array that is surveyed costs XLA time to compile, and a launch on a GPU.
    """
    small = [leaf for leaf in leaves if leaf.size <= _SMALL_LEAF]
    if len(small) < 2:
        return leaves
    joined = jnp.concatenate([leaf.ravel().astype(dtype) for leaf in small])
    return [joined, *(leaf for leaf in leaves if leaf.size > _SMALL_LEAF)]


def _search(leaves: list[Array], rank: UInt32[Array, ""], dtype: DTypeLike) -> _Bracket:
    """Narrows the bracket until at most two weights are left in it.

    Magnitudes are searched as integers, since non-negative floats are in the order of their bits.
    Every round raises first or lowers last, as each candidate is in [first, last).
    """
    bits = jnp.uint64 if dtype == jnp.float64 else jnp.uint32
    size = sum(leaf.size for leaf in leaves)

    def searching(state: _Bracket) -> Bool[Array, ""]:
        # With nothing below it, first may be the zero that the search began with: no weight at all.
        more_than_ends = (state.upto - state.below > 2) | (state.below == 0)
        undecided = (state.first < state.last) & (state.upto > rank + 1) & more_than_ends
        return (state.rounds == 0) | undecided

    def narrow(state: _Bracket) -> _Bracket:
        # Without the barrier XLA moves the magnitudes out of the loop, into a copy of all weights.
        weights, candidates = lax.optimization_barrier((leaves, list(state.candidates)))
        count, at_or_below, above, largest = _survey(weights, candidates, dtype)
        under = count <= rank
        last = jnp.min(jnp.where(under, state.last, at_or_below))
        narrowed = _Bracket(
            first=jnp.max(jnp.where(under, above, state.first)),
            below=jnp.max(jnp.where(under, count, state.below)),
            last=jnp.minimum(last, largest),
            upto=jnp.min(jnp.where(under, state.upto, count)),
            beyond=jnp.min(jnp.where(under, state.beyond, above)),
            largest=largest,
            candidates=state.candidates,
            rounds=state.rounds + 1,
        )
        # They are state, because what XLA computes twice need not round the same way twice.
        return narrowed._replace(candidates=_next_candidates(narrowed, rank))

    least, most = bits(0), bits(np.iinfo(bits).max)
    everything = _Bracket(
        first=least,
        below=jnp.uint32(0),
        last=most,
        upto=jnp.uint32(size),
        beyond=most,
        largest=most,
        candidates=_sample_candidates(leaves, rank, dtype),
        rounds=jnp.int32(0),
    )
    return lax.while_loop(searching, narrow, everything)


def _sample_candidates(
    leaves: list[Array], rank: UInt32[Array, ""], dtype: DTypeLike
) -> UInt[Array, " k"]:
    """Where a small sorted sample of the weights expects `rank` and its neighbourhood."""
    size = sum(leaf.size for leaf in leaves)
    # An odd stride takes every column of a leaf whose last dimension is even.
    stride = size // max(int(size * _SAMPLE_FRACTION), _LEAST_SAMPLE) | 1
    sample = jnp.concatenate([_magnitude_bits(leaf.ravel()[::stride], dtype) for leaf in leaves])
    position = _spread((rank.astype(jnp.float32) + 0.5) / size, sample.size) * (sample.size - 1)
    return jnp.sort(sample)[position.astype(jnp.int32)]


def _next_candidates(state: _Bracket, rank: UInt32[Array, ""]) -> UInt[Array, " k"]:
    """Where the weights in the bracket would have `rank` if they were spread evenly."""
    count = (state.upto - state.below).astype(jnp.float32)
    position = _spread(((rank - state.below).astype(jnp.float32) + 0.5) / (count - 1), count)
    # Equal parts, from the sixth round on in every other, bound the rounds for any distribution.
    equal = np.arange(1, _SPREAD.size + 1, dtype=np.float32) / (_SPREAD.size + 1)
    position = jnp.where((state.rounds >= 5) & (state.rounds % 2 == 1), equal, position)
    width = state.last - state.first
    candidates = state.first + (width.astype(jnp.float32) * position).astype(width.dtype)
    return jnp.clip(candidates, state.first, state.last - 1)


def _spread(position: Float32[Array, ""], count: ScalarLike) -> Float32[Array, " k"]:
    """Relative positions about `position`, which `count` weights tell no more exactly than that."""
    deviation = jnp.sqrt(position * (1 - position) / count)
    return jnp.clip(position + _SPREAD * deviation, 0, 1)


def _survey(
    leaves: list[Array], candidates: list[UInt[Array, ""]], dtype: DTypeLike
) -> tuple[UInt32[Array, " k"], UInt[Array, " k"], UInt[Array, " k"], UInt[Array, ""]]:
    """One pass over the weights.

    Returns:
      For each candidate the number of weights at or below it, the nearest weight there (of no
      meaning if there is none), the nearest weight above it (the largest integer if there is
      none); and the largest weight.
    """
    bits = candidates[0].dtype
    sign, most = np.iinfo(bits).bits - 1, bits.type(np.iinfo(bits).max)
    k = len(candidates)

    def combine(x, y):
        pairs = [list(zip(*parts, strict=True)) for parts in zip(x, y, strict=True)]
        return tuple(
            [merge(a, b) for a, b in part]
            for merge, part in zip((lax.add, lax.max, lax.min, lax.max), pairs, strict=True)
        )

    def survey_leaf(leaf):
        magnitudes = _magnitude_bits(leaf, dtype)
        # At or below a candidate the difference wraps around: its sign bit counts, its maximum is
        # the nearest weight there, and its minimum, unless it too has wrapped, the nearest above.
        differences = [magnitudes - (candidate + 1) for candidate in candidates]
        counted = [(difference >> sign).astype(jnp.uint32) for difference in differences]
        # Several results of one reduction are one pass, and XLA's CPU backend rewrites a reduction
        # with a single result into slower ones that materialise its operand.
        return lax.reduce(
            (counted, differences, differences, [magnitudes]),
            ([np.uint32(0)] * k, [bits.type(0)] * k, [most] * k, [bits.type(0)]),
            combine,
            tuple(range(leaf.ndim)),
        )

    count, below, above, (largest,) = functools.reduce(combine, map(survey_leaf, leaves))
    origin = jnp.stack(candidates) + 1
    above = jnp.stack(above)
    above = jnp.where(above >> sign, most, above + origin)
    return jnp.stack(count), jnp.stack(below) + origin, above, largest


def _magnitude_bits(leaf: Array, dtype: DTypeLike) -> UInt[Array, "..."]:
    bits = jnp.uint64 if dtype == jnp.float64 else jnp.uint32
    return lax.bitcast_convert_type(jnp.abs(leaf).astype(dtype), bits)
