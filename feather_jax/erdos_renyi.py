"""How sparse each layer is made where layers differ: Erdos-Renyi-Kernel."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from feather_jax.masks import Mask, pruning_mask
from feather_jax.schedule import check_sparsity


def erdos_renyi_kernel(
    params: PyTree, sparsity: float, *, prunable: Mask | None = None
) -> PyTree[float]:
    """A sparsity for each layer, so that small layers stay denser than large ones.

    The density of a layer is eps (sum of its kernel's dimensions) / (product of them), at most 1,
    with the one eps for which the fraction `sparsity` of all prunable weights is zero.

    Args:
      params: a pytree of arrays, or of their shapes (`jax.eval_shape`).
      sparsity: the fraction of zeros among all prunable weights, in [0, 1).
      prunable: the leaves that are pruned, a mask; `prunable_weights` by default.

    Returns:
      A pytree like `params` of Python floats in [0, 1), for `layer_thresholds`: 0.0 for a layer
      that stays dense, and for what is not prunable.

    Raises:
      ValueError: the sparsity is outside [0, 1), or nothing is prunable.

    Example:
      >>> import numpy as np
      >>> from feather_jax import erdos_renyi_kernel
      >>> layers = {"small": {"kernel": np.ones((4, 4))}, "large": {"kernel": np.ones((40, 40))}}
      >>> erdos_renyi_kernel(layers, 0.75)
      {'large': {'kernel': 0.757...}, 'small': {'kernel': 0.0}}

    References:
      Evci et al., Rigging the Lottery, ICML 2020 (https://arxiv.org/abs/1911.11134), section 3.
    """
    final = check_sparsity(sparsity)
    mask = jax.tree.leaves(pruning_mask(params, prunable))
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    layers = [i for i, (s, selected) in enumerate(zip(shapes, mask, strict=True)) if selected]
    # Layers in the order in which they would be dense: the product over the sum is 1 / density.
    layers.sort(key=lambda i: _inverse_density(shapes[i]))
    kept = (1 - final) * sum(math.prod(shapes[i]) for i in layers)
    sparsities = [0.0] * len(shapes)
    while layers:
        eps = kept / sum(sum(shapes[i]) for i in layers)
        densest, *others = layers
        if eps < _inverse_density(shapes[densest]):
            for i in layers:
                sparsities[i] = 1 - eps / _inverse_density(shapes[i])
            break
        kept -= math.prod(shapes[densest])
        layers = others
    return jax.tree.unflatten(jax.tree.structure(params), sparsities)


def _inverse_density(shape: tuple[int, ...]) -> float:
    """What eps must be below for a layer not to be dense; 0 for one without weights."""
    return math.prod(shape) / max(sum(shape), 1)
