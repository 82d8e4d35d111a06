"""What a folder of pictures holds: classes, splits, links, and what is wrong with it."""

import hashlib
import io
import os
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.data.folder import evaluation_rank, open_folder
from train.errors import UserError


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pets(tmp_path):
    """Twenty cats and thirty dogs, some a folder deeper."""
    cats = {f"cats/{i}.png": png(i) for i in range(20)}
    dogs = {f"dogs/{'old/' if i % 3 else ''}{i}.png": png(100 + i) for i in range(30)}
    return write(tmp_path / "pets", cats | dogs)


def levels(pictures):
    """What the pictures show, with their labels."""
    read = [pictures[i] for i in range(len(pictures))]
    shown = [Image.open(io.BytesIO(r["image"])).getpixel((0, 0)) for r in read]
    return dict(zip(shown, [r["label"] for r in read], strict=True))


def test_every_picture_is_in_one_split_with_the_label_of_its_class(pets):
    folder = open_folder(str(pets), eval_fraction=0.4)
    assert folder.classes == ("cats", "dogs")
    assert folder.notes == ()
    train, evaluation = levels(folder.train), levels(folder.evaluation)
    assert train | evaluation == dict.fromkeys(range(20), 0) | {100 + i: 1 for i in range(30)}
    assert len(train) + len(evaluation) == 50
    assert 8 < len(evaluation) < 32  # 20 and four standard deviations


def test_the_split_is_a_hash_of_the_path(pets):
    folder = open_folder(str(pets), eval_fraction=0.3)

    def number(path):
        return int(hashlib.blake2b(path.encode(), digest_size=6).hexdigest(), 16)

    paths = {*folder.train.paths, *folder.evaluation.paths}
    assert set(folder.evaluation.paths) == {p for p in paths if number(p) < 0.3 * 2**48}


def test_a_picture_stays_on_its_side_whatever_is_added_and_wherever_the_folder_is(pets):
    before = open_folder(str(pets), eval_fraction=0.3)
    write(pets, {f"{name}/new{i}.png": png(i) for name in ("cats", "ants") for i in range(40)})
    moved = pets.rename(pets.parent / "moved")
    after = open_folder(str(moved), eval_fraction=0.3)
    assert set(before.train.paths) < set(after.train.paths)
    assert set(before.evaluation.paths) < set(after.evaluation.paths)
    more = open_folder(str(moved), eval_fraction=0.5)
    assert set(after.evaluation.paths) < set(more.evaluation.paths)


@given(st.text(min_size=1))
def test_ranks_are_in_0_to_1(path):
    assert 0 <= evaluation_rank(path) < 1


def test_ranks_are_uniform():
    ranks = [evaluation_rank(f"class{i % 10}/{i}.jpg") for i in range(10_000)]
    counts = np.histogram(ranks, bins=20, range=(0, 1))[0]
    assert np.sum((counts - 500) ** 2 / 500) < 43.8  # chi-squared, 19 degrees of freedom: 99.9 %


def test_an_accent_is_one_letter_or_two():
    assert evaluation_rank("caf\u00e9/1.jpg") == evaluation_rank("cafe\u0301/1.jpg")


@pytest.mark.parametrize("name", ["eval", "val", "validation", "test", "Validation"])
def test_splits_may_be_given_as_folders(pets, name):
    root = pets.parent / "split"
    write(root / name, {"dogs/1.png": png(7)})
    pets.rename(root / "train")
    folder = open_folder(str(root))
    assert folder.classes == ("cats", "dogs")
    assert (len(folder.train), levels(folder.evaluation)) == (50, {7: 1})


def test_of_several_evaluation_folders_the_first_counts(pets):
    root = pets.parent / "split"
    write(root, {"test/dogs/1.png": png(7), "val/cats/1.png": png(8)})
    pets.rename(root / "train")
    assert levels(open_folder(str(root)).evaluation) == {8: 0}


def test_a_train_folder_alone_is_split(pets):
    root = pets.parent / "split"
    root.mkdir()
    pets.rename(root / "train")
    folder = open_folder(str(root), eval_fraction=0.3)
    assert folder.classes == ("cats", "dogs")
    assert len(folder.train) + len(folder.evaluation) == 50


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    files = {f"{name}/{i}.png": png(i) for name in ("train", "plane") for i in range(20)}
    folder = open_folder(str(write(tmp_path / "vehicles", files)), eval_fraction=0.5)
    assert folder.classes == ("plane", "train")


def test_hidden_files_and_those_beside_the_classes_are_passed_over(pets):
    write(pets, {".git/a": b"", "cats/.DS_Store": b"", "cats/._1.png": b"", "README.md": b"Pets"})
    folder = open_folder(str(pets))
    assert len(folder.train) + len(folder.evaluation) == 50


def test_classes_may_be_chosen_and_ordered(pets):
    write(pets, {f"ants/{i}.png": png(200 + i) for i in range(20)})
    folder = open_folder(str(pets), classes=("dogs", "ants"), eval_fraction=0.3)
    assert folder.classes == ("dogs", "ants")
    expected = {100 + i: 0 for i in range(30)} | {200 + i: 1 for i in range(20)}
    assert levels(folder.train) | levels(folder.evaluation) == expected
    assert set(folder.train.paths) < set(open_folder(str(pets), eval_fraction=0.3).train.paths)


def test_links_to_files_and_folders_are_followed(pets):
    pets.rename(pets.parent / "elsewhere")
    pets.mkdir()
    for name in ("cats", "dogs"):
        (pets / name).symlink_to(pets.parent / "elsewhere" / name)
    write(pets.parent, {"one.png": png(250)})
    (pets / "cats" / "linked.png").symlink_to(pets.parent / "one.png")
    folder = open_folder(str(pets))
    assert len(folder.train) + len(folder.evaluation) == 51


def test_a_home_directory_may_be_a_tilde(pets, monkeypatch):
    monkeypatch.setenv("HOME", str(pets.parent))
    assert open_folder("~/pets").classes == ("cats", "dogs")


def test_pictures_may_be_sent_to_other_processes(pets):
    train = open_folder(str(pets)).train
    assert levels(pickle.loads(pickle.dumps(train))) == levels(train)


def fails(root, says, **options):
    with pytest.raises(UserError, match=says) as error:
        open_folder(str(root), **options)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def test_no_folder_is_a_sentence(tmp_path):
    fails(tmp_path / "nowhere", "data.path is .*nowhere', where there is no folder")


def test_a_file_is_no_folder(pets):
    fails(pets / "cats" / "1.png", "there is no folder")


def test_no_class_is_a_sentence(tmp_path):
    fails(write(tmp_path / "flat", {"1.png": png(1)}), "flat has no subfolder; give it")


def test_one_class_is_a_sentence(tmp_path):
    fails(write(tmp_path / "one", {"cats/1.png": png(1)}), "has one class, 'cats'; give it")


def test_names_that_differ_in_case_are_a_sentence(pets):
    write(pets, {"Cats/1.png": png(1)})
    fails(pets, "has the classes 'Cats' and 'cats', which look the same")


def test_a_name_that_is_no_text_is_a_sentence(pets):
    os.mkdir(os.fsencode(pets) + b"/\xff")
    fails(pets, "which is no UTF-8; rename it")


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: write(p, {".hidden.png": png(1)})])
def test_an_empty_class_is_a_sentence(pets, make):
    make(pets / "ants")
    fails(pets, "The class 'ants' of .*pets has no pictures to train on; put some")


def test_an_unknown_class_is_a_sentence(pets):
    fails(pets, "data.classes has 'birds', .*those are cats, dogs", classes=("cats", "birds"))


def test_a_class_in_evaluation_alone_is_a_sentence(pets):
    root = pets.parent / "split"
    write(root, {"val/cats/1.png": png(7), "val/ants/1.png": png(7)})
    pets.rename(root / "train")
    fails(root, "val has the class 'ants', which .*train has not")


def test_evaluation_without_training_is_a_sentence(pets):
    root = pets.parent / "split"
    root.mkdir()
    pets.rename(root / "test")
    fails(root, "has test and no train; give it one")


def test_nothing_to_evaluate_on_is_a_sentence(pets):
    fails(pets, "none of 50 falls to data.eval_fraction = 1e-06", eval_fraction=1e-6)


@pytest.mark.parametrize("target", ["..", ".", "../.."])
def test_links_in_a_circle_are_a_sentence(pets, target):
    (pets / "cats" / "again").symlink_to(target)
    fails(pets, "cats/again.* leads back to .*; delete the link")


def test_files_that_are_no_pictures_are_counted_or_passed_over(pets):
    write(pets, {"cats/notes.txt": b"About cats", "cats/notes2.txt": b"", "dogs/x.pdf": b"%PDF"})
    fails(pets, "cats/notes.txt can't be read or is not a JPEG, .*, as 2 other.*skip_damaged=True")
    folder = open_folder(str(pets), skip_damaged=True)
    assert len(folder.train) + len(folder.evaluation) == 50
    (note,) = folder.notes
    assert "cats/notes.txt" in note
    assert "passed over" in note


def test_a_link_to_nothing_is_found(pets):
    (pets / "cats" / "broken.png").symlink_to("nothing.png")
    fails(pets, "cats/broken.png can't be read or is not")


def test_a_picture_that_vanishes_is_a_sentence(pets):
    train = open_folder(str(pets)).train
    (pets / train.paths[3]).unlink()
    with pytest.raises(UserError, match=rf"{train.paths[3]} can't be read \(No such file"):
        train[3]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_a_sentence(pets):
    (pets / "cats").chmod(0)
    fails(pets, r"cats can't be read \(Permission denied\)")
