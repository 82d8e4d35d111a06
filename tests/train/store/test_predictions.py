"""Measures of predictions, counted one by one; and the file that keeps them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.store import predictions as predictions_lib
from train.store.predictions import (
    Predictions,
    Thumbnail,
    accuracy_by_class,
    largest_confusions,
)


def some(seed, n, classes):
    """Predictions of random logits [n, classes], sorted by Python."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(n, classes)), rng.integers(classes, size=n)
    orders = [sorted(range(classes), key=lambda k, row=row: -row[k]) for row in logits]
    ranks = [order.index(label) for order, label in zip(orders, labels, strict=True)]
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(n), labels]
    return Predictions(
        np.arange(n, dtype=np.int32),
        labels.astype(np.int32),
        np.array([order[0] for order in orders], np.int32),
        np.array(ranks, np.int32),
        losses.astype(np.float32),
    )


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(2, 9))
def test_measures_are_counts(seed, n, classes):
    found = some(seed, n, classes)
    pairs = list(zip(found.label.tolist(), found.prediction.tolist(), strict=True))
    assert found.figures["eval/accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / n)
    assert found.figures["eval/loss"] == pytest.approx(sum(found.loss.tolist()) / n)
    assert found.figures["eval/examples"] == n
    assert found.top(1) == pytest.approx(found.figures["eval/accuracy"])
    assert found.top(classes) == 1
    confusion = found.confusion(classes)
    for a in range(classes):
        for b in range(classes):
            assert confusion[a, b] == pairs.count((a, b))
    for label, value in enumerate(accuracy_by_class(confusion)):
        of_class = [b == label for a, b in pairs if a == label]
        if of_class:
            assert value == pytest.approx(np.mean(of_class))
        else:
            assert np.isnan(value)
    wrong = sorted(
        (i for i in range(n) if pairs[i][0] != pairs[i][1]), key=lambda i: -found.loss[i]
    )
    assert found.most_wrong(5).tolist() == wrong[:5]
    listed = largest_confusions(confusion, 4)
    counts = sorted((pairs.count(pair) for pair in set(pairs) if pair[0] != pair[1]), reverse=True)
    assert [count for _, _, count in listed] == counts[:4]
    assert all(pairs.count((a, b)) == count for a, b, count in listed)


def test_the_file_gives_back_what_was_saved(tmp_path):
    found = some(0, 20, 4)
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), np.uint8)
    thumbnails = (Thumbnail(3, "cats/1.jpg", images[0]), Thumbnail(7, "caf\u00e9/2.jpg", images[1]))
    predictions_lib.save(tmp_path / "predictions.npz", found, thumbnails)
    again, thumbnails_again = predictions_lib.load(tmp_path / "predictions.npz")
    for field in dataclasses.fields(Predictions):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(found, field.name))
    for a, b in zip(thumbnails, thumbnails_again, strict=True):
        assert (a.entry, a.name) == (b.entry, b.name)
        np.testing.assert_array_equal(a.image, b.image)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.npz"]


def test_a_missing_or_damaged_file_is_none(tmp_path):
    path = tmp_path / "predictions.npz"
    assert predictions_lib.load(path) is None
    predictions_lib.save(path, some(0, 20, 4))
    assert predictions_lib.load(path)[1] == ()
    path.write_bytes(path.read_bytes()[:200])
    assert predictions_lib.load(path) is None
