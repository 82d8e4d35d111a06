"""The facts of the data sets that are known by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

Channels = tuple[float, ...]

IMAGENET: tuple[Channels, Channels] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY: tuple[Channels, Channels] = (0.449,), (0.226,)  # the means over ImageNet's channels
"""Mean and deviation of photographs in general."""

# The released code's for both CIFARs; its deviation is the mean of the images' own.
_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclasses.dataclass(frozen=True)
class Known:
    """What is fixed about a data set.

    Attributes:
      shape: (height, width, channels) of its images where they are kept in memory; None for
        photographs.
      num_classes: labels are in [0, num_classes).
      mean: of the training split's pixels in [0, 1], by channel; a configuration may have another.
      std: their standard deviation, likewise.
      train_split: the name of TFDS's split to train on.
      eval_split: the name of TFDS's split to evaluate on; "" for "validation", or "test" without.
      image: the name of TFDS's feature that is the image.
      label: the name of the one that is the class.
      defaults: what else a configuration has of its own accord.
    """

    shape: tuple[int, int, int] | None
    num_classes: int
    mean: Channels
    std: Channels
    train_split: str = "train"
    eval_split: str = "test"
    image: str = "image"
    label: str = "label"
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


KNOWN: dict[str, Known] = {
    "digits": Known((8, 8, 1), 10, (0.305,), (0.376,)),
    "mnist": Known((28, 28, 1), 10, (0.1307,), (0.3081,)),
    "fashion_mnist": Known((28, 28, 1), 10, (0.286,), (0.353,)),
    "cifar10": Known((32, 32, 3), 10, *_CIFAR),
    "cifar100": Known((32, 32, 3), 100, *_CIFAR),
    "imagenet2012": Known(
        None,
        1000,
        *IMAGENET,
        eval_split="validation",
        # The central crop of 224 from a shorter side of 256, as published figures have it.
        defaults={"random_resized_crop": 0.08, "center_crop": 0.875},
    ),
}
