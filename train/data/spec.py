"""The `data` part of a configuration, checked."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from train import fields
from train.data import tfds_facts
from train.data.known import GREY, IMAGENET, KNOWN, Known
from train.errors import UserError
from train.fields import Checked

FOLDER = "folder"
COMPUTED = "computed"

Mean = Annotated[
    tuple[float, ...], Field(strict=False, description="a tuple of numbers, one a channel")
]
Std = Annotated[
    tuple[fields.Positive, ...],
    Field(strict=False, description="a tuple of positive numbers, one a channel"),
]
UpTo1 = Annotated[float, Field(ge=0, le=1, description="in [0, 1]")]


class Spec(Checked):
    """A data set, its preprocessing and, off by default, its augmentation.

    Attributes:
      name: a key of `KNOWN`, "folder", or an image classification data set of TFDS's.
      mean: what is subtracted from pixels in [0, 1], by channel; "computed" for the mean of some
        training pictures.
      std: what they are then divided by, by channel; "computed" for the standard deviation.
      random_resized_crop: the least area of a crop that is resized to the whole image, as a
        fraction of the image's (0.08 is usual from scratch); 0 for none.
      crop_padding: pixels of padding for a random crop of the image's size; 0 for none.
      flip: whether training mirrors images at random.
      color_jitter: how much brightness, contrast, saturation and hue vary (see
        `train.data.augment.color_jitter`); (0.4, 0.4, 0.4, 0) is usual.
    """

    name: str
    mean: Annotated[
        Mean | Literal["computed"],
        Field(description="a tuple of numbers, one a channel, or 'computed'"),
    ]
    std: Annotated[
        Std | Literal["computed"],
        Field(description="a tuple of positive numbers, one a channel, or 'computed'"),
    ]
    random_resized_crop: UpTo1 = 0.0
    crop_padding: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    color_jitter: Annotated[
        tuple[UpTo1, UpTo1, UpTo1, Annotated[float, Field(ge=0, le=0.5)]],
        Field(strict=False, description="three numbers in [0, 1] and one in [0, 0.5]"),
    ] = (0.0, 0.0, 0.0, 0.0)


class InMemory(Spec):
    """Images of one size, all of them in memory.

    Attributes:
      data_dir: where TFDS's prepared data sets are; "" is TFDS's own default.
    """

    data_dir: str = ""


class Photographs(Spec):
    """Photographs of many sizes, read and decoded as training goes.

    Attributes:
      image_size: height and width of what the network sees: a central square of the photograph, or
        a random part of it in training, resized.
      center_crop: the side of the central square, as a fraction of the shorter side.
      workers: processes that read and decode, each a photograph at a time, so more of them than
        cores where the storage is slow to answer; 0 to do it in threads of the training process,
        with a tenth less work an image.
    """

    image_size: Annotated[int, Field(ge=8, le=4096)] = 224
    center_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    workers: Annotated[int, Field(ge=0, le=1024)] = 0


class Splits(Checked):
    """Which of TFDS's splits are used, slices such as "train[:90%]" among them.

    Attributes:
      train_split: to train on; "" for the data set's own.
      eval_split: to evaluate on; "" for the data set's own.
    """

    train_split: str = ""
    eval_split: str = ""


class PreparedInMemory(Splits, InMemory):
    """A data set that TFDS prepared, of small images of one size."""


class PreparedPhotographs(Splits, Photographs):
    """A data set that TFDS prepared, of photographs.

    Attributes:
      data_dir: where TFDS's prepared data sets are; "" is TFDS's own default.
    """

    data_dir: str = ""


class Folder(Photographs):
    """A folder of pictures, a subfolder a class (see `train.data.folder.open_folder`).

    Attributes:
      path: the folder.
      classes: the names of those that are taken, in the order of their labels; () for all.
      eval_fraction: the fraction of the pictures to evaluate on, where the folder does not say.
      grey: whether the network sees one channel, not three.
      skip_damaged: whether files that are no pictures, or damaged ones, are passed over.
    """

    path: str
    classes: Annotated[
        tuple[str, ...], Field(strict=False, description="a tuple of names of subfolders")
    ] = ()
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    grey: bool = False
    skip_damaged: bool = False


AnySpec = InMemory | PreparedInMemory | PreparedPhotographs | Folder


def parse(data: Mapping[str, Any]) -> AnySpec:
    """Checks `config.data`; the mean and the deviation are the data set's own by default.

    Args:
      data: names and values of the fields of the class that fits the data set.

    Raises:
      UserError: for an unknown data set, a key that the data set has no use for, or a value of the
        wrong type or out of range.
    """
    name = data.get("name")
    if name == FOLDER:
        mean, std = GREY if data.get("grey") is True else IMAGENET
        return _parse(Folder, data, Known(None, 0, mean, std))
    known = facts(name, data.get("data_dir"))
    if name == "digits":
        return _parse(InMemory, data, known)
    return _parse(PreparedInMemory if known.shape else PreparedPhotographs, data, known)


def facts(name: Any, data_dir: Any = "") -> Known:
    """What is known of a data set, by us or by TFDS.

    Raises:
      UserError: neither knows it, or it is not for image classification.
    """
    if isinstance(name, str) and name in KNOWN:
        return KNOWN[name]
    found = None
    if isinstance(name, str) and isinstance(data_dir, str | None):
        found = tfds_facts.find(name, data_dir or "")
    if found is None:
        raise UserError(
            f"config.data.name is {name!r}; choose one of {', '.join(KNOWN)}, {FOLDER}, or an "
            "image classification data set of TensorFlow Datasets."
        )
    return found


def _parse(kind: type[Any], data: Mapping[str, Any], known: Known) -> Any:
    given = {"mean": known.mean, "std": known.std, **known.defaults, **data}
    spec = fields.parse(kind, given, "config.data", data["name"])
    channels = len(known.mean)
    for key, values in (("mean", spec.mean), ("std", spec.std)):
        if values != COMPUTED and len(values) != channels:
            raise UserError(
                f"config.data.{key} is {values}; {spec.name} has {channels} channel(s), so give as "
                "many numbers."
            )
    size = min(known.shape[:2]) if known.shape else spec.image_size
    if spec.crop_padding > size:
        raise UserError(
            f"config.data.crop_padding is {spec.crop_padding}; images of {spec.name} are only "
            f"{size} pixels high or wide, so choose less."
        )
    if channels == 1 and any(spec.color_jitter[2:]):
        raise UserError(
            f"config.data.color_jitter is {spec.color_jitter}; images of {spec.name} are grey, "
            "without saturation and hue, so make the last two 0."
        )
    return spec
