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

from feather_jax.masks import path_name
from train import checkpoint, compare, model_file, page, pictures, program
from train.compare import Run
from train.errors import UserError, writing
from train.experiment import prunable_mask
from train.inspection import Layer, histogram_of, layers_of, total_of
from train.metrics import write_atomically
from train.model_file import SavedModel


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
    layers = layers_of(model, prunable)
    histogram = None
    if not run.dense:
        histogram = histogram_of(dense_params, model.variables["params"], prunable)
    with page.style():
        text = page.render(
            "report.html",
            title=_title(run),
            story=_story(run, model),
            tiles=_tiles(run, model, total_of(layers), twin),
            curves=pictures.curve_pictures(run.records),
            weights=pictures.weight_pictures(histogram) if histogram else [],
            threshold=f"{histogram.threshold:.4g}" if histogram else "",
            p=f"{float(run.config['p']):g}",
            layer_figures=pictures.layer_pictures(layers),
            layers=layers,
            total=total_of(layers),
            dense=run.dense,
            config=list(compare.flat(run.config).items()),
            made_with=f"{run.workdir.name}, trained with JAX {model.metadata['trained']['jax']}.",
        )
    with writing(run.workdir):
        write_atomically(run.workdir / "report.html", text)


def _title(run: Run) -> str:
    what = "dense" if run.dense else f"{100 * run.summary['sparsity']:.3g} % sparse"
    return f"{run.config['model']['name']} on {run.config['data']['name']}, {what}"


def _story(run: Run, model: SavedModel) -> str:
    """What was trained, on what and how long, in a few sentences."""
    config, trained = run.config, model.metadata["trained"]
    shape = "x".join(map(str, model.image_shape))
    how = f"{config['epochs']:g} epochs, {run.summary['steps']:,} updates of {config['batch_size']}"
    return (
        f"Trained from scratch for {how} examples, on {trained['examples']:,} images of {shape} in "
        f"{model.metadata['num_classes']} classes, with {config['optimizer']} in "
        f"{config['compute_dtype']} on {trained['devices']}, in "
        f"{page.duration(run.summary['wall_seconds'])}."
    )


def _tiles(run: Run, model: SavedModel, total: Layer, twin: Run | None) -> list[Tile]:
    """Accuracy, weights, size and work, sparse and dense."""
    examples = run.summary["eval/examples"]
    right = round(run.accuracy * examples)
    notes = [f"{right:,} of {examples:,} evaluation examples"]
    if twin is not None:
        change = 100 * (run.accuracy - twin.accuracy)
        notes.append(f"dense twin {twin.accuracy:.2%}: {change:+.2f} points")
    dense_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.variables))

    def times(before: float, after: float) -> str:
        return f"{before / after:.3g} times less" if after else "nothing left"

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
            (f"dense {page.size(dense_bytes)}: {times(dense_bytes, run.model_bytes)}",),
        ),
        Tile(
            "MACs for one image",
            page.short(total.sparse_macs),
            (f"dense {page.short(total.macs)}: {times(total.macs, total.sparse_macs)}",),
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
    if twin is not None and not _are_twins(run, twin):
        raise UserError(
            f"{twin.workdir} is no dense twin of {run.workdir}; give a run of the same model and "
            "data set with --config.sparsity=0."
        )
    write(run, trained_params(run), twin)
    print(run.workdir / "report.html")


def _are_twins(run: Run, twin: Run) -> bool:
    return twin.dense and all(twin.config[name] == run.config[name] for name in ("model", "data"))


def trained_params(run: Run) -> PyTree:
    """The dense weights of a run, from its newest checkpoint.

    Raises:
      UserError: there is no checkpoint that is whole, or not this run's.
    """
    folder = run.workdir / "checkpoints"
    found = checkpoint.newest(folder, ["variables"])
    if found is None:
        raise UserError(f"There is no checkpoint in {folder}; start the run again.")
    like = model_file.load(run.workdir / "model.npz").variables["params"]

    def leaf(path: KeyPath, _: np.ndarray) -> np.ndarray:
        return found.leaves[f"variables/params/{path_name(path)}"]

    return jax.tree_util.tree_map_with_path(leaf, like)


if __name__ == "__main__":
    sys.exit(program.run(lambda: main(sys.argv[1:])))
