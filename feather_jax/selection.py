"""From a sparsity to thresholds: one for all weights, or one for each layer."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, ScalarLike

from feather_jax.budget import bounded
from feather_jax.magnitude import Magnitude
from feather_jax.masks import Mask
from feather_jax.rank import Rank, ranks
from feather_jax.schedule import check_sparsity
from feather_jax.search import Statistics, order_statistics
from feather_jax.survey import put_together
from feather_jax.weights import AxisName, Static, check_count, collect, measured, on_any_mesh


def global_threshold(
    params: PyTree,
    sparsity: ScalarLike,
    *,
    prunable: Mask | None = None,
    magnitude: Magnitude = jnp.abs,
    axis_name: AxisName | None = None,
    max_sparsity: PyTree[float] | None = None,
) -> PyTree[Float[Array, ""]]:
    """The magnitude below which the fraction `sparsity` of all prunable weights lies.

    With N prunable weights and their magnitudes sorted into a, the rank is m = sparsity (N - 1),
    f = m - floor(m), lo = a[floor(m)], hi = a[min(floor(m) + 1, N - 1)], and the threshold is
    lo + (hi - lo) f, kept below hi where lo < hi. So exactly floor(m) + 1 weights have
    |w| <= threshold when there are no ties, whatever N and the sparsity. The result is
    bit-identical to sorting, but nothing is sorted except a small sample, and no large leaf copied.

    Weights may be sharded along any axes, on meshes of any kind. What devices tell each other is
    the sample and the counts: 0.1 MB, and up to half a megabyte for hundreds of megabytes of
    weights.

    Args:
      params: a pytree of arrays of any shapes and floating-point dtypes.
      sparsity: the fraction of zeros, in [0, 1). A Python or NumPy number, whose rank is computed
        in float64 as `np.quantile` does; or a JAX array, traced or not, whose rank is the exact
        product of its float32 value and N - 1 (the float64 product if it is float64). The value of
        an array cannot be checked: it is clipped to [0, 1].
      prunable: the leaves that count, a mask; `prunable_weights` by default.
      magnitude: what is compared instead of |w|, such as a `block_magnitude`: each weight counts
        with the magnitude of its block. It is computed once, as an array beside the weights.
      axis_name: inside `jax.shard_map`, the manual axes over which weights vary: they are counted
        over all devices, weights that do not vary once. Where JAX does not say which vary, with
        `check_vma=False` and in `pmap` and `vmap`, all are taken to.
      max_sparsity: no leaf loses more than this fraction of its weights, a number in [0, 1], or a
        pytree prefix of `params` with such numbers; 0 leaves a leaf dense. Others lose more, so
        that as many are pruned in all.

    Returns:
      A scalar, float32, or float64 if a prunable leaf is. Zero where `sparsity` or lo is zero,
      infinite where lo is, NaN if a prunable weight or the sparsity is. Denormals count as zeros
      where the backend flushes them. The derivative is zero. With `max_sparsity` a pytree like
      `params` of such scalars, the largest magnitudes pruned (not interpolated), 0 for what is not
      prunable.

    Raises:
      ValueError: no weight is prunable, 2**32 or more are, a `sparsity` given as a number is
        outside [0, 1) or above what `max_sparsity` allows, or a weight varies over a manual axis
        that `axis_name` does not name.

    References:
      The global backbone of Feather, Glentis Georgoulakis et al., BMVC 2023
      (https://arxiv.org/abs/2310.02448), whose released code sorts all weights.
    """
    weights = collect(params, prunable, magnitude, axis_name)
    rank = ranks([sparsity], [check_count(sum(weights.sizes))], weights.dtype)
    if max_sparsity is not None:
        return bounded(weights, sparsity, rank, max_sparsity)
    return _quantiles(weights.arrays, rank, weights.static)[0]


def layer_thresholds(
    params: PyTree,
    sparsity: PyTree[ScalarLike],
    *,
    final: PyTree[float] | Callable[[PyTree], PyTree[float]] | None = None,
    prunable: Mask | None = None,
    magnitude: Magnitude = jnp.abs,
    axis_name: AxisName | None = None,
) -> PyTree[Float[Array, ""]]:
    """A threshold for each layer: `global_threshold` of every prunable leaf for itself.

    All leaves are searched together, each pass over the weights serving all. A leaf that holds a
    stack of layers is one layer.

    Args:
      params: a pytree of arrays.
      sparsity: the fraction of zeros in every layer, in [0, 1), or a pytree prefix of `params` with
        one for each; numbers or arrays, as `global_threshold` takes them.
      final: where layers differ while the sparsity grows, as in `Feather`: the final sparsities, a
        pytree prefix of `params` with numbers in [0, 1), such as `erdos_renyi_kernel` gives, or a
        function of `params` that returns one. Then `sparsity` is that of all layers together, and
        each has its final one times `sparsity` over their mean.
      prunable: the leaves that have a threshold; `prunable_weights` by default.
      magnitude: as for `global_threshold`.
      axis_name: as for `global_threshold`.

    Returns:
      A pytree like `params` of scalars, 0 for what is not prunable.

    Raises:
      ValueError: as `global_threshold`; `sparsity` or `final` is no prefix of `params`, or no layer
        has a final sparsity above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from feather_jax import layer_thresholds
      >>> params = {"a": {"kernel": jnp.array([[1.0, 2.0, 3.0]])},
      ...           "b": {"kernel": jnp.array([[10.0, 20.0, 30.0]])}}
      >>> layer_thresholds(params, {"a": 0.5, "b": 0.0})
      {'a': {'kernel': Array(2., dtype=float32)}, 'b': {'kernel': Array(0., dtype=float32)}}
    """
    weights = collect(params, prunable, magnitude, axis_name)
    sparsities = weights.values_of(sparsity, "sparsity")
    if final is not None:
        finals = weights.values_of(final(params) if callable(final) else final, "final sparsity")
        sparsities = _in_proportion(sparsities, finals, weights.sizes)
    rank = ranks(sparsities, [check_count(size) for size in weights.sizes], weights.dtype)
    return weights.as_tree(_quantiles(weights.arrays, rank, weights.static))


def _in_proportion(
    sparsities: list[ScalarLike], finals: list[ScalarLike], sizes: list[int]
) -> list[ScalarLike]:
    """The final sparsities, each times the sparsity over their mean over all weights."""
    numbers = [check_sparsity(float(np.asarray(final))) for final in finals]
    mean = sum(f * n for f, n in zip(numbers, sizes, strict=True)) / sum(sizes)
    if not mean:
        raise ValueError("No layer has a final sparsity above 0; give those that are pruned one.")

    def scaled(sparsity: ScalarLike, final: float) -> ScalarLike:
        if isinstance(sparsity, jax.Array):
            return final * (sparsity / mean)
        ratio = float(np.asarray(sparsity)) / mean
        return final if math.isclose(ratio, 1, rel_tol=1e-9) else final * ratio

    return [scaled(s, final) for s, final in zip(sparsities, numbers, strict=True)]


@partial(jax.jit, static_argnames="static")
def _quantiles(arrays: list[Array], rank: Rank, static: Static) -> Float[Array, " n"]:
    """The interpolated thresholds at the ranks, one in all arrays or one in each."""
    return on_any_mesh(partial(_quantiles_here, static), arrays, rank)


def _quantiles_here(static: Static, arrays: list[Array], rank: Rank) -> Float[Array, " n"]:
    apart = len(rank.floor) > 1
    leaves, rows = put_together(measured(arrays, static), apart=apart)
    if not apart:
        return interpolate(order_statistics(leaves, rank.floor, static.dtype)[0], rank)
    found, _ = order_statistics(leaves, rank.floor[rows.argsort()], static.dtype)
    return interpolate(jax.tree.map(lambda x: x[rows], found), rank)


def interpolate(found: Statistics, rank: Rank) -> Float[Array, " n"]:
    """The thresholds between two order statistics, with as many weights below them as promised."""
    lo, hi = flush(found.lo), flush(found.hi)
    # abs keeps compilers from contracting the product and the sum into one rounding.
    between = lo + jnp.abs((hi - lo) * rank.fraction)
    inside = (lo < hi) & (rank.fraction > 0)
    threshold = jnp.where(inside, jnp.minimum(between, jnp.nextafter(hi, lo)), lo)
    threshold = jnp.where(rank.is_zero | (lo == 0), 0, flush(threshold))
    return jnp.where(jnp.isnan(found.largest) | jnp.isnan(rank.fraction), jnp.nan, threshold)


def flush(magnitude: Float[Array, " n"]) -> Float[Array, " n"]:
    """Zero for a denormal where the backend flushes them, as comparisons do but bits do not."""
    return jnp.where(magnitude > 0, magnitude, 0)
