"""The `data` part of a configuration, checked."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class Known:
    """What is fixed about a data set.

    Attributes:
      shape: (height, width, channels) of its images; None if they vary (ImageNet).
      num_classes: labels are in [0, num_classes).
      train_split: the name of TFDS's split to train on.
      eval_split: the name of TFDS's split to evaluate on.
    """

    shape: tuple[int, int, int] | None
    num_classes: int
    train_split: str = "train"
    eval_split: str = "test"

    @property
    def channels(self) -> int:
        return self.shape[2] if self.shape else 3


KNOWN: dict[str, Known] = {
    "digits": Known((8, 8, 1), 10),
    "mnist": Known((28, 28, 1), 10),
    "fashion_mnist": Known((28, 28, 1), 10),
    "cifar10": Known((32, 32, 3), 10),
    "cifar100": Known((32, 32, 3), 100),
    "imagenet2012": Known(None, 1000, eval_split="validation"),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A data set and its preprocessing.

    Attributes:
      name: a key of `KNOWN`.
      mean: per channel, of pixels in [0, 1].
      std: per channel, of pixels in [0, 1].
      data_dir: where TFDS's prepared data sets are; "" is TFDS's own default.
      flip: whether training mirrors images at random.
      crop_padding: pixels of padding for training's random crop, 0 for none (data sets in memory).
      image_size: height and width of the crops (ImageNet).
      workers: processes that read and decode, each a photograph at a time, so more of them than
        cores where the storage is slow to answer; 0 to do it in threads of the training process,
        with a tenth less work an image (ImageNet).
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data_dir: str = ""
    flip: bool = False
    crop_padding: int = 0
    image_size: int = 224
    workers: int = 0


def parse(data: Mapping[str, Any]) -> Spec:
    """Checks `config.data`.

    Args:
      data: names and values of the fields of `Spec`.

    Returns:
      The same as a `Spec`, sequences as tuples.

    Raises:
      UserError: for an unknown data set, a key that the data set has no use for, a missing key, or
        a value of the wrong type or out of range.
    """
    name = data.get("name")
    if not isinstance(name, str) or name not in KNOWN:
        raise UserError(f"data.name is {name!r}; choose one of {', '.join(KNOWN)}.")
    known = KNOWN[name]
    foreign = {"image_size", "workers"} if known.shape else {"crop_padding"}
    allowed = [f.name for f in dataclasses.fields(Spec) if f.name not in foreign]
    if unknown := [key for key in data if key not in allowed]:
        raise UserError(
            f"data has {', '.join(map(repr, unknown))}, which {name} has no use for; "
            f"its keys are {', '.join(allowed)}."
        )
    fields = dict(data)
    for key in ("mean", "std"):
        values: Any = data.get(key)
        if not are_channel_values(key, values, known.channels):
            kind = "positive number(s)" if key == "std" else "number(s)"
            raise UserError(
                f"data.{key} is {values!r}; give {known.channels} {kind}, one a channel."
            )
        fields[key] = tuple(map(float, values))
    spec = Spec(**fields)
    _expect("data_dir", spec.data_dir, str, "a path, or '' for TFDS's default")
    _expect("flip", spec.flip, bool, "True or False")
    for key, least, most in (
        ("crop_padding", 0, min(known.shape[:2]) if known.shape else 0),
        ("image_size", 8, 4096),
        ("workers", 0, 1024),
    ):
        value = getattr(spec, key)
        _expect(key, value, int, "an integer")
        if not least <= value <= most:
            raise UserError(f"data.{key} is {value}; choose it between {least} and {most}.")
    return spec


def _expect(key: str, value: Any, kind: type, remedy: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"data.{key} is {value!r}; it must be {remedy}.")


def are_channel_values(key: str, values: Any, channels: int) -> bool:
    """Whether `values` are finite numbers, one a channel, and above 0 if they are the "std"."""
    return (
        isinstance(values, list | tuple)
        and len(values) == channels
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        and all(math.isfinite(v) and (key != "std" or v > 0) for v in values)
    )
