"""The least score that saves enough, exact, by counting: the search behind a budget of cost.

A weight's score is its magnitude over its row's scale. What lies up to a score costs a sum of
integers of up to 64 bits, so decisions are exact; where to look next is told by floats. Rows that
may not lose more than a bound are searched, in the same passes over the weights, for the last
weight that they may lose, from when it is known that the bound binds.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt, UInt32

from feather_jax.search import (
    Bracket,
    draw,
    everything,
    expected,
    from_sample,
    interpolated,
    narrowed,
    undecided,
)
from feather_jax.survey import Leaf, Survey, survey
from feather_jax.wide import LIMBS, Wide, at_least, carry, difference, product, wide


class Market(NamedTuple):
    """What the weights of each row cost, and what is to be saved."""

    costs: np.ndarray  # (rows, 2) limbs
    scales: np.ndarray | None  # (rows, 1); a weight's score is its magnitude over its scale
    caps: np.ndarray | None  # how many weights a row may lose
    sizes: np.ndarray
    required: Wide

    @property
    def available(self) -> np.ndarray:
        """How many weights each row may lose."""
        return self.sizes if self.caps is None else self.caps

    @property
    def total(self) -> int:
        """The cost of all weights that may be lost."""
        costs = self.costs[:, 0] + (self.costs[:, 1].astype(object) << 16)
        return int((costs * self.available).sum())

    def saved(self, counts: UInt32[Array, "rows k"]) -> list[Array]:
        """The cost of `counts` weights of each row, as limbs to be summed up."""
        return product(counts, jnp.asarray(self.costs)[:, None], LIMBS)

    def magnitudes(self, scores: UInt[Array, "rows k"]) -> UInt[Array, "rows k"]:
        """The largest magnitudes that scores include, in bits."""
        return scores if self.scales is None else _scaled(scores, self.scales)

    def scores(self, magnitudes: UInt[Array, "rows k"], scales: np.ndarray | None = None) -> Array:
        """The least scores that include magnitudes, in bits; what is none stays none."""
        scales = self.scales if scales is None else scales
        if scales is None:
            return magnitudes
        none = magnitudes.dtype.type(np.iinfo(magnitudes.dtype).max)
        dtype = scales.dtype
        near = lax.bitcast_convert_type(
            lax.bitcast_convert_type(magnitudes, dtype) / scales, magnitudes.dtype
        )
        best = near + 2
        for offset in (1, 0, -1, -2):
            tried = jnp.where(near < -min(offset, 0), 0, near + np.array(offset).astype(near.dtype))
            best = jnp.where(_scaled(tried, scales) >= magnitudes, tried, best)
        return jnp.where(magnitudes == none, none, jnp.where(magnitudes == 0, 0, best))


def _scaled(bits: UInt[Array, "*shape"], scales: np.ndarray) -> UInt[Array, "*shape"]:
    return lax.bitcast_convert_type(
        lax.bitcast_convert_type(bits, scales.dtype) * scales, bits.dtype
    )


class State(NamedTuple):
    """The least score that saves enough has bits in [first, last]."""

    first: UInt[Array, " 1"]
    below: Wide  # what scores below first save, (1, limbs)
    last: UInt[Array, " 1"]
    upto: Wide  # what scores up to last save, (1, limbs)
    largest: UInt[Array, ""]  # of all magnitudes
    own: Bracket | None  # of each row, of the last weight that it may lose
    full: Bool[Array, " rows"]  # the rows that lose all that they may, which are searched for it
    scores: UInt[Array, " k"]  # the candidates of the round to come,
    candidates: UInt[Array, "rows k"]  # and the magnitudes up to which they prune each row
    counts: UInt32[Array, "rows k"]  # of the round before, of all rows
    rounds: Int32[Array, ""]
    found: Bool[Array, ""]  # the score is, and the round to come counts what it prunes
    done: Bool[Array, ""]


def search_score(leaves: list[Leaf], market: Market, bits: np.dtype) -> State:
    rows = len(market.sizes)

    def round_(state: State) -> State:
        # Without the barrier XLA moves the magnitudes out of the loop, into a copy of all weights.
        values, candidates = lax.optimization_barrier(
            ([leaf.values for leaf in leaves], state.candidates)
        )
        here = [leaf._replace(values=each) for leaf, each in zip(leaves, values, strict=True)]
        found = survey(here, candidates)
        return _proposed(_narrowed(state, found, market), market, bits)

    start = everything(np.zeros(1, np.uint32), bits)
    nothing, all_ = jnp.zeros((1, LIMBS), jnp.uint32), jnp.asarray(wide([market.total]))
    full = jnp.zeros(rows, bool) if market.caps is None else jnp.asarray(market.caps == 0)
    own = None if market.caps is None else everything(market.sizes, bits)
    scores = _first_scores(leaves, market, bits)
    state = State(
        start.first,
        nothing,
        start.last,
        all_,
        jnp.zeros((), bits),
        own,
        full,
        scores,
        market.magnitudes(jnp.broadcast_to(scores, (rows, len(scores)))),
        jnp.zeros((rows, len(scores)), jnp.uint32),
        jnp.int32(0),
        jnp.array(False),
        jnp.array(False),
    )
    return lax.while_loop(lambda state: ~state.done, round_, state)


def _first_scores(leaves: list[Leaf], market: Market, bits: np.dtype) -> UInt[Array, " k"]:
    costs = market.costs[:, 0] + market.costs[:, 1] * 2.0**16
    drawn, row = draw(leaves, costs * np.maximum(market.available, 1), bits)
    scales = None if market.scales is None else market.scales[row, 0]
    drawn = jnp.sort(market.scores(drawn, scales))[None]
    position = difference(market.required, jnp.zeros(LIMBS, jnp.uint32)) / np.float32(
        max(market.total, 1)
    )
    return from_sample(drawn, jnp.clip(position, 0, 1)[None])[0]


def _narrowed(state: State, found: Survey, market: Market) -> State:
    """The state after a round, without the candidates of the next."""
    counts, above, own, full = found.upto, found.above, state.own, state.full
    none = above.dtype.type(np.iinfo(above.dtype).max)
    if market.caps is not None and own is not None:
        caps = market.caps[:, None]
        last_one = jnp.maximum(caps, 1) - 1
        own = narrowed(own, found, found.upto <= last_one)
        counts = jnp.where(full[:, None], caps, jnp.minimum(counts, caps))
        above = jnp.where(counts >= caps, none, above)
    each = jnp.broadcast_to(found.largest[:, None], above.shape)
    sums, (higher,), (lower, highest, largest) = _over_rows(
        market.saved(counts),
        [market.scores(above)],
        [market.scores(found.below), market.scores(each), each],
    )
    saved = carry(sums)
    enough = at_least(saved, market.required)
    if market.caps is not None:
        full |= jnp.any((counts >= caps) & ~enough, axis=1)
    short = jnp.sum(~enough)  # how many candidates are too low, the first ones
    k = len(enough)
    return state._replace(
        counts=found.upto,
        first=jnp.maximum(state.first, jnp.max(jnp.where(enough, 0, higher))),
        below=jnp.where(short > 0, saved[jnp.maximum(short, 1) - 1], state.below),
        last=jnp.minimum(
            jnp.minimum(state.last, highest[0]), jnp.min(jnp.where(enough, lower, none))
        ),
        upto=jnp.where(short < k, saved[jnp.minimum(short, k - 1)], state.upto),
        largest=largest[0],
        own=own,
        full=full,
        rounds=state.rounds + 1,
    )


def _over_rows(
    sums: list[Array], least: list[Array], most: list[Array]
) -> tuple[list[Array], list[Array], list[Array]]:
    """Sums, least and largest of arrays over their rows, in the one kernel that XLA makes of it."""
    none = least[0].dtype.type(np.iinfo(least[0].dtype).max) if least else None

    def combine(x, y):
        parts = zip((lax.add, lax.min, lax.max), x, y, strict=True)
        return tuple([merge(a, b) for a, b in zip(p, q, strict=True)] for merge, p, q in parts)

    start = ([np.uint32(0)] * len(sums), [none] * len(least), [each.dtype.type(0) for each in most])
    return lax.reduce((sums, least, most), start, combine, (0,))


def _proposed(state: State, market: Market, bits: np.dtype) -> State:
    """The state with the candidates of the next round."""
    half = np.float32(market.total / max(int(market.available.sum()), 1) / 2)  # of a mean cost
    left = jnp.maximum(difference(market.required, state.below) - half, half)
    count = jnp.maximum(difference(state.upto, state.below), 2 * half)
    above = difference(jnp.asarray(wide([market.total])), state.below) + half
    first, last = state.first, state.last
    if market.caps is not None and state.own is not None:
        rank = jnp.asarray(np.maximum(market.caps, 1) - 1)
        rows = expected(state.own, rank, market.sizes)
        first, last, left, count, above = (
            jnp.concatenate(pair)
            for pair in zip((first, last, left, count, above), rows, strict=True)
        )
    places = interpolated(first, last, left, count, above, state.rounds)
    scores = places[0]
    candidates = market.magnitudes(jnp.broadcast_to(scores, state.candidates.shape))
    # Where a weight is NaN there is nothing to search for.
    infinity = np.array(np.inf, f"f{bits.itemsize}").view(bits)
    found = ((state.first >= state.last) | (state.largest > infinity))[0]
    before = market.magnitudes(
        jnp.broadcast_to(jnp.maximum(state.last, 1) - 1, (len(market.sizes), 1))
    )
    at = market.magnitudes(jnp.broadcast_to(state.last, (len(market.sizes), 1)))
    last_ones = jnp.concatenate([before, jnp.minimum(before + 1, at), at], axis=1)
    candidates, done = jnp.where(found, last_ones, candidates), state.found
    if market.caps is not None and state.own is not None:
        searched = state.full & (market.caps > 0) & undecided(state.own, rank)
        done &= ~jnp.any(searched)
        candidates = jnp.where(state.full[:, None], places[1:], candidates)
    # What the last round counted, at the candidates that it had, is what thresholds come from.
    candidates = jnp.where(done, state.candidates, candidates)
    return state._replace(scores=scores, candidates=candidates, found=found, done=done)


def row_thresholds(state: State, market: Market, order: np.ndarray) -> UInt[Array, " rows"]:
    """The thresholds in bits, from the counts of the last round.

    All rows lose what scores below the last score, and row by row what scores just that, until
    enough is saved: of a row all, or only the smaller of its magnitudes. `order` has the place of
    each row among them.
    """
    before, between, at = (state.counts[:, i] for i in range(3))
    lowest, middle, highest = (state.candidates[:, i] for i in range(3))
    costs = market.costs
    if market.caps is not None:
        caps, full = market.caps, state.full
        before = jnp.where(full, caps, jnp.minimum(before, caps))
        # What would go above the bound stays.
        middle = jnp.where(between > caps, lowest, middle)
        between = jnp.where(full | (between > caps), before, between)
        highest = jnp.where(at > caps, middle, highest)
        at = jnp.where(full | (at > caps), between, at)
    some, all_ = (product(counts - before, jnp.asarray(costs), LIMBS) for counts in (between, at))
    # What all rows save before, and each row with those that come first.
    first_rows = order[:, None] <= order
    so_far, _, _ = _over_rows(
        [
            jnp.where(first_rows, more[:, None], 0) + first[:, None]
            for more, first in zip(all_, product(before, jnp.asarray(costs), LIMBS), strict=True)
        ],
        [],
        [],
    )
    enough = at_least(carry(so_far), market.required)
    some_less = [x - y + z for x, y, z in zip(so_far, all_, some, strict=True)]
    some_enough = at_least(carry(some_less), market.required)
    first = jnp.min(jnp.where(enough, order, len(order)))  # there is none where all are too few
    last_one = jnp.where(some_enough, middle, highest)
    chosen = jnp.where(order < first, highest, jnp.where(order == first, last_one, lowest))
    own = state.own
    if market.caps is None or own is None:
        return chosen
    # The largest magnitude with as many weights up to it as may go, or where ties lie, fewer.
    largest = jnp.where(own.first < own.last, own.first, jnp.maximum(own.first, 1) - 1)
    largest = jnp.where(own.upto == caps, own.last, largest)
    return jnp.where(caps == 0, 0, jnp.where(full, largest, chosen))
