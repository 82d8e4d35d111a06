"""The training step and the evaluation step: pure functions, the same on one device and on many."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, Key, PyTree, UInt8

import feather_jax as feather

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


@flax.struct.dataclass
class TrainState:
    """All that training changes; what a checkpoint holds.

    Attributes:
      step: the number of updates completed, an int32 scalar.
      params: the dense weights.
      batch_stats: the running statistics of batch normalisation; {} without any.
      opt_state: the optimiser's state.
      kept: which weights the last evaluation kept, for `train.run.churn`; the step leaves it alone.
    """

    step: Int32[Array, ""]
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    kept: list[UInt8[Array, " bytes"]] = flax.struct.field(default_factory=list)


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformationExtraArgs,
    prune: feather.Feather | None,
    learning_rate: optax.Schedule,
    preprocess: Callable[[UInt8[Array, "b h w c"], Key[Array, " b"]], Float[Array, "b h w c"]],
    *,
    seed: int,
    label_smoothing: float = 0.0,
    accumulate_steps: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the training step, `train_step(state, batch, *, axis_name)`.

    Args:
      model: a Linen network (see `train.models`).
      tx: the optimiser, as `train.optimizer.make_optimizer` builds it.
      prune: None for the dense twin, which has none of Feather in its step.
      learning_rate: the optimiser's schedule, for the metrics.
      preprocess: augments and normalises images, given one PRNG key an example.
      seed: of the augmentation's keys.
      label_smoothing: in [0, 1).
      accumulate_steps: the gradient is the mean over this many equal parts of the batch.
    """

    def train_step(
        state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """One update. Under `jax.pmap` each device has its part of the batch and `axis_name`."""
        keys = example_keys(seed, state.step, batch["index"])
        images = preprocess(batch["image"], keys)

        weights, threshold_argument, pruning_metrics = state.params, {}, {}
        if prune is not None:
            threshold = prune.threshold(state.params, state.step)
            # Its derivative is the identity, straight through: the gradient with respect to these
            # weights is the one with respect to the dense ones.
            weights = prune.sparsify(state.params, threshold)
            threshold_argument = {"threshold": threshold}
            pruning_metrics = {
                "threshold": threshold,
                "sparsity": prune.sparsity_at(state.step),
            }

        def loss_fn(weights: PyTree, batch_stats: PyTree, images: Array, labels: Array):
            variables = {"params": weights, "batch_stats": batch_stats}
            logits, changed = model.apply(
                variables, images, train=True, axis_name=axis_name, mutable=["batch_stats"]
            )
            loss = cross_entropy(logits, labels, label_smoothing).mean()
            accuracy = jnp.mean(jnp.argmax(logits, -1) == labels, dtype=loss.dtype)
            return loss, (changed.get("batch_stats", {}), {"loss": loss, "accuracy": accuracy})

        grads, batch_stats, metrics = accumulate(
            loss_fn, weights, state.batch_stats, images, batch["label"], accumulate_steps
        )
        if axis_name is not None:
            grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **threshold_argument)
        metrics = {f"train/{name}": value for name, value in metrics.items()}
        metrics |= pruning_metrics | {"learning_rate": jnp.asarray(learning_rate(state.step))}
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return new_state, metrics

    return train_step


def example_keys(seed: int, step: Int32[Array, ""], index: Int32[Array, " b"]) -> Key[Array, " b"]:
    """A PRNG key an example, by seed, update and position in the global batch alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(index)


def cross_entropy(
    logits: Float[Array, "b classes"], labels: Int32[Array, " b"], smoothing: float = 0.0
) -> Float[Array, " b"]:
    """The cross entropy of each example in nats, against labels smoothed to the uniform."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return losses
    uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    return (1 - smoothing) * losses + smoothing * uniform


def accumulate(
    loss_fn: Callable[..., Any],
    weights: PyTree,
    batch_stats: PyTree,
    images: Float[Array, "b h w c"],
    labels: Int32[Array, " b"],
    parts: int,
) -> tuple[PyTree, PyTree, Metrics]:
    """The gradient, the new statistics and the metrics over a batch taken in equal parts.

    The statistics pass from part to part; the gradient and the metrics are means.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if parts == 1:
        grads, (batch_stats, metrics) = grad_fn(weights, batch_stats, images, labels)
        return grads, batch_stats, metrics

    def split(array: Array) -> Array:
        return array.reshape(parts, array.shape[0] // parts, *array.shape[1:])

    def add_part(carry: tuple[PyTree, PyTree], part: tuple[Array, Array]):
        total, batch_stats = carry
        grads, (batch_stats, metrics) = grad_fn(weights, batch_stats, *part)
        return (jax.tree.map(jnp.add, total, grads), batch_stats), metrics

    zeros = jax.tree.map(jnp.zeros_like, weights)
    (total, batch_stats), metrics = jax.lax.scan(
        add_part, (zeros, batch_stats), (split(images), split(labels))
    )
    grads = jax.tree.map(lambda leaf: leaf / parts, total)
    return grads, batch_stats, jax.tree.map(jnp.mean, metrics)


def make_eval_step(
    model: nn.Module,
    preprocess: Callable[[UInt8[Array, "b h w c"]], Float[Array, "b h w c"]],
) -> Callable[..., Metrics]:
    """Builds the evaluation step, `eval_step(variables, batch, *, axis_name)`.

    It gives sums over the examples whose mask is True: "loss" in nats, "correct" and "examples",
    over all devices where `axis_name` is given.
    """

    def eval_step(variables: PyTree, batch: Batch, *, axis_name: str | None = None) -> Metrics:
        logits = jnp.asarray(model.apply(variables, preprocess(batch["image"]), train=False))
        mask = batch["mask"]
        correct = (jnp.argmax(logits, -1) == batch["label"]) & mask
        losses = cross_entropy(logits, batch["label"])
        sums = {
            "loss": jnp.sum(jnp.where(mask, losses, 0)),
            "correct": jnp.sum(correct, dtype=jnp.int32),
            "examples": jnp.sum(mask, dtype=jnp.int32),
        }
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return eval_step
