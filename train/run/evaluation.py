"""The evaluation of a network on the evaluation split, every example once."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from feather_jax import cpu
from train import data as data_lib
from train import parallel
from train.data import DataSet
from train.data.spec import FOLDER, facts
from train.errors import UserError
from train.run.timing import compile_by_xla
from train.step import make_eval_step, outcomes
from train.store.model_file import SavedModel
from train.store.predictions import Predictions


def evaluate(
    eval_step: Callable[..., Any], variables: PyTree, data: DataSet, mesh: Mesh
) -> Predictions:
    """What the network makes of the evaluation split, each example taken once.

    Args:
      eval_step: `train.step.make_eval_step`'s, through `train.parallel.on_all_devices`.
      variables: the network's variables, replicated over the mesh.
      data: the data set.
      mesh: all devices.
    """
    found: list[dict[str, np.ndarray]] = []
    in_flight: deque[dict[str, jax.Array]] = deque()
    for batch in data.eval_batches():
        in_flight.append(eval_step(variables, parallel.shard(batch, mesh)))
        if len(in_flight) == 2:
            found.append(jax.device_get(in_flight.popleft()))
    return _predictions([*found, *map(jax.device_get, in_flight)])


def _predictions(outcomes: Sequence[dict[str, np.ndarray]]) -> Predictions:
    """Those of the examples in the batches, without what fills them up."""
    joined = {name: np.concatenate([each[name] for each in outcomes]) for name in outcomes[0]}
    (examples,) = np.nonzero(joined.pop("mask"))
    chosen = {name: values[examples] for name, values in joined.items()}
    return Predictions(example=examples.astype(np.int32), **chosen)


def evaluate_model(model: SavedModel, data: DataSet) -> Predictions:
    """What `evaluate` gives for a model file, on all devices."""
    mesh = parallel.device_mesh()
    eval_step = make_eval_step(model.network, data.eval_preprocess)
    return evaluate(
        parallel.on_all_devices(eval_step, donate_state=False),
        parallel.replicate(model.variables, mesh),
        data,
        mesh,
    )


@dataclasses.dataclass(frozen=True)
class CompiledEvaluation:
    """What `evaluate_compiled` found.

    Attributes:
      predictions: what the compiled program makes of the examples.
      images_per_second: how many of them it takes in a second, by the clock.
      images_per_second_of_xla: the same network's by XLA on this CPU, on as many threads as that
        takes.
      batch_size: images of a call, for both.
    """

    predictions: Predictions
    images_per_second: float
    images_per_second_of_xla: float
    batch_size: int


def evaluate_compiled(model: SavedModel, data: DataSet, threads: int) -> CompiledEvaluation:
    """Evaluates a model file as `feather_jax.cpu` compiles it, beside XLA on every batch.

    Raises:
      UserError: the network has something in it that is not compiled.
    """
    batches = list(data.eval_batches())
    images = batches[0]["image"]
    try:
        logits = functools.partial(model.logits, model.variables)
        compiled = cpu.compile(logits, images, threads=threads)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{model.path} cannot be compiled: {error}") from error
    by_xla = compile_by_xla(model, images)
    find = jax.jit(outcomes)
    found, times = [], {"ours": 0.0, "xla": 0.0}
    for batch in batches:
        start = time.perf_counter()
        result = compiled(batch["image"])
        middle = time.perf_counter()
        by_xla(batch["image"])
        times["ours"] += middle - start
        times["xla"] += time.perf_counter() - middle
        found.append(jax.device_get(find(result, batch)))
    taken = len(batches) * len(images)
    return CompiledEvaluation(
        _predictions(found), taken / times["ours"], taken / times["xla"], len(images)
    )


def open_data(model: SavedModel, name: str | None = None, data_dir: str | None = None) -> DataSet:
    """The data set that a model was trained on, or another one, preprocessed as the model wants it.

    Batches are the run's, or as little smaller as the devices need to share them equally.

    Args:
      model: the model.
      name: of another data set; None for the run's.
      data_dir: where it is; None for where the run had it, "" for TFDS's default. Of a folder of
        pictures, its path.

    Raises:
      UserError: there is no such data set, or it does not fit the model.
    """
    spec = _spec(model, name or model.metadata.data["name"], data_dir)
    preprocessing = model.metadata.preprocessing.model_dump(include={"mean", "std"})
    devices = jax.device_count()
    shares = max(model.metadata.batch_size // devices, 1)
    return data_lib.load(
        spec | preprocessing,
        batch_size=shares * devices,
        seed=0,
    )


def _spec(model: SavedModel, name: str, data_dir: str | None) -> dict[str, Any]:
    """`config.data` for a model and the data set of this name.

    Raises:
      UserError: it does not fit the model.
    """
    saved, (height, width, channels) = model.metadata.data, model.image_shape
    own = name == saved["name"]
    spec: dict[str, Any] = dict(saved) if own else {"name": name}
    if name == FOLDER:
        if not own:
            spec |= {"image_size": height, "grey": channels == 1}
        place = {} if data_dir is None else {"path": data_dir}
        return spec | {"classes": model.metadata.classes} | place
    if data_dir is not None:
        spec["data_dir"] = data_dir
    known = facts(name, spec.get("data_dir"))
    if known.shape is None and not own:
        spec["image_size"] = height
    has = known.shape or (height, width, len(known.mean)), known.num_classes
    wants = model.image_shape, model.metadata.num_classes
    if has != wants:
        raise UserError(
            f"{model.path} takes images of {wants[0]} in {wants[1]} classes, and {name} has "
            f"{has[0]} in {has[1]}; choose a data set of the same shape."
        )
    return spec
