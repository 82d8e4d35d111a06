"""What a finalised network makes of every evaluation example, and the measures that come of it."""

import dataclasses
import pathlib

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One entry for each evaluation example.

    Attributes:
      example: its number in the evaluation split.
      label: its class.
      prediction: the class of the largest logit.
      rank: how many classes come before its own when sorted by logit: 0 where it is right.
      loss: its cross entropy in nats.
    """

    example: Int32[np.ndarray, " n"]
    label: Int32[np.ndarray, " n"]
    prediction: Int32[np.ndarray, " n"]
    rank: Int32[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]

    @property
    def figures(self) -> dict[str, float]:
        """`eval/loss` (the mean, in nats), `eval/accuracy` and `eval/examples`."""
        return {
            "eval/loss": float(np.mean(self.loss, dtype=np.float64)),
            "eval/accuracy": float(np.mean(self.prediction == self.label)),
            "eval/examples": len(self.label),
        }

    def top(self, k: int) -> float:
        """The fraction of the examples whose class is among the k first."""
        return float(np.mean(self.rank < k))

    def confusion(self, num_classes: int) -> Int[np.ndarray, "classes classes"]:
        """How many examples of each class (rows) were taken for each class (columns)."""
        cells = self.label.astype(np.int64) * num_classes + self.prediction
        return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)

    def most_wrong(self, count: int) -> Int[np.ndarray, " m"]:
        """Which entries are wrong with the largest loss, the worst first, at most `count`."""
        (wrong,) = np.nonzero(self.prediction != self.label)
        return wrong[np.argsort(-self.loss[wrong], kind="stable")][:count]


def accuracy_by_class(
    confusion: Int[np.ndarray, "classes classes"],
) -> Float[np.ndarray, " classes"]:
    """The fraction of each class's examples that are right, NaN for a class without any."""
    totals = confusion.sum(1)
    right = np.diagonal(confusion)
    return np.divide(right, totals, out=np.full(len(totals), np.nan), where=totals > 0)


def largest_confusions(
    confusion: Int[np.ndarray, "classes classes"], count: int
) -> list[tuple[int, int, int]]:
    """(class, what it was taken for, how often), the most frequent first, at most `count`."""
    off_diagonal = confusion - np.diag(np.diagonal(confusion))
    order = np.argsort(-off_diagonal, axis=None, kind="stable")[:count]
    rows, columns = np.unravel_index(order, confusion.shape)
    cells = zip(rows.tolist(), columns.tolist(), off_diagonal[rows, columns].tolist(), strict=True)
    return [(row, column, number) for row, column, number in cells if number]


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """An example that is wrong, as people see it.

    Attributes:
      entry: which of the predictions it is.
      name: the picture's path below its folder, or its number.
      image: the picture as the network sees it, made small.
    """

    entry: int
    name: str
    image: UInt8[np.ndarray, "h w c"]


def save(
    path: pathlib.Path, predictions: Predictions, thumbnails: tuple[Thumbnail, ...] = ()
) -> None:
    """Writes predictions and thumbnails, all of one shape, into one file.

    Raises:
      OSError: it can't be written.
    """
    with path.with_name(f"{path.name}.tmp").open("wb") as file:
        np.savez_compressed(
            file,
            **dataclasses.asdict(predictions),
            entries=np.array([thumbnail.entry for thumbnail in thumbnails], np.int32),
            names=np.array([thumbnail.name for thumbnail in thumbnails], np.str_),
            images=np.array([thumbnail.image for thumbnail in thumbnails], np.uint8),
        )
    path.with_name(f"{path.name}.tmp").replace(path)


def load(path: pathlib.Path) -> tuple[Predictions, tuple[Thumbnail, ...]] | None:
    """What `save` wrote; None if it is not there or is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            fields = [field.name for field in dataclasses.fields(Predictions)]
            predictions = Predictions(**{name: file[name] for name in fields})
            rows = zip(
                file["entries"].tolist(), file["names"].tolist(), file["images"], strict=True
            )
            return predictions, tuple(Thumbnail(*row) for row in rows)
    except Exception:  # a damaged header makes NumPy and zipfile raise anything
        return None
