"""Feather with one set of hyperparameters: what a training script holds on to."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, ScalarLike

from feather_jax.masks import Mask, no_prunable_weight, resolve_mask
from feather_jax.operator import check_exponent, sparsify
from feather_jax.schedule import as_step, check_step, check_theta, cubic_schedule, default_theta
from feather_jax.selection import global_threshold
from feather_jax.transform import scale_pruned_gradients
from feather_jax.weights import AxisName
from feather_jax.wrap import wrap


@dataclasses.dataclass(frozen=True)
class Feather:
    """Sparse training with one threshold for all prunable weights (Feather-Global).

    Example: one line in a training script, after which its parameters are the sparse weights.

      tx = feather.Feather(sparsity=0.95, end_step=total_steps // 2).wrap(optax.adamw(1e-3))

    Or the pieces, where `params` are the dense weights and `prune.sparsify(params, threshold)` is
    what is evaluated:

      prune = feather.Feather(sparsity=0.95, end_step=total_steps // 2)
      tx = optax.chain(prune.scale_gradients(), optax.sgd(schedule, momentum=0.9))

      def train_step(params, opt_state, batch, step):
          threshold = prune.threshold(params, step)
          loss, grads = jax.value_and_grad(
              lambda w: loss_fn(prune.sparsify(w, threshold), batch))(params)
          updates, opt_state = tx.update(grads, opt_state, params, threshold=threshold)
          return optax.apply_updates(params, updates), opt_state, loss

    Attributes:
      sparsity: the final fraction of zeros among the prunable weights, in [0, 1). With 0 nothing is
        thresholded or scaled, whatever is prunable: the dense twin in the same program.
      end_step: the update from which on the sparsity is the final one. The paper's is half of all.
      begin_step: the update, counted from 0, at which sparsity begins to grow.
      p: the exponent of `threshold_operator`, in [1, inf].
      theta: the scale of pruned weights' gradients; None for `default_theta(sparsity)`.
      prunable: which weights may be pruned; None for `prunable_weights`.
      select: how thresholds are selected, `select(params, sparsity, *, prunable, magnitude,
        axis_name)`, where the sparsity is a number or an array, traced or not: one for all prunable
        weights, or a pytree prefix of `params`. `functools.partial` binds what else it takes.
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

    def threshold(
        self, params: PyTree, step: ScalarLike, *, axis_name: AxisName | None = None
    ) -> PyTree[Float[Array, "..."]]:
        """The threshold for update number `step`: `select`'s at `sparsity_at(step)`.

        From `end_step` on it is that of the final sparsity as a Python number, to the last bit the
        one that `finalize` uses. With `optax.MultiSteps`, `step` is its state's `gradient_step`:
        then the small batches of one update share a threshold. `axis_name` is for weights that vary
        over manual axes of `jax.shard_map`, as for `global_threshold`.
        """
        if not self.sparsity:
            return jnp.zeros(())
        reached = as_step(step) >= self.end_step
        if not isinstance(reached, jax.core.Tracer):
            sparsity = self.sparsity if reached else self.sparsity_at(step)
            return self._select(params, sparsity, axis_name)
        return lax.cond(
            reached,
            lambda: self._select(params, self.sparsity, axis_name),
            lambda: self._select(params, self.sparsity_at(step), axis_name),
        )

    def sparsify(self, params: PyTree, threshold: PyTree) -> PyTree:
        """The parameters with the prunable ones thresholded (see `sparsify`)."""
        if not self.sparsity:
            return params
        return sparsify(
            params, threshold, p=self.p, prunable=self.prunable, magnitude=self.magnitude
        )

    def scale_gradients(self) -> optax.GradientTransformationExtraArgs:
        """The first part of the optimiser's chain (see `scale_pruned_gradients`)."""
        if not self.sparsity:
            return optax.with_extra_args_support(optax.identity())
        theta = default_theta(self.sparsity) if self.theta is None else self.theta
        return scale_pruned_gradients(theta, prunable=self.prunable, magnitude=self.magnitude)

    def wrap(
        self,
        optimizer: optax.GradientTransformation,
        *,
        dense_dtype: DTypeLike | None = None,
        axis_name: AxisName | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """Feather around `optimizer`: the one line, after which nothing else of a loop changes.

        From then on the parameters *are* the sparse weights: they are evaluated, saved and shipped
        as they are, and gradients are taken at them, which is the straight-through estimator. The
        dense weights are in the state. An update scales the gradients of pruned weights, lets
        `optimizer` update the dense weights, selects the threshold of the next step, and gives the
        difference from the parameters to the new sparse weights: zeros are exact, and the rest is
        that of `sparsify(state.dense, state.threshold)` to a unit in the last place of the larger
        of the two, since Optax adds a difference. After the last update the parameters so are
        `finalize(state.dense)`.

        It comes last: what is put after it, as `scale` or `add_decayed_weights`, changes what was
        zero, as does what takes the parameters for its own average of weights (`lookahead` and
        `schedule_free` around it). `MultiSteps` and `apply_if_finite` go around it; clipping,
        weight decay, schedules and `reduce_on_plateau` inside. Inside `partition` or `masked`
        every part has its own threshold. `docs/your-loop.md` has them all.

        The state is what resumes a run: with the parameters alone, what is pruned is lost.
        Parameters that are changed from outside are overwritten by the next update, and so are
        those given to the first, if sparsity begins above zero (at `begin_step` it is 0 unless
        that is `end_step`): their gradients then are taken at weights that are not sparse yet.

        Functions among the extra arguments of `update` (`value_fn` of line searches, `grad_fn` of
        SAM) are called with sparse weights, as the loss is.

        Args:
          optimizer: any transformation that may see the dense weights.
          dense_dtype: of the dense weights, where parameters are floating-point; theirs by default.
            With bfloat16 parameters give float32: their 8 bits lose small updates and make ties.
          axis_name: as for `threshold`.

        Returns:
          An `optax.GradientTransformationExtraArgs` whose state is a `WrapState`: `step`, `dense`,
          `threshold`, `inner`.

        Raises:
          ValueError: `optimizer` is `MultiSteps`; in `init`, nothing is prunable; in `update`,
            `params` is missing.

        Example:
          >>> import jax.numpy as jnp, optax
          >>> from feather_jax import Feather
          >>> params = {"kernel": jnp.array([[0.5, 2.0, -1.0, 0.25, 3.0]])}
          >>> tx = Feather(sparsity=0.5, end_step=1, p=1.0).wrap(optax.sgd(0.25))
          >>> updates, state = tx.update({"kernel": jnp.ones((1, 5))}, tx.init(params), params)
          >>> print(optax.apply_updates(params, updates)["kernel"])
          [[0.  0.5 0.  0.  1.5]]
          >>> print(state.dense["kernel"])
          [[ 0.25  1.75 -1.25  0.    2.75]]

        References:
          The order inside a step is that of Feather's released code (Glentis Georgoulakis et al.,
          BMVC 2023, https://arxiv.org/abs/2310.02448).
        """
        return wrap(
            optimizer,
            scaling=self.scale_gradients(),
            select=functools.partial(self.threshold, axis_name=axis_name),
            sparsify=self.sparsify,
            dense_dtype=dense_dtype,
        )

    def finalize(self, params: PyTree, *, axis_name: AxisName | None = None) -> PyTree:
        """The sparse weights at the end of training: exact zeros at the final sparsity.

        With N prunable weights and no ties, floor(sparsity (N - 1)) + 1 of them are zero.
        """
        if not self.sparsity:
            return params
        return self.sparsify(params, self._select(params, self.sparsity, axis_name))

    def _select(
        self, params: PyTree, sparsity: ScalarLike, axis_name: AxisName | None
    ) -> PyTree[Float[Array, "..."]]:
        if not any(jax.tree.leaves(resolve_mask(params, self.prunable))):
            raise no_prunable_weight(params)
        return self.select(
            params,
            sparsity,
            prunable=self.prunable,
            magnitude=self.magnitude,
            axis_name=axis_name,
        )
