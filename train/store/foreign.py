"""Variables that others saved: plain Orbax checkpoints, and Flax's msgpack files."""

import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import flax.serialization
import numpy as np
from jaxtyping import PyTree

import feather_jax as feather
from train.errors import UserError, one_line
from train.store.checkpoint import read_arrays


def read_orbax(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The variables in an Orbax checkpoint that is not a run's; None if there is none.

    Args:
      folder: what a `StandardCheckpointer` or `PyTreeCheckpointer` wrote, or the folder of a
        `CheckpointManager`, of which the newest step is taken.

    Returns:
      Arrays by their names, such as `params/head/kernel`.

    Raises:
      UserError: it cannot be read.
    """
    if any(folder.glob("*/info")):  # a run's own checkpoints
        return None
    steps = [path for path in folder.iterdir() if path.name.isdecimal()]
    step = max(steps, key=lambda path: int(path.name), default=folder)
    items = {path.parent.name: path.parent for path in sorted(step.glob("*/_METADATA"))}
    if (step / "_METADATA").exists():
        items = {"default": step}
    if not items:
        return None
    try:
        trees = {name: read_arrays(path.resolve()) for name, path in items.items()}
    except Exception as error:  # of many types: damage meets Orbax, TensorStore and JSON
        raise UserError(f"{step} cannot be read ({one_line(error)}); bring back a copy.") from error
    return _variables(trees if len(trees) > 1 else next(iter(trees.values())))


def read_msgpack(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The variables in a file of `flax.serialization`; None if it is none.

    Raises:
      UserError: it is damaged.
      OSError: it cannot be read.
    """
    data = path.read_bytes()
    is_map = bool(data) and (0x81 <= data[0] <= 0x8F or data[0] in (0xDE, 0xDF))
    if not is_map or zipfile.is_zipfile(path):
        return None
    try:
        return _variables(flax.serialization.msgpack_restore(data))
    except Exception as error:  # whatever msgpack meets in bytes that are none of its own
        raise UserError(f"{path} is damaged ({one_line(error)}); bring back a copy.") from error


def _variables(tree: PyTree) -> dict[str, Any]:
    """The network's variables by name, in what people save: those, a train state, or parameters."""
    if isinstance(tree, Mapping) and "params" in tree:
        tree = {name: tree[name] for name in ("params", "batch_stats") if name in tree}
    else:
        tree = {"params": tree}
    return feather.named_leaves(tree)
