"""Data sets: `load` turns the `data` part of a configuration into batches."""

import functools
from collections.abc import Mapping
from typing import Any

from train.data import augment, decoded, digits, encoded, memory, statistics
from train.data.augment import Augmentation
from train.data.dataset import Batch, DataSet
from train.data.encoded import Pictures
from train.data.folder import open_folder
from train.data.known import KNOWN
from train.data.memory import Arrays
from train.data.order import Order
from train.data.prepared import open_prepared
from train.data.spec import (
    COMPUTED,
    AnySpec,
    Folder,
    Photographs,
    PreparedInMemory,
    PreparedPhotographs,
    facts,
    parse,
)

__all__ = ["KNOWN", "Batch", "DataSet", "load"]


def load(
    spec: Mapping[str, Any],
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> DataSet:
    """Opens a data set.

    Args:
      spec: `config.data`, a plain mapping with the fields that `train.data.spec` declares.
      batch_size: examples in a global batch, in training as in evaluation; a multiple of
        process_count.
      seed: of the order of training examples and of photographs' crops; non-negative.
      process_index: this process's number among `process_count`.
      process_count: processes that share every batch.

    Returns:
      The data set as this process sees it.

    Raises:
      UserError: if the specification is wrong, or if the data set is not there, is empty or holds
        a label out of range.
    """
    parsed = parse(spec)
    contents, notes = _open(parsed)

    def order(num_examples: int) -> Order:
        return Order(num_examples, batch_size, seed, process_index, process_count)

    orders = order(contents.num_train), order(contents.num_eval)
    reader: memory.Reader | encoded.Reader
    if isinstance(contents, Arrays):
        reader = memory.Reader(contents, *orders)
    else:
        assert isinstance(parsed, Photographs)
        reader = encoded.Reader(parsed, contents, *orders)

    found: dict[str, Any] = {}
    if isinstance(parsed, Folder):
        found["classes"] = list(contents.classes)
    given = {"mean": parsed.mean, "std": parsed.std}
    if COMPUTED in given.values():
        sample = statistics.of_sample(reader.train_image, contents.num_train)
        found |= {name: list(sample[name]) for name in given if given[name] == COMPUTED}
    mean, std = (tuple(found.get(name, given[name])) for name in ("mean", "std"))
    return DataSet(
        name=parsed.name,
        image_shape=reader.image_shape,
        num_classes=len(contents.classes),
        num_train=contents.num_train,
        num_eval=contents.num_eval,
        train_batches=reader.train_batches,
        eval_batches=reader.eval_batches,
        train_preprocess=functools.partial(
            augment.augment_and_normalize, augmentation=_on_device(parsed), mean=mean, std=std
        ),
        eval_preprocess=functools.partial(augment.normalize, mean=mean, std=std),
        mean=mean,
        std=std,
        eval_image=reader.eval_image,
        eval_name=reader.eval_name,
        classes=contents.classes,
        found=found,
        notes=notes,
    )


def _open(parsed: AnySpec) -> tuple[Arrays | Pictures, tuple[str, ...]]:
    """What a data set holds, and what people should know about it."""
    if isinstance(parsed, Folder):
        folder = open_folder(
            parsed.path,
            classes=parsed.classes,
            eval_fraction=parsed.eval_fraction,
            skip_damaged=parsed.skip_damaged,
        )
        channels = 1 if parsed.grey else 3
        return Pictures(folder.train, folder.evaluation, folder.classes, channels), folder.notes
    if not isinstance(parsed, PreparedInMemory | PreparedPhotographs):
        return digits.load(), ()
    known = facts(parsed.name, parsed.data_dir)
    prepared = open_prepared(
        parsed.name, parsed.data_dir, known, parsed.train_split, parsed.eval_split
    )
    if known.shape:
        return decoded.load(prepared, known.shape), ()
    train, evaluation = prepared.train, prepared.evaluation
    return Pictures(train, evaluation, prepared.classes, len(known.mean)), ()


def _on_device(parsed: AnySpec) -> Augmentation:
    """What is left to do of the augmentation where photographs are cropped and flipped already."""
    on_host = isinstance(parsed, Photographs)
    return Augmentation(
        random_resized_crop=0.0 if on_host else parsed.random_resized_crop,
        crop_padding=parsed.crop_padding,
        flip=parsed.flip and not on_host,
        color_jitter=parsed.color_jitter,
    )
