"""Arrays by their names, and whether they are those of a network."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import feather_jax as feather
from train.errors import UserError


def matched(
    found: Mapping[str, Any], like: PyTree, where: str, remedy: str, *, cast: bool = False
) -> PyTree:
    """`found` in the structure of `like`.

    Args:
      found: arrays by name.
      like: arrays or shapes that are wanted.
      where: what holds `found`, the subject of the sentence on a difference.
      remedy: what to do then.
      cast: whether any real floating-point numbers will do for others.

    Raises:
      UserError: a name is missing or unknown, or a shape or dtype is another.
    """
    wanted = feather.named_leaves(like)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            difference = f"has no {name}, which the model needs"
        elif name not in wanted:
            difference = f"has {name}, which the model does not"
        elif not _fits(found[name], wanted[name], cast):
            kinds = (f"{leaf.dtype}{list(leaf.shape)}" for leaf in (found[name], wanted[name]))
            difference = f"has {name} as {', and the model as '.join(kinds)}"
        else:
            continue
        raise UserError(f"{where} {difference}; {remedy}.")
    leaves = [
        leaf if leaf.dtype == wanted[name].dtype else np.asarray(leaf).astype(wanted[name].dtype)
        for name, leaf in ((name, found[name]) for name in wanted)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _fits(found: Any, wanted: Any, cast: bool) -> bool:
    both_floats = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (found, wanted))
    return found.shape == wanted.shape and (found.dtype == wanted.dtype or (cast and both_floats))


def selected(tree: PyTree, mask: PyTree[bool]) -> list[Any]:
    """The leaves that a mask of the same structure selects, in the order of `jax.tree.leaves`."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True)
    return [leaf for leaf, chosen in leaves if chosen]
