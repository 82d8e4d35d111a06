"""Which weights may be pruned: pytrees of bools, as Optax's masks are."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, KeyPath
from jaxtyping import PyTree

Mask: TypeAlias = PyTree[bool] | Callable[[PyTree], PyTree[bool]]
"""A pytree of bools, or a prefix of one, or a function of the parameters that returns either."""


def path_name(path: KeyPath) -> str:
    """The keys of a leaf's path joined by "/", as in `Dense_0/kernel`.

    What lies below the last dict key (the `.value` of an NNX variable or of a Linen partitioning
    box) is left out.
    """
    last = max((i for i, key in enumerate(path) if isinstance(key, DictKey)), default=len(path) - 1)
    return jax.tree_util.keystr(path[: last + 1], simple=True, separator="/")


def is_floating(leaf: Any) -> bool:
    """Whether `leaf` holds real floating-point numbers, bfloat16 and the 8-bit floats included."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def is_trainable(leaf: Any) -> bool:
    """Whether `leaf` is floating-point in at least 16 bits: narrower floats are for storage."""
    return is_floating(leaf) and jnp.result_type(leaf).itemsize >= 2


def prunable_weights(params: PyTree) -> PyTree[bool]:
    """The default mask: the kernels of dense, convolutional and attention layers.

    A leaf is prunable if it is floating-point, has at least two dimensions and the last dict key
    on its path is `kernel`. That is every convolution and linear layer of Flax, the first and the
    last included, and neither a bias (an attention projection's has two dimensions), a
    normalisation's scale nor an embedding. Kernels in floats of 8 bits or fewer, which are stored
    and not trained in them, are left alone.

    Args:
      params: a pytree of arrays: Linen's `params`, an `nnx.State`, nested dicts.

    Returns:
      A pytree of Python bools with the structure of `params`.

    References:
      Feather's released code prunes the weights of every convolution and every linear layer
      (Glentis Georgoulakis et al., BMVC 2023, https://arxiv.org/abs/2310.02448).
    """

    def is_prunable(path: KeyPath, leaf: Any) -> bool:
        keys = [key.key for key in path if isinstance(key, DictKey)]
        return keys[-1:] == ["kernel"] and jnp.ndim(leaf) >= 2 and is_trainable(leaf)

    return jax.tree_util.tree_map_with_path(is_prunable, params)


def resolve_mask(params: PyTree, prunable: Mask | None = None) -> PyTree[bool]:
    """The mask that `prunable` means for `params`, spelled out leaf by leaf.

    Args:
      params: a pytree of arrays. Where Optax has put a `MaskedNode` there is no leaf, and the
        mask has none either.
      prunable: None for `prunable_weights`, a pytree prefix of bools, or a function of `params`
        that returns one.

    Returns:
      A pytree of Python bools with the structure of `params`.

    Raises:
      TypeError: the mask holds something else than bools, or selects a leaf that is not
        floating-point in at least 16 bits.
      ValueError: the mask is not a prefix of `params`.
    """
    if prunable is None:
        return prunable_weights(params)
    mask = prunable(params) if callable(prunable) else prunable

    def spread(path: KeyPath, selected: Any, subtree: PyTree) -> PyTree[bool]:
        if not isinstance(selected, bool | np.bool_):
            raise TypeError(
                f"A mask of prunable weights holds bools, and this one holds {selected!r} at "
                f"{path_name(path)!r}; give True or False for each leaf or for a whole subtree."
            )
        for below, leaf in jax.tree_util.tree_leaves_with_path(subtree) if selected else ():
            if not is_trainable(leaf):
                raise TypeError(
                    f"The mask selects {path_name(path + below)!r} for pruning, whose dtype is "
                    f"{jnp.result_type(leaf)}; only floating-point weights of at least 16 bits "
                    "can be pruned."
                )
        return jax.tree.map(lambda _: bool(selected), subtree)

    try:
        return map_prefix(spread, mask, params)
    except ValueError as error:
        raise ValueError(
            "The mask of prunable weights must have the structure of the parameters or be a "
            "prefix of it, and this one is neither (the error above says where they differ)."
        ) from error


def map_prefix(
    function: Callable[[KeyPath, Any, PyTree], PyTree], prefix: PyTree, params: PyTree
) -> PyTree:
    """`function(path, value, subtree)` for every leaf of a pytree prefix of `params`.

    Where Optax has put a `MaskedNode` for a part of `params` it is passed over, together with
    whatever the prefix, made for the whole of them, holds there.

    Raises:
      ValueError: `prefix` is not a prefix of `params`.
    """

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_masked)
    masked = {path for path, node in nodes if is_masked(node)}
    visible = jax.tree_util.tree_map_with_path(
        lambda path, value: optax.MaskedNode() if path in masked else value,
        prefix,
        is_leaf=lambda path, _: path in masked,
        is_leaf_takes_path=True,
    )
    return jax.tree_util.tree_map_with_path(function, visible, params)


def prunable_leaves(params: PyTree, prunable: Mask | None = None) -> list[Any]:
    """The leaves of `params` that `prunable` selects, in the order of `jax.tree.leaves`."""
    mask = resolve_mask(params, prunable)
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
    return [leaf for leaf, selected in leaves if selected]
