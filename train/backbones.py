"""What decides which weights go: `config.backbone`, by name, and `config.block`."""

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

import feather_jax as feather
from train import fields
from train.asl import Asl
from train.config import Config, Steps
from train.errors import UserError
from train.fields import AtLeast0, Checked, Count, Positive

Pruning: TypeAlias = feather.Feather | Asl


class NoOptions(Checked):
    """Of backbones that have none."""


class MacsOptions(Checked):
    """Of a budget of multiply-accumulates: magnitudes are divided by a weight's cost^exponent."""

    exponent: AtLeast0 = 0.0


class PatternOptions(Checked):
    """Of N:M: the n largest of every m consecutive weights along the input axis stay."""

    n: Count
    m: Count


class AslOptions(Checked):
    """Of learned thresholds: the budget's weight in the loss, and r's learning rate by theirs."""

    weight: Positive = 10.0
    learning_rate: Positive = 0.01


OPTIONS: dict[str, type[Checked]] = {
    "global": NoOptions,
    "uniform": NoOptions,
    "erk": NoOptions,
    "macs": MacsOptions,
    "n_m": PatternOptions,
    "asl": AslOptions,
}


def options(spec: Mapping[str, Any]) -> Any:
    """The options of `config.backbone`, checked.

    Raises:
      UserError: the name or an option is unknown, or an option is out of its range.
    """
    given = dict(spec)
    name = given.pop("name")
    if name not in OPTIONS:
        raise UserError(f"config.backbone.name is {name!r}; known are {', '.join(OPTIONS)}.")
    return fields.parse(OPTIONS[name], given, "config.backbone", name)


def pruning(
    config: Config,
    steps: Steps,
    params: PyTree,
    prunable: PyTree[bool],
    macs: Callable[[], feather.Macs],
) -> Pruning:
    """What prunes in a run.

    Args:
      config: the configuration.
      steps: its durations in updates.
      params: the network's parameters, or their shapes.
      prunable: which of them may be pruned, a pytree of bools.
      macs: counts the multiply-accumulates of the network.

    Raises:
      UserError: an option is wrong, or ASL is to go with what it cannot go with.
    """
    chosen, name = options(config.backbone), config.backbone["name"]
    theta = feather.default_theta(config.sparsity) if config.theta is None else config.theta
    if name == "asl" and (config.block is not None or config.freeze or config.init_from):
        raise UserError(
            "config.backbone 'asl' learns thresholds for single weights, with a whole network and "
            "from its start; leave config.block, config.freeze and config.init_from out."
        )
    if name == "asl" and config.sparsity:
        return Asl(config.sparsity, config.p, theta, prunable, chosen.weight)

    def select() -> Callable[..., PyTree]:
        if name == "uniform":
            return feather.layer_thresholds
        if name == "erk":
            final = feather.erdos_renyi_kernel(params, config.sparsity, prunable=prunable)
            return functools.partial(feather.layer_thresholds, final=final)
        if name == "macs":
            return functools.partial(
                feather.budget_thresholds,
                cost=macs().cost_per_weight(params),
                exponent=chosen.exponent,
            )
        if name == "n_m":
            return functools.partial(feather.n_m_thresholds, n=chosen.n, m=chosen.m)
        return feather.global_threshold

    return feather.Feather(
        sparsity=config.sparsity,
        begin_step=steps.prune_begin,
        end_step=steps.prune_end,
        p=config.p,
        theta=theta,
        prunable=prunable,
        select=select() if config.sparsity else feather.global_threshold,
        magnitude=magnitude(config),
    )


def check(prune: feather.Feather, params: PyTree) -> tuple[str, ...]:
    """Prunes the shapes of parameters, to see that it can be done.

    Returns:
      What the library warns of, a sentence each. A run tells it once, so that Python need not,
      which would add a file and a line of code.

    Raises:
      UserError: a kernel cannot have the pattern or the blocks, or the sparsity is more than the
        pattern has.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            jax.eval_shape(prune.finalize, params)
        except ValueError as error:
            raise UserError(f"config.backbone and config.block: {error}") from error
    notes = tuple(str(warning.message) for warning in caught)
    for note in notes:
        warnings.filterwarnings("ignore", re.escape(note))
    return notes


def magnitude(config: Config) -> Callable[[Array], Array]:
    """What is compared with thresholds: |w|, or the magnitude of `config.block`."""
    return jnp.abs if config.block is None else feather.block_magnitude(config.block)


def mean_threshold(
    params: PyTree, threshold: PyTree[Float[Array, "..."]], prunable: PyTree[bool]
) -> Float[Array, ""]:
    """One number for a log: the threshold, or the mean of them all over the prunable weights."""
    if isinstance(threshold, jax.Array) and not threshold.ndim:
        return threshold

    def count(_: Array, part: PyTree, selected: PyTree[bool]) -> int:
        leaves = zip(jax.tree.leaves(part), jax.tree.leaves(selected), strict=True)
        return sum(leaf.size for leaf, chosen in leaves if chosen)

    counts = jax.tree.leaves(jax.tree.map(count, threshold, params, prunable))
    means = jnp.stack([jnp.mean(value) for value in jax.tree.leaves(threshold)])
    return jnp.average(means, weights=jnp.asarray(counts, means.dtype))
