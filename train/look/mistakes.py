"""What a network gets right and wrong, class by class and picture by picture."""

import base64
import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from train.data import DataSet
from train.errors import UserError
from train.store.predictions import (
    Predictions,
    Thumbnail,
    accuracy_by_class,
    largest_confusions,
)

THUMBNAILS = 24
LARGEST_MATRIX = 25  # classes: a larger table is no longer read

_LARGEST_SIDE = 96  # pixels of a thumbnail


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """How the examples of one class fare.

    Attributes:
      name: of the class.
      examples: how many there are.
      right: how many of them are right.
      accuracy: the fraction; None without examples.
      cells: how many are taken for each class.
      taken_for: the class that they are most often taken for by mistake, with the number; "" if
        none is.
    """

    name: str
    examples: int
    right: int
    accuracy: float | None
    cells: tuple[int, ...]
    taken_for: str


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A picture that is wrong.

    Attributes:
      source: the picture, as an address that holds it.
      name: what people call it.
      label: its class.
      prediction: what it was taken for.
      loss: in nats.
    """

    source: str
    name: str
    label: str
    prediction: str
    loss: float


def class_rows(
    confusion: Int[np.ndarray, "classes classes"], names: Sequence[str]
) -> list[ClassRow]:
    """A row for each class, in the order of the labels."""
    rows = []
    for label, accuracy in enumerate(accuracy_by_class(confusion).tolist()):
        cells = confusion[label]
        wrong = np.where(np.arange(len(cells)) == label, 0, cells)
        most = int(wrong.argmax())
        rows.append(
            ClassRow(
                name=names[label],
                examples=int(cells.sum()),
                right=int(cells[label]),
                accuracy=None if np.isnan(accuracy) else accuracy,
                cells=tuple(cells.tolist()),
                taken_for=f"{names[most]} ({wrong[most]:,})" if wrong[most] else "",
            )
        )
    return rows


def confusions(
    confusion: Int[np.ndarray, "classes classes"], names: Sequence[str], count: int = 20
) -> list[tuple[str, str, int]]:
    """(class, what it was taken for, how often) by name, the most frequent first."""
    found = largest_confusions(confusion, count)
    return [(names[label], names[prediction], number) for label, prediction, number in found]


def thumbnails(data: DataSet, predictions: Predictions) -> tuple[Thumbnail, ...]:
    """The examples that are most wrong, as pictures; without those that can no longer be read."""
    found = []
    for entry in predictions.most_wrong(THUMBNAILS).tolist():
        number = int(predictions.example[entry])
        try:
            found.append(Thumbnail(entry, data.eval_name(number), small(data.eval_image(number))))
        except UserError:
            continue
    return tuple(found)


def small(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    """An image, made smaller if it is large."""
    height, width, channels = image.shape
    scale = _LARGEST_SIDE / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    smaller = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return smaller.reshape(size[1], size[0], channels)


def mistakes(
    predictions: Predictions, shown: Sequence[Thumbnail], names: Sequence[str]
) -> list[Mistake]:
    """The thumbnails with what is said below them."""
    return [
        Mistake(
            source=as_address(thumbnail.image),
            name=thumbnail.name,
            label=names[predictions.label[thumbnail.entry]],
            prediction=names[predictions.prediction[thumbnail.entry]],
            loss=float(predictions.loss[thumbnail.entry]),
        )
        for thumbnail in shown
    ]


def as_address(image: UInt8[np.ndarray, "h w c"]) -> str:
    """A PNG file as an address that holds all of it."""
    encoded = cv2.imencode(".png", image[..., ::-1])[1]  # OpenCV has BGR
    return f"data:image/png;base64,{base64.b64encode(encoded.tobytes()).decode()}"
