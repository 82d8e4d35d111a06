"""The training loop, from wherever a run was left to its last step."""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import feather_jax as feather
from train import parallel
from train.backbones import Pruning
from train.errors import StorageError
from train.experiment import TrainState
from train.run.churn import Kept, mask_churn, pruned_leaves
from train.run.session import Progress, Session
from train.run.signals import Interrupted
from train.step import Metrics, make_train_step
from train.store.metrics import Record


def train(session: Session) -> Progress:
    """Dispatches a step, then reads the metrics of the one before, to the last step.

    So the device always has a step to do while the host waits, and never more than two. What the
    last step leaves is for the caller to save.

    Raises:
      UserError: the training diverged, or what has to be written cannot be.
      Interrupted: a signal came; the state is saved.
    """
    experiment, journal = session.experiment, session.journal
    config, steps = experiment.config, experiment.steps
    train_step = parallel.on_all_devices(make_train_step(experiment), donate_state=True)
    sparse_variables = jax.jit(functools.partial(current_variables, experiment.prune))
    state, kept = session.start.state, session.start.kept
    first = int(state.step)
    unread: tuple[int, Metrics] | None = None

    with contextlib.closing(experiment.data.train_batches(first)) as batches:
        for step in range(first + 1, steps.total + 1):
            state, metrics = train_step(state, parallel.shard(next(batches), session.mesh))
            if unread is not None:
                journal.read(*unread)
            unread = step, metrics
            signal, last = session.interruption.signal_after(step), step == steps.total
            evaluating = last or step % steps.eval_every == 0
            saving = signal or (step % config.checkpoint_every_steps == 0 and not last)
            if evaluating or saving:
                metrics, evaluation = jax.device_get(metrics), None  # or three would be in flight
                if evaluating:
                    evaluation, kept = evaluated(session, step, sparse_variables(state), kept)
                journal.read(step, metrics, evaluation)
                unread = None
                journal.pause()
            if saving:
                save(session, Progress(state, kept), must=bool(signal))
            if signal:
                raise Interrupted(signal, step)
    return Progress(state, kept)


def current_variables(prune: Pruning, state: TrainState) -> PyTree:
    """The variables as the model is evaluated after an update: sparsified at its sparsity."""
    last_update, dense = jnp.maximum(state.step - 1, 0), state.result["params"]
    return state.result | {"params": prune.sparsify(dense, prune.threshold(dense, last_update))}


def evaluated(session: Session, step: int, variables: PyTree, kept: Kept) -> tuple[Record, Kept]:
    """The evaluation of sparse variables after a step, and which weights they keep."""
    experiment, params = session.experiment, variables["params"]
    evaluation: Record = session.evaluate(variables).figures
    if not experiment.config.sparsity:
        return evaluation, kept
    churn, kept = mask_churn(kept, pruned_leaves(experiment, params))
    if parallel.is_first() and step < experiment.steps.total:  # at the end the table says it
        summary = feather.summarize(jax.device_get(params), prunable=experiment.prunable)
        session.journal.warn_of_starved(step, summary)
    return evaluation | {"mask_churn": churn}, kept


def save(session: Session, progress: Progress, *, must: bool) -> None:
    """Saves a state after the metrics that led to it.

    Where there is no room, training goes on, and the next checkpoint is tried again. That the one
    before failed, which shows here, is no reason not to try this one.

    Args:
      session: the run.
      progress: the state.
      must: whether it has to be on disk on return.

    Raises:
      StorageError: it was not written, and it must be, or the other processes wait.
      UserError: the state is not finite.
    """
    checkpoints, say = session.checkpoints, session.journal.say
    must_each = jax.process_count() > 1
    try:
        try:
            checkpoints.wait()  # what is being written takes room, and gives it back if it fails
        except StorageError as error:
            if must_each:
                raise
            say(f"{error} The present state is tried in its place.")
        if must:
            checkpoints.make_room_for(session.journal.sync)
        else:
            session.journal.sync()
        write = checkpoints.save_now if must else checkpoints.save
        info = {"wall_seconds": session.wall_seconds(), "examples": session.experiment.data.sizes}
        write(progress.items(), info)
    except StorageError as error:
        if must or must_each:
            raise
        say(f"{error} Training goes on, and the next checkpoint is tried again.")
