"""What a network is called with: as much as it takes."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

import feather_jax as feather


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """The parameters that can be given by name; None if any name will do."""
    parameters = inspect.signature(function).parameters
    kinds = {each.kind for each in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return None
    return {
        name: each
        for name, each in parameters.items()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the network's `__call__` takes this argument by name."""
    parameters = parameters_of(type(model).__call__)
    return parameters is None or argument in parameters


def call_arguments(
    model: nn.Module,
    *,
    train: bool,
    axis_name: str | None = None,
    keys: Key[Array, " b"] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for `model.apply` and `model.init`, besides variables and images.

    Args:
      model: a network.
      train: whether it is trained or evaluated.
      axis_name: the mapped axis over which the batch is spread, if it is.
      keys: one an example, for dropout. A network that does not take them has the first as Linen's
        key, so that `nn.Dropout` works; which entries it drops depends on how many devices there
        are.

    Returns:
      Those of `train`, `axis_name` and `keys` that the network's `__call__` takes, and `rngs`.
    """
    given = {"train": train, "axis_name": axis_name, "keys": keys}
    arguments: dict[str, Any] = {name: each for name, each in given.items() if takes(model, name)}
    if keys is not None and "keys" not in arguments:
        arguments["rngs"] = {"params": keys[0]}  # Linen's default, whatever a stream's name is
    return arguments


def count_macs(model: nn.Module, variables: PyTree, image_shape: tuple[int, ...]) -> feather.Macs:
    """The multiply-accumulates of a network for one image [height, width, channels]."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    arguments = call_arguments(model, train=False)
    return feather.count_macs(
        lambda variables, images: model.apply(variables, images, **arguments), variables, images
    )
