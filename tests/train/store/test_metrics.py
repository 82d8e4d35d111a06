"""metrics.jsonl and TensorBoard hold each logged step once, in order, whatever came between."""

import json
import pathlib
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from train.errors import StorageError, UserError
from train.files import write_json
from train.store.metrics import MetricsLog, read_records


def record(step: int) -> dict[str, float]:
    return {"step": step, "train/loss": 1 / step, "sparsity": 0.95}


def written(workdir: pathlib.Path, *steps: int, after: int = 0) -> MetricsLog:
    workdir.mkdir(exist_ok=True)
    log = MetricsLog(workdir, after)
    for step in steps:
        log.write(record(step))
    return log


def lines(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum, bit by bit (RFC 3720, B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """TFRecord's masked checksum (tensorflow/core/lib/hash/crc32c.h)."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(workdir: pathlib.Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of each event; every checksum is checked."""
    (path,) = (workdir / "tensorboard").glob("events.out.tfevents.*")
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12]) == (masked(data[:8]),)
        assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked(body),)
        event = Event.FromString(body)
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found


def assert_both_hold(workdir: pathlib.Path, *steps: int) -> None:
    assert lines(workdir) == [record(step) for step in steps]
    expected = [
        (step, name, pytest.approx(value))
        for step in steps
        for name, value in record(step).items()
        if name != "step"
    ]
    assert events(workdir) == expected


def test_each_record_is_a_line_and_its_values_are_events(tmp_path):
    log = written(tmp_path, 1, 2, 3)
    assert_both_hold(tmp_path, 1, 2, 3)  # before it is closed: a kill loses nothing
    log.close()


def test_records_after_the_restored_step_are_dropped(tmp_path):
    written(tmp_path, 1, 2, 3, 4).close()
    written(tmp_path, 3, 4, 5, after=2).close()
    assert_both_hold(tmp_path, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("torn", [b'{"step": 4, "tra', b"{", b"\xff\x00", b'{"step": 4}'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    written(tmp_path, 1, 2, 3).close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    written(tmp_path, 4, after=3).close()
    assert_both_hold(tmp_path, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "damage",
    [
        *(b"garbage", b"", b"[2]", b"\xff\xfe", b"2", b"[" * 100_000),
        *(b'{"step": "2"}', b'{"step": 1}', b'{"step": true}', b'{"step": 9223372036854775808}'),
        *(b'{"step": 2, "loss": %s}' % value for value in (b"NaN", b"1e999", b'"x"', b"null")),
    ],
)
def test_a_damaged_line_in_the_middle_is_named_and_nothing_changed(tmp_path, damage):
    written(tmp_path, 1, 2, 3).close()
    path = tmp_path / "metrics.jsonl"
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damage, third, b""]))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"^Line 2 of .*metrics\.jsonl is not the record of a "):
        MetricsLog(tmp_path, 3)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_no_file_is_no_records(tmp_path):
    assert read_records(tmp_path) == []


def test_nan_is_never_written(tmp_path):
    log = written(tmp_path)
    with pytest.raises(ValueError, match="Out of range float"):
        log.write({"step": 1, "train/loss": float("nan")})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "summary.json", {"loss": float("inf")})
    log.close()


def test_a_full_disk_tears_no_line_and_loses_none(tiny_disk):
    workdir = tiny_disk(262_144)
    log, steps = written(workdir), 600
    (workdir / "filler").write_bytes(bytes(220_000))
    for step in range(1, steps + 1):
        log.write(record(step))
    with pytest.raises(StorageError, match="No space left"):
        log.sync()
    assert lines(workdir) == [record(step) for step in range(1, len(lines(workdir)) + 1)]
    assert len(lines(workdir)) < steps
    (workdir / "filler").unlink()
    log.write(record(steps + 1))
    log.sync()
    log.close()
    assert_both_hold(workdir, *range(1, steps + 2))


def test_a_workdir_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        MetricsLog(tmp_path, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        MetricsLog(tmp_path, 0)
