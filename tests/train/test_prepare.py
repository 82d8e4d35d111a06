"""python -m train.prepare: what it writes, and what it says where it can't."""

import contextlib
import gzip
import importlib.util
import pathlib
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds

from train import config as config_lib
from train import data, experiment, prepare
from train.data.prepared import open_prepared
from train.errors import UserError
from train.step import make_eval_step, make_train_step

ROOT = pathlib.Path(prepare.__file__).parents[1]
SYNSETS = ("n01440764", "n01443537", "n15075141")  # of the archives in conftest.py
DEBIAN = prepare.DEBIAN_FASHION_MNIST

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed"
)
needs_debian = pytest.mark.skipif(
    not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)


def run(*arguments, first=""):
    """Runs the program in a process of its own, after the Python code `first`."""
    program = (
        f"import sys\nfrom train import prepare, program\n{first}\n"
        "sys.exit(program.run(lambda: prepare.main(sys.argv[1:])))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.mark.parametrize("name", ["digits", "cifar", ""])
def test_an_unknown_name_is_one_sentence(name, tmp_path):
    with pytest.raises(UserError, match=r"choose one of .*fashion_mnist.*imagenet2012") as error:
        prepare.prepare(name, str(tmp_path))
    assert repr(name) in one_sentence(error)


def test_without_tensorflow_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        prepare.prepare("cifar10", str(tmp_path))
    assert "`pip install '.[prepare]'`" in one_sentence(error)


@pytest.fixture
def tensorflow_seems_there(monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: True)


def test_without_internet_it_says_so_at_once(tmp_path, monkeypatch, tensorflow_seems_there):
    def head(url, timeout):
        raise requests.ConnectionError

    monkeypatch.setattr(requests, "head", head)
    with pytest.raises(UserError, match=r"cifar10 can't be downloaded, as https?://") as error:
        prepare.prepare("cifar10", str(tmp_path))
    assert "connect to the internet" in one_sentence(error)


@pytest.mark.parametrize("manual_dir", ["given", ""])
def test_without_imagenets_archives_it_says_where_to_get_them(
    tmp_path, manual_dir, tensorflow_seems_there
):
    folder = tmp_path / (manual_dir or "downloads/manual")
    folder.mkdir(parents=True)
    (folder / "ILSVRC2012_img_val.tar").touch()
    with pytest.raises(UserError, match=r"ImageNet's ILSVRC2012_img_train\.tar can't") as error:
        prepare.prepare("imagenet2012", str(tmp_path), manual_dir and str(folder))
    assert f"in {folder};" in one_sentence(error)
    assert "https://image-net.org/download-images" in str(error.value)


def test_what_is_there_needs_neither_tensorflow_nor_internet(small_imagenet, monkeypatch, capsys):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    before = {path: path.stat().st_mtime_ns for path in small_imagenet.rglob("*")}
    prepare.main(["imagenet2012", "--data_dir", str(small_imagenet)])
    assert capsys.readouterr().out == (
        f"imagenet2012 is in {small_imagenet}/imagenet2012/5.1.0: "
        "22 training and 8 evaluation examples.\n"
    )
    assert before == {path: path.stat().st_mtime_ns for path in small_imagenet.rglob("*")}


def test_a_wrong_argument_is_one_sentence():
    result = run("fashion_mnist", "--datadir", "x")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "--datadir" in result.stderr


def idx(name):
    """A file of the original data set, read without TFDS."""
    content = gzip.decompress((DEBIAN / name).read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def sorted_examples(images, labels):
    return sorted(zip(map(bytes, images), map(int, labels), strict=True))


@pytest.mark.slow
@needs_tensorflow
@needs_debian
def test_fashion_mnist_comes_from_debians_package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = run("fashion_mnist", "--data_dir", tmp_path / "data")
    assert result.returncode == 0, result.stderr
    assert "60,000 training and 10,000 evaluation examples.\n" in result.stdout
    assert len(list((tmp_path / "data" / "fashion_mnist").iterdir())) == 1  # nothing incomplete

    spec = {"name": "fashion_mnist", "mean": (0.3,), "std": (0.4,), "data_dir": f"{tmp_path}/data"}
    data_set = data.load(spec, batch_size=10_000, seed=0)
    assert data_set.classes[0] == "T-shirt/top"
    batches = data_set.train_batches(0)
    train = [next(batches) for _ in range(6)]
    for got, files in (
        (train, ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")),
        (list(data_set.eval_batches()), ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")),
    ):
        images = np.concatenate([batch["image"] for batch in got])
        labels = np.concatenate([batch["label"] for batch in got])
        assert sorted_examples(images, labels) == sorted_examples(*map(idx, files))

    again = run("fashion_mnist", "--data_dir", tmp_path / "data")
    assert again.returncode == 0
    assert "Generating" not in again.stderr


@pytest.mark.slow
@needs_tensorflow
@needs_debian
def test_damaged_files_leave_nothing_behind(tmp_path):
    shutil.copytree(DEBIAN, tmp_path / "debian")
    path = tmp_path / "debian" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1000])
    first = (
        f"import pathlib\nprepare.DEBIAN_FASHION_MNIST = pathlib.Path({str(tmp_path / 'debian')!r})"
    )
    result = run("fashion_mnist", "--data_dir", tmp_path / "data", first=first)
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("fashion_mnist could not be prepared (ExtractError: ")
    assert f"Error while extracting {path}" in last
    assert "Compressed file ended before the end-of-stream marker was reached)" in last
    assert not list((tmp_path / "data" / "fashion_mnist").iterdir())


@pytest.mark.slow
@needs_tensorflow
@needs_debian
@pytest.mark.parametrize("reason", ["a file in the way", "no space"])
def test_where_it_cannot_write_it_says_so(tmp_path, reason):
    if reason == "a file in the way":
        (tmp_path / "data").touch()
        first, says = "", "NotADirectoryError"
    else:
        first = (
            "from tensorflow_datasets.core import utils\n"
            "utils.has_sufficient_disk_space = lambda *args, **kwargs: False"
        )
        says = "Not enough disk space"
    result = run("fashion_mnist", "--data_dir", tmp_path / "data", first=first)
    assert result.returncode == 2
    assert says in result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def prepared_imagenet(imagenet_archives, tmp_path_factory):
    """A data_dir that TFDS's own builder filled from the archives."""
    data_dir = tmp_path_factory.mktemp("prepared")
    result = run("imagenet2012", "--data_dir", data_dir, "--manual_dir", imagenet_archives)
    assert result.returncode == 0, result.stderr
    assert "22 training and 8 evaluation examples.\n" in result.stdout
    return data_dir


@pytest.mark.slow
@needs_tensorflow
def test_imagenet_comes_from_its_archives(prepared_imagenet, jpeg_photographs):
    prepared = open_prepared("imagenet2012", str(prepared_imagenet), data.KNOWN["imagenet2012"])
    assert len(prepared.classes) == 1000
    train = prepared.train.read(range(22))
    assert sorted(record["image"] for record in train) == sorted(jpeg_photographs[:22])
    for record in train:
        number = jpeg_photographs.index(record["image"])
        assert prepared.classes[record["label"]] == SYNSETS[number % 3]
    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    evaluation = prepared.evaluation.read(range(8))
    assert sorted(record["image"] for record in evaluation) == sorted(jpeg_photographs[22:])
    for record in evaluation:
        number = jpeg_photographs.index(record["image"]) - 22
        assert prepared.classes[record["label"]] == labels[number]


@pytest.mark.slow
@needs_tensorflow
def test_prepared_imagenet_trains_resnet50(prepared_imagenet):
    """From the archives down to two updates and an evaluation of configs/resnet50.py."""
    config = runpy.run_path(str(ROOT / "configs" / "resnet50.py"))["get_config"]()
    config.data.update({"data_dir": str(prepared_imagenet), "image_size": 32, "workers": 1})
    config.batch_size = 8
    built = experiment.build(config_lib.parse(config))
    state, metrics = experiment.initial_state(built), {}
    with contextlib.closing(built.data.train_batches(0)) as batches:
        step = jax.jit(make_train_step(built))
        for _ in range(2):
            state, metrics = step(state, next(batches))
    assert int(state.step) == 2
    # A network that knows nothing has the loss log(1000) = 6.9.
    assert 6 < float(metrics["train/loss"]) < 9
    (batch,) = built.data.eval_batches()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    outcomes = jax.jit(make_eval_step(built.model, built.data.eval_preprocess))(variables, batch)
    assert int(outcomes["mask"].sum()) == 8


@pytest.mark.slow
@needs_tensorflow
def test_a_truncated_archive_leaves_nothing_behind(tmp_path, imagenet_archives):
    for name in prepare.ARCHIVES:
        content = (imagenet_archives / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    result = run("imagenet2012", "--data_dir", tmp_path, "--manual_dir", tmp_path)
    assert result.returncode == 2
    assert "imagenet2012 could not be prepared (" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "imagenet2012").iterdir())
