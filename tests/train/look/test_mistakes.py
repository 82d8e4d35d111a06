"""What the report says of classes and mistakes, on predictions made by hand."""

import base64
import dataclasses

import cv2
import numpy as np

from train import data
from train.errors import UserError
from train.look import mistakes
from train.store.predictions import Predictions, Thumbnail

NAMES = ("ant", "bee", "cat", "dog")
LABELS = np.array([0, 0, 0, 1, 1, 2], np.int32)  # and no dog
GUESSES = np.array([0, 1, 1, 1, 2, 2], np.int32)
FOUND = Predictions(
    example=np.arange(10, 16, dtype=np.int32),
    label=LABELS,
    prediction=GUESSES,
    rank=np.array([0, 1, 2, 0, 1, 0], np.int32),
    loss=np.array([0.1, 2.0, 3.0, 0.2, 5.0, 0.3], np.float32),
)


def test_each_class_has_its_figures():
    rows = mistakes.class_rows(FOUND.confusion(4), NAMES)
    got = [(row.name, row.examples, row.right, row.accuracy, row.taken_for) for row in rows]
    assert got == [
        ("ant", 3, 1, 1 / 3, "bee (2)"),
        ("bee", 2, 1, 1 / 2, "cat (1)"),
        ("cat", 1, 1, 1.0, ""),
        ("dog", 0, 0, None, ""),
    ]
    assert rows[0].cells == (1, 2, 0, 0)


def test_the_most_frequent_confusions_come_first():
    assert mistakes.confusions(FOUND.confusion(4), NAMES) == [("ant", "bee", 2), ("bee", "cat", 1)]


def decoded(address):
    head, content = address.split(",")
    assert head == "data:image/png;base64"
    encoded = np.frombuffer(base64.b64decode(content), np.uint8)
    return cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)


def test_the_worst_are_shown_with_what_they_were_taken_for():
    images = np.random.default_rng(0).integers(0, 256, (16, 5, 6, 3), np.uint8)
    data_set = data.load({"name": "digits"}, batch_size=1, seed=0)

    def image(number):
        if number == 12:
            raise UserError("It is gone.")
        return images[number]

    data_set = dataclasses.replace(data_set, eval_image=image, eval_name="picture {}".format)
    shown = mistakes.thumbnails(data_set, FOUND)
    assert [(each.entry, each.name) for each in shown] == [(4, "picture 14"), (1, "picture 11")]
    first, _ = mistakes.mistakes(FOUND, shown, NAMES)
    assert (first.label, first.prediction, first.loss) == ("bee", "cat", 5.0)
    np.testing.assert_array_equal(decoded(first.source)[..., ::-1], images[14])


def test_a_grey_thumbnail_is_grey():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
    (mistake,) = mistakes.mistakes(FOUND, [Thumbnail(1, "x", image)], NAMES)
    np.testing.assert_array_equal(decoded(mistake.source), image[..., 0])


def test_large_pictures_are_made_small():
    for shape, size in (((300, 200, 3), (96, 64, 3)), ((224, 224, 1), (96, 96, 1))):
        assert mistakes.small(np.full(shape, 7, np.uint8)).shape == size
    image = np.zeros((96, 20, 3), np.uint8)
    assert mistakes.small(image) is image
