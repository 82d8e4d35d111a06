"""The pictures of a run's report, with the text that stands for them."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from train.look import curves, page
from train.look.inspection import Histogram, PrunableLayer
from train.store.metrics import Record


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture and the line below it."""

    svg: Markup
    caption: str


def curve_pictures(records: Sequence[Record]) -> list[Picture]:
    """Loss, accuracy, sparsity and so on over steps, those of which something was recorded."""
    pictures = []
    for panel in curves.PANELS:
        ends = []
        for key, name in panel.lines.items():
            if values := curves.series(records, key)[1]:
                ends.append(f"{name} {values[-1]:{'.2%' if panel.percent else '.3g'}}")
        if not ends:
            continue
        picture = Figure(figsize=(4.8, 3.0), layout="constrained")
        curves.draw_panel(picture.subplots(), panel, records)
        caption = f"{panel.meaning} At the end: {', '.join(ends)}."
        alternative = f"Line chart. {panel.title} over steps. {caption}"
        pictures.append(Picture(page.inline_svg(picture, panel.title, alternative), caption))
    return pictures


def weight_pictures(histogram: Histogram) -> list[Picture]:
    """The trained weights and those that the network uses, in units of the threshold."""
    near = _near_zero(histogram)
    beyond = 1 - histogram.dense.sum() / histogram.weights
    texts = (
        (
            "Trained weights",
            histogram.dense,
            f"All prunable weights, on a log scale: {histogram.pruned:,} of {histogram.weights:,} "
            f"lie within the threshold and are pruned; {beyond:.2%} are beyond the picture.",
        ),
        (
            "Weights that the network uses",
            histogram.sparse,
            f"The weights that are left: {near:.1%} of them are within a quarter of the threshold "
            f"around zero.",
        ),
    )
    pictures = []
    for title, counts, caption in texts:
        picture = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = picture.subplots()
        axes.axvspan(-1, 1, color="C0", alpha=0.15, linewidth=0, label="|w| ≤ T")
        axes.stairs(counts, histogram.edges, fill=True, color="C1")
        axes.set(title=title, xlabel="w / T", ylabel="weights", xlim=histogram.edges[[0, -1]])
        if counts is histogram.dense:
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(loc="upper right", handlelength=1.2)
        svg = page.inline_svg(picture, title, f"Histogram. {caption}")
        pictures.append(Picture(svg, caption))
    return pictures


def _near_zero(histogram: Histogram) -> float:
    """The fraction of the weights left that is smaller than a quarter of the threshold."""
    middles = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    return histogram.sparse[np.abs(middles) < 0.25].sum() / max(histogram.sparse.sum(), 1)


def layer_pictures(layers: Sequence[PrunableLayer]) -> list[Picture]:
    """A bar a layer: how much of it is left, and its MACs before and after."""
    densest = max(layers, key=lambda layer: layer.density)
    sparsest = min(layers, key=lambda layer: layer.density)
    costliest = max(layers, key=lambda layer: layer.sparse_macs)

    def draw_left(axes: Axes, places: np.ndarray) -> None:
        axes.barh(places, [layer.density for layer in layers], color="C1")
        for place, layer in zip(places, layers, strict=True):
            axes.annotate(
                f"{layer.density:.1%}",
                (layer.density, place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set(title="Weights left", xlim=(0, 1.14))
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.xaxis.set_major_formatter(PercentFormatter(1))

    def draw_macs(axes: Axes, places: np.ndarray) -> None:
        axes.barh(places, [layer.macs for layer in layers], color="C0", alpha=0.55)
        axes.barh(places, [layer.sparse_macs for layer in layers], color="C1", height=0.5)
        axes.set(title="MACs for one image, before and after")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    return [
        _layer_picture(
            layers,
            draw_left,
            f"Most is left of {densest.name}, {densest.density:.1%}; least of {sparsest.name}, "
            f"{sparsest.density:.2%}.",
        ),
        _layer_picture(
            layers,
            draw_macs,
            f"Most of the MACs that remain are in {costliest.name}: "
            f"{page.short(costliest.sparse_macs)} of its {page.short(costliest.macs)}.",
        ),
    ]


def _layer_picture(
    layers: Sequence[PrunableLayer], draw: Callable[[Axes, np.ndarray], None], caption: str
) -> Picture:
    """A horizontal bar chart with the first layer on top."""
    picture = Figure(figsize=(5.8, 0.9 + 0.21 * len(layers)), layout="constrained")
    axes = picture.subplots()
    places = np.arange(len(layers))
    draw(axes, places)
    axes.set_yticks(places, [layer.name for layer in layers], fontsize=8)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    title = axes.get_title()
    return Picture(page.inline_svg(picture, title, f"Bar chart. {title}. {caption}"), caption)
