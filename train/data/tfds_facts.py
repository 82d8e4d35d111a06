"""What TFDS knows of an image classification data set, whether or not it is prepared."""

import math
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from train.data.known import GREY, IMAGENET, Known
from train.errors import UserError, one_line

LARGEST_SIDE = 64  # of images that are kept in memory
LARGEST_BYTES = 4 << 30  # of all of them together


def find(name: str, data_dir: str) -> Known | None:
    """The facts of a data set.

    Args:
      name: as TFDS has it, with the builder's config if need be: `emnist/letters`.
      data_dir: the directory that was given to `train.prepare`, "" for TFDS's default.

    Returns:
      None if TFDS has no such data set.

    Raises:
      UserError: its examples are not an image with a class, or TFDS can't tell.
    """
    if not name:
        return None
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
    except tfds.core.registered.DatasetNotFoundError:
        return None
    except Exception as error:  # builders and what they import raise anything
        raise UserError(
            f"TFDS can't tell what {name} is ({one_line(error)}); correct config.data.name, or "
            "install what it needs."
        ) from error
    image, label = _image_and_label(builder)
    shape, dtype = image.shape, np.dtype(image.np_dtype)
    if shape[-1] not in (1, 3) or dtype != np.uint8:
        raise UserError(
            f"{name} has images of {shape[-1]} channel(s) of {dtype}; choose a data set with 1 or "
            "3 channels of uint8."
        )
    mean, std = IMAGENET if shape[-1] == 3 else GREY
    return Known(
        shape=shape if _fits(builder, shape) else None,
        num_classes=label.num_classes,
        mean=mean,
        std=std,
        eval_split="",
        image=_key_of(builder, image),
        label=_key_of(builder, label),
    )


def _image_and_label(builder: Any) -> tuple[Any, Any]:
    """The features that are the image and the class: the supervised pair, or the only ones."""
    all_features = builder.info.features
    features = dict(all_features.items()) if hasattr(all_features, "items") else {}
    keys = builder.info.supervised_keys or tuple(features)
    chosen = [features[key] for key in keys if isinstance(key, str) and key in features]
    images = [each for each in chosen if isinstance(each, tfds.features.Image)]
    labels = [each for each in chosen if isinstance(each, tfds.features.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise UserError(
            f"{builder.name} is not for image classification: its examples are of "
            f"{', '.join(features) or 'one feature'}; choose a data set whose examples have one "
            "image and one class."
        )
    return images[0], labels[0]


def _key_of(builder: Any, feature: Any) -> str:
    return next(key for key, each in builder.info.features.items() if each is feature)


def _fits(builder: Any, shape: tuple[int | None, ...]) -> bool:
    """Whether images have one shape, a small one, and all of them fit in memory."""
    sides = [side for side in shape if side is not None]
    if len(sides) < len(shape) or max(sides) > LARGEST_SIDE:
        return False
    count = sum(split.num_examples for split in builder.info.splits.values())
    return math.prod(sides) * count <= LARGEST_BYTES
