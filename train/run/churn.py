"""Mask churn: how many weights went from kept to pruned or back since the last evaluation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree, UInt8, UInt32

from train.experiment import Experiment
from train.store.leaves import selected

Kept = list[UInt8[Array, " bytes"]]
"""Which weights are kept, one bit each, an array a prunable leaf: an eighth of a byte a weight."""


def all_kept(weights: Sequence[Array]) -> Kept:
    """The bits before training, when nothing is pruned."""
    return [jnp.packbits(jnp.ones(leaf.size, bool)) for leaf in weights]


def mask_churn(before: Kept, weights: Sequence[Float[Array, "..."]]) -> tuple[float, Kept]:
    """The fraction of weights whose state has changed, and the states now.

    Args:
      before: the states then.
      weights: the prunable leaves now, pruned weights being zeros.
    """
    placed = [jax.device_put(old, leaf.sharding) for old, leaf in zip(before, weights, strict=True)]
    changed, now = _compare(placed, list(weights))
    return int(changed) / sum(leaf.size for leaf in weights), now


@jax.jit
def _compare(before: Kept, weights: list[Array]) -> tuple[UInt32[Array, ""], Kept]:
    now = [jnp.packbits(leaf.reshape(-1) != 0) for leaf in weights]
    changed = jnp.zeros((), jnp.uint32)
    for old, new in zip(before, now, strict=True):
        changed += jnp.sum(lax.population_count(old ^ new), dtype=jnp.uint32)
    return changed, now


def pruned_leaves(experiment: Experiment, params: PyTree) -> list[Array]:
    """The parameters that are pruned; [] for the dense twin."""
    if not experiment.config.sparsity:
        return []
    return selected(params, experiment.prunable)
