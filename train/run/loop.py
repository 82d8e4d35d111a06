"""A run from its first step to its last file, from wherever an earlier start left it."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

import feather_jax as feather
from feather_jax.masks import prunable_leaves
from train import experiment, parallel, report
from train.compare import Run
from train.config import Config
from train.errors import StorageError, writing
from train.evaluate import evaluate
from train.experiment import Experiment
from train.look import curves
from train.run.churn import mask_churn
from train.run.init_from import with_variables_of
from train.run.progress import Clock, MetricsReader
from train.run.signals import Interrupted, Interruption
from train.run.workdir import (
    check_room,
    check_same_run,
    check_unfinished,
    clear_damage,
    open_workdir,
)
from train.step import Metrics, TrainState
from train.store import checkpoint, model_file
from train.store.checkpoint import Checkpoints
from train.store.files import write_json
from train.store.metrics import MetricsLog, Record


def run(config: Config, workdir: pathlib.Path, say: Callable[[str], None] = print) -> Record:
    """Trains, from the newest checkpoint in `workdir` if there is one, and writes the results.

    Args:
      config: the experiment.
      workdir: its folder; the README's "The training program" says what is written there.
      say: takes a line meant for people.

    Returns:
      What `summary.json` holds.

    Raises:
      UserError: the user's mistake, in one sentence.
      Interrupted: a signal came; the state is saved.
    """
    clock, folder = Clock(), workdir / "checkpoints"
    parallel.check_batch_size(config.batch_size, config.accumulate_steps)
    check_same_run(config, workdir)
    built = experiment.build(config)
    mesh = parallel.device_mesh()
    check_room(workdir, built.abstract_state)
    restored = checkpoint.restore(folder, built.abstract_state)
    if restored is not None:
        state, found = restored
        clock.wall_before = found.info["wall_seconds"]
        say(f"Going on after step {state.step} of {built.steps.total}.")
    else:
        check_unfinished(workdir)
        state = built.initial_state()
        if config.init_from:
            state = with_variables_of(state, pathlib.Path(config.init_from), built.model, say)
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_workdir(workdir, config))
        log = None
        if parallel.is_first():
            log = stack.enter_context(contextlib.closing(MetricsLog(workdir, int(state.step))))
        clear_damage(folder, found.passed_over if restored else {}, say)
        saved = Checkpoints(folder, config.keep_checkpoints)
        stack.enter_context(contextlib.closing(saved))
        interruption = stack.enter_context(Interruption())
        state = parallel.replicate(state, mesh)
        eval_step = parallel.on_all_devices(built.eval_step, donate_state=False)
        state = train(built, eval_step, state, mesh, log, saved, clock, interruption, say)
        return finish(built, eval_step, state, mesh, log, workdir, clock, say)


def train(
    built: Experiment,
    eval_step: Callable[..., Metrics],
    state: TrainState,
    mesh: Mesh,
    log: MetricsLog | None,
    checkpoints: Checkpoints,
    clock: Clock,
    interruption: Interruption,
    say: Callable[[str], None],
) -> TrainState:
    """The loop: dispatches a step, then reads the metrics of the one before.

    So the device always has a step to do while the host waits, and never more than two.
    """
    train_step = parallel.on_all_devices(built.train_step, donate_state=True)
    sparse_variables = jax.jit(lambda state: current_variables(built.prune, state))
    config, steps = built.config, built.steps
    first = int(state.step)
    reader = MetricsReader(built, first, log, clock)
    batches = built.data.train_batches(first)
    unread: tuple[int, Metrics] | None = None

    with contextlib.closing(reader), contextlib.closing(batches):
        for step in range(first + 1, steps.total + 1):
            state, metrics = train_step(state, parallel.shard(next(batches), mesh))
            if unread is not None:
                reader.read(*unread)
            unread = step, metrics
            stopping, last = interruption.reached(step), step == steps.total
            evaluating = last or step % steps.eval_every == 0
            saving = last or stopping or step % config.checkpoint_every_steps == 0
            if evaluating or saving:
                evaluation = None
                if evaluating:
                    metrics = jax.device_get(metrics)  # or three programs would be in flight
                    variables = sparse_variables(state)
                    evaluation = evaluate(eval_step, variables, built.data, mesh)
                    if built.prune is not None:
                        weights = prunable_leaves(variables["params"], built.prunable)
                        evaluation["mask_churn"], kept = mask_churn(state.kept, weights)
                        state = dataclasses.replace(state, kept=kept)
                reader.read(step, metrics, evaluation)
                unread = None
                clock.pause()
            if saving:
                save(checkpoints, state, log, clock, say, or_stop=last or stopping > 0)
            if stopping:
                raise Interrupted(stopping, step)
    return state


def save(
    checkpoints: Checkpoints,
    state: TrainState,
    log: MetricsLog | None,
    clock: Clock,
    say: Callable[[str], None],
    *,
    or_stop: bool,
) -> None:
    """Saves the state after the metrics that led to it.

    Where there is no room, training goes on, and the next checkpoint is tried again. That the one
    before failed, which shows here, is no reason not to try this one.

    Raises:
      StorageError: it was not written, and `or_stop` says that it has to be, or the other
        processes wait.
      UserError: the state is not finite.
    """
    try:
        if log is not None:
            log.sync()
        try:
            checkpoints.wait()
        except StorageError as error:
            if jax.process_count() > 1:
                raise
            say(f"{error} The present state is tried in its place.")
        checkpoints.save(state, {"wall_seconds": clock.wall_seconds()})
        if or_stop:
            checkpoints.wait()
    except StorageError as error:
        if or_stop or jax.process_count() > 1:
            raise
        say(f"{error} Training goes on, and the next checkpoint is tried again.")


def current_variables(prune: feather.Feather | None, state: TrainState) -> PyTree:
    """The variables as the model is evaluated after an update: sparsified at its sparsity."""
    params = state.params
    if prune is not None:
        last_update = jnp.maximum(state.step - 1, 0)
        params = prune.sparsify(params, prune.threshold(params, last_update))
    return {"params": params, "batch_stats": state.batch_stats}


def finish(
    built: Experiment,
    eval_step: Callable[..., Metrics],
    state: TrainState,
    mesh: Mesh,
    log: MetricsLog | None,
    workdir: pathlib.Path,
    clock: Clock,
    say: Callable[[str], None],
) -> Record:
    """Finalises the weights, evaluates them and writes what a finished run leaves."""
    params = state.params if built.prune is None else jax.jit(built.prune.finalize)(state.params)
    variables = {"params": params, "batch_stats": state.batch_stats}
    evaluation = evaluate(eval_step, variables, built.data, mesh)
    counts = feather.summarize(jax.device_get(params), prunable=built.prunable)
    summary: dict[str, Any] = {
        "steps": built.steps.total,
        "parameters": counts.parameters,
        "prunable": counts.prunable,
        "nonzero": counts.nonzero,
        "sparsity": counts.sparsity,
        **evaluation,
        "wall_seconds": clock.wall_seconds(),
    }
    if log is not None:  # on the first process alone
        model_file.save(workdir / "model.npz", built, variables, counts, evaluation)
        run = Run(workdir, built.config.as_dict(), summary, log.records)
        report.write(run, jax.device_get(state.params))
        title = f"{built.config.model['name']} on {built.data.name}, {counts.sparsity:.1%} sparse"
        with writing(workdir):
            curves.save(workdir / "curves.png", log.records, title)
            write_json(workdir / "summary.json", summary)
    say(f"\n{counts}")
    say(
        f"{evaluation['eval/accuracy']:.2%} of {evaluation['eval/examples']} evaluation examples "
        f"right; {summary['wall_seconds']:.0f} s in all; everything is in {workdir}."
    )
    parallel.gather(0)  # who left before would take the first process down, in its writing
    return summary
