"""Starting from another run's variables: `config.init_from`."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

import feather_jax as feather
from train.errors import UserError
from train.step import TrainState
from train.store import checkpoint


def with_variables_of(
    state: TrainState, source: pathlib.Path, say: Callable[[str], None]
) -> TrainState:
    """`state` with the weights and running statistics of another run; step and optimiser stay.

    Args:
      state: the state before the first update.
      source: a model file, a workdir or a folder of checkpoints.
      say: takes a line on each newer checkpoint that is damaged.

    Raises:
      UserError: there is nothing to start from, or a leaf is missing, unknown or of another shape.
    """
    wanted = {"params": state.params, "batch_stats": state.batch_stats}
    names, found = checkpoint.named_leaves(wanted), _read(source, say)
    for name in names:
        if name not in found:
            raise UserError(
                f"config.init_from: {source} has no {name}, which the model needs; choose the same "
                "config.model."
            )
    for name, leaf in found.items():
        if name not in names:
            raise UserError(
                f"config.init_from: {source} has {name}, which the model does not; choose the same "
                "config.model."
            )
        if np.shape(leaf) != names[name].shape:
            raise UserError(
                f"config.init_from: {name} has the shape {np.shape(leaf)} in {source} and "
                f"{names[name].shape} in the model; choose the same model and number of classes."
            )
    leaves = [jax.numpy.asarray(found[name], leaf.dtype) for name, leaf in names.items()]
    variables = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
    return dataclasses.replace(state, **variables)


def _read(source: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The variables in `source` by name, such as `params/head/kernel`."""
    try:
        is_file, is_workdir = source.is_file(), (source / "checkpoints").is_dir()
    except OSError as error:  # a name may be too long, or not ours to look up
        raise UserError(
            f"config.init_from is {str(source)!r}, which cannot be read ({error.strerror}); give a "
            "model.npz or the workdir of a run."
        ) from error
    if is_file:
        return checkpoint.named_leaves(_read_file(source))
    folder = source / "checkpoints" if is_workdir else source
    if not folder.is_dir():
        raise UserError(
            f"config.init_from is {str(source)!r}, and there is no such file or folder; give a "
            "model.npz or the workdir of a run."
        )
    found = checkpoint.newest(folder, items=("variables",))
    if found is None:
        raise UserError(
            f"config.init_from: there is no checkpoint in {folder}; give the workdir of a run that "
            "has saved one."
        )
    for step, reason in found.passed_over.items():
        say(f"Passed over the checkpoint of step {step} in {folder}: {reason}.")
    return {name.removeprefix("variables/"): leaf for name, leaf in found.leaves.items()}


def _read_file(source: pathlib.Path) -> PyTree:
    try:
        return feather.load(source)
    except (ValueError, OSError) as error:
        raise UserError(f"config.init_from: {error}") from error
