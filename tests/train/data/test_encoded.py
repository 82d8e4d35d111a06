"""Photographs' batches: the same from any number of processes, workers and interruptions."""

import io
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from train import data
from train.errors import UserError

SPEC = {"name": "imagenet2012", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "image_size": 32}


def load(data_dir, batch_size=6, processes=1, process=0, **fields):
    return data.load(
        SPEC | {"flip": True, "data_dir": str(data_dir)} | fields,
        batch_size=batch_size,
        seed=3,
        process_index=process,
        process_count=processes,
    )


def take(batches, count):
    taken = [{k: np.array(v) for k, v in next(batches).items()} for _ in range(count)]
    batches.close()
    return taken


def check_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def joined(slices):
    """Global batches of the processes' slices."""
    return [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*slices, strict=True)
    ]


# 22 photographs are 3 batches of 6 an epoch: updates 1 to 6 are parts of three epochs.
def test_global_batches_are_the_same_for_any_processes_and_interruptions(small_imagenet):
    whole = take(load(small_imagenet).train_batches(1), 6)
    slices = [
        take(data_set.train_batches(1), 3) + take(data_set.train_batches(4), 3)
        for data_set in (load(small_imagenet, processes=2, process=p) for p in range(2))
    ]
    check_equal(joined(slices), whole)
    images = np.concatenate([batch["image"] for batch in whole])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


@pytest.mark.slow
def test_workers_change_nothing(small_imagenet):
    without = load(small_imagenet)
    whole = take(without.train_batches(1), 6)
    slices = []
    for process in range(2):
        data_set = load(small_imagenet, processes=2, process=process, workers=2)
        slices.append(take(data_set.train_batches(1), 3))
    check_equal(joined(slices), whole[:3])
    resumed = take(load(small_imagenet, workers=2).train_batches(4), 3)
    check_equal(resumed, whole[3:])
    check_equal(list(load(small_imagenet, workers=2).eval_batches()), list(without.eval_batches()))


PARENT = """
import multiprocessing, os, signal, sys
from train import data

if __name__ == "__main__":
    batches = data.load({spec!r}, batch_size=6, seed=3).train_batches(1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for signum in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, signum)
    for _ in range(20):
        next(batches)
    print(worker.pid, worker.is_alive(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_worker_outlives_signals_to_all_and_not_its_parent(small_imagenet, tmp_path):
    spec = SPEC | {"data_dir": str(small_imagenet), "workers": 1}
    (tmp_path / "parent.py").write_text(PARENT.format(spec=spec))
    root = pathlib.Path(data.__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    worker, alive = parent.stdout.readline().split()
    assert alive == "True"
    parent.kill()
    parent.communicate(timeout=30)  # an orphan would hold its pipe
    deadline = time.monotonic() + 10
    while pathlib.Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    status = pathlib.Path(f"/proc/{worker}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


IMPATIENT = """
import itertools, os, time
from train import data

def main():
    batches = data.load({spec!r}, batch_size=4, seed=0).train_batches(0)
    taken = list(itertools.islice(batches, 2))
    batches.close()
    assert taken[1]["label"].size == 4
    print(os.getpid())

if __name__ == "__main__":
    main()
    time.sleep(2)  # Grain frees what was taken in a thread of its own
"""


@pytest.mark.slow
def test_what_workers_made_ahead_is_freed(small_imagenet, tmp_path):
    """Nothing is left in memory, and no warning of leaked objects on stderr."""
    spec = SPEC | {"data_dir": str(small_imagenet), "workers": 2}
    (tmp_path / "impatient.py").write_text(IMPATIENT.format(spec=spec))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "impatient.py")],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(data.__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
    assert "Error" not in done.stderr
    assert not list(pathlib.Path("/dev/shm").glob(f"feather_{int(done.stdout)}_*"))


def test_batches_are_as_the_contract_has_them(small_imagenet):
    data_set = load(small_imagenet, batch_size=4, processes=2, process=1)
    assert data_set.image_shape == (32, 32, 3)
    assert data_set.num_classes == 1000
    assert (data_set.num_train, data_set.num_eval) == (22, 8)
    (batch,) = take(data_set.train_batches(0), 1)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "image": ((2, 32, 32, 3), np.uint8),
        "label": ((2,), np.int32),
        "index": ((2,), np.int32),
    }
    np.testing.assert_array_equal(batch["index"], [2, 3])


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_takes_every_photograph_once(small_imagenet, processes):
    seen = []
    for process in range(processes):
        batches = load(small_imagenet, processes=processes, process=process).eval_batches()
        batches = take(batches, 2)
        for batch in batches:
            assert batch["image"].shape == (6 // processes, 32, 32, 3)
            seen += batch["label"][batch["mask"]].tolist()
    assert sorted(seen) == [7 * i for i in range(22, 30)]


def test_augmentation_is_a_crop_and_in_half_of_the_cases_a_flip(small_imagenet):
    """Without flips, an image differs from the flipped one by its mirroring or not at all."""
    with_flips = take(load(small_imagenet).train_batches(0), 30)
    without = take(load(small_imagenet, flip=False).train_batches(0), 30)
    mirrored = []
    for batch, other in zip(with_flips, without, strict=True):
        for image, plain in zip(batch["image"], other["image"], strict=True):
            mirrored.append(not np.array_equal(image, plain))
            np.testing.assert_array_equal(image[:, ::-1] if mirrored[-1] else image, plain)
    assert 63 <= sum(mirrored) <= 117  # of 180, four standard deviations


def test_preprocessing_on_the_device_is_normalisation_alone(small_imagenet):
    data_set = load(small_imagenet)
    (batch,) = take(data_set.train_batches(0), 1)
    expected = (batch["image"] / 255 - 0.5) / 0.2
    np.testing.assert_allclose(data_set.eval_preprocess(batch["image"]), expected, atol=1e-5)


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["threads", "workers"]
)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image": b"no image"}, "Record 2 of imagenet2012's split 'train' .* is damaged"),
        ({"label": 1000}, r"Record 2 .* has label 1000, not one in \[0, 1000\)"),
    ],
)
def test_a_damaged_record_is_one_sentence(
    tmp_path, write_prepared, jpeg_photographs, workers, change, says
):
    examples = [{"image": image, "label": 1} for image in jpeg_photographs[:4]]
    examples[2] |= change
    for example in examples:
        example["file_name"] = b"x.JPEG"
    write_prepared(tmp_path, "imagenet2012", {"train": examples, "validation": examples[:2]})
    batches = load(tmp_path, batch_size=4, workers=workers).train_batches(0)
    with pytest.raises(UserError, match=says) as error:
        next(batches)
    assert "`python -m train.prepare imagenet2012 --data_dir" in str(error.value)


@pytest.mark.slow
def test_memory_that_cannot_be_shared_is_one_sentence(small_imagenet):
    """Files are held to 5 kB, as a full /dev/shm would: a batch has 6 x 32 x 32 x 3 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))  # which a worker inherits
    try:
        batches = load(small_imagenet, workers=1).train_batches(0)
        with pytest.raises(UserError, match=r"can't be shared .*; give /dev/shm more room"):
            next(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_missing_imagenet_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"`python -m train.prepare imagenet2012 --data_dir .*`"):
        load(tmp_path)


PETS = {"name": "folder", "image_size": 8, "eval_fraction": 0.3}


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """A folder of 60 pictures of 8x8 in two classes, and their pixels by path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng, shown = np.random.default_rng(0), {}
    for i in range(60):
        path = f"{('cats', 'dogs')[i % 2]}/{i:02}.png"
        shown[path] = rng.integers(0, 256, (8, 8, 3), np.uint8)
        (tmp_path / "pets" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / path).write_bytes(png(shown[path]))
    return tmp_path / "pets", shown


def load_pets(folder, batch_size=6, **fields):
    return data.load(PETS | {"path": str(folder)} | fields, batch_size=batch_size, seed=3)


def evaluated(data_set):
    """(images, labels) of the evaluation split, padding left out."""
    batches = list(data_set.eval_batches())
    mask = np.concatenate([batch["mask"] for batch in batches])
    return [np.concatenate([batch[k] for batch in batches])[mask] for k in ("image", "label")]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_folder_is_read_as_its_pictures_are(pets, workers):
    """Of the size that is wanted and without augmentation, they are what was written."""
    folder, shown = pets
    data_set = load_pets(folder, workers=workers)
    assert (data_set.classes, data_set.num_classes) == (("cats", "dogs"), 2)
    assert data_set.found == {"classes": ["cats", "dogs"]}
    assert data_set.num_train + data_set.num_eval == 60
    names = [data_set.eval_name(i) for i in range(data_set.num_eval)]
    images, labels = evaluated(data_set)
    np.testing.assert_array_equal(images, [shown[name] for name in names])
    assert labels.tolist() == [int(name.startswith("dogs")) for name in names]
    np.testing.assert_array_equal(data_set.eval_image(4), shown[names[4]])
    per_epoch = data_set.num_train // 6
    epoch = np.concatenate([b["image"] for b in take(data_set.train_batches(0), per_epoch)])
    left = {image.tobytes() for path, image in shown.items() if path not in names}
    taken = [image.tobytes() for image in epoch]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= left


def test_grey_has_one_channel(pets):
    folder, shown = pets
    data_set = load_pets(folder, grey=True)
    assert data_set.image_shape == (8, 8, 1)
    assert data_set.mean == (0.449,)
    grey = shown[data_set.eval_name(0)] @ [0.299, 0.587, 0.114]
    assert np.abs(data_set.eval_image(0)[..., 0] - grey).max() <= 1


def test_mean_and_deviation_can_be_computed(pets):
    """Of the training pictures, as the network sees them; one of the two may be given."""
    folder, shown = pets
    data_set = load_pets(folder, mean="computed", std="computed")
    held_out = {data_set.eval_name(i) for i in range(data_set.num_eval)}
    pixels = np.stack([image for path, image in shown.items() if path not in held_out]) / 255
    assert data_set.mean == pytest.approx(pixels.mean((0, 1, 2)), abs=5.1e-5)
    assert data_set.std == pytest.approx(pixels.std((0, 1, 2)), abs=5.1e-5)
    assert data_set.found["mean"] == list(data_set.mean)
    images = evaluated(data_set)[0]
    expected = (images / 255 - data_set.mean) / data_set.std
    np.testing.assert_allclose(data_set.eval_preprocess(images), expected, atol=1e-5)
    half = load_pets(folder, mean="computed", std=[0.5] * 3)
    assert (half.mean, half.std) == (data_set.mean, (0.5, 0.5, 0.5))
    assert half.found.keys() == {"classes", "mean"}


def test_photographs_of_a_folder_are_turned_upright(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stored, exif = np.zeros((40, 40, 3), np.uint8), Image.Exif()
    stored[:20] = 255  # bright above, which is to the right when turned
    exif[0x0112] = 6
    for name in ("a", "b"):
        for i in range(20):
            path = tmp_path / "folder" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(stored).save(path, exif=exif, quality=95)
    image = load_pets(tmp_path / "folder").eval_image(0)
    assert image[:, 5:].min() > 240
    assert image[:, :3].max() < 15


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_pictures_are_a_sentence_or_passed_over(pets, workers):
    folder, shown = pets
    whole = load_pets(folder)
    names = [whole.eval_name(i) for i in range(whole.num_eval)]
    damaged = names[1], next(path for path in shown if path not in names)
    for path in damaged:
        (folder / path).write_bytes((folder / path).read_bytes()[:80])
    with pytest.raises(UserError, match=rf"{damaged[0]} is damaged \(.*skip_damaged=True"):
        list(load_pets(folder, workers=workers).eval_batches())
    data_set = load_pets(folder, skip_damaged=True, workers=workers)
    images, _ = evaluated(data_set)
    kept = [name for name in names if name != damaged[0]]
    np.testing.assert_array_equal(images, [shown[name] for name in kept])
    epoch = take(data_set.train_batches(0), data_set.num_train // 6)
    taken = {image.tobytes() for batch in epoch for image in batch["image"]}
    assert taken <= {shown[path].tobytes() for path in shown if path not in {*names, damaged[1]}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "config.data lacks the field 'path'"),
        ({"path": 3}, "data.path is 3, of type int"),
        ({"path": "x", "eval_fraction": 1.0}, "data.eval_fraction is 1.0"),
        ({"path": "x", "classes": "cats"}, "must be a tuple of names of subfolders"),
        ({"path": "x", "mean": "mine"}, "one a channel, or 'computed'"),
        ({"path": "x", "grey": True, "mean": (0.1, 0.2, 0.3)}, r"has 1 channel\(s\)"),
        ({"path": "x", "grey": True, "color_jitter": (0, 0, 0, 0.1)}, "make the last two 0"),
        ({"path": "x", "color_jitter": (0, 0, 0, 0.6)}, "three numbers in .* and one in"),
        ({"path": "x", "crop_padding": 300}, "are only 224 pixels"),
        ({"path": "x", "data_dir": "y"}, "data_dir is not a field of folder"),
        ({"path": "/nowhere"}, "there is no folder"),
    ],
)
def test_a_wrong_folder_is_one_sentence(fields, says):
    with pytest.raises(UserError, match=says) as error:
        data.load({"name": "folder"} | fields, batch_size=2, seed=0)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
