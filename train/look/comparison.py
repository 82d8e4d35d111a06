"""Runs side by side: a table, and accuracy against the weights left."""

import dataclasses
import itertools
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from train.config import flat
from train.errors import writing
from train.look import page
from train.store.files import write_atomically
from train.store.runs import Run, differences, uses


@dataclasses.dataclass(frozen=True)
class Point:
    """Runs that differ in their seed alone.

    Attributes:
      label: what distinguishes them from the other points, beside the sparsity: "p = 1".
      sparsity: the fraction of zeros that was asked for; 0 of dense runs.
      runs: the runs.
    """

    label: str
    sparsity: float
    runs: tuple[Run, ...]

    @property
    def accuracies(self) -> list[float]:
        return [run.accuracy for run in self.runs]

    @property
    def accuracy(self) -> float:
        """The mean over the runs."""
        return statistics.mean(self.accuracies)

    @property
    def left(self) -> float:
        """The fraction of weights left, mean over the runs."""
        return statistics.mean(run.left for run in self.runs)


def points(runs: Sequence[Run]) -> list[Point]:
    """The runs without their seeds: the dense ones first, then by label and sparsity.

    Labels are made of the fields of the configuration in which the runs differ.
    """
    differing = differences(runs)
    found: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        own = flat(run.config.as_dict())
        used = [name for name in differing if name in own and uses(run, name)]
        parts = [_label(name, own[name]) for name in used]
        label = ", ".join(["dense", *parts] if run.dense else parts) or "sparse"
        found.setdefault((label, run.config.sparsity), []).append(run)
    ordered = sorted(found.items(), key=lambda item: (not item[1][0].dense, *item[0]))
    return [Point(label, sparsity, tuple(alike)) for (label, sparsity), alike in ordered]


def _label(name: str, value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if name in ("model.name", "data.name") else f"{name} = {text}"


Cell = tuple[float | None, str]
"""What a table shows, after the number that its column is sorted by; None sorts by the text."""


def rows(found: Sequence[Point]) -> tuple[list[str], list[list[Cell]]]:
    """The points as a table's headings and rows."""
    headers = [
        "runs",
        "sparsity",
        "1 weight in",
        "accuracy",
        "spread",
        "seeds",
        "model.npz",
        "time",
    ]
    lines = []
    for point in found:
        sizes = [run.model_bytes for run in point.runs if run.model_bytes]
        several = len(point.runs) > 1
        spread = max(point.accuracies) - min(point.accuracies)
        size = statistics.mean(sizes) if sizes else 0.0
        seconds = statistics.mean(run.summary["wall_seconds"] for run in point.runs)
        lines.append(
            [
                (None, point.label),
                (point.sparsity, f"{point.sparsity:.4g}"),
                # In the order of 1 / left, which is infinite where nothing is left.
                (-point.left, f"{1 / point.left:.3g}" if point.left else "-"),
                (point.accuracy, f"{point.accuracy:.2%}"),
                (spread, f"{spread:.2%}" if several else ""),
                (len(point.runs), str(len(point.runs))),
                (size, page.size(size) if sizes else ""),
                (seconds, page.duration(seconds)),
            ]
        )
    return headers, lines


def table(found: Sequence[Point]) -> str:
    """The points as a table for a terminal."""
    headers, lines = rows(found)
    texts = [headers, *([text for _, text in line] for line in lines)]
    first, *others = (max(map(len, column)) for column in zip(*texts, strict=True))
    heading, *body = (
        "  ".join([name.ljust(first), *map(str.rjust, rest, others)]).rstrip()
        for name, *rest in texts
    )
    return "\n".join([heading, "-" * len(heading), *body])


def markdown(runs: Sequence[Run]) -> str:
    """The runs as a table in Markdown, a row for those that differ in their seed alone."""
    return _markdown(points(runs))


def _markdown(found: Sequence[Point]) -> str:
    headers, lines = rows(found)
    rule = ["---"] + ["--:"] * (len(headers) - 1)
    texts = [[text.replace("|", r"\|") for _, text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headers, rule, *texts])


# A label is a user's own text, in which a dollar sign begins no formula.
@matplotlib.rc_context({"text.parse_math": False})
def figure(found: Sequence[Point]) -> Figure:
    """Accuracy against the weights left, on a log scale; means, with bars from worst to best."""
    picture = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = picture.subplots()
    colors = (f"C{number}" for number in itertools.count())
    for point in (point for point in found if not point.sparsity):
        _draw_dense(axes, point, next(colors))
    sparse = [point for point in found if point.sparsity]
    for label in dict.fromkeys(point.label for point in sparse):
        _draw_line(axes, [point for point in sparse if point.label == label], next(colors))
    axes.set(xscale="log", xlabel="prunable weights left", ylabel="accuracy")
    if sparse:
        axes.set_xticks(sorted({round(1 - point.sparsity, 12) for point in sparse}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda left, _: f"{100 * left:.3g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.invert_xaxis()
    axes.legend()
    return picture


def _draw_dense(axes: Axes, point: Point, color: str) -> None:
    axes.axhline(point.accuracy, color=color, linestyle="--", label=point.label)
    if len(point.runs) > 1:
        axes.axhspan(min(point.accuracies), max(point.accuracies), color=color, alpha=0.15, lw=0)


def _draw_line(axes: Axes, line: Sequence[Point], color: str) -> None:
    means = [point.accuracy for point in line]
    below = [point.accuracy - min(point.accuracies) for point in line]
    above = [max(point.accuracies) - point.accuracy for point in line]
    axes.errorbar(
        [point.left for point in line],
        means,
        yerr=[below, above] if any(len(point.runs) > 1 for point in line) else None,
        color=color,
        marker="o",
        capsize=3,
        label=line[0].label,
    )


def write(folder: pathlib.Path, runs: Sequence[Run]) -> None:
    """Writes `compare.html`, `compare.md` and `compare.png`.

    Raises:
      StorageError: the folder cannot be written.
    """
    found = points(runs)
    title, description = _title(runs), _describe(found)
    with page.style(page.SERIES):  # the page's own colours, which a file of its own has not
        picture = page.inline_svg(figure(found), "accuracy", description)
    headers, lines = rows(found)
    text = page.render(
        "compare.html", title=title, picture=picture, headers=headers, rows=lines, runs=runs
    )
    with writing(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "compare.png", page.png(figure(found), dpi=150))
        write_atomically(folder / "compare.html", text)
        write_atomically(
            folder / "compare.md",
            f"# {title}\n\n{_markdown(found)}\n\n![{description}](compare.png)\n",
        )


def _title(runs: Sequence[Run]) -> str:
    def names(field: str) -> str:
        return " and ".join(dict.fromkeys(getattr(run.config, field)["name"] for run in runs))

    return f"{names('model')} on {names('data')}"


def _describe(found: Sequence[Point]) -> str:
    """The picture in words."""
    lines: dict[str, list[str]] = {}
    for point in found:
        where = f" at {point.left:.3g}" if point.sparsity else ""
        lines.setdefault(point.label, []).append(f"{point.accuracy:.2%}{where}")
    texts = (f"{label}: {', '.join(values)}" for label, values in lines.items())
    return f"Accuracy against the fraction of weights left. {'; '.join(texts)}."
