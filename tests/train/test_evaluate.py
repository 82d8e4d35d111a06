"""A model file gives the run's own figures without the run, and a damaged one gives a sentence."""

import dataclasses
import json
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import feather_jax as feather
from train import evaluate, program
from train.data import digits, spec
from train.run import evaluation
from train.store import model_file


@pytest.fixture(scope="module")
def model(finished_run, tmp_path_factory) -> pathlib.Path:
    """A copy of the run's model file, away from the run."""
    path = tmp_path_factory.mktemp("model") / "model.npz"
    shutil.copy(finished_run / "model.npz", path)
    return path


def status(*arguments: object) -> int:
    return program.run(lambda: evaluate.main([str(argument) for argument in arguments]))


def test_the_file_gives_the_runs_figures_to_the_last_digit(finished_run, model, capsys):
    summary = json.loads((finished_run / "summary.json").read_text())
    assert status("--model", model) == 0
    printed = capsys.readouterr().out.splitlines()
    for name in ("eval/accuracy", "eval/loss", "eval/examples"):
        assert f"{name} {summary[name]!r}, as in the file" in printed


def test_the_accuracy_is_that_of_the_files_own_weights(finished_run, model):
    """Counted here from the logits, with nothing of the program's evaluation."""
    saved, data = feather.load(model), digits.load()
    network = model_file.load(model).network
    images = (data.eval_images / np.float32(255) - np.float32(0.305)) / np.float32(0.376)
    logits = network.apply(saved, images.astype(np.float32), train=False)
    right = np.argmax(np.asarray(logits), -1) == data.eval_labels
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["eval/accuracy"] == right.mean()
    del saved["params"]["head"]  # which the configuration excludes from pruning
    kernels = feather.summarize(saved["params"])
    assert (kernels.nonzero, kernels.prunable) == (summary["nonzero"], summary["prunable"])
    assert feather.load_metadata(model)["sparsity"] == summary["sparsity"] == kernels.sparsity
    assert summary["eval/accuracy"] > 0.3


def test_another_data_set_of_the_same_shape(model, monkeypatch, capsys, tmp_path):
    """Digits as a folder of pictures, their labels moved by one, so that the accuracy is known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arrays = digits.load()
    moved = (arrays.eval_labels + 1) % 10
    for i, (image, label) in enumerate(zip(arrays.eval_images, moved, strict=True)):
        for split in ("train", "eval"):
            path = tmp_path / "moved" / split / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
    saved = model_file.load(model)
    logits = np.asarray(saved.logits(saved.variables, arrays.eval_images))
    expected = float((np.argmax(logits, -1) == moved).mean())

    assert status("--model", model, "--data", "folder", "--data_dir", tmp_path / "moved") == 0
    assert f"eval/accuracy {expected!r}\n" in capsys.readouterr().out
    monkeypatch.setitem(spec.KNOWN, "coloured", spec.Known((8, 8, 3), 10, (0.5,) * 3, (0.5,) * 3))
    monkeypatch.setitem(spec.KNOWN, "few", spec.Known((8, 8, 1), 3, (0.5,), (0.5,)))
    for name in ("coloured", "few"):
        assert status("--model", model, "--data", name) == 2
        assert "choose a data set of the same shape" in capsys.readouterr().err
    assert status("--model", model, "--data", "nothing") == 2
    assert "'nothing'" in capsys.readouterr().err
    assert status("--model", model, "--data", "folder") == 2
    assert "lacks the field 'path'" in capsys.readouterr().err


def changed(model: pathlib.Path, path: pathlib.Path, metadata: dict) -> pathlib.Path:
    """The model file with other metadata."""
    feather.save(path, feather.load(model), feather.load_metadata(model) | metadata)
    return path


def bad_files(model: pathlib.Path, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    variables = feather.load(model)
    del variables["params"]["stem"]
    complex_ones = jax.tree.map(lambda leaf: leaf.astype(np.complex64), feather.load(model))
    feather.save(folder / "complex.npz", complex_ones, feather.load_metadata(model))
    preprocessing = feather.load_metadata(model)["preprocessing"]
    (folder / "text.npz").write_text("nothing of ours")
    (folder / "cut.npz").write_bytes(model.read_bytes()[:-100])
    np.savez(folder / "foreign.npz", weights=np.zeros(3))
    feather.save(folder / "bare.npz", feather.load(model))
    feather.save(folder / "other.npz", variables, feather.load_metadata(model))
    return {
        "cannot be read": folder / "absent.npz",
        "is a directory": folder,
        "is damaged or was not written by": folder / "text.npz",
        "index.json": folder / "foreign.npz",
        "train.main wrote": folder / "bare.npz",
        "stem/kernel": folder / "other.npz",
        "config.model.name is 'os.system'": changed(
            model, folder / "named.npz", {"model": {"name": "os.system"}}
        ),
        "version 2": changed(model, folder / "later.npz", {"version": 2}),
        "lacks classes": changed(model, folder / "kind.npz", {"classes": 3}),
        "lacks preprocessing": changed(
            model, folder / "mean.npz", {"preprocessing": {"mean": [1.0]}}
        ),
        "lacks preprocessing or": changed(
            model, folder / "std.npz", {"preprocessing": preprocessing | {"std": [0.0]}}
        ),
        "lacks num_classes": changed(model, folder / "classes.npz", {"num_classes": 0}),
        "'float64', for which JAX_ENABLE_X64=1": changed(
            model, folder / "double.npz", {"compute_dtype": "float64"}
        ),
        "as complex64": folder / "complex.npz",
        "save it again": folder / "cut.npz",
    }


def test_what_is_no_model_file_is_one_sentence(model, tmp_path, capsys):
    before = set(sys.modules)
    for words, path in bad_files(model, tmp_path).items():
        assert status("--model", path) == 2
        printed = capsys.readouterr()
        assert words in printed.err
        assert str(path) in printed.err
        assert printed.err.count("\n") == 1
        assert not printed.out
    imported = set(sys.modules) - before
    assert not [name for name in imported if not name.startswith(("jax", "numpy"))]


def test_a_wrong_argument_is_one_sentence(capsys):
    for arguments in ([], ["--model"], ["--model", "x", "--nothing"]):
        assert status(*arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("batch_size", [1437, 64, 5])
def test_every_device_count_evaluates_every_example(model, batch_size):
    """1437 is the whole training split, which 8 devices cannot share equally."""
    saved = model_file.load(model)
    metadata = saved.metadata.model_copy(update={"batch_size": batch_size})
    saved = dataclasses.replace(saved, metadata=metadata)
    data = evaluation.open_data(saved)
    assert sum(int(batch["mask"].sum()) for batch in data.eval_batches()) == data.num_eval
    assert next(iter(data.eval_batches()))["image"].shape[0] % jax.device_count() == 0


def test_compiled_it_gives_the_same_accuracy(finished_run, model, capsys):
    summary = json.loads((finished_run / "summary.json").read_text())
    assert status("--model", model, "--compiled", "--threads", 2) == 0
    printed = capsys.readouterr().out
    assert f"eval/accuracy {summary['eval/accuracy']!r}, as in the file" in printed
    loss = float(re.search(r"eval/loss (\S+?),", printed)[1])
    assert loss == pytest.approx(summary["eval/loss"], rel=1e-5)
    rates = re.search(
        r"([\d,]+) images/s compiled, on 2 threads; ([\d,]+) by XLA; 64 at a", printed
    )
    assert all(int(rate.replace(",", "")) > 0 for rate in rates.groups())


def test_threads_of_what_is_not_compiled(model, capsys):
    assert status("--model", model, "--threads", 2) == 2
    assert "--threads is of --compiled" in capsys.readouterr().err


def test_threads_that_are_none(model, capsys):
    assert status("--model", model, "--compiled", "--threads", 0) == 2
    assert "threads is 0" in capsys.readouterr().err
