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
from train.files import write_atomically
from train.look import page
from train.store.runs import Run, differences, uses


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
      label: what distinguishes them from the other groups, beside the sparsity: "p = 1".
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
    def density(self) -> float:
        """The fraction of weights left, mean over the runs."""
        return statistics.mean(run.density for run in self.runs)


def grouped(runs: Sequence[Run]) -> list[Group]:
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
    return [Group(label, sparsity, tuple(alike)) for (label, sparsity), alike in ordered]


def _label(name: str, value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if name in ("model.name", "data.name") else f"{name} = {text}"


Cell = tuple[float | None, str]
"""What a table shows, after the number that its column is sorted by; None sorts by the text."""


def rows(groups: Sequence[Group]) -> tuple[list[str], list[list[Cell]]]:
    """The groups as a table's headings and rows."""
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
    for group in groups:
        sizes = [run.model_bytes for run in group.runs if run.model_bytes]
        several = len(group.runs) > 1
        spread = max(group.accuracies) - min(group.accuracies)
        size = statistics.mean(sizes) if sizes else 0.0
        seconds = statistics.mean(run.summary["wall_seconds"] for run in group.runs)
        lines.append(
            [
                (None, group.label),
                (group.sparsity, f"{group.sparsity:.4g}"),
                # In the order of 1 / density, which is infinite where nothing is left.
                (-group.density, f"{1 / group.density:.3g}" if group.density else "-"),
                (group.accuracy, f"{group.accuracy:.2%}"),
                (spread, f"{spread:.2%}" if several else ""),
                (len(group.runs), str(len(group.runs))),
                (size, page.size(size) if sizes else ""),
                (seconds, page.duration(seconds)),
            ]
        )
    return headers, lines


def table(groups: Sequence[Group]) -> str:
    """The groups as a table for a terminal."""
    headers, lines = rows(groups)
    texts = [headers, *([text for _, text in line] for line in lines)]
    first, *others = (max(map(len, column)) for column in zip(*texts, strict=True))
    heading, *body = (
        "  ".join([name.ljust(first), *map(str.rjust, rest, others)]).rstrip()
        for name, *rest in texts
    )
    return "\n".join([heading, "-" * len(heading), *body])


def markdown(runs: Sequence[Run]) -> str:
    """The runs as a table in Markdown, a row for those that differ in their seed alone."""
    return _markdown(grouped(runs))


def _markdown(groups: Sequence[Group]) -> str:
    headers, lines = rows(groups)
    rule = ["---"] + ["--:"] * (len(headers) - 1)
    texts = [[text.replace("|", r"\|") for _, text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headers, rule, *texts])


# A label is a user's own text, in which a dollar sign begins no formula.
@matplotlib.rc_context({"text.parse_math": False})
def figure(groups: Sequence[Group]) -> Figure:
    """Accuracy against the weights left, on a log scale; means, with bars from worst to best."""
    picture = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = picture.subplots()
    colors = (f"C{number}" for number in itertools.count())
    for group in (group for group in groups if not group.sparsity):
        _draw_dense(axes, group, next(colors))
    sparse = [group for group in groups if group.sparsity]
    for label in dict.fromkeys(group.label for group in sparse):
        _draw_line(axes, [group for group in sparse if group.label == label], next(colors))
    axes.set(xscale="log", xlabel="prunable weights left", ylabel="accuracy")
    if sparse:
        axes.set_xticks(sorted({round(1 - group.sparsity, 12) for group in sparse}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda density, _: f"{100 * density:.3g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.invert_xaxis()
    axes.legend()
    return picture


def _draw_dense(axes: Axes, group: Group, color: str) -> None:
    axes.axhline(group.accuracy, color=color, linestyle="--", label=group.label)
    if len(group.runs) > 1:
        axes.axhspan(min(group.accuracies), max(group.accuracies), color=color, alpha=0.15, lw=0)


def _draw_line(axes: Axes, line: Sequence[Group], color: str) -> None:
    means = [group.accuracy for group in line]
    below = [group.accuracy - min(group.accuracies) for group in line]
    above = [max(group.accuracies) - group.accuracy for group in line]
    axes.errorbar(
        [group.density for group in line],
        means,
        yerr=[below, above] if any(len(group.runs) > 1 for group in line) else None,
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
    groups = grouped(runs)
    title, description = _title(runs), _describe(groups)
    with page.style(page.SERIES):  # the page's own colours, which a file of its own has not
        picture = page.inline_svg(figure(groups), "accuracy", description)
    headers, lines = rows(groups)
    text = page.render(
        "compare.html", title=title, picture=picture, headers=headers, rows=lines, runs=runs
    )
    with writing(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "compare.png", page.png(figure(groups), dpi=150))
        write_atomically(folder / "compare.html", text)
        write_atomically(
            folder / "compare.md",
            f"# {title}\n\n{_markdown(groups)}\n\n![{description}](compare.png)\n",
        )


def _title(runs: Sequence[Run]) -> str:
    def names(field: str) -> str:
        return " and ".join(dict.fromkeys(getattr(run.config, field)["name"] for run in runs))

    return f"{names('model')} on {names('data')}"


def _describe(groups: Sequence[Group]) -> str:
    """The picture in words."""
    lines: dict[str, list[str]] = {}
    for group in groups:
        where = f" at {group.density:.3g}" if group.sparsity else ""
        lines.setdefault(group.label, []).append(f"{group.accuracy:.2%}{where}")
    texts = (f"{label}: {', '.join(values)}" for label, values in lines.items())
    return f"Accuracy against the fraction of weights left. {'; '.join(texts)}."
