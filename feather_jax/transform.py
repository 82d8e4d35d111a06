"""Gradient transformations for weights that are pruned."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from feather_jax.magnitude import Magnitude
from feather_jax.masks import Mask, pruning_mask
from feather_jax.operator import scale_pruned, spread_threshold
from feather_jax.schedule import check_theta


def scale_pruned_gradients(
    theta: float | Float[Array, ""],
    *,
    prunable: Mask | None = None,
    magnitude: Magnitude | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies by theta the updates of the prunable weights that are pruned, |w| <= threshold.

    It belongs first in an `optax.chain`, before clipping, weight decay and momentum. `update`
    takes the threshold of this step as an extra argument, beside other transformations' own:

      updates, state = tx.update(grads, state, params, threshold=threshold)

    With a threshold of 0 nothing is scaled. It holds no state, so it can be put into a chain or
    taken out. Updates that are None or that Optax has replaced by `MaskedNode` are passed over, so
    it works inside `optax.masked` and `optax.partition`.

    Args:
      theta: the scale, finite and at least 0; an array inside `optax.inject_hyperparams`.
      prunable: which weights may be pruned; `prunable_weights` by default.
      magnitude: what is compared with the threshold; None for |w|. Optax's `inject_hyperparams`
        takes functions for schedules: name it in its `static_args`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. The updates keep their dtypes; `update` raises
      ValueError where `params` or `threshold` is missing, or nothing is prunable. `threshold` is a
      scalar or a pytree prefix of params, as for `sparsify`.

    Raises:
      ValueError: theta is negative or not finite.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from feather_jax import scale_pruned_gradients
      >>> params = {"kernel": jnp.array([[0.1, 2.0]])}
      >>> tx = optax.chain(scale_pruned_gradients(0.5), optax.sgd(1.0))
      >>> grads = {"kernel": jnp.ones((1, 2))}
      >>> tx.update(grads, tx.init(params), params, threshold=1.0)[0]
      {'kernel': Array([[-0.5, -1. ]], dtype=float32)}

    References:
      Gradient scaling in Feather (Glentis Georgoulakis et al., BMVC 2023,
      https://arxiv.org/abs/2310.02448); theta as in `default_theta`.
    """
    scale = theta if isinstance(theta, jax.core.Tracer) else check_theta(theta)

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        threshold: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra_args  # other transformations' own
        if params is None:
            raise ValueError(
                "scale_pruned_gradients compares the weights with the threshold: pass the "
                "parameters, as in tx.update(grads, state, params, threshold=threshold)."
            )
        if threshold is None:
            raise ValueError(
                "scale_pruned_gradients needs the threshold of this step: pass it, as in "
                "tx.update(grads, state, params, threshold=threshold). (Flax's "
                "TrainState.apply_gradients does not forward it; call tx.update yourself.)"
            )

        def scaled(update: Any, weight: Array, threshold: Array, selected: bool) -> Any:
            if _passed_over(update) or not selected:
                return update
            return scale_pruned(scale, update, weight, threshold, magnitude or jnp.abs)

        new_updates = jax.tree.map(
            scaled,
            updates,
            params,
            spread_threshold(threshold, params),
            pruning_mask(params, prunable),
            is_leaf=_passed_over,
        )
        return new_updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def keep_zeros(*, prunable: Mask | None = None) -> optax.GradientTransformation:
    """Leaves every zero of the prunable weights a zero, for fine-tuning a sparse model.

    The updates of prunable weights that are zero become zero, whatever they are. Last in an
    `optax.chain` nothing can move a zero, neither momentum nor weight decay:

      tx = optax.chain(optax.adamw(1e-4), keep_zeros())

    First in it as well, the gradients of zeros count in no clipping by norm. Leaves that are not
    prunable learn as ever, biases that are zero included. A weight that training takes to exactly
    zero is a zero from then on.

    Args:
      prunable: which weights are sparse; `prunable_weights` by default.

    Returns:
      A transformation without state, whose `update` raises ValueError where `params` is missing or
      nothing is prunable. Updates that are None or `MaskedNode` are passed over.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from feather_jax import keep_zeros
      >>> params = {"kernel": jnp.array([[0.0, 2.0]])}
      >>> tx = optax.chain(optax.sgd(1.0), keep_zeros())
      >>> tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)[0]
      {'kernel': Array([[ 0., -1.]], dtype=float32)}
    """

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        if params is None:
            raise ValueError(
                "keep_zeros looks for the zeros among the weights: pass the parameters, as in "
                "tx.update(grads, state, params)."
            )

        def kept(update: Any, weight: Array, selected: bool) -> Any:
            if _passed_over(update) or not selected:
                return update
            return jnp.where(weight == 0, jnp.zeros_like(update), update)

        mask = pruning_mask(params, prunable)
        return jax.tree.map(kept, updates, params, mask, is_leaf=_passed_over), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _passed_over(update: Any) -> bool:
    return update is None or isinstance(update, optax.MaskedNode)
