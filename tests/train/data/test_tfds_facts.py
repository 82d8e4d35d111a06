"""Any image classification data set of TFDS's by its name, small ones and photographs."""

import importlib.util

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from train import data
from train.data import tfds_facts
from train.data.spec import facts, parse
from train.errors import UserError

RNG = np.random.default_rng(0)


def png(image):
    return cv2.imencode(".png", image)[1].tobytes()


def letters(count, start=0):
    """Records of EMNIST's letters, and what they hold."""
    images = RNG.integers(0, 256, (count, 28, 28, 1), np.uint8)
    labels = np.arange(start, start + count) % 37
    pairs = zip(images, labels.tolist(), strict=True)
    return [{"image": png(image), "label": label} for image, label in pairs], images, labels


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(name, data_dir, **fields):
    return data.load({"name": name, "data_dir": str(data_dir)} | fields, batch_size=4, seed=0)


@pytest.mark.parametrize(
    ("name", "classes", "shape", "channels"),
    [
        ("oxford_flowers102", 102, None, 3),
        ("food101", 101, None, 3),
        ("stanford_dogs", 120, None, 3),
        ("celeb_a_no", None, None, None),
        ("svhn_cropped", 10, (32, 32, 3), 3),
        ("emnist/letters", 37, (28, 28, 1), 1),
        ("eurosat", 10, (64, 64, 3), 3),
    ],
)
def test_tfds_knows_shape_and_classes(name, classes, shape, channels, tmp_path):
    known = tfds_facts.find(name, str(tmp_path))
    if classes is None:
        assert known is None
        return
    assert (known.num_classes, known.shape) == (classes, shape)
    assert len(known.mean) == len(known.std) == channels
    assert (known.image, known.label) == ("image", "label")


def test_small_images_of_one_shape_are_in_memory(tmp_path, write_prepared):
    evaluation, eval_images, _ = letters(6, start=20)
    write_prepared(tmp_path, "emnist/letters", {"train": letters(20)[0], "test": evaluation})
    data_set = load("emnist/letters", tmp_path)
    assert data_set.name == "emnist/letters"
    assert data_set.image_shape == (28, 28, 1)
    assert (data_set.num_train, data_set.num_eval, data_set.num_classes) == (20, 6, 37)
    assert len(data_set.classes) == 37
    assert data_set.mean == (0.449,)
    batches = list(data_set.eval_batches())
    mask = np.concatenate([batch["mask"] for batch in batches])
    got = np.concatenate([batch["image"] for batch in batches])[mask]
    np.testing.assert_array_equal(got, eval_images)
    np.testing.assert_array_equal(data_set.eval_image(5), eval_images[5])


def test_what_does_not_fit_in_memory_is_read_as_photographs(tmp_path, write_prepared, monkeypatch):
    train, images, labels = letters(20)
    write_prepared(tmp_path, "emnist/letters", {"train": train, "test": letters(4)[0]})
    monkeypatch.setattr(tfds_facts, "LARGEST_BYTES", 24 * 28 * 28 - 1)
    data_set = load("emnist/letters", tmp_path, image_size=28)
    assert data_set.image_shape == (28, 28, 1)
    batches = data_set.train_batches(0)
    taken = [next(batches) for _ in range(5)]
    batches.close()
    got = np.concatenate([batch["image"] for batch in taken])
    order = [int(np.argmax((images == image).all((1, 2, 3)))) for image in got]
    assert sorted(order) == list(range(20))
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in taken]), labels[order])


def test_photographs_are_cropped_to_squares(tmp_path, write_prepared, jpeg_photographs):
    records = [{"image": jpeg_photographs[i], "label": i} for i in range(12)]
    splits = {"train": records[:6], "validation": records[6:9], "test": records[9:]}
    write_prepared(tmp_path, "oxford_flowers102", splits)
    data_set = load("oxford_flowers102", tmp_path, image_size=32)
    assert data_set.image_shape == (32, 32, 3)
    assert (data_set.num_train, data_set.num_eval) == (6, 3)
    assert data_set.classes[0] == "pink primrose"
    (batch,) = data_set.eval_batches()
    assert batch["label"][batch["mask"]].tolist() == [6, 7, 8]  # of the split "validation"
    chosen = load("oxford_flowers102", tmp_path, eval_split="test", train_split="train[:50%]")
    assert (chosen.num_train, chosen.num_eval) == (3, 3)
    (batch,) = chosen.eval_batches()
    assert batch["label"][batch["mask"]].tolist() == [9, 10, 11]


def test_one_split_can_be_divided(tmp_path, write_prepared):
    records = [
        {"image": png(RNG.integers(0, 256, (64, 64, 3), np.uint8)), "label": i} for i in range(10)
    ]
    write_prepared(tmp_path, "eurosat/rgb", {"train": records})
    with pytest.raises(UserError, match=r"none to evaluate on; give .*train\[90%:\]"):
        load("eurosat", tmp_path)
    fields = {"train_split": "train[:80%]", "eval_split": "train[80%:]"}
    data_set = load("eurosat", tmp_path, **fields)
    assert (data_set.num_train, data_set.num_eval) == (8, 2)
    (batch,) = data_set.eval_batches()
    assert batch["label"][batch["mask"]].tolist() == [8, 9]
    other = load("eurosat", tmp_path, **fields | {"eval_split": "train[:50%]"})
    assert other.num_eval == 5  # and not what was kept of the other split


@pytest.mark.parametrize("split", ["nothing", "train[:x]", "train[:0%]"])
def test_a_wrong_split_is_one_sentence(tmp_path, write_prepared, split):
    write_prepared(tmp_path, "emnist/letters", {"train": letters(8)[0], "test": letters(4)[0]})
    with pytest.raises(UserError, match="has no examples in its split") as error:
        load("emnist/letters", tmp_path, eval_split=split)
    assert str(error.value).endswith("give another.")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("voc", "voc is not for image classification: its examples are of image, .*objects"),
        ("imdb_reviews", "not for image classification: its examples are of text, label"),
        ("celeb_a", "celeb_a is not for image classification"),
        ("no_such_set", "choose one of digits, .*folder, or an image classification"),
        ("../x", "config.data.name is '../x'|TFDS can't tell"),
        ("emnist/nothing", "TFDS can't tell what emnist/nothing is"),
    ],
)
def test_what_is_not_for_classification_is_one_sentence(name, says):
    with pytest.raises(UserError, match=says) as error:
        facts(name)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_missing_data_set_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"`python -m train.prepare emnist/letters --data_dir"):
        load("emnist/letters", tmp_path)


def test_fields_are_those_of_the_kind(tmp_path):
    assert parse({"name": "oxford_flowers102"}).image_size == 224
    with pytest.raises(UserError, match="image_size is not a field of emnist/letters"):
        parse({"name": "emnist/letters", "image_size": 28})


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed"
)
def test_a_builder_of_ones_own_is_prepared_and_read(tmp_path):
    """With other names of the features than usual, written by TFDS itself."""
    images = RNG.integers(0, 256, (9, 20, 24, 3), np.uint8)

    class SmallShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Image(shape=(20, 24, 3)),
                    "kind": tfds.features.ClassLabel(names=["round", "square", "thin"]),
                    "id": np.int64,
                }
            )
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._some(0, 6), "validation": self._some(6, 9)}

        def _generate_examples(self):
            raise NotImplementedError

        def _some(self, start, stop):
            for i in range(start, stop):
                yield i, {"picture": images[i], "kind": i % 3, "id": i}

    from train import prepare

    prepared = prepare.prepare("small_shapes", str(tmp_path))
    assert (len(prepared.train), len(prepared.evaluation)) == (6, 3)
    data_set = load("small_shapes", tmp_path)
    assert data_set.classes == ("round", "square", "thin")
    (batch,) = data_set.eval_batches()
    in_order = np.argsort(batch["label"][batch["mask"]])  # TFDS shuffles what it writes
    np.testing.assert_array_equal(batch["image"][batch["mask"]][in_order], images[6:])
    assert sorted(batch["label"][batch["mask"]].tolist()) == [0, 1, 2]
