"""The optimiser of a configuration: one Optax chain, with SGD in the paper's order."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath
from jaxtyping import PyTree

import feather_jax as feather
from train import asl, backbones
from train.asl import Asl
from train.backbones import Pruning
from train.config import Config, Steps


def learning_rate(config: Config, steps: Steps) -> optax.Schedule:
    """A linear rise from 0 over the warm-up, then a cosine that reaches 0 after the last update."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=steps.warmup,
        decay_steps=steps.total,
    )


def kernels(params: PyTree) -> PyTree[bool]:
    """Which parameters decay: the matrices and filters, not the biases and normalisations.

    Whether they may be pruned is another question (`train.experiment.prunable_mask`).
    """

    def is_kernel(path: KeyPath, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return name.endswith("kernel") and jnp.ndim(leaf) >= 2

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def make_optimizer(
    config: Config, schedule: optax.Schedule, prune: Pruning
) -> optax.GradientTransformationExtraArgs:
    """Scaling of pruned gradients, clipping, and the update of SGD or of AdamW, in this order.

    SGD's is weight decay, momentum and learning rate; AdamW's is its moments, weight decay, which
    they do not see, and learning rate. Weight decay is for kernels alone, the dense and the pruned
    ones alike, not for biases and normalisation parameters. The head may have a learning rate of
    its own. Learned thresholds have a fraction of the learning rate, and no part in the clipping.
    Frozen parameters are outside all of it: they have no momentum, and their gradients no
    part in the norm that is clipped.

    Args:
      config: the hyperparameters.
      schedule: the learning rate.
      prune: what prunes.

    References:
      The order with SGD: Feather's released code (Glentis Georgoulakis et al., BMVC 2023).
    """
    clipping = (optax.clip_by_global_norm(config.clip_norm),) if config.clip_norm else ()
    if config.optimizer == "adamw":
        update = optax.adamw(
            schedule,
            b1=config.momentum,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=kernels,
        )
    else:
        update = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=kernels),
            optax.sgd(schedule, momentum=config.momentum or None, nesterov=config.nesterov),
        )
    if isinstance(prune, Asl):
        clipping = tuple(optax.masked(clip, asl.network_alone) for clip in clipping)
        rate = backbones.options(config.backbone).learning_rate
        update = optax.chain(update, optax.masked(optax.scale(rate), asl.r_alone))
    head: tuple[optax.GradientTransformation, ...] = ()
    if config.head_learning_rate != 1:
        factor = optax.scale(config.head_learning_rate)
        head = (optax.masked(factor, feather.path_mask(include=config.head)),)
    tx = optax.chain(prune.scale_gradients(), *clipping, update, *head)
    if config.freeze:
        is_frozen = feather.path_mask(include=config.freeze)
        tx = optax.partition(
            {"trained": tx, "frozen": optax.set_to_zero()},
            lambda params: jax.tree.map(
                lambda frozen: "frozen" if frozen else "trained", is_frozen(params)
            ),
        )
    return optax.with_extra_args_support(tx)
