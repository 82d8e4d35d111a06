"""Data sets: `load` turns the `data` part of a configuration into batches."""

from collections.abc import Mapping
from typing import Any

from train.data import decoded, digits, imagenet, memory
from train.data.dataset import Batch, DataSet
from train.data.order import Order
from train.data.prepared import open_prepared
from train.data.spec import KNOWN, Photographs, parse

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
      seed: of the order of training examples and of ImageNet's crops; non-negative.
      process_index: this process's number among `process_count`.
      process_count: processes that share every batch.

    Returns:
      The data set as this process sees it.

    Raises:
      UserError: if the specification is wrong, or if the data set is not there, is empty or holds
        a label out of range.
    """
    parsed = parse(spec)

    def order(num_examples: int) -> Order:
        return Order(num_examples, batch_size, seed, process_index, process_count)

    if isinstance(parsed, Photographs):
        prepared = open_prepared(parsed.name, parsed.data_dir)
        num_train, num_eval = len(prepared.train), len(prepared.evaluation)
        return imagenet.data_set(parsed, prepared, order(num_train), order(num_eval))
    shape = KNOWN[parsed.name].shape
    assert shape is not None  # or `parse` would have given Photographs
    arrays = (
        digits.load()
        if parsed.name == "digits"
        else decoded.load(parsed.name, shape, parsed.data_dir)
    )
    num_train, num_eval = len(arrays.train_labels), len(arrays.eval_labels)
    return memory.data_set(parsed, arrays, order(num_train), order(num_eval))
