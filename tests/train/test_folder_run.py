"""Runs on a folder of pictures: what they write down of it, and what a later start makes of it."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import feather_jax as feather
from train import config as config_lib
from train import export, main, program
from train.data import folder
from train.errors import UserError
from train.store import predictions as predictions_lib

CONFIG = {
    "model": {"name": "lenet300", "hidden": [16]},
    "batch_size": 32,
    "epochs": 2.0,
    "learning_rate": 0.1,
    "sparsity": 0.5,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three of the digits as a folder of pictures, named so that the order is not by number."""
    root, digits = tmp_path_factory.mktemp("pictures"), load_digits()
    names = {0: "zero", 1: "one", 2: "two"}
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if label in names:
            path = root / names[label] / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).save(path)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(pictures, workdir, said=None, **changes):
    data = {
        "name": "folder",
        "path": str(pictures),
        "image_size": 8,
        "grey": True,
        "eval_fraction": 0.3,
        "mean": "computed",
        "std": "computed",
    }
    values = CONFIG | changes
    values["data"] = data | values.get("data", {})
    say = (lambda line: None) if said is None else said.append
    return main.run(config_lib.parse(values), workdir, say)


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "folder"
    run(pictures, workdir)
    return workdir


def test_classes_and_statistics_are_written_down(finished):
    said = json.loads((finished / "config.json").read_text())["data"]
    assert said["classes"] == ["one", "two", "zero"]
    assert said["mean"] == pytest.approx([0.3], abs=0.05)
    metadata = feather.load_metadata(finished / "model.npz")
    assert metadata["classes"] == ["one", "two", "zero"]
    assert metadata["preprocessing"]["mean"] == said["mean"]
    assert metadata["data"]["path"] == said["path"]


def test_the_export_names_the_classes(finished, tmp_path):
    arguments = ["--model", str(finished / "model.npz"), "--out", str(tmp_path / "out")]
    assert program.run(lambda: export.main(arguments)) == 0
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert described["model"]["classes"] == ["one", "two", "zero"]


def test_a_second_start_goes_on_with_what_the_first_found_out(finished, pictures, tmp_path):
    """A class and pictures that came since are not taken; what was computed is not again."""
    more = tmp_path / "more"
    shutil.copytree(pictures, more)
    config = json.loads((finished / "config.json").read_text())
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    config["data"]["path"] = str(more)
    (workdir / "config.json").write_text(json.dumps(config))
    (more / "four").mkdir()
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(more / "four" / "1.png")
    run(more, workdir)
    assert json.loads((workdir / "config.json").read_text()) == config


@pytest.mark.parametrize("use", ["training", "evaluation"])
def test_a_run_does_not_go_on_with_other_pictures(finished, pictures, tmp_path, use):
    more, workdir = tmp_path / "more", tmp_path / "run"
    shutil.copytree(pictures, more)
    shutil.copytree(finished, workdir)
    config = json.loads((finished / "config.json").read_text())
    config["data"]["path"] = str(more)
    (workdir / "config.json").write_text(json.dumps(config))
    names = (f"one/{i}x.png" for i in range(1000))
    added = next(n for n in names if (folder.evaluation_rank(n) < 0.3) == (use == "evaluation"))
    shutil.copy(next((more / "one").iterdir()), more / added)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"holds a run with \d+ {use} examples, and the data set"):
        run(more, workdir)
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_another_order_of_classes_is_another_configuration(finished, pictures):
    with pytest.raises(UserError, match=r"differs in data.classes \(was \['one', 'two', 'zero'\]"):
        run(pictures, finished, data={"classes": ("zero", "one", "two")})


def test_what_is_passed_over_is_said(pictures, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(pictures, more)
    (more / "one" / "notes.txt").write_text("mine")
    said = []
    run(more, tmp_path / "run", said, data={"skip_damaged": True}, epochs=0.2)
    assert sum("notes.txt" in line and "passed over" in line for line in said) == 1


def test_the_report_shows_what_is_wrong(finished):
    text = (finished / "report.html").read_text()
    found, shown = predictions_lib.load(finished / "predictions.npz")
    summary = json.loads((finished / "summary.json").read_text())
    assert found.figures.items() <= summary.items()
    wrong = summary["eval/examples"] - round(summary["eval/accuracy"] * summary["eval/examples"])
    assert 0 < min(wrong, 24) == len(shown) == text.count("<img ")
    for each in shown:
        assert re.fullmatch(r"(one|two|zero)/\d+\.png", each.name)
        assert f"{each.name}</span>" in text
    matrix = re.search(r'<table class="matrix">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)[1]
    cells = re.findall(r"<td(?: style=.*?)?>([\d,]*)</td>", matrix)
    assert [int(cell or 0) for cell in cells] == found.confusion(3).ravel().tolist()


def test_mixing_and_colour_change_training_and_it_still_learns(pictures, tmp_path):
    data = {"color_jitter": (0.3, 0.3, 0.0, 0.0), "random_resized_crop": 0.8}
    summary = run(pictures, tmp_path / "run", data=data, mixup=0.2, cutmix=1.0, epochs=8.0)
    assert summary["eval/accuracy"] > 0.8


def test_an_odd_batch_cannot_be_mixed(pictures, tmp_path):
    """The tests have eight devices, five examples each here."""
    with pytest.raises(UserError, match=r"batch_size is 40, .* multiple of 16"):
        run(pictures, tmp_path / "run", batch_size=40, mixup=0.2)
