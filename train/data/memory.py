"""Data sets that fit in memory: arrays, gathered into batches by NumPy."""

import dataclasses
import itertools
from collections.abc import Generator

import numpy as np
from jaxtyping import Int32, UInt8

from train.data.dataset import Batch
from train.data.order import Order


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A whole data set, decoded."""

    train_images: UInt8[np.ndarray, "n h w c"]
    train_labels: Int32[np.ndarray, " n"]
    eval_images: UInt8[np.ndarray, "m h w c"]
    eval_labels: Int32[np.ndarray, " m"]
    classes: tuple[str, ...] = ()

    @property
    def num_train(self) -> int:
        """Training examples."""
        return len(self.train_labels)

    @property
    def num_eval(self) -> int:
        """Evaluation examples."""
        return len(self.eval_labels)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Batches of `arrays` in the given orders."""

    arrays: Arrays
    train_order: Order
    eval_order: Order

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        height, width, channels = self.arrays.train_images.shape[1:]
        return height, width, channels

    def train_batches(self, step: int) -> Generator[Batch, None, None]:
        """As `DataSet.train_batches`."""
        positions = self.train_order.positions()
        for k in itertools.count(step):
            examples = self.train_order.train_examples(k)
            yield {
                "image": self.arrays.train_images[examples],
                "label": self.arrays.train_labels[examples],
                "index": positions,
            }

    def eval_batches(self) -> Generator[Batch, None, None]:
        """As `DataSet.eval_batches`."""
        for k in range(self.eval_order.eval_steps):
            examples, mask = self.eval_order.eval_examples(k)
            yield {
                "image": self.arrays.eval_images[examples],
                "label": self.arrays.eval_labels[examples],
                "mask": mask,
            }

    def train_image(self, number: int) -> UInt8[np.ndarray, "h w c"]:
        """A training image as evaluation would have it."""
        return self.arrays.train_images[number]

    def eval_image(self, number: int) -> UInt8[np.ndarray, "h w c"]:
        """An evaluation image."""
        return self.arrays.eval_images[number]

    def eval_name(self, number: int) -> str:
        """What people call an evaluation image."""
        return f"number {number}"
