"""`model.npz`: a finalised network, with all it takes to use it again without the run."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from feather_jax import compact
from feather_jax.masks import is_floating, path_name
from feather_jax.summary import Summary
from train import models
from train.config import plain
from train.data import augment, spec
from train.errors import UserError, writing
from train.experiment import Experiment, initial_variables, usable_dtype

VERSION = 1


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What a model file holds, checked.

    Attributes:
      path: the file.
      network: the network, built by its name in `train.models.MODELS`.
      variables: `params` and `batch_stats`, NumPy arrays.
      metadata: what `save` wrote, plain data.
    """

    path: pathlib.Path
    network: nn.Module
    variables: PyTree
    metadata: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        height, width, channels = self.metadata["preprocessing"]["image_shape"]
        return height, width, channels

    def preprocess(self, images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """What comes before the network: (image / 255 - mean) / std, by channel."""
        values = self.metadata["preprocessing"]
        return augment.normalize(images, values["mean"], values["std"])

    def logits(self, variables: PyTree, images: UInt8[Array, "b h w c"]) -> Float[Array, "b k"]:
        """The network on images as they are decoded, with `variables` placed by the caller."""
        logits = self.network.apply(variables, self.preprocess(images), train=False)
        assert isinstance(logits, jax.Array)
        return logits


def save(
    path: pathlib.Path,
    built: Experiment,
    variables: PyTree,
    counts: Summary,
    evaluation: Mapping[str, float],
) -> None:
    """Writes a model file (see `feather_jax.save`).

    Args:
      path: where to.
      built: the experiment.
      variables: the finalised `params` and `batch_stats`.
      counts: of the weights of `params`.
      evaluation: what `train.evaluate.evaluate` gave for these variables.

    Raises:
      StorageError: it cannot be written.
    """
    config, data = built.config, built.data
    parsed, devices = spec.parse(config.data), jax.devices()
    several = f"{len(devices)} x " if len(devices) > 1 else ""
    metadata = {
        "version": VERSION,
        "model": plain(config.model),
        "num_classes": data.num_classes,
        "compute_dtype": config.compute_dtype,
        "preprocessing": {
            "image_shape": list(data.image_shape),
            "mean": list(parsed.mean),
            "std": list(parsed.std),
        },
        "data": {k: v for k, v in plain(config.data).items() if k not in ("mean", "std")},
        "classes": list(data.classes),
        "batch_size": config.batch_size,
        "step": built.steps.total,
        "sparsity": counts.sparsity,
        "evaluation": dict(evaluation),
        "trained": {
            "examples": data.num_train,
            "devices": several + devices[0].device_kind,
            "jax": jax.__version__,
        },
    }
    with writing(path):
        compact.save(path, jax.device_get(variables), metadata)


_KINDS: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "num_classes": int,
    "compute_dtype": str,
    "preprocessing": dict,
    "data": dict,
    "classes": list,
    "batch_size": int,
    "step": int,
    "sparsity": (int, float),
    "evaluation": dict,
    "trained": dict,
}


def load(path: pathlib.Path) -> SavedModel:
    """Reads a model file and builds its network.

    Nothing is unpickled, and nothing imported that the file names.

    Raises:
      UserError: there is no such file, it is damaged or not of `save`, its variables are not those
        of the network that it names, or it computes in float64 and JAX does not.
    """
    try:
        metadata = compact.load_metadata(path)
        variables = compact.load(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    _check_metadata(path, metadata)
    dtype = usable_dtype(metadata["compute_dtype"], f"{path}'s compute_dtype")
    try:
        network = models.build(metadata["model"], num_classes=metadata["num_classes"], dtype=dtype)
    except UserError as error:
        raise UserError(f"{path} holds a network that is not known here: {error}") from error
    model = SavedModel(path, network, variables, metadata)
    return dataclasses.replace(model, variables=_fitting(model))


def _check_metadata(path: pathlib.Path, metadata: dict[str, Any]) -> None:
    """Raises UserError unless all is there and of its kind."""
    if metadata.get("version") != VERSION:
        raise UserError(
            f"{path} says it is version {metadata.get('version')!r} of a run's model file, and "
            f"{VERSION} is known; give a model.npz that train.main wrote."
        )
    wrong = [
        name
        for name, kind in _KINDS.items()
        if not isinstance(metadata.get(name), kind) or isinstance(metadata.get(name), bool)
    ]
    if not wrong:
        values = metadata["preprocessing"]
        shape = values.get("image_shape")
        if not _is_image_shape(shape) or not all(
            spec.are_channel_values(key, values.get(key), shape[2]) for key in ("mean", "std")
        ):
            wrong.append("preprocessing")
        if metadata["num_classes"] < 1:
            wrong.append("num_classes")
        if metadata["compute_dtype"] not in ("float32", "bfloat16", "float64"):
            wrong.append("compute_dtype")
    if wrong:
        raise UserError(
            f"{path} lacks {', '.join(wrong)} or has something else there; give a model.npz that "
            "train.main wrote."
        )


def _is_image_shape(value: Any) -> bool:
    """Whether it is [height, width, channels], as JSON has it."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(size) is int and size > 0 for size in value)
    )


def _fitting(model: SavedModel) -> PyTree:
    """The variables in the network's structure and types.

    Raises:
      UserError: they are not the network's.
    """
    try:
        wanted = jax.eval_shape(lambda: initial_variables(model.network, model.image_shape, 0))
    except UserError as error:
        raise UserError(f"{model.path} does not fit its own network: {error}") from error
    leaves = jax.tree_util.tree_leaves_with_path(model.variables)
    found = {path_name(path): leaf for path, leaf in leaves}
    paths = jax.tree_util.tree_leaves_with_path(wanted)
    shapes = {path_name(path): leaf.shape for path, leaf in paths}
    for name in sorted(shapes.keys() | found.keys()):
        has = found[name].shape if name in found else "missing"
        wants = shapes.get(name, "unknown")
        if has != wants:
            raise UserError(
                f"{model.path} does not hold a {model.metadata['model']['name']} as it says: "
                f"{name} is {has} there and {wants} in the network; save the model again."
            )
        if not is_floating(found[name]):
            raise UserError(
                f"{model.path} holds {name} as {found[name].dtype}, and the network computes with "
                "real floating-point numbers; save the model again."
            )

    def fit(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return found[path_name(path)].astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fit, wanted)
