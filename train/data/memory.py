"""Data sets that fit in memory: arrays, gathered into batches by NumPy, augmented on the device."""

import dataclasses
import functools
import itertools
from collections.abc import Generator

import numpy as np
from jaxtyping import Int32, UInt8

from train.data import augment
from train.data.augment import Augmentation
from train.data.dataset import Batch, DataSet
from train.data.order import Order
from train.data.spec import KNOWN, InMemory


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A whole data set, decoded."""

    train_images: UInt8[np.ndarray, "n h w c"]
    train_labels: Int32[np.ndarray, " n"]
    eval_images: UInt8[np.ndarray, "m h w c"]
    eval_labels: Int32[np.ndarray, " m"]
    classes: tuple[str, ...] = ()


def data_set(spec: InMemory, arrays: Arrays, train_order: Order, eval_order: Order) -> DataSet:
    """Batches of `arrays` in the given orders."""
    return DataSet(
        name=spec.name,
        image_shape=arrays.train_images.shape[1:],
        num_classes=KNOWN[spec.name].num_classes,
        num_train=len(arrays.train_images),
        num_eval=len(arrays.eval_images),
        train_batches=functools.partial(_train_batches, arrays, train_order),
        eval_batches=functools.partial(_eval_batches, arrays, eval_order),
        train_preprocess=functools.partial(
            augment.augment_and_normalize,
            mean=spec.mean,
            std=spec.std,
            augmentation=Augmentation(crop_padding=spec.crop_padding, flip=spec.flip),
        ),
        eval_preprocess=functools.partial(augment.normalize, mean=spec.mean, std=spec.std),
        classes=arrays.classes,
    )


def _train_batches(arrays: Arrays, order: Order, step: int) -> Generator[Batch, None, None]:
    positions = order.positions()
    for k in itertools.count(step):
        examples = order.train_examples(k)
        yield {
            "image": arrays.train_images[examples],
            "label": arrays.train_labels[examples],
            "index": positions,
        }


def _eval_batches(arrays: Arrays, order: Order) -> Generator[Batch, None, None]:
    for k in range(order.eval_steps):
        examples, mask = order.eval_examples(k)
        yield {
            "image": arrays.eval_images[examples],
            "label": arrays.eval_labels[examples],
            "mask": mask,
        }
