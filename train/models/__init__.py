"""The networks that a configuration can name.

All are called alike: `model.apply(variables, images, train=..., axis_name=None)`, with images
[batch, height, width, channels], gives logits [batch, classes] in float32 (float64 if `dtype` is).
Those with dropout or stochastic depth take `keys` besides, one an example, in training.
Batch normalisation keeps its running statistics in the collection "batch_stats", and takes those of
the whole batch where `axis_name` says that it is spread over devices.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from train.errors import UserError
from train.models.densenet import DenseNet
from train.models.lenet import LeNet5, LeNet300
from train.models.mobilenet import MobileNet
from train.models.mobilenet_v2 import MobileNetV2
from train.models.resnet import CifarResNet, ResNet
from train.models.vit import ViT

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet300": LeNet300,
    "lenet5": LeNet5,
    "resnet8": functools.partial(CifarResNet, blocks_per_stage=1),
    "resnet20": CifarResNet,
    "mobilenet": functools.partial(MobileNet, stem_strides=1, pointwise_bias=True),
    "densenet40": DenseNet,
    "resnet18": functools.partial(ResNet, blocks_per_stage=(2, 2, 2, 2), bottleneck=False),
    "resnet34": functools.partial(ResNet, bottleneck=False),
    "resnet50": ResNet,
    "imagenet_mobilenet": MobileNet,
    "mobilenet_v2": MobileNetV2,
    "vit_tiny": functools.partial(ViT, width=192, heads=3),
    "vit_small": ViT,
    "vit_base": functools.partial(ViT, width=768, heads=12),
}


def build(spec: Mapping[str, Any], *, num_classes: int, dtype: Any = jnp.float32) -> nn.Module:
    """The network that `config.model` describes.

    Args:
      spec: `{"name": ..., **options}` with a name of `MODELS` and options of that network.
      num_classes: number of logits.
      dtype: of the computation; weights and statistics are in at least float32.

    Returns:
      A Linen module, not yet initialised.

    Raises:
      UserError: the name or an option is unknown, or an option's value is of the wrong type.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(f"config.model.name is {name!r}; known are {', '.join(MODELS)}.")
    known = _options(MODELS[name])
    for option, value in options.items():
        if option not in known:
            these = ", ".join(known) or "none"
            raise UserError(f"{name} has no option {option!r}; its options are: {these}.")
        options[option] = _checked(f"config.model.{option}", value, known[option])
    return MODELS[name](num_classes=num_classes, dtype=dtype, **options)


def _options(model: Callable[..., nn.Module]) -> dict[str, Any]:
    """The types of the keyword arguments that a configuration may give."""
    ours = ("num_classes", "dtype", "parent", "name")
    parameters = inspect.signature(model).parameters
    return {name: each.annotation for name, each in parameters.items() if name not in ours}


def _checked(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type that an option is annotated with."""

    def is_whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= 1

    if kind is bool:
        wanted, right = "True or False", isinstance(value, bool)
    elif kind is int:
        wanted, right = "a whole number above 0", is_whole(value)
    elif kind is float:
        wanted = "a number from 0 to 1"
        right = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    else:
        wanted = "a sequence of whole numbers above 0"
        right = isinstance(value, list | tuple) and bool(value) and all(map(is_whole, value))
        value = tuple(value) if right else value
    if not right:
        raise UserError(f"{name} is {value!r}; give {wanted}.")
    return value
