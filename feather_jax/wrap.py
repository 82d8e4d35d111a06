"""Feather around an optimiser: the one line, after which `params` are the sparse weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PyTree, ScalarLike

from feather_jax.masks import is_trainable


class WrapState(NamedTuple):
    """The state of `Feather.wrap`: all that training needs beside the sparse weights.

    `optax.tree.get(opt_state, "dense")` and the like find its parts in any optimiser's state.

    Attributes:
      step: the number of updates completed.
      dense: the dense weights, a pytree like the parameters and sharded like them. They are what
        the inner optimiser trains; the parameters are `sparsify(dense, threshold)`.
      threshold: the one that the parameters were made with: a scalar, or a pytree prefix of them.
      inner: the state of the optimiser that is wrapped.
    """

    step: Int32[Array, ""]
    dense: PyTree
    threshold: PyTree[Float[Array, "..."]]
    inner: optax.OptState


def wrap(
    optimizer: optax.GradientTransformation,
    *,
    scaling: optax.GradientTransformationExtraArgs,
    select: Callable[[PyTree, ScalarLike], PyTree],
    sparsify: Callable[[PyTree, PyTree], PyTree],
    dense_dtype: DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` on dense weights, for parameters that are sparse (see `Feather.wrap`).

    Args:
      optimizer: what trains the dense weights.
      scaling: what gradients go through first, as `scale_pruned_gradients`.
      select: from dense weights and a step to the threshold.
      sparsify: from dense weights and a threshold to the sparse weights.
      dense_dtype: of the dense weights; None for that of the parameters.
    """
    if isinstance(optimizer, optax.MultiSteps):
        raise ValueError(_MULTI_STEPS)
    if dense_dtype is not None and not is_trainable(jax.ShapeDtypeStruct((), dense_dtype)):
        raise ValueError(
            "Dense weights are floating-point in at least 16 bits; dense_dtype is "
            f"{jnp.dtype(dense_dtype).name}."
        )
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> WrapState:
        if isinstance(params, optax.LookaheadParams):
            raise ValueError(
                "Feather.wrap around optax.lookahead would prune its fast and its slow weights "
                "together; wrap its fast optimiser and finalize the slow weights at the end."
            )
        dense = jax.tree.map(lambda leaf: _copy(leaf, dense_dtype), params)
        inner_state = inner.init(dense)
        if _holds_multi_steps(inner_state):
            raise ValueError(_MULTI_STEPS)
        # There is no leaf in the placeholder with which optax.tree.map_params calls this.
        threshold = select(dense, 0) if jax.tree.leaves(dense) else jnp.zeros(())
        return WrapState(jnp.zeros((), jnp.int32), dense, threshold, inner_state)

    def update(
        grads: PyTree, state: WrapState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, WrapState]:
        if params is None:
            raise ValueError(
                "Feather.wrap gives the difference from the parameters to the new sparse weights: "
                "pass them, as in tx.update(grads, state, params)."
            )
        scaled, _ = scaling.update(
            grads, optax.EmptyState(), state.dense, threshold=state.threshold
        )
        updates, inner_state = inner.update(
            _map_present(_cast_like, scaled, state.dense),
            state.inner,
            state.dense,
            **{name: at_sparse(value, state, params) for name, value in extra_args.items()},
        )
        dense = _moved(state.dense, updates)
        step = optax.safe_increment(state.step)
        threshold = select(dense, step)
        sparse = sparsify(dense, threshold)
        differences = _map_present(_difference, updates, sparse, params)
        return differences, WrapState(step, dense, threshold, inner_state)

    def at_sparse(argument: Any, state: WrapState, params: PyTree) -> Any:
        """A function of the parameters, as one of the sparse weights that it is meant for."""
        if not callable(argument):
            return argument

        def function(dense: PyTree, *args: Any, **kwargs: Any) -> Any:
            sparse = sparsify(dense, state.threshold)
            return argument(jax.tree.map(_cast_like, sparse, params), *args, **kwargs)

        return function

    return optax.GradientTransformationExtraArgs(init, update)


_MULTI_STEPS = (
    "Feather.wrap around optax.MultiSteps would count every small batch as an update; put it "
    "around the other way: optax.MultiSteps(prune.wrap(optimizer), every_k_schedule)."
)


def _holds_multi_steps(state: optax.OptState) -> bool:
    def is_state(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    return any(map(is_state, jax.tree.leaves(state, is_leaf=is_state)))


def _copy(leaf: Any, dtype: DTypeLike | None) -> Any:
    """A copy, so that state and parameters can both be donated; of weights in `dtype`, if given."""
    if is_trainable(leaf):
        return jnp.array(leaf, dtype, copy=True)
    return leaf.copy() if isinstance(leaf, jax.Array | np.ndarray) else leaf


def _map_present(function: Callable[..., Any], updates: PyTree, *rest: PyTree) -> PyTree:
    """`function` of every update and what stands beside it; of none, None, where there is none."""
    return jax.tree.map(
        lambda update, *others: None if update is None else function(update, *others),
        updates,
        *rest,
        is_leaf=lambda update: update is None,
    )


def _moved(weights: PyTree, updates: PyTree) -> PyTree:
    """`optax.apply_updates`, which takes no update that is None."""
    return jax.tree.map(
        lambda update, weight: weight if update is None else _cast_like(weight + update, weight),
        updates,
        weights,
        is_leaf=lambda update: update is None,
    )


def _cast_like(array: Array, like: Array) -> Array:
    return array.astype(jnp.result_type(like))


def _difference(update: Array, sparse: Array, weight: Array) -> Array:
    """What `optax.apply_updates` adds to `weight` to reach `sparse`: exactly where that is 0."""
    del update
    sparse = _cast_like(sparse, weight)
    difference = sparse - weight
    # Far below a large weight the sum is rounded to 0, and a weight would be pruned that is not.
    absorbed = (weight + difference == 0) & (sparse != 0)
    return jnp.where(absorbed, weight * (jnp.finfo(sparse.dtype).eps - 1), difference)
