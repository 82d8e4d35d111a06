"""Data sets: `load` turns the `data` part of a configuration into batches."""

from collections.abc import Mapping
from typing import Any

from train.data import decoded, digits, imagenet, memory
from train.data.dataset import Batch, DataSet
from train.data.order import Order
from train.data.prepared import open_prepared
from train.data.spec import KNOWN, parse
from train.errors import UserError

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
      spec: `config.data`, a plain mapping with the fields of `train.data.spec.Spec`: `name`,
        `mean`, `std` and, where the defaults don't do, `data_dir`, `flip`, `crop_padding`,
        `image_size`, `workers`.
      batch_size: examples in a global batch, in training as in evaluation.
      seed: of the order of training examples and of ImageNet's crops; non-negative.
      process_index: this process's number among `process_count`.
      process_count: processes that share every batch.

    Returns:
      The data set as this process sees it.

    Raises:
      UserError: if the specification is wrong, if the data set is not there, is empty or holds a
        label out of range, or if the batch does not fit the number of processes.
    """
    parsed = parse(spec)
    _check_batch(batch_size, seed, process_count)

    def order(num_examples: int) -> Order:
        return Order(num_examples, batch_size, seed, process_index, process_count)

    shape = KNOWN[parsed.name].shape
    if shape is None:
        prepared = open_prepared(parsed.name, parsed.data_dir)
        num_train, num_eval = len(prepared.train), len(prepared.evaluation)
        return imagenet.data_set(parsed, prepared, order(num_train), order(num_eval))
    arrays = (
        digits.load()
        if parsed.name == "digits"
        else decoded.load(parsed.name, shape, parsed.data_dir)
    )
    num_train, num_eval = len(arrays.train_labels), len(arrays.eval_labels)
    return memory.data_set(parsed, arrays, order(num_train), order(num_eval))


def _check_batch(batch_size: int, seed: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size is {batch_size}; make it a positive multiple of the number of processes, "
            f"{process_count}."
        )
    if seed < 0:
        raise UserError(f"seed is {seed}; choose one that is not negative.")
