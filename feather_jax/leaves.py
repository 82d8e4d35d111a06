"""The leaves of a pytree by their names."""

from typing import Any

import jax
from jaxtyping import PyTree

from feather_jax.masks import path_name


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a pytree by their names, in the order of `jax.tree.leaves`.

    A name is what `summarize`, `count_macs` and `path_mask` go by: the keys, indices and attributes
    on the way to the leaf, joined by "/".

    Args:
      tree: any pytree.

    Returns:
      A dict from names to leaves. The leaf of a bare array has the name "".

    Raises:
      ValueError: two leaves have one name, as those of `{"a/b": 1, "a": {"b": 2}}`.

    Example:
      >>> from feather_jax import named_leaves
      >>> named_leaves({"Dense_0": {"kernel": 1, "bias": 2}})
      {'Dense_0/bias': 2, 'Dense_0/kernel': 1}
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        if name in named:
            raise ValueError(f"Two leaves are named {name!r}; give the keys of one other names.")
        named[name] = leaf
    return named
