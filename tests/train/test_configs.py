"""Every file under configs/ is whole: it parses, and its parts fit one another."""

import ast
import json
import pathlib
import re

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import command_line, main, models
from train import config as config_lib
from train.data import spec
from train.experiment import prunable_mask

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("[!_]*.py"))
CIFAR = [
    f"cifar:{model},{data}"
    for model in ("resnet20", "mobilenet", "densenet40")
    for data in ("cifar10", "cifar100")
]
BACKBONES = [f"fashion_mnist_resnet:{backbone}" for backbone in ("macs", "n_m")]
EXPERIMENTS = [*(path.stem for path in FILES if path.stem != "cifar"), *CIFAR, *BACKBONES]


def load(experiment):
    """What the command line's `configs/NAME.py:ARGUMENT` gives, by "NAME:ARGUMENT"."""
    name, colon, argument = experiment.partition(":")
    return command_line.load(f"{ROOT}/configs/{name}.py{colon}{argument}")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_config_is_checked_data_whose_parts_fit(experiment):
    config = config_lib.parse(load(experiment))
    parsed = spec.parse(config.data)
    known = spec.KNOWN.get(config.data["name"])  # a folder has its own classes
    shape = known.shape if known else None
    shape = shape or (parsed.image_size, parsed.image_size, 3)
    model = models.build(config.model, num_classes=known.num_classes if known else 7)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
    )
    assert any(jax.tree.leaves(prunable_mask(variables["params"], config)))
    assert 0 < config.sparsity < 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_says_how_to_run_it(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert re.search(rf"--config configs/{path.stem}.py(:\S+)?( --config\.\S+)* --workdir", text)
    imports = [
        line for line in path.read_text().splitlines() if line.startswith(("import", "from"))
    ]
    assert imports == ["import ml_collections"]


# The others are slow: their networks have all their layers.
FAST = ("cifar:resnet20,cifar10", "fashion_mnist_lenet")


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in EXPERIMENTS],
)
def test_a_config_takes_two_steps(
    experiment, tmp_path, write_prepared, jpeg_photographs, monkeypatch
):
    """A whole run of two updates of 8 examples, its evaluation and its files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = load(experiment)
    name = config.data.name
    if name == "folder":
        for number, image in enumerate(jpeg_photographs):
            path = tmp_path / "pictures" / ("train" if number < 22 else "eval")
            path /= f"{number % 2}/{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        config.data.update({"path": str(tmp_path / "pictures"), "image_size": 32, "workers": 0})
        config.init_from = ""  # see models/test_pretrained.py
    elif name != "digits":
        known = spec.KNOWN[name]
        if known.shape is None:
            images = jpeg_photographs
            config.data.update({"image_size": 32, "workers": 0})
        else:
            rng = np.random.default_rng(0)
            pixels = rng.integers(0, 256, (30, *known.shape), np.uint8)
            images = [cv2.imencode(".png", image)[1].tobytes() for image in pixels]
        examples = [{"image": image, "label": i % 10} for i, image in enumerate(images)]
        splits = {known.train_split: examples[:22], known.eval_split: examples[22:]}
        write_prepared(tmp_path / "data", name, splits)
        config.data.data_dir = str(tmp_path / "data")
    if experiment == "cifar:resnet20,cifar10":
        config.model.update({"widths": (4, 8, 8), "blocks_per_stage": 1})
    config.batch_size = 8
    config.mixup = 0.0  # which needs two examples a device, and there are eight devices
    values = config_lib.parse(config)
    shrink = 2 / ((1437 if name == "digits" else 22) // 8 * values.epochs)
    for field in ("epochs", "warmup_epochs", "prune_begin", "prune_end"):
        if getattr(values, field) is not None:
            config[field] = getattr(values, field) * shrink
    main.run(config_lib.parse(config), tmp_path / "run", say=lambda line: None)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["eval/examples"] == (360 if name == "digits" else 8)
    assert np.isfinite(summary["eval/loss"])
    if values.backbone["name"] != "macs":  # of which sparsity is a fraction
        assert summary["sparsity"] == pytest.approx(config.sparsity, abs=1 / summary["prunable"])


@pytest.mark.parametrize("experiment", ["finetune", "folder", "imagenet_vit"])
def test_fewer_epochs_are_the_only_change_that_a_shorter_run_needs(experiment):
    arguments = [
        "main",
        "--config",
        f"{ROOT}/configs/{experiment}.py",
        "--workdir",
        "run",
        "--config.epochs=2",
    ]
    config, whole = command_line.parse(arguments).config, config_lib.parse(load(experiment))
    for field in ("warmup_epochs", "prune_begin"):
        share = getattr(whole, field) / whole.epochs
        assert getattr(config, field) == pytest.approx(2 * share)
    assert config.prune_end_epoch == pytest.approx(2 * whole.prune_end_epoch / whole.epochs)
