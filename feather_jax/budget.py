"""Thresholds for a budget of cost: work, bytes or time, where weights differ in what they cost."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree, ScalarLike

from feather_jax.cost_search import Market, row_thresholds, search_score
from feather_jax.magnitude import Magnitude
from feather_jax.masks import Mask
from feather_jax.rank import Rank
from feather_jax.schedule import check_sparsity
from feather_jax.survey import put_together
from feather_jax.weights import (
    AxisName,
    Static,
    Weights,
    check_count,
    collect,
    measured,
    on_any_mesh,
)
from feather_jax.wide import LIMBS, Wide, fraction_of, wide


def budget_thresholds(
    params: PyTree,
    sparsity: ScalarLike,
    *,
    cost: PyTree[float] | Callable[[PyTree], PyTree[float]],
    exponent: float = 0.0,
    max_sparsity: PyTree[float] | None = None,
    prunable: Mask | None = None,
    magnitude: Magnitude = jnp.abs,
    axis_name: AxisName | None = None,
) -> PyTree[Float[Array, ""]]:
    """Thresholds that leave the fraction 1 - `sparsity` of the cost of all prunable weights.

    Weights are pruned in the order of |w| / cost^exponent until what is left costs at most
    (1 - sparsity) of all: the fewest that do, to one weight when there are no ties within a layer.
    The order of weights whose quotients round to the same float is that of their leaves. With an
    exponent of 0 it is the order of |w|, and the thresholds are alike but for such ties; with 1
    those go first that have the least magnitude for what they cost.

    Args:
      params: a pytree of arrays.
      sparsity: the fraction of the cost to save, in [0, 1), a number or an array, traced or not.
      cost: what each weight of a leaf costs, a pytree prefix of `params` with positive numbers, or
        a function of `params` that returns one: `Macs.cost_per_weight`, bytes, measured times.
        Whole numbers below 2**32 are exact, others are rounded to 32 bits of the largest.
      exponent: how much what a weight costs counts against it, a number of at least 0.
      max_sparsity: no leaf loses more than this fraction of its weights: a number in [0, 1], or a
        pytree prefix of `params` with such numbers; 0 leaves a leaf dense. What it would have lost
        others lose, so that the budget is met all the same.
      prunable: the leaves that count, a mask; `prunable_weights` by default.
      magnitude: as for `global_threshold`.
      axis_name: as for `global_threshold`.

    Returns:
      A pytree like `params` of scalars, 0 for what is not prunable. The thresholds are the largest
      magnitudes pruned, not interpolated, at an exponent of 0; close above them at others. NaN
      if a prunable weight or the sparsity is.

    Raises:
      ValueError: as `global_threshold`; a cost is not positive and finite, an exponent negative,
        a bound is outside [0, 1], or the bounds leave too little to prune.

    References:
      Costs as in Spartan, Tai et al., 2022 (https://arxiv.org/abs/2205.14107).
    """
    weights = collect(params, prunable, magnitude, axis_name)
    check_count(sum(weights.sizes))
    given = weights.values_of(cost(params) if callable(cost) else cost, "cost")
    prices = _Prices.of(given, exponent, _caps(weights, max_sparsity), weights.dtype)
    required = _required(sparsity, prices, weights.sizes)
    return weights.as_tree(_select(weights.arrays, required, prices, weights.static))


class _Prices(NamedTuple):
    """What the leaves' weights cost. Plain and hashable: it is static."""

    costs: tuple[int, ...]  # in units that make them integers, below 2**32
    scales: tuple[float, ...] | None  # cost^exponent, at most 1; None if all are 1
    caps: tuple[int, ...] | None  # how many weights a leaf may lose

    @classmethod
    def of(
        cls, given: list, exponent: float, caps: tuple[int, ...] | None, dtype: DTypeLike
    ) -> "_Prices":
        costs = [float(np.asarray(cost)) for cost in given]
        for cost in costs:
            if not (cost > 0 and math.isfinite(cost)):
                raise ValueError(
                    f"A weight's cost is a positive number, and one is {cost}; leave weights that "
                    "cost nothing out with `prunable`."
                )
        if not (exponent >= 0 and math.isfinite(exponent)):
            raise ValueError(f"The exponent of the cost is at least 0, and it is {exponent}.")
        most = max(costs)
        whole = most < 2**32 and all(cost == int(cost) for cost in costs)
        unit = 1.0 if whole else math.ldexp(1.0, math.frexp(most)[1] - 32)
        integers = tuple(max(1, min(round(cost / unit), 2**32 - 1)) for cost in costs)
        scales = tuple(float(np.asarray((cost / most) ** exponent, dtype)) for cost in costs)
        return cls(integers, None if set(scales) == {1.0} else scales, caps)


def _caps(weights: Weights, max_sparsity: PyTree[float] | None) -> tuple[int, ...] | None:
    if max_sparsity is None:
        return None
    bounds = [float(np.asarray(b)) for b in weights.values_of(max_sparsity, "max_sparsity")]
    for bound in bounds:
        if not 0 <= bound <= 1:
            raise ValueError(
                f"max_sparsity is the largest fraction of zeros in a layer, in [0, 1], and it is "
                f"{bound}."
            )
    return tuple(math.floor(b * size) for b, size in zip(bounds, weights.sizes, strict=True))


def _required(
    sparsity: ScalarLike, prices: _Prices, sizes: list[int]
) -> tuple[Wide, Bool[Array, ""] | bool]:
    """The cost to be saved, rounded up to an integer, and whether the sparsity is NaN."""
    total = sum(cost * size for cost, size in zip(prices.costs, sizes, strict=True))
    if isinstance(sparsity, jax.Array):
        share = lax.stop_gradient(sparsity)
        return fraction_of(jnp.clip(jnp.nan_to_num(share), 0, 1), total), jnp.isnan(share)
    required = math.ceil(check_sparsity(float(np.asarray(sparsity))) * total)
    _check_bounds(sparsity, required, prices, sizes)
    return jnp.asarray(wide([required])[0]), False


def _check_bounds(sparsity: ScalarLike, required: int, prices: _Prices, sizes: list[int]) -> None:
    total, most = (
        sum(cost * count for cost, count in zip(prices.costs, counts, strict=True))
        for counts in (sizes, prices.caps or sizes)
    )
    if required > most:
        raise ValueError(
            f"A sparsity of {sparsity} cannot be reached where max_sparsity lets only "
            f"{most / total:.6g} of all be pruned; raise the bounds or lower the sparsity."
        )


def bounded(
    weights: Weights, sparsity: ScalarLike, rank: Rank, max_sparsity: PyTree[float]
) -> PyTree[Float[Array, ""]]:
    """The thresholds of `global_threshold` with bounds: each weight costs the same."""
    prices = _Prices.of([1] * len(weights.sizes), 0.0, _caps(weights, max_sparsity), weights.dtype)
    if not isinstance(sparsity, jax.Array):
        position = float(np.asarray(sparsity)) * (sum(weights.sizes) - 1)
        _check_bounds(sparsity, math.floor(position) + 1, prices, weights.sizes)
    count = jnp.where(rank.is_zero, 0, rank.floor + 1)[0]
    limbs = jnp.stack([count & 0xFFFF, count >> 16, *[jnp.zeros_like(count)] * (LIMBS - 2)])
    required = limbs, jnp.isnan(rank.fraction[0])
    return weights.as_tree(_select(weights.arrays, required, prices, weights.static))


@functools.partial(jax.jit, static_argnames=("prices", "static"))
def _select(
    arrays: list[Array],
    required: tuple[Wide, Bool[Array, ""] | bool],
    prices: _Prices,
    static: Static,
) -> Float[Array, " leaves"]:
    def select(arrays: list[Array], required: tuple[Wide, Array]) -> Array:
        leaves, rows = put_together(measured(arrays, static), apart=True)
        order = np.argsort(rows)
        sizes = np.array([size for leaf in leaves for size in leaf.sizes], np.uint32)
        bits = np.dtype(np.uint64 if static.dtype == jnp.float64 else np.uint32)
        scales, caps = prices.scales, prices.caps
        market = Market(
            wide([prices.costs[i] for i in order], 2),
            None if scales is None else np.array([scales[i] for i in order], static.dtype)[:, None],
            None if caps is None else np.array([caps[i] for i in order], np.uint32),
            sizes,
            required[0],
        )
        state = search_score(leaves, market, bits)
        found = row_thresholds(state, market, order)[rows]
        values = lax.bitcast_convert_type(found, static.dtype)
        values = jnp.where(values > 0, values, 0)  # what the backend flushes
        nothing = ~jnp.any(required[0] > 0) | (state.last[0] == 0)
        largest = lax.bitcast_convert_type(state.largest, static.dtype)
        invalid = required[1] | jnp.isnan(largest)
        return jnp.where(invalid, jnp.nan, jnp.where(nothing, 0, values))

    return on_any_mesh(select, arrays, required)
