"""The program's training step on random data: what the benchmarks of the step measure."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

import feather_jax as feather
from train import config as config_lib
from train import experiment, parallel
from train.backbones import Pruning
from train.data import DataSet
from train.data.augment import Augmentation, augment_and_normalize, normalize
from train.experiment import TrainState
from train.step import make_train_step
from train.store.leaves import selected

SPARSITY = 0.9


@dataclasses.dataclass(frozen=True)
class Case:
    """One network as it is trained.

    Attributes:
      model: as in `config.model`.
      image_shape: height, width, channels.
      num_classes: number of labels.
      batch_size: of the global batch.
      crop_padding: of the augmentation; it flips in any case.
      compute_dtype: as in `config.compute_dtype`.
    """

    model: Mapping[str, Any]
    image_shape: tuple[int, int, int]
    num_classes: int
    batch_size: int
    crop_padding: int = 0
    compute_dtype: str = "float32"


CASES = {
    "resnet20": Case({"name": "resnet20"}, (32, 32, 3), 100, 128, crop_padding=4),
    "resnet50": Case({"name": "resnet50"}, (224, 224, 3), 1000, 32),
    "resnet50_bfloat16": Case(
        {"name": "resnet50"}, (224, 224, 3), 1000, 256, compute_dtype="bfloat16"
    ),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A step, not yet compiled, and what it is called with first."""

    step: Any  # a pmapped function, which has no type that says that it can be lowered
    state: TrainState
    batch: dict[str, jax.Array]
    prune: Pruning | None

    def lower(self) -> jax.stages.Lowered:
        return self.step.lower(self.state, self.batch)


def make(case: Case, sparsity: float, mesh: Mesh | None = None, **changes: Any) -> Program:
    """The step as `python -m train.main` runs it, at the sparsity that it ends with.

    Args:
      case: what to train.
      sparsity: 0 for the dense twin.
      mesh: of the devices; all there are by default.
      changes: further fields of the configuration, such as `backbone`.
    """
    config = config_lib.parse(
        {
            "data": {"name": "random"},
            "model": case.model,
            "batch_size": case.batch_size,
            "epochs": 1.0,
            "learning_rate": 1e-3,
            "weight_decay": 5e-4,
            "sparsity": sparsity,
            "prune_end": 0.0,
            "compute_dtype": case.compute_dtype,
        }
        | changes
    )
    built = experiment.build(config, random_data(case))
    mesh = mesh or parallel.device_mesh()
    return Program(
        step=parallel.on_all_devices(make_train_step(built), donate_state=True),
        state=parallel.replicate(experiment.initial_state(built), mesh),
        batch=parallel.shard(random_batch(case), mesh),
        prune=built.prune,
    )


def random_data(case: Case) -> DataSet:
    """A data set of noise, cropped and flipped as any other."""
    half = (0.5,) * case.image_shape[-1]
    augmentation = Augmentation(crop_padding=case.crop_padding, flip=True)
    augment = functools.partial(
        augment_and_normalize, mean=half, std=half, augmentation=augmentation
    )
    return DataSet(
        name="random",
        image_shape=case.image_shape,
        num_classes=case.num_classes,
        num_train=1_000_000,
        num_eval=case.batch_size,
        train_batches=lambda step: (random_batch(case) for _ in itertools.count(step)),
        eval_batches=lambda: (random_batch(case) for _ in range(0)),
        train_preprocess=augment,
        eval_preprocess=functools.partial(normalize, mean=half, std=half),
        mean=half,
        std=half,
        eval_image=lambda number: random_batch(case)["image"][number],
        eval_name=str,
    )


def random_batch(case: Case) -> dict[str, np.ndarray]:
    """A global batch of noise."""
    rng, size = np.random.default_rng(0), case.batch_size
    return {
        "image": rng.integers(0, 256, (size, *case.image_shape), np.uint8),
        "label": rng.integers(0, case.num_classes, size, np.int32),
        "index": np.arange(size, dtype=np.int32),
    }


def running(step: Callable[..., Any], program: Program) -> Callable[[], None]:
    """A function that does one more step and waits for it."""
    state = program.state

    def run() -> None:
        nonlocal state
        state, metrics = step(state, program.batch)
        jax.block_until_ready((state, metrics))

    return run


def prunable_bytes(params: PyTree) -> int:
    """Bytes of all prunable weights."""
    return sum(leaf.nbytes for leaf in selected(params, feather.prunable_weights(params)))


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of the same work, by the clock and of all cores' computing."""

    clock: list[float]
    cpu: list[float]

    def summary(self) -> dict[str, float]:
        return {
            "median": statistics.median(self.clock),
            "min": min(self.clock),
            "max": max(self.clock),
            "cpu_min": min(self.cpu),
        }


def in_turns(functions: Sequence[Callable[[], Any]], repeats: int) -> list[Times]:
    """Times the functions one after the other, `repeats` times over: A B A B ...

    What else the machine does then falls on all of them alike.
    """
    times = [Times([], []) for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            clock, cpu = time.perf_counter(), time.process_time()
            function()
            taken.clock.append(time.perf_counter() - clock)
            taken.cpu.append(time.process_time() - cpu)
    return times


def ratio(a: Times, b: Times) -> dict[str, Any]:
    """How much longer `a` takes than `b`: over the pairs, and from the shortest times."""
    pairs = [x / y for x, y in zip(a.clock, b.clock, strict=True)]
    quarters = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else [pairs[0]] * 3
    return {
        "pairs": len(pairs),
        "median": statistics.median(pairs),
        "quartiles": [quarters[0], quarters[2]],
        "of_minimums": min(a.clock) / min(b.clock),
        "of_cpu_minimums": min(a.cpu) / min(b.cpu),
    }
