"""From a sparsity to thresholds: one for all weights, or one for each layer."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, ScalarLike

from feather_jax.magnitude import Magnitude, comparison_dtype, measure
from feather_jax.masks import Mask, no_prunable_weight, prunable_leaves
from feather_jax.rank import Rank, ranks
from feather_jax.search import order_statistics
from feather_jax.survey import Leaf, put_together

AxisName: TypeAlias = str | tuple[str, ...]
"""One or several manual axes of `jax.shard_map`."""


def global_threshold(
    params: PyTree,
    sparsity: ScalarLike,
    *,
    prunable: Mask | None = None,
    magnitude: Magnitude = jnp.abs,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """The magnitude below which the fraction `sparsity` of all prunable weights lies.

    With N prunable weights and their magnitudes sorted into a, the rank is m = sparsity (N - 1),
    f = m - floor(m), lo = a[floor(m)], hi = a[min(floor(m) + 1, N - 1)], and the threshold is
    lo + (hi - lo) f, kept below hi where lo < hi. So exactly floor(m) + 1 weights have
    |w| <= threshold when there are no ties, whatever N and the sparsity. The result is
    bit-identical to sorting, but nothing is sorted except a small sample, and no large leaf copied.

    Weights may be sharded along any axes, on meshes of any kind. What devices tell each other is
    the sample and the counts, some 0.1 MB.

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

    Returns:
      A scalar, float32, or float64 if a prunable leaf is. Zero where `sparsity` or lo is zero,
      infinite where lo is, NaN if a prunable weight or the sparsity is. Denormals count as zeros
      where the backend flushes them. The derivative is zero.

    Raises:
      ValueError: no weight is prunable, 2**32 or more are, a `sparsity` given as a number is
        outside [0, 1), or a weight varies over a manual axis that `axis_name` does not name.

    References:
      The global backbone of Feather, Glentis Georgoulakis et al., BMVC 2023
      (https://arxiv.org/abs/2310.02448), whose released code sorts all weights.
    """
    weights = collect(params, prunable, magnitude, axis_name)
    rank = ranks([sparsity], [check_count(sum(weights.sizes))], weights.dtype)
    return _quantiles(weights.arrays, rank, weights.static)[0]


class Static(NamedTuple):
    """What a selection depends on besides its arrays."""

    axes: tuple[tuple[str, ...], ...]  # of each leaf, the manual axes that it varies over
    magnitude: Magnitude
    dtype: DTypeLike


class Weights(NamedTuple):
    """The prunable weights of the parameters."""

    arrays: list[Array]
    sizes: list[int]  # of each leaf, the weights of all devices
    static: Static

    @property
    def dtype(self) -> DTypeLike:
        """That of the thresholds."""
        return self.static.dtype


def collect(
    params: PyTree, prunable: Mask | None, magnitude: Magnitude, axis_name: AxisName | None
) -> Weights:
    """The prunable leaves that hold weights.

    Raises:
      ValueError: as `global_threshold`.
    """
    arrays = [lax.stop_gradient(jnp.asarray(leaf)) for leaf in prunable_leaves(params, prunable)]
    arrays = [array for array in arrays if array.size]
    if not arrays:
        raise no_prunable_weight(params)
    axes = _varying_axes(arrays, axis_name)
    sizes = [array.size * lax.axis_size(each) for array, each in zip(arrays, axes, strict=True)]
    return Weights(arrays, sizes, Static(axes, magnitude, comparison_dtype(*arrays)))


def check_count(size: int) -> int:
    """`size`, or a ValueError if that many weights cannot be counted."""
    if size >= 2**32:
        raise ValueError(
            f"One threshold can be selected from at most 2**32 - 1 weights, and {size} are "
            "prunable; exclude some with `prunable`."
        )
    return size


def _varying_axes(arrays: list[Array], axis_name: AxisName | None) -> tuple[tuple[str, ...], ...]:
    """Of each array, those of the named axes over which the devices have different parts of it."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    # A device's index varies, wherever JAX keeps track of what does.
    tracked = bool(names) and bool(_varying(lax.axis_index(names)))
    for array in arrays:
        unnamed = sorted(_varying(array) - set(names))
        if unnamed:
            raise ValueError(
                f"A prunable weight of shape {array.shape} varies over the manual axes {unnamed} "
                f"of shard_map: each device has a part of its own, and would select a threshold "
                f"of its own. Pass axis_name={unnamed} to select one from all of them."
            )
    if not tracked:
        return (names,) * len(arrays)
    return tuple(tuple(name for name in names if name in _varying(array)) for array in arrays)


def _varying(array: Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying


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


def measured(arrays: list[Array], static: Static) -> list[Leaf]:
    """The magnitudes of arrays. |w| is left to each pass over them, which then copies nothing."""
    if static.magnitude is jnp.abs:
        return [Leaf(w, (0,), 1, axes) for w, axes in zip(arrays, static.axes, strict=True)]
    leaves = []
    for w, axes in zip(arrays, static.axes, strict=True):
        values = measure(static.magnitude, w)
        leaves.append(Leaf(values, (0,), w.size // values.size, axes))
    return leaves


def interpolate(found, rank: Rank) -> Float[Array, " n"]:
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


def on_any_mesh(select: Callable[..., Array], arrays: list[Array], *args: PyTree) -> Array:
    """`select(arrays, *args)`, also of arrays whose shardings are part of their types."""
    for array in arrays:
        mesh = jax.typeof(array).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            everywhere = NamedSharding(mesh, PartitionSpec())
            return jax.sharding.auto_axes(select, out_sharding=everywhere)(arrays, *args)
    return select(arrays, *args)
