"""What the training program knows of a data set: sizes, batches, preprocessing on the device."""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Key, UInt8

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set as one process of a run sees it.

    Batches are dicts of NumPy arrays that hold this process's slice of a global batch, b =
    batch_size // process_count examples. For training: `image` uint8 [b, h, w, c], `label` int32
    [b] and `index` int32 [b], the position of each example in the global batch. For evaluation:
    `image`, `label` and `mask` bool [b], False where an entry is padding.

    Attributes:
      name: the data set's name, as the configuration gives it.
      image_shape: (height, width, channels) of the images that the model sees.
      num_classes: labels are in [0, num_classes).
      num_train: training examples, over all processes.
      num_eval: evaluation examples, over all processes.
      train_batches: train_batches(step) yields this process's slices of the global batches of
        updates step, step + 1, ..., without end. Update k is the same whichever step the iterator
        was started from.
      eval_batches: yields every evaluation example exactly once over all processes; all processes
        get equally many batches of equal shape.
      train_preprocess: images and one PRNG key an example to augmented, normalised float32 images;
        for use inside the jitted step.
      eval_preprocess: images to normalised float32 images.
      mean: what the preprocessing subtracts from pixels in [0, 1], by channel.
      std: what it then divides them by, by channel.
      eval_image: an evaluation example by its number: uint8 [h, w, c].
      eval_name: what people call it: a folder's picture by its path, another by its number.
      classes: the names of the classes in the order of the labels, or ().
      found: what was found out about the data set, as fields of `config.data`.
      notes: what people should know about it, a sentence each.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    num_train: int
    num_eval: int
    train_batches: Callable[[int], Generator[Batch, None, None]]
    eval_batches: Callable[[], Generator[Batch, None, None]]
    train_preprocess: Callable[[UInt8[Array, "b h w c"], Key[Array, " b"]], Float[Array, "b h w c"]]
    eval_preprocess: Callable[[UInt8[Array, "b h w c"]], Float[Array, "b h w c"]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_image: Callable[[int], UInt8[np.ndarray, "h w c"]]
    eval_name: Callable[[int], str]
    classes: tuple[str, ...] = ()
    found: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """What a run that goes on must find again, since the order of its batches hangs on it."""
        return {"training": self.num_train, "evaluation": self.num_eval}
