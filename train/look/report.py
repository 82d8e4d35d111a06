"""The report of a run: one page that stands alone."""

import dataclasses
from collections.abc import Sequence

import jax
from jaxtyping import PyTree

import feather_jax as feather
from train.backbones import magnitude
from train.config import flat
from train.errors import writing
from train.experiment import prunable_mask
from train.files import write_atomically
from train.look import mistakes, page, pictures
from train.look.inspection import (
    PrunableLayer,
    histogram_of,
    layers_of,
    macs_of,
    thresholds_of,
    total_of,
)
from train.look.mistakes import ClassRow, Mistake
from train.run.timing import COMPILED, XLA
from train.store import predictions
from train.store.model_file import SavedModel
from train.store.predictions import Predictions, Thumbnail
from train.store.runs import Run


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


def write(run: Run, model: SavedModel, dense_params: PyTree, twin: Run | None = None) -> None:
    """Writes `report.html` into the folder of a finished run.

    Args:
      run: the run.
      model: its model file.
      dense_params: the trained weights, before they were finalised.
      twin: the run of the same configuration without pruning, for its accuracy.

    Raises:
      StorageError: the page cannot be written.
    """
    params = model.variables["params"]
    prunable, macs = prunable_mask(params, run.config), macs_of(model)
    thresholds = thresholds_of(dense_params, params, magnitude(run.config))
    layers = layers_of(model, prunable, macs, thresholds)
    total = total_of(layers)
    histogram = None
    if not run.dense:
        histogram = histogram_of(dense_params, params, prunable)
    names = model.metadata.classes or [str(i) for i in range(model.metadata.num_classes)]
    saved = predictions.load(run.workdir / "predictions.npz")
    with page.style():
        text = page.render(
            "report.html",
            title=run.title,
            story=_story(run, model),
            tiles=_tiles(run, model, total, macs, twin),
            outcome=_outcome(*saved, names) if saved else None,
            curves=pictures.curve_pictures(run.records),
            weights=pictures.weight_pictures(histogram) if histogram else [],
            threshold=f"{histogram.threshold:.4g}" if histogram else "",
            p=f"{run.config.p:g}",
            one_threshold=run.config.backbone["name"] == "global",
            layer_figures=pictures.layer_pictures(layers),
            layers=layers,
            total=total,
            config=list(flat(run.config.as_dict()).items()),
            made_with=f"{run.workdir.name}, trained with JAX {model.metadata.trained.jax}.",
        )
    with writing(run.workdir):
        write_atomically(run.workdir / "report.html", text)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the network makes of the evaluation examples.

    Attributes:
      top5: the fraction whose class is among the five first; None where there are no more.
      classes: a row for each class.
      matrix: whether they are few enough for a table of all pairs.
      confusions: the most frequent mistakes: a class, what it was taken for, how often.
      mistakes: the pictures that are most wrong.
    """

    top5: float | None
    classes: list[ClassRow]
    matrix: bool
    confusions: list[tuple[str, str, int]]
    mistakes: list[Mistake]


def _outcome(found: Predictions, shown: Sequence[Thumbnail], names: Sequence[str]) -> Outcome:
    confusion = found.confusion(len(names))
    return Outcome(
        top5=found.top(5) if len(names) > 5 else None,
        classes=mistakes.class_rows(confusion, names),
        matrix=len(names) <= mistakes.LARGEST_MATRIX,
        confusions=mistakes.confusions(confusion, names),
        mistakes=mistakes.mistakes(found, shown, names),
    )


def _story(run: Run, model: SavedModel) -> str:
    """What was trained, on what and how long, in a few sentences."""
    config, trained = run.config, model.metadata.trained
    shape = "x".join(map(str, model.image_shape))
    start = config.init_from or "scratch"
    how = f"{config.epochs:g} epochs, {run.summary['steps']:,} updates of {config.batch_size}"
    return (
        f"Trained from {start} for {how} examples, on {trained.examples:,} images of {shape} in "
        f"{model.metadata.num_classes} classes, with {config.optimizer} in "
        f"{config.compute_dtype} on {trained.devices}, in "
        f"{page.duration(run.summary['wall_seconds'])}."
    )


def _tiles(
    run: Run, model: SavedModel, total: PrunableLayer, macs: feather.Macs, twin: Run | None
) -> list[Tile]:
    """Accuracy, weights, size, work and time, of a sparse run next to the dense network's."""
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
            f"{total.density:.2%}",
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
        *_time(run),
    ]


def _time(run: Run) -> list[Tile]:
    """One image on one core, if the run measured it."""
    if COMPILED not in run.summary:
        return []
    compiled, by_xla = (run.summary[name] for name in (COMPILED, XLA))
    note = f"compiled; XLA {_short(by_xla)}: {by_xla / compiled:.3g} times that"
    return [Tile("One image, one core", _short(compiled), (note,))]


def _short(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
