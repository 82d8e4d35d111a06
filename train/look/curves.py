"""How a run went: loss, accuracy, sparsity, threshold, learning rate and mask churn over steps."""

import dataclasses
import pathlib
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from train.files import write_atomically
from train.look import page
from train.store.metrics import Record


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of a run.

    Attributes:
      title: what stands above the picture.
      lines: the records' keys, each with the name of its line, those of training first.
      unit: what the y-axis is labelled with.
      meaning: a sentence about what is shown.
      percent: whether values are fractions, to be shown as percent.
    """

    title: str
    lines: dict[str, str]
    unit: str
    meaning: str
    percent: bool = False


PANELS = (
    Panel(
        "Loss",
        {"train/loss": "training", "eval/loss": "evaluation"},
        "nats",
        "Cross entropy, in evaluation with the pruned weights.",
    ),
    Panel(
        "Accuracy",
        {"train/accuracy": "training", "eval/accuracy": "evaluation"},
        "of the examples",
        "In evaluation with the pruned weights.",
        percent=True,
    ),
    Panel(
        "Sparsity",
        {"sparsity": "sparsity"},
        "of the prunable weights",
        "The prunable weights that are zero in a step.",
        percent=True,
    ),
    Panel(
        "Threshold",
        {"threshold": "threshold"},
        "|w|",
        "The magnitude up to which a weight is zero in a step.",
    ),
    Panel(
        "Mask churn",
        {"mask_churn": "churn"},
        "of the prunable weights",
        "Weights that went from kept to pruned or back since the last evaluation.",
        percent=True,
    ),
    Panel(
        "Learning rate",
        {"learning_rate": "learning rate"},
        "learning rate",
        "The optimiser's step size.",
    ),
)


def series(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """The steps at which `key` was recorded, and its values."""
    found = [record for record in records if key in record]
    return [record["step"] for record in found], [record[key] for record in found]


def draw_panel(axes: Axes, panel: Panel, records: Sequence[Record]) -> None:
    """Draws one panel; one of which nothing was recorded says so."""
    drawn = {key: label for key, label in panel.lines.items() if series(records, key)[0]}
    for key, label in panel.lines.items():
        # In C0 is what training saw, noisy and often, and in C1 what counts.
        training = key.startswith("train/")
        if key in drawn:
            axes.plot(
                *series(records, key),
                label=label,
                color="C0" if training else "C1",
                linewidth=1 if training else 2,
            )
    if len(drawn) > 1:
        axes.legend(loc="best", handlelength=1.2)
    if not drawn:
        axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
    axes.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def draw(records: Sequence[Record], title: str) -> Figure:
    """All panels of which something was recorded."""
    panels = [panel for panel in PANELS if any(series(records, key)[0] for key in panel.lines)]
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    figure.suptitle(title)
    for axes, panel in zip(figure.subplots(2, 3).flat, panels, strict=False):
        draw_panel(axes, panel, records)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    return figure


def save(path: pathlib.Path, records: Sequence[Record], title: str) -> None:
    """Writes the picture as PNG."""
    write_atomically(path, page.png(draw(records, title), dpi=120))
