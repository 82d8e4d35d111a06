"""Data sets that `python -m train.prepare` wrote, read by TFDS without TensorFlow."""

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from train.data.known import Known
from train.errors import UserError, one_line


class Missing(UserError):
    """A data set has not been prepared."""


@dataclasses.dataclass(frozen=True)
class Records:
    """One split of a prepared data set, images left encoded. It may be sent to other processes.

    Attributes:
      where: the data set, its split and its directory, for error messages.
      remedy: what to do if it is damaged, for error messages.
      known: the facts of the data set.
      source: what `tfds.data_source` gave: serialised tf.train.Example messages by number.
    """

    where: str
    remedy: str
    known: Known
    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def read(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """The records of these numbers: dicts with `image`, encoded bytes, and `label`.

        Raises:
          UserError: if one can't be read or its label is out of range.
        """
        numbers = list(map(int, numbers))
        with self._sentences():
            records = [self._parse(record) for record in self.source.__getitems__(numbers)]
        return [self._checked(n, record) for n, record in zip(numbers, records, strict=True)]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One record as `read` gives it: a third of the time if it is large, thrice if small."""
        with self._sentences():
            record = self._parse(self.source[int(number)])
        return self._checked(number, record)

    @contextlib.contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ArrayRecord and the parsers above it raise anything
            raise UserError(
                f"{self.where} can't be read ({one_line(error)}); {self.remedy}."
            ) from error

    def _checked(self, number: int, record: dict[str, Any]) -> dict[str, Any]:
        classes = self.known.num_classes
        if not 0 <= record["label"] < classes:
            raise self.error(number, f"has label {record['label']}, not one in [0, {classes})")
        return record

    def _parse(self, record: bytes) -> dict[str, Any]:
        """The two features that are read, six times as fast as TFDS reads all of them."""
        features = tf_example_pb2.Example.FromString(record).features.feature
        return {
            "image": features[self.known.image].bytes_list.value[0],
            "label": features[self.known.label].int64_list.value[0],
        }

    def name(self, number: int) -> str:
        """What people call a record."""
        return f"number {number}"

    def error(self, number: int, complaint: str) -> UserError:
        """What to raise about a record."""
        return UserError(f"Record {number} of {self.where} {complaint}; {self.remedy}.")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set.

    Attributes:
      name: TFDS's name of it.
      directory: where its files are.
      train: the training split.
      evaluation: the evaluation split.
      classes: the names of the classes.
    """

    name: str
    directory: str
    train: Records
    evaluation: Records
    classes: tuple[str, ...]


def open_prepared(
    name: str, data_dir: str, known: Known, train_split: str = "", eval_split: str = ""
) -> Prepared:
    """Opens both splits of a data set.

    Args:
      name: TFDS's.
      data_dir: the directory that was given to `train.prepare`, "" for TFDS's default.
      known: the facts of the data set.
      train_split: to train on, "" for the data set's own.
      eval_split: to evaluate on, "" for the data set's own.

    Raises:
      Missing: if the data set is not there.
      UserError: if it lacks a split, or examples in one, or can't be read.
    """
    command = f"python -m train.prepare {name}" + (
        f" --data_dir {shlex.quote(data_dir)}" if data_dir else ""
    )
    directory = os.path.join(data_dir or "TFDS's default data_dir", name)
    try:
        builder = tfds.builder(name, data_dir=os.path.expanduser(data_dir) or None)
        directory = os.fspath(builder.data_path)
        if not builder.is_prepared():
            raise Missing(f"{name} is not in {directory}; prepare it with `{command}`.")
        remedy = f"delete {directory} and prepare it anew with `{command}`"
        names = (
            train_split or known.train_split,
            eval_split or known.eval_split or _evaluation_split(builder),
        )
        for split, given in zip(names, (train_split, eval_split), strict=True):
            if not _has_examples(builder, split):
                mend = "give another" if given else remedy
                raise UserError(
                    f"{name} in {directory} has no examples in its split {split!r}; {mend}."
                )
        sources = tfds.data_source(
            name,
            split=list(names),
            data_dir=os.path.expanduser(data_dir) or None,
            download=False,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        )
        classes = tuple(builder.info.features[known.label].names)
    except UserError:
        raise
    except Exception as error:  # damaged metadata make TFDS and its parsers raise anything
        raise UserError(
            f"{name} in {directory} can't be opened ({one_line(error)}); "
            f"delete the directory and prepare it anew with `{command}`."
        ) from error
    train, evaluation = (
        Records(f"{name}'s split {split!r} in {directory}", remedy, known, source)
        for split, source in zip(names, sources, strict=True)
    )
    return Prepared(name, directory, train, evaluation, classes)


def _evaluation_split(builder: Any) -> str:
    """The split to evaluate on where neither we nor the user say."""
    for split in ("validation", "test"):
        if split in builder.info.splits:
            return split
    raise UserError(
        f"{builder.info.full_name} has the split(s) {', '.join(builder.info.splits)} and none to "
        'evaluate on; give some of it, as with --config.data.train_split="train[:90%]" and '
        '--config.data.eval_split="train[90%:]".'
    )


def _has_examples(builder: Any, split: str) -> bool:
    try:
        return builder.info.splits[split].num_examples > 0
    except (KeyError, ValueError):  # no such split, or no slice of one
        return False
