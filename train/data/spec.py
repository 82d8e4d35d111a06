"""The data sets that are known, and the `data` part of a configuration, checked."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from train import fields
from train.errors import UserError
from train.fields import Checked

Mean = Annotated[
    tuple[float, ...], Field(strict=False, description="a tuple of numbers, one a channel")
]
Std = Annotated[
    tuple[fields.Positive, ...],
    Field(strict=False, description="a tuple of positive numbers, one a channel"),
]


@dataclasses.dataclass(frozen=True)
class Known:
    """What is fixed about a data set.

    Attributes:
      shape: (height, width, channels) of its images; None if they vary (ImageNet).
      num_classes: labels are in [0, num_classes).
      mean: of the training split's pixels in [0, 1], by channel; a configuration may have another.
      std: their standard deviation, likewise.
      train_split: the name of TFDS's split to train on.
      eval_split: the name of TFDS's split to evaluate on.
    """

    shape: tuple[int, int, int] | None
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_split: str = "train"
    eval_split: str = "test"


# The released code's for both CIFARs; its deviation is the mean of the images' own.
_CIFAR = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

KNOWN: dict[str, Known] = {
    "digits": Known((8, 8, 1), 10, (0.305,), (0.376,)),
    "mnist": Known((28, 28, 1), 10, (0.1307,), (0.3081,)),
    "fashion_mnist": Known((28, 28, 1), 10, (0.286,), (0.353,)),
    "cifar10": Known((32, 32, 3), 10, *_CIFAR),
    "cifar100": Known((32, 32, 3), 100, *_CIFAR),
    "imagenet2012": Known(
        None, 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), eval_split="validation"
    ),
}


class Spec(Checked):
    """A data set and its preprocessing.

    Attributes:
      name: a key of `KNOWN`.
      mean: per channel, of pixels in [0, 1].
      std: per channel, of pixels in [0, 1].
      data_dir: where TFDS's prepared data sets are; "" is TFDS's own default.
      flip: whether training mirrors images at random.
    """

    name: str
    mean: Mean
    std: Std
    data_dir: str = ""
    flip: bool = False


class InMemory(Spec):
    """Images of one size, all of them in memory.

    Attributes:
      crop_padding: pixels of padding for training's random crop, 0 for none.
    """

    crop_padding: Annotated[int, Field(ge=0)] = 0


class Photographs(Spec):
    """Photographs of many sizes, read and decoded as training goes.

    Attributes:
      image_size: height and width of the crops.
      workers: processes that read and decode, each a photograph at a time, so more of them than
        cores where the storage is slow to answer; 0 to do it in threads of the training process,
        with a tenth less work an image.
    """

    image_size: Annotated[int, Field(ge=8, le=4096)] = 224
    workers: Annotated[int, Field(ge=0, le=1024)] = 0


def parse(data: Mapping[str, Any]) -> InMemory | Photographs:
    """Checks `config.data`; the mean and the deviation are the data set's own by default.

    Args:
      data: names and values of the fields of `InMemory` or `Photographs`.

    Raises:
      UserError: for an unknown data set, a key that the data set has no use for, or a value of the
        wrong type or out of range.
    """
    name = data.get("name")
    if not isinstance(name, str) or name not in KNOWN:
        raise UserError(f"config.data.name is {name!r}; choose one of {', '.join(KNOWN)}.")
    known = KNOWN[name]
    given = {"mean": known.mean, "std": known.std, **data}
    kind: type[InMemory | Photographs] = InMemory if known.shape else Photographs
    spec = fields.parse(kind, given, "config.data", name)
    for key, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) != len(known.mean):
            raise UserError(
                f"config.data.{key} is {values}; {name} has {len(known.mean)} channel(s), so give "
                "as many numbers."
            )
    if isinstance(spec, InMemory) and known.shape and spec.crop_padding > min(known.shape[:2]):
        raise UserError(
            f"config.data.crop_padding is {spec.crop_padding}; images of {name} are only "
            f"{known.shape[0]}x{known.shape[1]}, so choose less."
        )
    return spec
