"""N:M patterns: the N largest of every M consecutive weights along the input axis."""

import functools
import operator
import warnings
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree, ScalarLike, UInt

from feather_jax.magnitude import Magnitude, has_one_input_axis, like_weights, measure
from feather_jax.masks import Mask, map_prefix, path_name, pruning_mask
from feather_jax.selection import global_threshold

# What is elementwise XLA's CPU backend finds again for each weight of a group. For up to as many
# that takes less than to write it down once, as it does with a reduction.
_FEW = 4


def n_m_thresholds(
    params: PyTree,
    sparsity: ScalarLike | None = None,
    *,
    n: SupportsIndex,
    m: SupportsIndex,
    axis: PyTree[int] | None = None,
    prunable: Mask | None = None,
    magnitude: Magnitude = jnp.abs,
    axis_name: str | tuple[str, ...] | None = None,
) -> PyTree[Float[Array, "..."]]:
    """Thresholds that keep the `n` largest of every `m` consecutive weights along the input axis.

    The threshold of a group is its (m - n)-th smallest magnitude, so that exactly n of its weights
    are above it wherever there are no ties: 2:4 (`n=2, m=4`) is what sparse tensor cores take. A
    leaf whose input axis is no multiple of m, such as the first convolution's of an image's three
    channels, stays dense, and a warning names it.

    As a selection, bound by `functools.partial(n_m_thresholds, n=2, m=4)`, it goes where
    `global_threshold` goes. Then `sparsity` is the fraction of zeros in the leaves that take the
    pattern: while it grows to 1 - n/m, the smallest weights of all that the pattern would prune are
    pruned, and from there on the pattern is complete.

    Args:
      params: a pytree of arrays.
      sparsity: the fraction of zeros, in [0, 1 - n/m], a number or a JAX array as in
        `global_threshold`; None for the whole pattern.
      n: how many weights of a group stay, from 1 to m - 1.
      m: how many weights a group has.
      axis: the axis that groups lie along, or a pytree prefix of them. By default the last but one,
        which has to be the only one that a kernel's shape allows to be its input: Dense, or a
        convolution over two dimensions or more. Of attention (embed, heads, head_dim) say it.
      prunable: the leaves that take the pattern, a mask; `prunable_weights` by default.
      magnitude: what is compared, |w| by default.
      axis_name: the manual axes of `jax.shard_map` that weights vary over; groups are within what
        a device holds.

    Returns:
      A pytree like `params`: for leaves that take the pattern an array of their shape, of at least
      float32, for others zero. It is as large as the weights, which what keeps thresholds should
      know.

    Raises:
      TypeError: `n`, `m` or an axis is no integer.
      ValueError: n is not below m, the sparsity is a number above 1 - n/m, a kernel may have
        several input axes and none is said, or no leaf takes the pattern.

    Example:
      >>> import jax.numpy as jnp
      >>> from feather_jax import n_m_thresholds
      >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
      >>> n_m_thresholds(params, n=2, m=4)["kernel"].ravel()
      Array([2., 2., 2., 2.], dtype=float32)

    References:
      Mishra et al., Accelerating Sparse Deep Neural Networks, 2021
      (https://arxiv.org/abs/2104.08378).
    """
    n, m = operator.index(n), operator.index(m)
    if not 0 < n < m:
        raise ValueError(f"Of every m weights n stay, 1 <= n < m, and n is {n} and m is {m}.")
    is_number = not isinstance(sparsity, jax.Array | None)
    if is_number and not 0 <= float(np.asarray(sparsity)) <= 1 - n / m + 1e-6:
        raise ValueError(
            f"The sparsity of {n}:{m} is in [0, {1 - n / m:.6g}], the fraction of zeros, and it is "
            f"{sparsity}."
        )
    axes = _group_axes(params, pruning_mask(params, prunable), axis, m)
    leaves, structure = jax.tree.flatten(params)
    taken = [(i, along) for i, along in enumerate(axes) if along is not None]
    magnitudes = [lax.stop_gradient(measure(magnitude, leaves[i])) for i, _ in taken]
    groups = [
        _group_thresholds(jnp.broadcast_to(size, leaves[i].shape), along, n, m)
        for (i, along), size in zip(taken, magnitudes, strict=True)
    ]
    growing = not is_number or float(np.asarray(sparsity)) < 1 - n / m
    if sparsity is not None and growing:
        # What the pattern keeps is above every threshold. A NaN stays one.
        candidates = [
            jnp.where(size > group, jnp.inf, size)
            for size, group in zip(magnitudes, groups, strict=True)
        ]
        upto = global_threshold(candidates, sparsity, prunable=True, axis_name=axis_name)
        groups = [jnp.minimum(group, upto.astype(group.dtype)) for group in groups]
    thresholds = [jnp.zeros((), jnp.float32) for _ in leaves]
    for (i, _), group in zip(taken, groups, strict=True):
        thresholds[i] = group
    return jax.tree.unflatten(structure, thresholds)


def _group_axes(
    params: PyTree, mask: PyTree[bool], axis: PyTree[int] | None, m: int
) -> list[int | None]:
    """For each leaf the axis that its groups lie along, or None where it stays as it is."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    said: list[int | None] = [None] * len(leaves)
    if axis is not None:
        try:
            spread = map_prefix(lambda _, i, tree: jax.tree.map(lambda _: i, tree), axis, params)
        except ValueError as error:
            raise ValueError(
                "axis must be an integer or a pytree prefix of the parameters, and it is neither "
                "(the error above says where they differ)."
            ) from error
        said = [operator.index(i) for i in jax.tree.leaves(spread)]

    dense, axes = [], []
    for (path, leaf), selected, along in zip(leaves, jax.tree.leaves(mask), said, strict=True):
        if selected:
            along = _input_axis(path_name(path), jnp.shape(leaf), along)
            if jnp.shape(leaf)[along] % m:
                dense.append(f"{path_name(path)} ({jnp.shape(leaf)[along]} along axis {along})")
                selected = False
        axes.append(along if selected else None)
    if dense and all(along is None for along in axes):
        raise ValueError(f"No leaf takes groups of {m}: {', '.join(dense)}.")
    if dense:
        warnings.warn(f"Stay dense, as {m} does not divide them: {', '.join(dense)}.", stacklevel=3)
    return axes


def _input_axis(name: str, shape: tuple[int, ...], said: int | None) -> int:
    if said is None and not has_one_input_axis(shape):
        raise ValueError(
            f"The inputs of {name!r}, of shape {shape}, may lie along other axes than the last but "
            "one (an attention's are embed, heads, head_dim): say `axis`, an integer or a pytree "
            "prefix of them, or leave it out with `prunable`."
        )
    along = -2 if said is None else said
    if not -len(shape) <= along < len(shape):
        raise ValueError(f"{name!r} has the shape {shape}, in which there is no axis {along}.")
    return along


def _group_thresholds(
    magnitudes: Float[Array, "*shape"], axis: int, n: int, m: int
) -> Float[Array, "*shape"]:
    """The (m - n)-th smallest of each group, for every weight of the group."""
    axis %= magnitudes.ndim
    bits = jnp.uint64 if magnitudes.dtype == jnp.float64 else jnp.uint32

    def of_groups(w: Array) -> Array:
        shape = w.shape
        groups = w.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])
        # As integers, which have the order of non-negative floats and are compared three times as
        # fast, since no NaN is looked for: it is above infinity.
        groups = lax.bitcast_convert_type(groups, bits)
        found = lax.bitcast_convert_type(_order_statistic(groups, axis + 1, m - n - 1), w.dtype)
        return jnp.broadcast_to(jnp.expand_dims(found, axis + 1), groups.shape).reshape(shape)

    return like_weights(of_groups, magnitudes)


def _order_statistic(values: UInt[Array, "*shape"], axis: int, rank: int) -> UInt[Array, "..."]:
    """The value at `rank` in sorted order along an axis, without sorting more than it takes."""
    size, count = values.shape[axis], rank + 1
    least, most, none = lax.min, lax.max, np.iinfo(values.dtype).max
    if rank >= size / 2:  # fewer from the other end
        least, most, none, count = most, least, 0, size - rank

    def merge(a: list[Array], b: list[Array]) -> list[Array]:
        """Up to `count` of the values of two sorted lists, in sorted order.

        The k-th is the least, over all i, of the larger of the i-th of one list and the (k - i)-th
        of the other.
        """

        def at(k: int) -> Array:
            alone = [half[k - 1] for half in (a, b) if k <= len(half)]
            taken = range(max(1, k - len(b)), min(k - 1, len(a)) + 1)
            return functools.reduce(least, [*alone, *(most(a[i - 1], b[k - i - 1]) for i in taken)])

        return [at(k) for k in range(1, min(count, len(a) + len(b)) + 1)]

    if size <= _FEW:
        members = [lax.index_in_dim(values, i, axis, keepdims=False) for i in range(size)]
        return functools.reduce(merge, [[member] for member in members])[-1]
    nothing = np.array(none, values.dtype)
    lists = [values, *[jnp.full_like(values, nothing)] * (count - 1)]
    return lax.reduce(lists, [nothing] * count, merge, (axis,))[-1]
