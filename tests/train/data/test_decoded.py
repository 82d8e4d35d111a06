"""Prepared data sets that fit in memory, and the cache of their arrays."""

import os
import pathlib
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from train import data
from train.errors import UserError

SPEC = {"name": "cifar10", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
IMAGES = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
LABELS = np.arange(30) % 10
CLASSES = ("airplane", "automobile", *(f"animal {i}" for i in range(8)))


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def examples(images=IMAGES, labels=LABELS):
    pairs = zip(images, labels, strict=True)
    return [{"image": png(image), "label": int(label)} for image, label in pairs]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cifar10(tmp_path, cache, write_prepared):
    """A data_dir with a cifar10 of 20 training and 10 test images."""
    splits = {"train": examples()[:20], "test": examples()[20:]}
    directory = write_prepared(tmp_path / "data", "cifar10", splits)
    (directory / "label.labels.txt").write_text("\n".join(CLASSES))
    return tmp_path / "data"


def load(data_dir, batch_size=10):
    return data.load(SPEC | {"data_dir": str(data_dir)}, batch_size=batch_size, seed=0)


def check_whole(data_set):
    (evaluation,) = data_set.eval_batches()
    np.testing.assert_array_equal(evaluation["image"], IMAGES[20:])
    np.testing.assert_array_equal(evaluation["label"], LABELS[20:])
    batches = data_set.train_batches(0)
    train = np.concatenate([next(batches)["image"], next(batches)["image"]])
    assert sorted(map(bytes, train)) == sorted(map(bytes, IMAGES[:20]))


def entry(cache):
    (path,) = cache.rglob("*.npz")
    return path


def break_decoding(monkeypatch):
    """From here on, arrays can come from the cache alone."""
    monkeypatch.setattr(cv2, "imdecode", None)


def test_a_data_set_is_read_whole_then_from_the_cache(cifar10, cache, monkeypatch):
    check_whole(load(cifar10))
    assert load(cifar10).classes == CLASSES
    break_decoding(monkeypatch)
    check_whole(load(cifar10))
    assert load(cifar10).classes == CLASSES
    assert [path.name for path in entry(cache).parent.iterdir()] == [entry(cache).name]


def test_decoding_agrees_with_tfds(cifar10):
    (batch,) = load(cifar10).eval_batches()
    source = tfds.data_source("cifar10", split="test", data_dir=cifar10, download=False)
    np.testing.assert_array_equal(batch["image"], [example["image"] for example in source])
    np.testing.assert_array_equal(batch["label"], [example["label"] for example in source])


def test_a_damaged_cache_is_made_anew(cifar10, cache, monkeypatch):
    """Wherever a byte is wrong or the file ends, the arrays are right all the same."""
    check_whole(load(cifar10))
    whole = entry(cache).read_bytes()
    for position in [*range(0, 400, 37), *range(400, len(whole), len(whole) // 30)]:
        wrong = bytearray(whole)
        wrong[position] ^= 0x55
        for damaged in (bytes(wrong), whole[:position]):
            entry(cache).write_bytes(damaged)
            check_whole(load(cifar10))
    break_decoding(monkeypatch)
    check_whole(load(cifar10))


def test_records_prepared_anew_replace_the_cache(cifar10, cache, tmp_path, write_prepared):
    load(cifar10)
    for path in sorted(cifar10.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    splits = {"train": examples(255 - IMAGES)[:20], "test": examples(255 - IMAGES)[20:]}
    write_prepared(cifar10, "cifar10", splits)
    (batch,) = load(cifar10).eval_batches()
    np.testing.assert_array_equal(batch["image"], 255 - IMAGES[20:])
    assert entry(cache)


def test_a_cache_that_cannot_be_written_is_no_error(cifar10, cache):
    cache.write_text("a file where the directory would be")
    check_whole(load(cifar10))


def test_what_a_killed_process_left_is_removed_and_not_what_another_writes(cifar10, cache):
    folder = cache / "feather_jax" / "data"
    folder.mkdir(parents=True)
    for name, age in (("left.tmp", 7200), ("being_written.tmp", 10)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    load(cifar10)
    assert {path.name for path in folder.iterdir()} == {"being_written.tmp", entry(cache).name}


@pytest.mark.slow
def test_two_processes_may_start_at_once(cifar10, cache, monkeypatch):
    program = (
        "from train import data\n"
        f"s = data.load({SPEC | {'data_dir': str(cifar10)}!r}, batch_size=10, seed=0)\n"
        "print(sum(b['image'].astype(int).sum() for b in s.eval_batches()))\n"
        "import sys; assert 'tensorflow' not in sys.modules"
    )
    root = pathlib.Path(data.__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [f"{IMAGES[20:].astype(int).sum()}\n"] * 2
    break_decoding(monkeypatch)
    check_whole(load(cifar10))
    assert len(list(entry(cache).parent.iterdir())) == 1


def test_a_missing_data_set_names_the_command(tmp_path, cache):
    with pytest.raises(UserError) as error:
        load(tmp_path / "my data")
    command = f"`python -m train.prepare cifar10 --data_dir '{tmp_path}/my data'`"
    assert command in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": 10}, r"Record 3 .*'train' in .* has label 10, not one in \[0, 10\)"),
        ({"label": -1}, "Record 3 .* has label -1"),
        ({"image": png(IMAGES[3, :16])}, r"Record 3 .* \(16, 32, 3\), not uint8 \(32, 32, 3\)"),
        ({"image": png(IMAGES[3, ..., :1])}, r"Record 3 .* \(32, 32, 1\)"),
        ({"image": b"no image"}, "Record 3 .* is not an image"),
        ({"image": b""}, "Record 3 .* is not an image"),
    ],
)
def test_a_wrong_record_is_one_sentence(tmp_path, cache, write_prepared, change, says):
    train = examples()[:20]
    train[3] |= change
    write_prepared(tmp_path, "cifar10", {"train": train, "test": examples()[20:]})
    with pytest.raises(UserError, match=says) as error:
        load(tmp_path)
    assert f"`python -m train.prepare cifar10 --data_dir {tmp_path}`" in str(error.value)


def test_a_damaged_file_of_records_is_one_sentence(cifar10):
    (path,) = cifar10.rglob("*train.array_record*")
    content = bytearray(path.read_bytes())
    position = content.index(b"PNG", 20_000)
    content[position + 200 : position + 300] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"split 'train' in .* can't be read .*Corrupted"):
        load(cifar10)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("dataset_info.json", b"{", "can't be opened"),
        ("cifar10-train.array_record-00000-of-00001", b"", "can't be read"),
        ("cifar10-train.array_record-00000-of-00001", None, "can't be read"),
    ],
)
def test_a_damaged_directory_is_one_sentence(cifar10, name, content, says):
    path = cifar10 / "cifar10" / "3.0.2" / name
    path.write_bytes(content) if content is not None else os.remove(path)
    with pytest.raises(UserError, match=says) as error:
        load(cifar10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("splits", [{"train": examples()}, {"train": [], "test": examples()}])
def test_an_empty_or_missing_split_is_one_sentence(tmp_path, cache, write_prepared, splits):
    write_prepared(tmp_path, "cifar10", splits)
    with pytest.raises(UserError, match=r"has no examples in its split '(train|test)'"):
        load(tmp_path)


def test_a_batch_larger_than_the_data_set_will_do_for_evaluation(cifar10):
    (batch,) = load(cifar10, batch_size=64).eval_batches()
    assert batch["image"].shape == (64, 32, 32, 3)
    assert 0 < batch["mask"].sum() < 64
