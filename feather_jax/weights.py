"""The prunable weights, wherever they are: what every selection starts from."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from feather_jax.magnitude import Magnitude, comparison_dtype, measure_once
from feather_jax.masks import Mask, map_prefix, no_prunable_weight, resolve_mask
from feather_jax.survey import Leaf

AxisName: TypeAlias = str | tuple[str, ...]
"""One or several manual axes of `jax.shard_map`."""


class Static(NamedTuple):
    """What a selection depends on besides its arrays."""

    axes: tuple[tuple[str, ...], ...]  # of each leaf, the manual axes that it varies over
    magnitude: Magnitude
    dtype: DTypeLike


class Weights(NamedTuple):
    """The prunable weights of the parameters."""

    params: PyTree
    places: list[int]  # among the leaves of `params`
    arrays: list[Array]
    sizes: list[int]  # of each leaf, the weights of all devices
    static: Static

    @property
    def dtype(self) -> DTypeLike:
        """That of the thresholds."""
        return self.static.dtype

    def values_of(self, prefix: PyTree, what: str) -> list[Any]:
        """For each of the weights' leaves what a pytree prefix of the parameters holds for it."""
        try:
            spread = map_prefix(
                lambda _, value, subtree: jax.tree.map(lambda _: value, subtree),
                prefix,
                self.params,
            )
        except ValueError as error:
            raise ValueError(
                f"The {what} must be one for all layers or a pytree prefix of the parameters, and "
                "it is neither (the error above says where they differ)."
            ) from error
        leaves = jax.tree.leaves(spread)
        return [leaves[place] for place in self.places]

    def as_tree(self, thresholds: Float[Array, " n"]) -> PyTree[Float[Array, ""]]:
        """A pytree like the parameters of the leaves' thresholds, 0 for what is not prunable."""
        leaves, structure = jax.tree.flatten(self.params)
        values = [jnp.zeros((), self.dtype)] * len(leaves)
        for place, threshold in zip(self.places, _scalars(thresholds), strict=True):
            values[place] = threshold
        return jax.tree.unflatten(structure, values)


def _scalars(vector: Float[Array, " n"]) -> list[Float[Array, ""]]:
    """The elements of a vector, by one reduction: XLA compiles a kernel for each of n slices."""
    n = len(vector)
    alone = [jnp.where(np.arange(n) == i, vector, 0) for i in range(n)]
    zeros = [np.zeros((), vector.dtype)] * n
    return lax.reduce(alone, zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (0,))


def collect(
    params: PyTree, prunable: Mask | None, magnitude: Magnitude, axis_name: AxisName | None
) -> Weights:
    """The prunable leaves that hold weights.

    Raises:
      ValueError: as `global_threshold`.
    """
    leaves, mask = jax.tree.leaves(params), jax.tree.leaves(resolve_mask(params, prunable))
    chosen = enumerate(zip(leaves, mask, strict=True))
    places = [i for i, (leaf, selected) in chosen if selected and jnp.size(leaf)]
    if not places:
        raise no_prunable_weight(params)
    arrays = [lax.stop_gradient(jnp.asarray(leaves[place])) for place in places]
    axes = _varying_axes(arrays, axis_name)
    sizes = [array.size * lax.axis_size(each) for array, each in zip(arrays, axes, strict=True)]
    static = Static(axes, magnitude, comparison_dtype(*arrays))
    return Weights(params, places, arrays, sizes, static)


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


def measured(arrays: list[Array], static: Static) -> list[Leaf]:
    """The magnitudes of arrays. |w| is left to each pass over them, which then copies nothing."""
    if static.magnitude is jnp.abs:
        return [Leaf(w, (0,), 1, axes) for w, axes in zip(arrays, static.axes, strict=True)]
    leaves = []
    for w, axes in zip(arrays, static.axes, strict=True):
        values = measure_once(static.magnitude, w)
        leaves.append(Leaf(values, (0,), w.size // values.size, axes))
    return leaves


def on_any_mesh(select: Callable[..., Array], arrays: list[Array], *args: PyTree) -> Array:
    """`select(arrays, *args)`, also of arrays whose shardings are part of their types."""
    for array in arrays:
        mesh = jax.typeof(array).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            everywhere = NamedSharding(mesh, PartitionSpec())
            return jax.sharding.auto_axes(select, out_sharding=everywhere)(arrays, *args)
    return select(arrays, *args)
