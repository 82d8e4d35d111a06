"""Batches of data sets in memory, on the digits."""

import hashlib
import itertools

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from train import data
from train.data import digits

SPEC = {"name": "digits", "mean": (0.3,), "std": (0.4,), "crop_padding": 1, "flip": True}
SEED = 5


@jax.jit
def augmented(images, index, step):
    """What the training step sees of a batch, with the keys that it uses."""
    key = jax.random.fold_in(jax.random.key(SEED), step)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
    return data.load(SPEC, batch_size=1, seed=SEED).train_preprocess(images, keys)


def global_batches(steps, processes, interrupted_at=None):
    """(augmented images, labels) of the global batches of `steps`, read by that many processes."""
    read = []
    for process in range(processes):
        data_set = data.load(
            SPEC, batch_size=240, seed=SEED, process_index=process, process_count=processes
        )
        batches = data_set.train_batches(steps.start)
        read.append([])
        for step in steps:
            if step == interrupted_at:
                batches = data_set.train_batches(step)
            batch = next(batches)
            images = augmented(batch["image"], batch["index"], step)
            read[-1].append((images, batch["label"], batch["index"]))
    return [
        [np.concatenate(parts) for parts in zip(*slices, strict=True)]
        for slices in zip(*read, strict=True)
    ]


def test_global_batches_are_the_same_for_any_processes_and_interruptions():
    epoch = range(2, 2 + 1437 // 240)  # from the midst of one into the next
    one = global_batches(epoch, processes=1)
    for others in (
        global_batches(epoch, processes=2, interrupted_at=5),
        global_batches(epoch, processes=3),
    ):
        for batch, other in zip(one, others, strict=True):
            for part, other_part in zip(batch, other, strict=True):
                np.testing.assert_array_equal(part, other_part)
    images = np.stack([images for images, _, _ in one])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    for _, _, index in one:
        np.testing.assert_array_equal(index, np.arange(240))


def test_batches_are_as_the_contract_has_them():
    data_set = data.load(SPEC, batch_size=96, seed=0, process_index=1, process_count=2)
    assert data_set.image_shape == (8, 8, 1)
    assert data_set.num_classes == len(data_set.classes) == 10
    batch = next(data_set.train_batches(0))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "image": ((48, 8, 8, 1), np.uint8),
        "label": ((48,), np.int32),
        "index": ((48,), np.int32),
    }
    for batch in data_set.eval_batches():
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "image": ((48, 8, 8, 1), np.uint8),
            "label": ((48,), np.int32),
            "mask": ((48,), np.bool_),
        }


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_takes_every_example_once(processes):
    arrays = digits.load()
    seen = []
    for process in range(processes):
        data_set = data.load(
            SPEC, batch_size=100, seed=0, process_index=process, process_count=processes
        )
        batches = list(data_set.eval_batches())
        assert len(batches) == 4
        for batch in batches:
            mask = batch["mask"]
            seen += zip(
                map(bytes, batch["image"][mask]), batch["label"][mask].tolist(), strict=True
            )
    expected = zip(map(bytes, arrays.eval_images), arrays.eval_labels.tolist(), strict=True)
    assert sorted(seen) == sorted(expected)


def test_an_epoch_takes_each_example_at_most_once():
    data_set = data.load(SPEC | {"crop_padding": 0}, batch_size=100, seed=0)
    arrays = digits.load()
    epoch = itertools.islice(data_set.train_batches(14), 14)
    seen = [
        (bytes(image), int(label))
        for batch in epoch
        for image, label in zip(batch["image"], batch["label"], strict=True)
    ]
    have = list(zip(map(bytes, arrays.train_images), arrays.train_labels.tolist(), strict=True))
    assert len(seen) == 1400
    for example in set(seen):
        assert seen.count(example) <= have.count(example)


def test_the_digits_are_scikit_learns_all_of_them_divided_once_and_for_all():
    arrays = digits.load()
    assert len(arrays.train_labels) == 1437
    assert len(arrays.eval_labels) == 360
    images = np.concatenate([arrays.train_images, arrays.eval_images])[..., 0]
    labels = np.concatenate([arrays.train_labels, arrays.eval_labels])
    real = load_digits()
    levels = np.rint(images / 255 * 16)
    assert images.max() == 255
    have = sorted(zip(map(bytes, levels.astype(np.uint8)), labels.tolist(), strict=True))
    want = zip(map(bytes, real.images.astype(np.uint8)), real.target.tolist(), strict=True)
    assert have == sorted(want)
    # The figures in the README stand for this split.
    digest = hashlib.sha256(arrays.eval_labels.tobytes()).hexdigest()
    assert digest == "057df36543590aaeaee2c0948bcd08de62a84f573412b6579905a7b6e7f1cf07"
