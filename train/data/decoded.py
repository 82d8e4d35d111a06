"""Prepared data sets that fit in memory: decoded once, then kept as arrays on disk."""

import contextlib
import hashlib
import pathlib

import cv2
import numpy as np
from jaxtyping import Int32, UInt8

from train.data import kept
from train.data.memory import Arrays
from train.data.prepared import Prepared, Records

_CHUNK = 1024  # TFDS reads many records at once three times as fast as one by one


def load(prepared: Prepared, shape: tuple[int, int, int]) -> Arrays:
    """The whole of a data set that `train.prepare` wrote.

    The first call decodes it, which takes seconds, and keeps the arrays in the user's cache
    directory for the next. Processes may start at once: each writes a file of its own and renames
    it. A file that is damaged or was made of other records is replaced; a directory that can't be
    written is no error.

    Args:
      prepared: the data set.
      shape: (height, width, channels) of its images.

    Raises:
      UserError: if a record is damaged, of another shape or of a class that the data set does not
        have.
    """
    directory = pathlib.Path(prepared.directory)
    splits = [prepared.train.where, prepared.evaluation.where]
    path = kept.place(prepared.name.replace("/", "-"), "\0".join(splits))
    made_of = np.array(_fingerprint(directory))
    arrays = kept.read(path)
    if arrays.get("made_of") != made_of:
        train, evaluation = _decode(prepared.train, shape), _decode(prepared.evaluation, shape)
        arrays = {
            "train_images": train[0],
            "train_labels": train[1],
            "eval_images": evaluation[0],
            "eval_labels": evaluation[1],
        }
        # A full disk or a read-only home costs time at the next start, no more.
        with contextlib.suppress(OSError):
            kept.write(path, arrays | {"made_of": made_of})
    return Arrays(
        arrays["train_images"],
        arrays["train_labels"],
        arrays["eval_images"],
        arrays["eval_labels"],
        prepared.classes,
    )


def _decode(
    records: Records, shape: tuple[int, int, int]
) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"]]:
    images = np.empty((len(records), *shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), _CHUNK):
        numbers = range(start, min(start + _CHUNK, len(records)))
        for i, record in zip(numbers, records.read(numbers), strict=True):
            encoded = np.frombuffer(record["image"], np.uint8)
            image = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED) if encoded.size else None
            if image is None:
                raise records.error(i, "is not an image")
            image = image[..., None] if image.ndim == 2 else image[..., ::-1]  # OpenCV has BGR
            if image.shape != shape or image.dtype != np.uint8:
                raise records.error(i, f"is {image.dtype} {image.shape}, not uint8 {shape}")
            images[i], labels[i] = image, record["label"]
    return images, labels


def _fingerprint(directory: pathlib.Path) -> str:
    """Names, sizes and times of the files that the arrays are made of."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in directory.iterdir())
    return hashlib.sha256(repr(files).encode()).hexdigest()
