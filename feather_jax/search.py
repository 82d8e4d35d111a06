"""Order statistics of magnitudes, exact, by counting, not sorting.

A round of the search reads the weights once and learns, of a few candidates for each statistic, how
many weights lie at or below it and which weights lie nearest on either side. A small sorted sample
of the weights proposes the first candidates, interpolation between the counts the next ones, and
four or five rounds leave no weight in between. Whatever the sample says, the counts are the proof,
so the result is that of sorting, for every input.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt, UInt32

from feather_jax.magnitude import comparison_dtype
from feather_jax.survey import Leaf, Survey, magnitude_bits, sample, survey

# The candidates of a round, in standard deviations about the estimated position. More of them would
# take fewer rounds, each limited by arithmetic instead of memory.
_SPREAD = np.array([-2, 0, 2], np.float32)
# Of the first round: to miss below costs more than above, where weights thin out predictably.
_FIRST_SPREAD = np.array([-4, 0, 2], np.float32)
# How much of the difference between the two interpolations is added to the deviation.
_DISAGREEMENT = 0.25
# Sorting the sample takes a fraction of a round if it is this fraction of the weights.
_SAMPLE_FRACTION = 2**-10
_LEAST_SAMPLE = 2**12
_LARGEST_SAMPLE = 2**17
# Of each row, where each is searched for itself.
_ROW_SAMPLE = 2**10


class Bracket(NamedTuple):
    """What the search knows of each statistic: its bits lie in [first, last]."""

    first: UInt[Array, " n"]
    below: UInt32[Array, " n"]  # the number of weights below first
    last: UInt[Array, " n"]
    upto: UInt32[Array, " n"]  # the number of weights at or below last
    beyond: UInt[Array, " n"]  # the nearest weight above last
    largest: UInt[Array, " n"]  # of all weights; NaNs are above infinity


class Statistics(NamedTuple):
    """Magnitudes in sorted order, of each group of weights."""

    lo: Float[Array, " n"]  # at the rank
    hi: Float[Array, " n"]  # at the next
    largest: Float[Array, " n"]


class _State(NamedTuple):
    bracket: Bracket
    candidates: UInt[Array, "n k"]  # of the round to come
    rounds: Int32[Array, ""]


def order_statistics(
    leaves: list[Leaf], rank: UInt32[Array, " n"], dtype: DTypeLike
) -> tuple[Statistics, Int32[Array, ""]]:
    """The magnitudes at a `rank`, one in all leaves or one in each row, and the rounds it took."""
    sizes = [size for leaf in leaves for size in leaf.sizes]
    size = np.array([sum(sizes)] if len(rank) == 1 else sizes, np.uint32)
    state = _search(leaves, rank, size, dtype)
    found = state.bracket
    # What ended the search: lo is last, or first is last, or they are lo and hi.
    ended_above = found.upto == rank + 1
    lo = jnp.where(ended_above, found.last, found.first)
    hi = jnp.where(ended_above & (found.upto < size), found.beyond, found.last)
    statistics = (lax.bitcast_convert_type(x, dtype) for x in (lo, hi, found.largest))
    return Statistics(*statistics), state.rounds


def _search(
    leaves: list[Leaf], rank: UInt32[Array, " n"], size: np.ndarray, dtype: DTypeLike
) -> _State:
    """Narrows the brackets until at most two weights are left in each.

    Every round raises first or lowers last, as each candidate is in [first, last).
    """
    bits = np.dtype(np.uint64 if dtype == jnp.float64 else np.uint32)
    rows = sum(len(leaf.padding) for leaf in leaves)

    def searching(state: _State) -> Bool[Array, ""]:
        return (state.rounds == 0) | jnp.any(undecided(state.bracket, rank))

    def narrow(state: _State) -> _State:
        # Without the barrier XLA moves the magnitudes out of the loop, into a copy of all weights.
        values, candidates = lax.optimization_barrier(
            ([leaf.values for leaf in leaves], state.candidates)
        )
        here = [leaf._replace(values=each) for leaf, each in zip(leaves, values, strict=True)]
        found = survey(here, jnp.broadcast_to(candidates, (rows, len(_SPREAD))))
        if len(rank) < rows:
            found = together(found)
        bracket = narrowed(state.bracket, found, found.upto <= rank[:, None])
        # They are state, because what XLA computes twice need not round the same way twice.
        candidates = interpolated(*expected(bracket, rank, size), state.rounds + 1)
        return _State(bracket, candidates, state.rounds + 1)

    first = _first_candidates(leaves, rank, size, bits)
    return lax.while_loop(searching, narrow, _State(everything(size, bits), first, jnp.int32(0)))


def everything(size: np.ndarray, bits: np.dtype) -> Bracket:
    """The brackets before anything is known."""
    least, most = jnp.zeros(len(size), bits), jnp.full(len(size), np.iinfo(bits).max, bits)
    return Bracket(least, jnp.zeros(len(size), jnp.uint32), most, jnp.asarray(size), most, most)


def undecided(bracket: Bracket, rank: UInt32[Array, " n"]) -> Bool[Array, " n"]:
    # With nothing below it, first may be the zero that the search began with: no weight at all.
    more_than_ends = (bracket.upto - bracket.below > 2) | (bracket.below == 0)
    return (bracket.first < bracket.last) & (bracket.upto > rank + 1) & more_than_ends


def together(found: Survey) -> Survey:
    """What a survey has learnt of all rows together, about candidates that they share."""
    return Survey(
        jnp.sum(found.upto, axis=0, keepdims=True, dtype=jnp.uint32),
        jnp.max(found.below, axis=0, keepdims=True),
        jnp.min(found.above, axis=0, keepdims=True),
        jnp.max(found.largest, keepdims=True),
    )


def narrowed(bracket: Bracket, found: Survey, under: Bool[Array, "n k"]) -> Bracket:
    """The bracket after a survey; `under` are the candidates that lie below the statistic.

    Candidates outside the bracket change nothing.
    """

    def raised(known: Array, surveyed: Array) -> Array:
        return jnp.maximum(known, jnp.max(jnp.where(under, surveyed, known[:, None]), axis=1))

    def lowered(known: Array, surveyed: Array) -> Array:
        return jnp.minimum(known, jnp.min(jnp.where(under, known[:, None], surveyed), axis=1))

    return Bracket(
        first=raised(bracket.first, found.above),
        below=raised(bracket.below, found.upto),
        last=jnp.minimum(lowered(bracket.last, found.below), found.largest),
        upto=lowered(bracket.upto, found.upto),
        beyond=lowered(bracket.beyond, found.above),
        largest=found.largest,
    )


def _first_candidates(
    leaves: list[Leaf], rank: UInt32[Array, " n"], size: np.ndarray, bits: np.dtype
) -> UInt[Array, "n k"]:
    sizes = np.array([size for leaf in leaves for size in leaf.sizes], float)
    drawn, _ = draw(leaves, sizes if len(rank) == 1 else None, bits)
    drawn = jnp.sort(drawn.reshape(len(rank), -1))
    return from_sample(drawn, (rank.astype(jnp.float32) + 0.5) / size.astype(np.float32))


def from_sample(drawn: UInt[Array, "n size"], position: Float32[Array, " n"]) -> UInt[Array, "n k"]:
    """Where a sorted sample expects a relative position among the weights, and about it."""
    length = drawn.shape[1]
    offsets = _FIRST_SPREAD * _deviation(position, length)[:, None]
    index = jnp.clip(position[:, None] + offsets, 0, 1) * (length - 1)
    return jnp.take_along_axis(drawn, index.astype(jnp.int32), axis=1)


def draw(
    leaves: list[Leaf], portions: np.ndarray | None, bits: np.dtype
) -> tuple[UInt[Array, " size"], np.ndarray]:
    """A sample of all rows, in proportion to `portions`, or without them of as many of each.

    Returns:
      The magnitudes row by row, and of each the row.
    """
    total = sum(size for leaf in leaves for size in leaf.sizes)
    wanted = min(max(_SAMPLE_FRACTION * total, _LEAST_SAMPLE), _LARGEST_SAMPLE, total)
    rows = sum(len(leaf.padding) for leaf in leaves)
    if portions is None:
        shares = np.full(rows, _ROW_SAMPLE)
    else:
        shares = np.ceil(wanted * portions / portions.sum()).astype(int)
    dtype = comparison_dtype(*(leaf.values for leaf in leaves))
    drawn, indices, end, row = [], [], 0, 0
    for leaf in leaves:
        here = shares[row : row + len(leaf.padding)]
        values, places = sample(leaf, here)
        # As many of each row as its share, whatever was drawn, so that all stand for as much.
        for share, place in zip(here, places, strict=True):
            indices.append(end + place[np.arange(share) * len(place) // share])
        drawn.append(values.astype(dtype))
        end += values.size
        row += len(here)
    values = jnp.concatenate(drawn)[np.concatenate(indices)]
    return magnitude_bits(values, bits), np.repeat(np.arange(rows), shares)


def expected(
    bracket: Bracket, rank: UInt32[Array, " n"], size: np.ndarray
) -> tuple[Array, Array, Array, Array, Array]:
    """What `interpolated` takes to say where the weights in the bracket should have `rank`."""
    count = (bracket.upto - bracket.below).astype(jnp.float32)
    left = (rank - bracket.below).astype(jnp.float32) + 0.5
    above = (jnp.asarray(size) - bracket.below).astype(jnp.float32) + 0.5
    return bracket.first, bracket.last, left, count, above


def interpolated(
    first: UInt[Array, " n"],
    last: UInt[Array, " n"],
    left: Float32[Array, " n"],
    count: Float32[Array, " n"],
    above: Float32[Array, " n"],
    rounds: Int32[Array, ""],
) -> UInt[Array, "n k"]:
    """Where `left` of the `count` between first and last would lie if they thinned out
    exponentially, with `above` from first on.

    That is, if the logarithm of the number of weights above a threshold were linear in it, which
    in a narrow bracket is the same as weights that are spread evenly.
    """
    even = left / count
    logarithms = jnp.log1p(-jnp.stack([left, count]) / above)
    position = logarithms[0] / logarithms[1]
    deviation = _deviation(even, count) + _DISAGREEMENT * jnp.abs(position - even)
    positions = jnp.clip(position[:, None] + _SPREAD * deviation[:, None], 0, 1)

    first, last = first[:, None], last[:, None]
    dtype = jnp.float64 if first.dtype == jnp.uint64 else jnp.float32
    least, most = (lax.bitcast_convert_type(x, dtype) for x in (first, last))
    between = least + (most - least) * positions.astype(dtype)
    candidates = lax.bitcast_convert_type(between, first.dtype)
    # Equal parts, from the sixth round on in every other, bound the rounds for any distribution.
    parts = np.arange(1, len(_SPREAD) + 1, dtype=dtype) / (len(_SPREAD) + 1)
    equal = first + ((last - first).astype(dtype) * parts).astype(first.dtype)
    candidates = jnp.where((rounds >= 5) & (rounds % 2 == 1), equal, candidates)
    return jnp.clip(candidates, first, last - 1)


def _deviation(position: Float32[Array, " n"], count: Float32[Array, " n"] | int) -> Array:
    """The standard deviation of a position that is told by `count` weights."""
    return jnp.sqrt(jnp.maximum(position * (1 - position), 0) / count)
