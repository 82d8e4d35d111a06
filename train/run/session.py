"""A run in progress: what it holds from its start, or from where it was left, to its end."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping

import flax.struct
import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from train import experiment as experiment_lib
from train import parallel, program
from train.asl import network_params
from train.config import Config
from train.experiment import Experiment, TrainState, abstract_state, initial_state
from train.models.imported import note_on_statistics
from train.run.churn import Kept, all_kept, pruned_leaves
from train.run.evaluation import evaluate
from train.run.init_from import with_variables_of
from train.run.journal import Journal
from train.run.signals import Interruption
from train.run.workdir import (
    check_room,
    check_same_examples,
    check_same_run,
    check_unfinished,
    clear_damage,
    open_workdir,
    with_found,
)
from train.step import make_eval_step
from train.store import checkpoint
from train.store.checkpoint import Checkpoints, Restored
from train.store.predictions import Predictions


@flax.struct.dataclass
class Progress:
    """What a checkpoint holds.

    Attributes:
      state: all that training changes.
      kept: which weights the last evaluation kept, for the mask churn.
    """

    state: TrainState
    kept: Kept

    def items(self) -> dict[str, PyTree]:
        """As `train.store.checkpoint` saves it."""
        state = self.state
        return {
            "variables": {
                "params": state.params,
                "batch_stats": state.batch_stats,
                "average": state.average,
            },
            "optimizer": {"opt_state": state.opt_state, "step": state.step, "kept": self.kept},
        }

    @classmethod
    def of(cls, items: dict[str, PyTree]) -> "Progress":
        """The inverse of `items`."""
        rest = dict(items["optimizer"])
        kept = rest.pop("kept")
        return cls(TrainState(**items["variables"], **rest), kept)


@dataclasses.dataclass(frozen=True)
class Session:
    """A run in progress.

    Attributes:
      experiment: what is trained.
      start: the state to go on from, on all devices.
      workdir: the run's folder, which is locked.
      mesh: all devices.
      evaluate: what the network makes of the evaluation split, with variables on all devices.
      journal: what the run tells.
      checkpoints: where it saves its states.
      interruption: the signals that came.
      wall_seconds: gives the time in the run, over all restarts.
    """

    experiment: Experiment
    start: Progress
    workdir: pathlib.Path
    mesh: Mesh
    evaluate: Callable[[PyTree], Predictions]
    journal: Journal
    checkpoints: Checkpoints
    interruption: Interruption
    wall_seconds: Callable[[], float]


@contextlib.contextmanager
def open_session(
    config: Config, workdir: pathlib.Path, say: Callable[[str], None]
) -> Iterator[Session]:
    """Opens a run where it was left, or a new one.

    Raises:
      UserError: the configuration, the data set or the folder is not as it has to be.
    """
    started = time.perf_counter()
    if not parallel.is_first():
        say = _silent
    parallel.check_batch_size(config.batch_size, config.accumulate_steps)
    if config.mixup or config.cutmix:
        parallel.check_pairs(config.batch_size)
    config = with_found(config, workdir)
    check_same_run(config, workdir)
    experiment = experiment_lib.build(config)
    config = experiment.config
    for note in (*experiment.data.notes, *experiment.notes):
        say(note)
    shapes = jax.eval_shape(functools.partial(beginning, experiment), abstract_state(experiment))
    like = shapes.items()
    stats, name = like["variables"]["batch_stats"], config.model["name"]
    if alone := note_on_statistics(name, experiment.model, stats, jax.device_count()):
        say(alone)
    check_room(workdir, like)

    start, found = left_or_new(experiment, workdir, like, say)
    before = found.info["wall_seconds"] if found else 0.0
    mesh = parallel.device_mesh()
    eval_step = make_eval_step(experiment.model, experiment.data.eval_preprocess)
    on_all_devices = parallel.on_all_devices(eval_step, donate_state=False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_workdir(workdir, config))
        journal = Journal(workdir, config, experiment.steps, int(start.state.step), say)
        stack.enter_context(contextlib.closing(journal))
        clear_damage(workdir / "checkpoints", found.passed_over if found else {}, say)
        checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints)
        stack.enter_context(contextlib.closing(checkpoints))
        yield Session(
            experiment=experiment,
            start=Progress(parallel.replicate(start.state, mesh), start.kept),
            workdir=workdir,
            mesh=mesh,
            evaluate=functools.partial(evaluate, on_all_devices, data=experiment.data, mesh=mesh),
            journal=journal,
            checkpoints=checkpoints,
            interruption=stack.enter_context(Interruption()),
            wall_seconds=lambda: before + time.perf_counter() - started,
        )


def left_or_new(
    experiment: Experiment,
    workdir: pathlib.Path,
    like: Mapping[str, PyTree],
    say: Callable[[str], None],
) -> tuple[Progress, Restored | None]:
    """Where the run goes on: from its newest checkpoint, which comes along, or from the beginning.

    Raises:
      UserError: no checkpoint is whole, the data set has other examples than it had, or there is
        nothing at `config.init_from`.
    """
    restored = checkpoint.restore(workdir / "checkpoints", like)
    if restored is not None:
        items, found = restored
        check_same_examples(found.info.get("examples"), experiment.data.sizes, workdir)
        progress = Progress.of(items)
        say(f"Going on after step {progress.state.step} of {experiment.steps.total}.")
        return progress, found
    check_unfinished(workdir)
    start = beginning(experiment, initial_state(experiment))
    if source := experiment.config.init_from:
        path, head = program.path(source), experiment.config.head
        state = with_variables_of(start.state, path, experiment.model, say, head=head)
        start = Progress(state, start.kept)
    return start, None


def beginning(experiment: Experiment, state: TrainState) -> Progress:
    """Where a new run begins, with an initial state or the shapes of one."""
    return Progress(state, all_kept(pruned_leaves(experiment, network_params(state.params))))


def _silent(line: str) -> None:
    """What the processes but the first have to say."""
