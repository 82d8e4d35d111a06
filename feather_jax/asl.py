"""Adaptive sparsity loss (ASL): a threshold a layer that is learned, within a budget."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf, erfinv
from jaxtyping import Array, Float, PyTree

from feather_jax.magnitude import comparison_dtype
from feather_jax.masks import Mask, pruning_mask
from feather_jax.operator import check_exponent, spread_threshold, threshold_operator
from feather_jax.schedule import check_sparsity


def asl_init(
    params: PyTree, sparsity: float, *, prunable: Mask | None = None
) -> PyTree[Float[Array, ""]]:
    """What the thresholds start from: r = sqrt(2) erfinv(0.6 S) for each layer.

    r is trained next to the weights, at a hundredth of their learning rate and without weight
    decay. A training step is

      def loss_fn(weights):
          params, r = weights
          task = cross_entropy(model(asl_sparsify(params, r), images), labels)
          return task + asl_loss(params, r, sparsity)

    and the finished network is `asl_sparsify(params, r)`. The sparsity that it has is near S, since
    the weights of a layer are only nearly normal. `Feather` has no part in it: sparsity does not
    grow by a schedule, and its `wrap` keeps no r.

    Args:
      params: a pytree of arrays.
      sparsity: S, the fraction of zeros among all prunable weights, in [0, 1).
      prunable: the leaves that are pruned, a mask; `prunable_weights` by default.

    Returns:
      A pytree like `params` of float32 scalars (float64 for float64 weights): r for each prunable
      leaf, and 0, which stays 0, for the others.

    Raises:
      ValueError: the sparsity is outside [0, 1), or nothing is prunable.

    References:
      Retsinas et al., Weight Pruning via Adaptive Sparsity Loss, 2020
      (https://arxiv.org/abs/2006.02768), and its released code; Feather's second backbone.
    """
    start = np.sqrt(2) * erfinv(0.6 * check_sparsity(sparsity))
    return jax.tree.map(
        lambda leaf, selected: jnp.asarray(start if selected else 0, comparison_dtype(leaf)),
        params,
        pruning_mask(params, prunable),
    )


def asl_thresholds(
    params: PyTree, r: PyTree[Float[Array, ""]], *, prunable: Mask | None = None
) -> PyTree[Float[Array, ""]]:
    """The threshold of each layer, T = clip(r, 0, 5) times the standard deviation of its weights.

    The derivative is that of r alone: the deviation is taken for a constant.

    Args:
      params: a pytree of arrays.
      r: a pytree of scalars like `params`, or a prefix of it.
      prunable: the leaves that are pruned, a mask; `prunable_weights` by default.

    Returns:
      A pytree like `params` of scalars of at least float32, 0 for what is not prunable: thresholds
      for `sparsify` and `scale_pruned_gradients`.

    Raises:
      ValueError: `r` is no prefix of `params`, or nothing is prunable.
    """

    def threshold(leaf: Array, r: Array, selected: bool) -> Array:
        dtype = comparison_dtype(leaf)
        if not selected:
            return jnp.zeros((), dtype)
        deviation = jnp.std(jax.lax.stop_gradient(jnp.asarray(leaf, dtype)))
        return jnp.clip(jnp.asarray(r, dtype), 0, 5) * deviation

    mask = pruning_mask(params, prunable)
    return jax.tree.map(threshold, params, spread_threshold(r, params), mask)


def asl_loss(
    params: PyTree,
    r: PyTree[Float[Array, ""]],
    sparsity: Float[Array, ""] | float,
    *,
    weight: float = 10.0,
    prunable: Mask | None = None,
) -> Float[Array, ""]:
    """The budget's part of the loss, weight (density - (1 - S))^2.

    The density is the one that normal weights would have, the mean of 1 - erf(r / sqrt(2)) over all
    prunable weights.

    Args:
      params: a pytree of arrays, of which the sizes alone matter.
      r: a pytree of scalars like `params`, or a prefix of it.
      sparsity: S, the fraction of zeros among all prunable weights, in [0, 1).
      weight: the factor, lambda in the paper.
      prunable: the leaves that are pruned, a mask; `prunable_weights` by default.

    Returns:
      A scalar to add to the loss of the task, differentiable in r.

    Raises:
      ValueError: the sparsity is a number outside [0, 1), `r` is no prefix of `params`, or nothing
        is prunable.
    """
    if not isinstance(sparsity, jax.Array):
        sparsity = check_sparsity(sparsity)
    mask = jax.tree.leaves(pruning_mask(params, prunable))
    each_r = jax.tree.leaves(spread_threshold(r, params))
    sizes = [jnp.size(leaf) for leaf in jax.tree.leaves(params)]
    layers = [(n, r) for n, r, selected in zip(sizes, each_r, mask, strict=True) if selected]
    kept = jnp.stack([n * (1 - erf(r / np.sqrt(2))) for n, r in layers])
    return weight * (kept.sum() / sum(n for n, _ in layers) - (1 - sparsity)) ** 2


def asl_sparsify(
    params: PyTree,
    r: PyTree[Float[Array, ""]],
    *,
    p: float = 3.0,
    prunable: Mask | None = None,
) -> PyTree:
    """The parameters with the prunable ones thresholded, differentiable in r.

    A layer's weights become T STE(w / T): `threshold_operator` with its straight-through
    derivative for the weights, and for the threshold sum_i g_i (P(w_i) - w_i) / T, where g is the
    cotangent of the result (0 where T is).

    Args:
      params: a pytree of arrays.
      r: a pytree of scalars like `params`, or a prefix of it.
      p: the exponent of `threshold_operator`, static.
      prunable: the leaves that are pruned, a mask; `prunable_weights` by default.

    Returns:
      A pytree like `params`; leaves that are not prunable are the same objects.

    Raises:
      TypeError, ValueError: as `threshold_operator`; `r` is no prefix of `params`, or nothing is
        prunable.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from feather_jax import asl_sparsify
      >>> params = {"kernel": jnp.array([[-2.0, 0.0, 1.0, 1.0]])}
      >>> asl_sparsify(params, 1.0, p=jnp.inf)["kernel"]
      Array([[-2.,  0.,  0.,  0.]], dtype=float32)
    """

    def thresholded(leaf: Array, threshold: Array, selected: bool) -> Array:
        return _operator(check_exponent(p), leaf, threshold) if selected else leaf

    thresholds = asl_thresholds(params, r, prunable=prunable)
    return jax.tree.map(thresholded, params, thresholds, pruning_mask(params, prunable))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _operator(
    p: float, w: Float[Array, "*shape"], threshold: Float[Array, ""]
) -> Float[Array, "*shape"]:
    return threshold_operator(w, threshold, p)


def _forward(p: float, w: Array, threshold: Array):
    sparse = threshold_operator(w, threshold, p)
    return sparse, (w, sparse, threshold)


def _backward(p: float, residuals: tuple[Array, Array, Array], cotangent: Array):
    w, sparse, threshold = residuals
    shrunk, given = (jnp.asarray(x, threshold.dtype) for x in (sparse - w, cotangent))
    # At T = 0 nothing is shrunk.
    return cotangent, jnp.vdot(given, shrunk) / jnp.where(threshold > 0, threshold, 1)


_operator.defvjp(_forward, _backward)
