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
import pydantic

from train import fields
from train.errors import UserError
from train.fields import Checked
from train.models import imported
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


def build(
    spec: Mapping[str, Any],
    *,
    num_classes: int,
    dtype: Any = jnp.float32,
    image_shape: tuple[int, ...] | None = None,
    allow_import: bool = False,
) -> nn.Module:
    """The network that `config.model` describes.

    Args:
      spec: `{"name": ..., **options}` with a name of `MODELS` and options of that network, or the
        name of anyone's own, `package.module:Network`.
      num_classes: number of logits.
      dtype: of the computation; weights and statistics are in at least float32.
      image_shape: height, width, channels, with which anyone's own network is tried.
      allow_import: whether a name with a colon is imported, which runs the code of its module.

    Returns:
      A Linen module, not yet initialised.

    Raises:
      UserError: the name or an option is unknown, or an option's value is of another type or out
        of the range that the network's attribute is annotated with; or the network is anyone's
        own, and not allowed or not fit for a run.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if is_imported(name):
        if not allow_import:
            raise UserError(
                f"{name!r} is code that would be imported; give --allow-import if you trust whom "
                "it is from."
            )
        model = imported.build(name, options, num_classes=num_classes, dtype=dtype)
        if image_shape is not None:
            imported.check(name, model, image_shape, num_classes)
        return model
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(
            f"config.model.name is {name!r}; known are {', '.join(MODELS)}, and your own as "
            "package.module:Network."
        )
    checked = fields.parse(_options(MODELS[name]), options, "config.model", name)
    given = {option: getattr(checked, option) for option in checked.model_fields_set}
    return MODELS[name](num_classes=num_classes, dtype=dtype, **given)


def is_imported(name: Any) -> bool:
    """Whether a network's name is that of anyone's own, `package.module:Network`."""
    return isinstance(name, str) and ":" in name


def _options(model: Callable[..., nn.Module]) -> type[Checked]:
    """What a configuration may give of a network's keyword arguments, as they are annotated."""
    ours = ("num_classes", "dtype", "parent", "name")
    parameters = inspect.signature(model).parameters
    declared: dict[str, Any] = {
        name: (each.annotation, None) for name, each in parameters.items() if name not in ours
    }
    return pydantic.create_model("Options", __base__=Checked, **declared)
