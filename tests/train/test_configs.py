"""Every file under configs/ is whole: it parses, and its parts fit one another."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest

from train import config as config_lib
from train import models
from train.data import spec
from train.experiment import prunable_mask

FILES = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("[!_]*.py"))


def load(path):
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_is_checked_data_whose_parts_fit(path):
    config = config_lib.parse(load(path).get_config())
    parsed = spec.parse(config.data)
    known = spec.KNOWN[config.data["name"]]
    shape = known.shape or (parsed.image_size, parsed.image_size, 3)
    model = models.build(config.model, num_classes=known.num_classes)
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
    )
    assert any(jax.tree.leaves(prunable_mask(variables["params"], config.exclude)))
    assert 0 < config.sparsity < 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_says_how_to_run_it(path):
    text = load(path).__doc__
    assert f"--config configs/{path.stem}.py --workdir" in text
    imports = [
        line for line in path.read_text().splitlines() if line.startswith(("import", "from"))
    ]
    assert imports == ["import ml_collections"]
