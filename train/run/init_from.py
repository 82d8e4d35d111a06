"""Starting from other weights, `config.init_from`: a run's, a model file's or PyTorch's."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import feather_jax as feather
from train.asl import R, network_params
from train.errors import UserError
from train.experiment import TrainState
from train.models.pretrained import LAYOUTS, translate
from train.models.vit import ViT, resize_positions
from train.store import checkpoint, foreign, tensors
from train.store.leaves import matched

_POSITIONS = "params/positions"


def with_variables_of(
    state: TrainState,
    source: pathlib.Path,
    model: nn.Module,
    say: Callable[[str], None],
    *,
    head: str = "head/.*",
) -> TrainState:
    """`state` with the weights and running statistics of `source`; step and optimiser stay.

    Of a run that averages its weights, it is the averages that are taken.

    The head begins anew where it does not fit, as with another number of classes. A vision
    transformer's positions are resized to those of its image size.

    Args:
      state: the state before the first update.
      source: a model file, a workdir, a folder of checkpoints (a run's or Orbax's own), Flax's
        msgpack, or a state dict with torchvision's or timm's names, in a file of PyTorch or of
        safetensors.
      model: the network.
      say: takes a line on what was taken, on what was left, and on each newer checkpoint that is
        damaged.
      head: the expression that the paths of the head's parameters match in full.

    Raises:
      UserError: there is nothing to start from, or a leaf that is not the head's is missing,
        unknown or of another shape.
    """
    wanted = {"params": network_params(state.params), "batch_stats": state.batch_stats}
    names, found = feather.named_leaves(wanted), _read(source, model, say)
    if isinstance(model, ViT):
        _resize_positions(found, names, source, say)
    anew = {
        name: found.pop(name, None)
        for name, leaf in names.items()
        if re.fullmatch(head, name.removeprefix("params/"))
        and (name not in found or np.shape(found[name]) != leaf.shape)
    }
    taken = len(names) - len(anew)
    found |= {name: names[name] for name in anew}
    where, remedy = f"config.init_from: {source}", "choose the same config.model"
    variables = matched(found, wanted, where, remedy, cast=True)
    say(f"Took {taken} of the network's {len(names)} arrays from {source}.")
    if anew:
        lines = (
            f"{name} ({'missing' if leaf is None else list(leaf.shape)} there, "
            f"{list(names[name].shape)} here)"
            for name, leaf in anew.items()
        )
        say(f"The head begins anew, since it does not fit: {', '.join(lines)}.")
    variables["params"] = {**state.params, **variables["params"]}  # ASL's thresholds stay
    # A copy, for both are donated to the first update.
    average = jax.tree.map(np.array, variables) if state.average else {}
    return dataclasses.replace(state, **variables, average=average)


def _resize_positions(
    found: dict[str, Any],
    names: Mapping[str, Any],
    source: pathlib.Path,
    say: Callable[[str], None],
) -> None:
    """Makes the positions in `found` those of the model's image size."""
    name = "params/positions"
    if name not in found:
        return
    there, here = np.shape(found[name]), names[name].shape
    if len(there) != 3 or there == here:
        return
    try:
        found[name] = np.asarray(resize_positions(found[name], here[1]))
    except ValueError as error:
        raise UserError(
            f"config.init_from: {source} is of another vision transformer ({error}) Choose its "
            "config.model."
        ) from error
    say(f"Resized the positions of {there[1]} tokens in {source} to the network's {here[1]}.")


def _read(source: pathlib.Path, model: nn.Module, say: Callable[[str], None]) -> dict[str, Any]:
    """The variables in `source` by name, such as `params/head/kernel`."""
    try:
        is_file, is_workdir = source.is_file(), (source / "checkpoints").is_dir()
    except OSError as error:  # a name may be too long, or not ours to look up
        raise UserError(
            f"config.init_from is {str(source)!r}, which cannot be read ({error.strerror}); give a "
            "model.npz, the workdir of a run, or PyTorch's weights."
        ) from error
    if is_file:
        return _read_file(source, model)
    folder = source / "checkpoints" if is_workdir else source
    if not folder.is_dir():
        raise UserError(
            f"config.init_from is {str(source)!r}, and there is no such file or folder; give a "
            "model.npz, the workdir of a run, or PyTorch's weights."
        )
    plain = foreign.read_orbax(folder)
    if plain is not None:
        return plain
    found = checkpoint.newest(folder, items=("variables",))
    if found is None:
        raise UserError(
            f"config.init_from: there is no checkpoint in {folder}; give the workdir of a run that "
            "has saved one."
        )
    for step, reason in found.passed_over.items():
        say(f"Passed over the checkpoint of step {step} in {folder}: {reason}.")
    variables = {name.removeprefix("variables/"): leaf for name, leaf in found.leaves.items()}
    averages = {
        name.removeprefix("average/"): leaf
        for name, leaf in variables.items()
        if name.startswith("average/")
    }
    chosen = averages or variables
    return {name: leaf for name, leaf in chosen.items() if not name.startswith(f"params/{R}/")}


def _read_file(source: pathlib.Path, model: nn.Module) -> dict[str, Any]:
    try:
        state_dict = tensors.read(source)
        if state_dict is None:
            flax_file = foreign.read_msgpack(source)
            return flax_file or feather.named_leaves(feather.load(source))
    except (ValueError, OSError) as error:
        raise UserError(f"config.init_from: {error}") from error
    layouts = LAYOUTS.get(type(model))
    if layouts is None:
        known = ", ".join(each.__name__ for each in LAYOUTS)
        raise UserError(
            f"config.init_from: {source} is PyTorch's, and its names are known for {known}, not "
            f"for a {type(model).__name__}; give a model.npz or the workdir of a run."
        )
    best = min((translate(each, state_dict) for each in layouts), key=lambda it: len(it.unknown))
    if best.unknown:
        raise UserError(
            f"config.init_from: {source} has {best.unknown[0]!r}, which neither torchvision's nor "
            f"timm's {type(model).__name__} has; choose the config.model that it is of."
        )
    return best.leaves
