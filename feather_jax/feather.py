"""Feather with one set of hyperparameters: what a training script holds on to."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree, ScalarLike

from feather_jax.masks import Mask
from feather_jax.operator import check_exponent, sparsify
from feather_jax.schedule import as_step, check_step, check_theta, cubic_schedule, default_theta
from feather_jax.selection import global_threshold
from feather_jax.transform import scale_pruned_gradients


@dataclasses.dataclass(frozen=True)
class Feather:
    """Sparse training with one threshold for all prunable weights (Feather-Global).

    Example: four lines in a training script, `Feather(...)`, `scale_gradients()`, `threshold` and
    `sparsify`.

      prune = feather.Feather(sparsity=0.95, end_step=total_steps // 2)
      tx = optax.chain(prune.scale_gradients(), optax.sgd(schedule, momentum=0.9))

      def train_step(params, opt_state, batch, step):
          threshold = prune.threshold(params, step)
          loss, grads = jax.value_and_grad(
              lambda w: loss_fn(prune.sparsify(w, threshold), batch))(params)
          updates, opt_state = tx.update(grads, opt_state, params, threshold=threshold)
          return optax.apply_updates(params, updates), opt_state, loss

    Attributes:
      sparsity: the final fraction of zeros among the prunable weights, in [0, 1).
      end_step: the update from which on the sparsity is the final one. The paper's is half of all.
      begin_step: the update, counted from 0, at which sparsity begins to grow.
      p: the exponent of `threshold_operator`, in [1, inf].
      theta: the scale of pruned weights' gradients; None for `default_theta(sparsity)`.
      prunable: which weights may be pruned; None for `prunable_weights`.
      select: how thresholds are selected, `select(params, sparsity, *, prunable)`, where the
        sparsity is a number or an array, traced or not: one for all prunable weights, or a pytree
        prefix of `params`. `functools.partial` binds what else it takes.
      magnitude: by what weights are compared, as for `threshold_operator`.

    Raises:
      ValueError: a hyperparameter is out of its range, at construction.

    References:
      Glentis Georgoulakis et al., Feather: An Elegant Solution to Effective DNN Sparsification,
      BMVC 2023 (https://arxiv.org/abs/2310.02448), and its released code.
    """

    sparsity: float
    _: dataclasses.KW_ONLY
    end_step: int
    begin_step: int = 0
    p: float = 3.0
    theta: float | None = None
    prunable: Mask | None = None
    select: Callable[..., PyTree] = global_threshold
    magnitude: Callable[[Array], Array] = jnp.abs

    def __post_init__(self) -> None:
        for name in ("begin_step", "end_step"):  # 1e4 is a step as well
            object.__setattr__(self, name, check_step(getattr(self, name), name))
        cubic_schedule(self.sparsity, begin_step=self.begin_step, end_step=self.end_step)
        check_exponent(self.p)
        if self.theta is not None:
            check_theta(self.theta)

    def sparsity_at(self, step: ScalarLike) -> Float[Array, ""]:
        """The sparsity during update number `step`, counted from 0 (see `cubic_schedule`)."""
        schedule = cubic_schedule(self.sparsity, begin_step=self.begin_step, end_step=self.end_step)
        return schedule(step)

    def threshold(self, params: PyTree, step: ScalarLike) -> PyTree[Float[Array, "..."]]:
        """The threshold for update number `step`: `select`'s at `sparsity_at(step)`.

        From `end_step` on it is that of the final sparsity as a Python number, to the last bit the
        one that `finalize` uses. With `optax.MultiSteps`, `step` is its state's `gradient_step`:
        then the small batches of one update share a threshold.
        """
        reached = as_step(step) >= self.end_step
        if not isinstance(reached, jax.core.Tracer):
            return self._select(params, self.sparsity if reached else self.sparsity_at(step))
        return lax.cond(
            reached,
            lambda: self._select(params, self.sparsity),
            lambda: self._select(params, self.sparsity_at(step)),
        )

    def sparsify(self, params: PyTree, threshold: PyTree) -> PyTree:
        """The parameters with the prunable ones thresholded (see `sparsify`)."""
        return sparsify(params, threshold, p=self.p, prunable=self.prunable, **self._magnitude())

    def scale_gradients(self) -> optax.GradientTransformationExtraArgs:
        """The first part of the optimiser's chain (see `scale_pruned_gradients`)."""
        theta = default_theta(self.sparsity) if self.theta is None else self.theta
        return scale_pruned_gradients(theta, prunable=self.prunable, **self._magnitude())

    def finalize(self, params: PyTree) -> PyTree:
        """The sparse weights at the end of training: exact zeros at the final sparsity.

        With N prunable weights and no ties, floor(sparsity (N - 1)) + 1 of them are zero.
        """
        return self.sparsify(params, self._select(params, self.sparsity))

    def _select(self, params: PyTree, sparsity: ScalarLike) -> PyTree[Float[Array, "..."]]:
        return self.select(params, sparsity, prunable=self.prunable, **self._magnitude())

    def _magnitude(self) -> dict[str, Any]:
        return {} if self.magnitude is jnp.abs else {"magnitude": self.magnitude}
