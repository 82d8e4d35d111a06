"""The end of a run: the finalised model, its evaluation, and what people look at."""

import functools

import jax

import feather_jax as feather
from train import parallel
from train.asl import network_params
from train.config import Config
from train.errors import writing
from train.experiment import TrainState
from train.files import write_json
from train.look import curves, report
from train.look.mistakes import thumbnails
from train.run.session import Session
from train.run.timing import time_one_image
from train.store import model_file
from train.store import predictions as predictions_file
from train.store.metrics import Record
from train.store.runs import Run


def finish(session: Session, state: TrainState) -> Record:
    """Finalises the weights, evaluates them and writes what a finished run leaves.

    Returns:
      What `summary.json` holds.

    Raises:
      StorageError: something cannot be written.
    """
    experiment, workdir = session.experiment, session.workdir
    params = jax.jit(experiment.prune.finalize)(state.result["params"])
    variables = state.result | {"params": params}
    predictions = session.evaluate(variables)
    evaluation = predictions.figures
    counts = feather.summarize(
        jax.device_get(params),
        prunable=experiment.prunable,
        sparsity=_sparsity_of_one_threshold(experiment.config),
    )
    summary: Record = {
        "steps": experiment.steps.total,
        "parameters": counts.parameters,
        "prunable": counts.prunable,
        "nonzero": counts.nonzero,
        "sparsity": counts.sparsity,
        **evaluation,
        "wall_seconds": session.wall_seconds(),
    }
    if parallel.is_first():
        path = workdir / "model.npz"
        write = functools.partial(model_file.save, path, experiment, variables, counts, evaluation)
        session.checkpoints.make_room_for(write)
        model = model_file.load(path, allow_import=True)
        summary |= time_one_image(model)
        run = Run(workdir, experiment.config, summary, session.journal.records)
        with writing(workdir):
            shown = thumbnails(experiment.data, predictions)
            predictions_file.save(workdir / "predictions.npz", predictions, shown)
        dense = jax.device_get(network_params(state.result["params"]))
        report.write(run, model, dense)
        with writing(workdir):
            curves.save(workdir / "curves.png", run.records, run.title)
            write_json(workdir / "summary.json", summary)
    session.journal.say(f"\n{counts}")
    session.journal.say(
        f"{evaluation['eval/accuracy']:.2%} of {evaluation['eval/examples']} evaluation examples "
        f"right; {summary['wall_seconds']:.0f} s in all; everything is in {workdir}."
    )
    parallel.gather(0)  # who left before would take the first process down, in its writing
    return summary


def _sparsity_of_one_threshold(config: Config) -> float | None:
    """What one threshold for all single weights was asked for; None if something else prunes."""
    alone = config.backbone["name"] == "global" and config.block is None
    return config.sparsity if alone and config.sparsity else None
