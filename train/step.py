"""The training step and the evaluation step: pure functions, the same on one device and on many."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32, Key, PyTree, UInt8

from train.backbones import mean_threshold
from train.data import augment
from train.data.mix import mix
from train.experiment import Experiment, TrainState
from train.models.calling import call_arguments, takes

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


def make_train_step(experiment: Experiment) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the bare training step, `train_step(state, batch, *, axis_name=None)`."""
    config, data, prune = experiment.config, experiment.data, experiment.prune
    model = experiment.model

    def loss_fn(
        axis_name: str | None, weights: PyTree, batch_stats: PyTree, batch: Batch
    ) -> tuple[Array, tuple[PyTree, Metrics]]:
        variables = {"params": weights, "batch_stats": batch_stats}
        arguments = call_arguments(
            model, train=not config.freeze_statistics, axis_name=axis_name, keys=batch["keys"]
        )
        logits, changed = model.apply(
            variables, batch["image"], **arguments, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy(logits, batch["target"]).mean()
        right = jnp.argmax(logits, -1) == jnp.argmax(batch["target"], -1)
        accuracy = jnp.mean(right, dtype=loss.dtype)
        metrics = {"train/loss": loss, "train/accuracy": accuracy}
        batch_stats = changed.get("batch_stats", {})
        if axis_name is not None and not takes(model, "axis_name"):
            batch_stats = jax.lax.pmean(batch_stats, axis_name)  # else each device's own
        return loss, (batch_stats, metrics)

    def train_step(
        state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """One update. Under `jax.pmap` each device has its part of the batch and `axis_name`."""
        keys = example_keys(config.seed, state.step, batch["index"])
        images = data.train_preprocess(batch["image"], keys)
        targets = smoothed(batch["label"], data.num_classes, config.label_smoothing)
        images, targets = mix(images, targets, keys, mixup=config.mixup, cutmix=config.cutmix)
        keys = augment.stream(keys, augment.NETWORK)
        batch = {"image": images, "target": targets, "keys": keys}

        threshold = prune.threshold(state.params, state.step)
        weights = prune.sparsify(state.params, threshold)
        # Straight through: the gradient at these weights is taken as that of the dense ones.
        loss_here, parts = functools.partial(loss_fn, axis_name), config.accumulate_steps
        gradient, batch_stats, metrics = accumulate(
            loss_here, weights, state.batch_stats, batch, parts
        )
        if axis_name is not None:
            gradient, metrics = jax.lax.pmean((gradient, metrics), axis_name)
        # Where |w| <= T the gradient is scaled, and all dense weights are updated.
        updates, opt_state = experiment.tx.update(
            gradient, state.opt_state, state.params, threshold=threshold
        )
        params = optax.apply_updates(state.params, updates)

        average = state.average
        if config.average_decay:
            now = {"params": params, "batch_stats": batch_stats}
            average = averaged(average, now, state.step, config.average_decay)

        metrics["learning_rate"] = jnp.asarray(experiment.learning_rate(state.step))
        if config.sparsity:
            metrics["threshold"] = mean_threshold(weights, threshold, prune.prunable)
            metrics["sparsity"] = prune.sparsity_at(state.step)
        return TrainState(state.step + 1, params, batch_stats, opt_state, average), metrics

    return train_step


def averaged(average: PyTree, now: PyTree, step: Int32[Array, ""], decay: float) -> PyTree:
    """The exponential average after update number `step`, counted from 0.

    Args:
      average: before the update.
      now: what is averaged, after the update.
      step: the smaller it is, the faster the average forgets where it began.
      decay: of the average, at most.

    References:
      TensorFlow's `tf.train.ExponentialMovingAverage`, for decay = min(decay, (1 + k) / (10 + k)).
    """
    return optax.incremental_update(now, average, 1 - jnp.minimum(decay, (1 + step) / (10 + step)))


def example_keys(seed: int, step: Int32[Array, ""], index: Int32[Array, " b"]) -> Key[Array, " b"]:
    """A PRNG key an example, by seed, update and position in the global batch alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda position: jax.random.fold_in(key, position))(index)


def smoothed(
    labels: Int32[Array, " b"], num_classes: int, smoothing: float
) -> Float[Array, "b classes"]:
    """The probabilities that a network shall give: 1 for the label, drawn towards the uniform."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def accumulate(
    loss_fn: Callable[..., Any], weights: PyTree, batch_stats: PyTree, batch: Batch, parts: int
) -> tuple[PyTree, PyTree, Metrics]:
    """The gradient, the new statistics and the metrics over a batch taken in equal parts.

    Part k has the examples whose position modulo `parts` is k. So it is the same part of the global
    batch on any number of devices, each of which has a stretch of it, and where statistics are
    those of a part over all devices, so are they.

    Args:
      loss_fn: loss_fn(weights, batch_stats, batch) gives the loss, and the new statistics with the
        metrics.
      weights: at which the gradient is taken.
      batch_stats: they pass from part to part; the gradient and the metrics are means.
      batch: a pytree of arrays [b, ...].
      parts: how many; they divide b.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if parts == 1:
        gradient, (batch_stats, metrics) = grad_fn(weights, batch_stats, batch)
        return gradient, batch_stats, metrics

    def split(array: Array) -> Array:
        return jnp.swapaxes(array.reshape(-1, parts, *array.shape[1:]), 0, 1)

    def add_part(carry: tuple[PyTree, PyTree], part: Batch):
        total, batch_stats = carry
        gradient, (batch_stats, metrics) = grad_fn(weights, batch_stats, part)
        return (jax.tree.map(jnp.add, total, gradient), batch_stats), metrics

    zeros = jax.tree.map(jnp.zeros_like, weights)
    (total, batch_stats), metrics = jax.lax.scan(
        add_part, (zeros, batch_stats), jax.tree.map(split, batch)
    )
    gradient = jax.tree.map(lambda leaf: leaf / parts, total)
    return gradient, batch_stats, jax.tree.map(jnp.mean, metrics)


def make_eval_step(
    model: nn.Module,
    preprocess: Callable[[UInt8[Array, "b h w c"]], Float[Array, "b h w c"]],
) -> Callable[..., dict[str, Array]]:
    """Builds the evaluation step, `eval_step(variables, batch, *, axis_name)`.

    It gives arrays [b] over the examples of all devices, in their order: `mask`, `label` and, as
    `train.store.predictions` has them, `prediction`, `rank` and `loss`.
    """

    def eval_step(
        variables: PyTree, batch: Batch, *, axis_name: str | None = None
    ) -> dict[str, Array]:
        images, arguments = preprocess(batch["image"]), call_arguments(model, train=False)
        logits = model.apply(variables, images, **arguments)
        found = outcomes(jnp.asarray(logits), batch)
        return found if axis_name is None else jax.lax.all_gather(found, axis_name, tiled=True)

    return eval_step


def outcomes(logits: Float[Array, "b classes"], batch: Batch) -> dict[str, Array]:
    """What an evaluation keeps of a batch's logits (see `make_eval_step`)."""
    labels = batch["label"]
    return {
        "mask": batch["mask"],
        "label": labels,
        "prediction": jnp.argmax(logits, -1).astype(jnp.int32),
        "rank": ranks(logits, labels),
        "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    }


def ranks(logits: Float[Array, "b classes"], labels: Int32[Array, " b"]) -> Int32[Array, " b"]:
    """How many classes come before each label's; of equal ones the first, as argmax has it."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1]) < labels[:, None]
    before = ~(logits <= own) | ((logits == own) & earlier)  # what is not a number comes first
    return jnp.sum(before, axis=-1, dtype=jnp.int32)
