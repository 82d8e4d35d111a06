"""Thresholds that are learned (`config.backbone = {"name": "asl"}`), in the place of Feather's.

Each prunable layer has a trainable r, which `train.experiment` puts among the parameters, in
`params["asl"]`: it is trained, saved and restored as they are. What the network is applied to, and
what a finished run leaves, is without it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, ScalarLike

import feather_jax as feather

R = "asl"
"""The key of the r among the parameters."""


@dataclasses.dataclass(frozen=True)
class Asl:
    """What `feather_jax.Feather` is for thresholds that are selected, for those that are learned.

    Attributes:
      sparsity: the fraction of zeros that the budget's loss aims at.
      p: the exponent of the thresholding operator.
      theta: the scale of pruned weights' gradients.
      prunable: which of the network's parameters are pruned.
      weight: what the budget's loss is multiplied by (see `feather_jax.asl_loss`).

    References:
      Retsinas et al., Weight Pruning via Adaptive Sparsity Loss, 2020
      (https://arxiv.org/abs/2006.02768).
    """

    sparsity: float
    p: float
    theta: float
    prunable: PyTree[bool]
    weight: float = 10.0

    def with_r(self, params: PyTree) -> PyTree:
        """The network's parameters and, under `R`, what the r start from."""
        return {**params, R: feather.asl_init(params, self.sparsity, prunable=self.prunable)}

    def sparsity_at(self, step: ScalarLike) -> Float[Array, ""]:
        """The sparsity aimed at, which is the final one from the first update on."""
        return jnp.full(jnp.shape(step), self.sparsity)

    def threshold(self, params: PyTree, step: ScalarLike) -> PyTree[Float[Array, ""]]:
        """The threshold of each of the network's parameters; the step is of no matter."""
        weights, r = _apart(params)
        return feather.asl_thresholds(weights, r, prunable=self.prunable)

    def sparsify(self, params: PyTree, threshold: PyTree) -> PyTree:
        """The network's parameters with the prunable ones thresholded."""
        weights, _ = _apart(params)
        return feather.sparsify(weights, threshold, p=self.p, prunable=self.prunable)

    def finalize(self, params: PyTree) -> PyTree:
        """The network's sparse parameters at the end of training."""
        return self.sparsify(params, self.threshold(params, 0))

    def scale_gradients(self) -> optax.GradientTransformationExtraArgs:
        """The first part of the optimiser's chain.

        From gradients with respect to the sparse weights it makes updates for the weights, scaled
        where they are pruned, and for r: those of the task's loss and of the budget's.
        """
        scaling = feather.scale_pruned_gradients(self.theta, prunable=self.prunable)

        def update(
            gradient: PyTree,
            state: optax.EmptyState,
            params: PyTree,
            *,
            threshold: PyTree,
            **extra_args: Any,
        ) -> tuple[PyTree, optax.EmptyState]:
            weights, r = _apart(params)

            def sparse_weights(r: PyTree) -> PyTree:
                return feather.asl_sparsify(weights, r, p=self.p, prunable=self.prunable)

            def budget(r: PyTree) -> Float[Array, ""]:
                return feather.asl_loss(
                    weights, r, self.sparsity, weight=self.weight, prunable=self.prunable
                )

            (by_task,) = jax.vjp(sparse_weights, r)[1](gradient)
            by_r = jax.tree.map(jnp.add, by_task, jax.grad(budget)(r))
            scaled, _ = scaling.update(
                gradient, optax.EmptyState(), weights, threshold=threshold, **extra_args
            )
            return {**scaled, R: by_r}, state

        return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def network_alone(params: PyTree) -> PyTree[bool]:
    """A mask of the parameters that are not r: a prefix of them."""
    return {name: name != R for name in params}


def r_alone(params: PyTree) -> PyTree[bool]:
    """A mask of the r: a prefix of the parameters."""
    return {name: name == R for name in params}


def network_params(params: PyTree) -> PyTree:
    """The parameters without the r, if there are any."""
    return {name: tree for name, tree in params.items() if name != R} if R in params else params


def _apart(params: PyTree) -> tuple[PyTree, PyTree]:
    """The network's parameters, and the r."""
    return network_params(params), params[R]
