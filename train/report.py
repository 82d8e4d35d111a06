"""The report of a run: python -m train.report runs/digits --dense runs/digits_dense

train.main writes `report.html` at the end of every run. This program writes it anew, with --dense
beside the accuracy of the dense twin: the same configuration with --config.sparsity=0.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from feather_jax.macs import Macs
from feather_jax.masks import path_name
from train import compare, program
from train import config as config_lib
from train.compare import Run
from train.errors import UserError, writing
from train.experiment import prunable_mask
from train.look import page, pictures
from train.look.inspection import PrunableLayer, histogram_of, layers_of, macs_of, total_of
from train.store import checkpoint, model_file
from train.store.files import write_atomically
from train.store.model_file import SavedModel


@dataclasses.dataclass(frozen=True)
class Tile:
    """A figure at the head of the page.

    Attributes:
      name: what it is.
      value: the figure.
      notes: what it is to be seen next to.
    """

    name: str
    value: str
    notes: tuple[str, ...]


def write(run: Run, dense_params: PyTree, twin: Run | None = None) -> None:
    """Writes `report.html` into the folder of a finished run.

    Args:
      run: the run.
      dense_params: the trained weights, before they were finalised.
      twin: the run of the same configuration without pruning, for its accuracy.

    Raises:
      UserError: the run's model file is damaged or not there.
      StorageError: the page cannot be written.
    """
    model = model_file.load(run.workdir / "model.npz")
    prunable = prunable_mask(model.variables["params"], tuple(run.config["exclude"]))
    macs = macs_of(model)
    layers = layers_of(model, prunable, macs)
    total = total_of(layers)
    histogram = None
    if not run.dense:
        histogram = histogram_of(dense_params, model.variables["params"], prunable)
    with page.style():
        text = page.render(
            "report.html",
            title=_title(run),
            story=_story(run, model),
            tiles=_tiles(run, model, total, macs, twin),
            curves=pictures.curve_pictures(run.records),
            weights=pictures.weight_pictures(histogram) if histogram else [],
            threshold=f"{histogram.threshold:.4g}" if histogram else "",
            p=f"{float(run.config['p']):g}",
            layer_figures=pictures.layer_pictures(layers),
            layers=layers,
            total=total,
            config=list(config_lib.flat(run.config).items()),
            made_with=f"{run.workdir.name}, trained with JAX {model.metadata.trained.jax}.",
        )
    with writing(run.workdir):
        write_atomically(run.workdir / "report.html", text)


def _title(run: Run) -> str:
    what = "dense" if run.dense else f"{100 * run.summary['sparsity']:.3g} % sparse"
    return f"{run.config['model']['name']} on {run.config['data']['name']}, {what}"


def _story(run: Run, model: SavedModel) -> str:
    """What was trained, on what and how long, in a few sentences."""
    config, trained = run.config, model.metadata.trained
    shape = "x".join(map(str, model.image_shape))
    start = config["init_from"] or "scratch"
    how = f"{config['epochs']:g} epochs, {run.summary['steps']:,} updates of {config['batch_size']}"
    return (
        f"Trained from {start} for {how} examples, on {trained.examples:,} images of {shape} in "
        f"{model.metadata.num_classes} classes, with {config['optimizer']} in "
        f"{config['compute_dtype']} on {trained.devices}, in "
        f"{page.duration(run.summary['wall_seconds'])}."
    )


def _tiles(
    run: Run, model: SavedModel, total: PrunableLayer, macs: Macs, twin: Run | None
) -> list[Tile]:
    """Accuracy, weights, size and work, those of a sparse run next to the dense network's."""
    examples = run.summary["eval/examples"]
    right = round(run.accuracy * examples)
    notes = [f"{right:,} of {examples:,} evaluation examples"]
    if twin is not None:
        change = 100 * (run.accuracy - twin.accuracy)
        notes.append(f"dense twin {twin.accuracy:.2%}: {change:+.2f} points")
    dense_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.variables))

    def less(before: str, ratio: float) -> tuple[str, ...]:
        return () if run.dense else (f"dense {before}: {ratio:.3g} times less",)

    return [
        Tile("Accuracy", f"{run.accuracy:.2%}", tuple(notes)),
        Tile(
            "Weights left",
            f"{total.left:.2%}",
            (
                f"{total.nonzero:,} of {total.weights:,} prunable ones",
                f"{run.summary['parameters']:,} parameters in all",
            ),
        ),
        Tile(
            "Model file",
            page.size(run.model_bytes),
            less(page.size(dense_bytes), dense_bytes / run.model_bytes),
        ),
        Tile(
            "MACs for one image",
            page.short(macs.sparse_total),
            less(page.short(macs.total), macs.total / max(macs.sparse_total, 1)),
        ),
    ]


def main(argv: Sequence[str]) -> None:
    """Writes the report of a finished run anew."""
    parser = program.ArgumentParser("train.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdir", type=pathlib.Path, help="of a finished run")
    parser.add_argument("--dense", type=pathlib.Path, help="the workdir of its dense twin")
    arguments = parser.parse_args(argv)
    run = compare.read_run(arguments.workdir)
    twin = None if arguments.dense is None else compare.read_run(arguments.dense)
    if twin is not None:
        _check_twin(run, twin)
    write(run, trained_params(run), twin)
    print(run.workdir / "report.html")


def _check_twin(run: Run, twin: Run) -> None:
    """Raises UserError unless the twin is dense, with the same configuration otherwise."""
    differing = compare.differences([run, twin])
    if differing or not twin.dense:
        why = f"they differ in {', '.join(differing)}" if differing else "it is sparse"
        raise UserError(
            f"{twin.workdir} is no dense twin of {run.workdir}: {why}; give a run of the same "
            "configuration with --config.sparsity=0."
        )


def trained_params(run: Run) -> PyTree:
    """The dense weights that a run ended with, from its newest checkpoint.

    Raises:
      UserError: the newest checkpoint is not there, not whole, or not this run's.
    """
    folder = run.workdir / "checkpoints"
    found = checkpoint.newest(folder, ["variables"])
    if found is None:
        raise UserError(
            f"There is no checkpoint in {folder}; bring it back, or train again in a new --workdir."
        )
    if found.passed_over:
        step, reason = next(iter(found.passed_over.items()))
        raise UserError(
            f"The checkpoint of step {step} in {folder} is damaged ({reason}), and older ones do "
            "not hold the weights that model.npz was made of; start the run again to mend it."
        )
    like = model_file.load(run.workdir / "model.npz").variables["params"]

    def leaf(path: KeyPath, finalised: np.ndarray) -> np.ndarray:
        name = f"variables/params/{path_name(path)}"
        trained = found.leaves.get(name)
        if trained is None or trained.shape != finalised.shape:
            raise UserError(
                f"The newest checkpoint in {folder} has no {name} of shape {finalised.shape}, as "
                "model.npz has; bring back the run's own."
            )
        return trained

    return jax.tree_util.tree_map_with_path(leaf, like)


if __name__ == "__main__":
    sys.exit(program.run(lambda: main(sys.argv[1:])))
