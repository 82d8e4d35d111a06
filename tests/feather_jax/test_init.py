"""The package exports DESIGN's public names, and needs no Flax."""

import pathlib
import re
import subprocess
import sys
import tomllib
import types

import feather_jax


def test_exports_the_public_names_and_nothing_else():
    assert feather_jax.__all__ == sorted(feather_jax.__all__)
    visible = {
        name
        for name, value in vars(feather_jax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert visible == set(feather_jax.__all__)


def test_has_the_version_that_is_built():
    pyproject = pathlib.Path(__file__).parents[2] / "pyproject.toml"
    tool = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]
    assert tool["setuptools"]["dynamic"]["version"] == {"attr": "feather_jax.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", feather_jax.__version__)


def test_runs_where_flax_cannot_be_imported():
    program = """
import sys
sys.modules.update(dict.fromkeys(["flax", "orbax", "tensorflow", "matplotlib", "train"]))
import jax.numpy as jnp
import feather_jax as feather
prune = feather.Feather(0.5, end_step=1)
print(feather.summarize(prune.finalize({"kernel": jnp.arange(1.0, 6.0)[None]})).nonzero)
loaded = {name for name, module in sys.modules.items() if module is not None}
print([name for name in ("flax", "orbax", "matplotlib") if name in loaded])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stderr == ""
    assert result.stdout == "2\n[]\n"
