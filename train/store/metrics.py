"""What a run writes while it goes: metrics.jsonl, and the same scalars as TensorBoard events."""

import contextlib
import json
import math
import os
import pathlib
import struct
import time
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from train.errors import UserError, writing
from train.files import write_atomically

Record = dict[str, Any]


class MetricsLog:
    """The metrics of a run, one JSON object a logged step, each step once over all restarts.

    On opening, records after `step` and a torn last line are dropped, since the run is about to
    repeat those updates, and TensorBoard's events are written anew from the records that stay.

    Args:
      workdir: the run's folder.
      step: the number of updates from which the run goes on.

    Raises:
      UserError: metrics.jsonl is damaged, and nothing was changed.
      StorageError: the folder cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        self._workdir = workdir
        self.records = [record for record in read_records(workdir) if record["step"] <= step]
        events = workdir / "tensorboard" / f"events.out.tfevents.{int(time.time()):010d}.feather"
        with writing(workdir):
            lines = "".join(map(_line, self.records))
            write_atomically(workdir / "metrics.jsonl", lines)
            events.parent.mkdir(exist_ok=True)
            for old in events.parent.glob("events.out.tfevents.*"):
                old.unlink()
            self._lines = _AppendedFile(workdir / "metrics.jsonl")
            self._events = _AppendedFile(events)
            self._events.append(_event(file_version="brain.Event:2"))
            for record in self.records:
                self._events.append(_scalars(record))

    def write(self, record: Record) -> None:
        """Appends a record, which holds `step` and is later than all before.

        What the disk has no room for is kept, and written with what comes later.
        """
        self.records.append(record)
        self._lines.append(_line(record).encode())
        self._events.append(_scalars(record))

    def sync(self) -> None:
        """Sees to it that all records are on disk, as a checkpoint that comes after them wants.

        Raises:
          StorageError: they are not.
        """
        with writing(self._workdir):
            self._lines.sync()
            self._events.sync()

    def close(self) -> None:
        """Closes the files."""
        self._lines.close()
        self._events.close()


class _AppendedFile:
    """A file of whole records: what cannot be written is taken back, kept and tried again."""

    def __init__(self, path: pathlib.Path):
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._pending = b""

    def append(self, data: bytes) -> None:
        self._pending += data
        with contextlib.suppress(OSError):
            self._flush()

    def sync(self) -> None:
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        rest = self._pending
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._pending = b""
        self._size = self._file.tell()


def read_records(workdir: pathlib.Path) -> list[Record]:
    """The records of metrics.jsonl, [] without one; a torn last line is left out.

    Raises:
      UserError: another line is no record, or it cannot be read.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    with writing(path):
        *lines, last = path.read_bytes().split(b"\n")
    if _record(last) is not None:  # all of it but the end of its line
        lines.append(last)
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None or (records and record["step"] <= records[-1]["step"]):
            raise UserError(
                f"Line {number} of {path} is not the record of a later step ({line[:60]!r}); "
                "delete that line, or the file to go on without what was logged before."
            )
        records.append(record)
    return records


def _record(line: bytes) -> Record | None:
    """The record in a line; None if there is none."""
    try:
        record = json.loads(line)
        step, numbers = record["step"], [*record.values()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    finite = all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
    return record if finite and type(step) is int and 0 <= step < 2**31 else None


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _scalars(record: Record) -> bytes:
    """A record's values as TensorBoard has them, one event each."""
    return b"".join(
        _event(step=record["step"], summary=scalar(name, value))
        for name, value in record.items()
        if name != "step"
    )


def _event(**fields: Any) -> bytes:
    """One event in the framing of TFRecord: length, its checksum, data, its checksum.

    tensorboardX's writer would do it, in a thread that a full disk ends.
    """
    data = Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(data))
    framed = [part + struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return b"".join(framed)
