"""`model.npz`: a finalised network, with all it takes to use it again without the run."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Self

import flax.linen as nn
import jax
import pydantic
from jaxtyping import Array, Float, PyTree, UInt8
from pydantic import Field

import feather_jax as feather
from train import models
from train.config import Dtype, Named
from train.data import augment
from train.data.spec import Mean, Std
from train.errors import UserError, writing
from train.experiment import Experiment, initial_variables, usable_dtype
from train.fields import Checked, Count
from train.models.calling import call_arguments
from train.store.leaves import matched

VERSION = 1


class Preprocessing(Checked, extra="allow"):
    """From decoded images to what the network takes: (image / 255 - mean) / std, by channel."""

    image_shape: Annotated[tuple[Count, Count, Count], Field(strict=False)]
    mean: Mean
    std: Std

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if not len(self.mean) == len(self.std) == self.image_shape[-1]:
            raise ValueError("one number a channel")
        return self


class Trained(Checked, extra="allow"):
    """How it was trained: the number of examples, the devices and JAX's version."""

    examples: Count
    devices: str
    jax: str


class Metadata(Checked, extra="allow"):
    """What a model file says of its network, which later versions may add to.

    Attributes:
      model: as in `config.model`.
      num_classes: the number of logits.
      compute_dtype: as in `config.compute_dtype`.
      preprocessing: what is done to decoded images before the network sees them.
      data: as in `config.data`, without the mean and the deviation.
      classes: the names of the classes in the order of the logits; [] where they have none.
      batch_size: as in `config.batch_size`.
      step: the updates that it was trained for.
      sparsity: the fraction of zeros among its prunable weights.
      evaluation: what the run's evaluation gave.
      trained: on how many examples, on which devices, and with which JAX.
    """

    version: int = VERSION
    model: Named
    num_classes: Count
    compute_dtype: Dtype
    preprocessing: Preprocessing
    data: Named
    classes: list[str]
    batch_size: Count
    step: Count
    sparsity: float
    evaluation: dict[str, Any]
    trained: Trained


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What a model file holds, checked.

    Attributes:
      path: the file.
      network: the network, built by its name in `train.models.MODELS`.
      variables: `params` and `batch_stats`, NumPy arrays.
      metadata: what `save` wrote.
    """

    path: pathlib.Path
    network: nn.Module
    variables: PyTree
    metadata: Metadata

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return self.metadata.preprocessing.image_shape

    def preprocess(self, images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """What comes before the network."""
        values = self.metadata.preprocessing
        return augment.normalize(images, values.mean, values.std)

    def logits(self, variables: PyTree, images: UInt8[Array, "b h w c"]) -> Float[Array, "b k"]:
        """The network on images as they are decoded, with `variables` placed by the caller."""
        logits = self.network.apply(
            variables, self.preprocess(images), **call_arguments(self.network, train=False)
        )
        assert isinstance(logits, jax.Array)
        return logits


def save(
    path: pathlib.Path,
    experiment: Experiment,
    variables: PyTree,
    counts: feather.Summary,
    evaluation: Mapping[str, float],
) -> None:
    """Writes a model file (see `feather_jax.save`).

    Args:
      path: where to.
      experiment: what was trained.
      variables: the finalised `params` and `batch_stats`.
      counts: of the weights of `params`.
      evaluation: what `train.evaluate.evaluate` gave for these variables.

    Raises:
      StorageError: it cannot be written.
    """
    config, data = experiment.config, experiment.data
    devices = jax.devices()
    several = f"{len(devices)} x " if len(devices) > 1 else ""
    metadata = Metadata(
        model=config.model,
        num_classes=data.num_classes,
        compute_dtype=config.compute_dtype,
        preprocessing=Preprocessing(image_shape=data.image_shape, mean=data.mean, std=data.std),
        data={k: v for k, v in config.data.items() if k not in ("mean", "std")},
        classes=list(data.classes),
        batch_size=config.batch_size,
        step=experiment.steps.total,
        sparsity=counts.sparsity,
        evaluation=dict(evaluation),
        trained=Trained(
            examples=data.num_train,
            devices=several + devices[0].device_kind,
            jax=jax.__version__,
        ),
    )
    with writing(path):
        feather.save(path, jax.device_get(variables), metadata.model_dump(mode="json"))


def load(path: pathlib.Path, *, allow_import: bool = False) -> SavedModel:
    """Reads a model file and builds its network.

    Nothing is unpickled, and nothing imported that the file names, unless it is allowed.

    Args:
      path: the file.
      allow_import: whether a network of the user's own, `package.module:Network`, is imported.

    Raises:
      UserError: there is no such file, it is damaged or not of `save`, its variables are not those
        of the network that it names, or it computes in float64 and JAX does not.
    """
    try:
        metadata = _parse(path, feather.load_metadata(path))
        variables = feather.load(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    dtype = usable_dtype(metadata.compute_dtype, f"{path}'s compute_dtype")
    try:
        network = models.build(
            metadata.model,
            num_classes=metadata.num_classes,
            dtype=dtype,
            image_shape=metadata.preprocessing.image_shape,
            allow_import=allow_import,
        )
    except UserError as error:
        raise UserError(f"{path} holds a network that is not known here: {error}") from error
    model = SavedModel(path, network, variables, metadata)
    return dataclasses.replace(model, variables=_fitting(model))


def _parse(path: pathlib.Path, metadata: dict[str, Any]) -> Metadata:
    """Raises UserError unless all is there and of its kind."""
    if metadata.get("version") != VERSION:
        raise UserError(
            f"{path} says it is version {metadata.get('version')!r} of a run's model file, and "
            f"{VERSION} is known; give a model.npz that train.main wrote."
        )
    try:
        return Metadata.model_validate(metadata)
    except pydantic.ValidationError as error:
        wrong = ", ".join(dict.fromkeys(str(each["loc"][0]) for each in error.errors()))
        raise UserError(
            f"{path} lacks {wrong} or has something else there; give a model.npz that "
            "train.main wrote."
        ) from error


def _fitting(model: SavedModel) -> PyTree:
    """The variables in the network's structure and types.

    Raises:
      UserError: they are not the network's.
    """
    try:
        wanted = jax.eval_shape(lambda: initial_variables(model.network, model.image_shape, 0))
    except UserError as error:
        raise UserError(f"{model.path} does not fit its own network: {error}") from error
    where = f"{model.path}, which says that it is of a {model.metadata.model['name']},"
    found = feather.named_leaves(model.variables)
    return matched(found, wanted, where, "save the model again", cast=True)
