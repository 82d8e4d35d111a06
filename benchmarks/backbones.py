"""Accuracy by backbone on Fashion-MNIST, against the weights and the work that are left.

  python -m train.prepare fashion_mnist
  python -m benchmarks.backbones --runs runs/backbones
  python -m benchmarks.backbones --show

Each run is one of `python -m train.main` in a workdir of its own under --runs, and when it is
finished a line of `benchmarks/results/backbones.jsonl`. What has a line there is not run again, so
that it goes on where it was stopped, on another machine too; a run that was stopped in the middle
goes on from its checkpoint. --most ends it after as many runs. --show runs nothing, and writes the
table to the terminal and the two pictures into `docs/`.

LeNet-300-100 is trained as in `configs/fashion_mnist_lenet.py`, 20 epochs, and the residual network
as in `configs/fashion_mnist_resnet.py`, but for 8 epochs instead of 4: at 4 a sparse network has
not settled. On one core of an AMD EPYC a run takes half a minute and five minutes, 42 and 28 runs.
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from benchmarks import accuracy
from benchmarks.common import RESULTS, append_result, print_table
from train.look.inspection import macs_of
from train.store import model_file

ROOT = pathlib.Path(__file__).parents[1]
SEEDS = {"lenet": 3, "resnet": 2}
EXTRA_FLAGS: dict[str, list[str]] = {"lenet": [], "resnet": ["--config.epochs=8"]}
SPARSITIES = (0.9, 0.95)
METHODS: dict[str, tuple[tuple[float, ...], list[str]]] = {
    "dense": ((0.0,), []),
    "global": (SPARSITIES, []),
    "uniform": (SPARSITIES, ["--config.backbone={'name': 'uniform'}"]),
    "erk": (SPARSITIES, ["--config.backbone={'name': 'erk'}"]),
    "macs": (SPARSITIES, ["--config.backbone={'name': 'macs'}"]),
    "asl": (SPARSITIES, ["--config.backbone={'name': 'asl'}"]),
    "2:4": ((0.5,), ["--config.backbone={'name': 'n_m', 'n': 2, 'm': 4}"]),
    "blocks of 4": (SPARSITIES, ["--config.block=(4, 1)"]),
}
"""What is compared: the sparsities, and the flags beside them."""


class Cell(NamedTuple):
    """A run, as the results name it."""

    network: str
    method: str
    sparsity: float
    seed: int


def cells(networks: Sequence[str]) -> Iterator[Cell]:
    """All runs, in their order: every method at a sparsity, every sparsity, then the next seed."""
    each = [(sparsity, method) for method, (several, _) in METHODS.items() for sparsity in several]
    each.sort(key=lambda pair: pair[0])
    for network in networks:
        for seed in range(SEEDS[network]):
            for sparsity, method in each:
                yield Cell(network, method, sparsity, seed)


def run(cell: Cell, runs: pathlib.Path) -> dict[str, Any]:
    """Trains and gives the line of results."""
    flags = [*EXTRA_FLAGS[cell.network], *METHODS[cell.method][1]]
    flags += [f"--config.sparsity={cell.sparsity}", f"--config.seed={cell.seed}"]
    name = f"{cell.method}_{cell.sparsity}_seed{cell.seed}".replace(" ", "_").replace(":", "_")
    workdir = runs / cell.network / name
    summary = accuracy.run(cell.network, workdir, flags).summary
    macs = macs_of(model_file.load(workdir / "model.npz"))
    return {
        **cell._asdict(),
        "accuracy": summary["eval/accuracy"],
        "prunable": summary["prunable"],
        "nonzero": summary["nonzero"],
        "macs": macs.total,
        "sparse_macs": macs.sparse_total,
        "summary": summary,
        "flags": flags,
    }


def finished() -> dict[Cell, dict[str, Any]]:
    """The lines of results by run."""
    path = RESULTS / "backbones.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = map(json.loads, lines)
    return {Cell(*(record[field] for field in Cell._fields)): record for record in records}


class Point(NamedTuple):
    """The means over the seeds of one method at one sparsity."""

    method: str
    sparsity: float
    accuracies: list[float]
    weights_left: float  # of the prunable ones, a fraction
    macs_left: float  # of all, a fraction


def points(network: str, results: dict[Cell, dict[str, Any]]) -> list[Point]:
    """What is there of a network, in the order of `METHODS`."""
    found = []
    for method, (sparsities, _) in METHODS.items():
        for sparsity in sparsities:
            records = [
                results[cell]
                for cell in cells([network])
                if cell in results and cell[1:3] == (method, sparsity)
            ]
            if records:
                found.append(
                    Point(
                        method,
                        sparsity,
                        [record["accuracy"] for record in records],
                        statistics.mean(r["nonzero"] / r["prunable"] for r in records),
                        statistics.mean(r["sparse_macs"] / r["macs"] for r in records),
                    )
                )
    return found


def table(network: str, found: Sequence[Point]) -> None:
    """Prints the means, and between which seeds they lie, as Markdown."""
    print(f"\n{network}\n")
    rows = [
        (
            point.method,
            f"{point.sparsity:.0%}",
            f"{statistics.mean(point.accuracies):.2%}",
            f"{min(point.accuracies):.2%} to {max(point.accuracies):.2%}",
            len(point.accuracies),
            f"{point.weights_left:.1%}",
            f"{point.macs_left:.1%}",
        )
        for point in found
    ]
    print_table(
        ("backbone", "sparsity", "accuracy", "range", "seeds", "weights left", "MACs left"), rows
    )


def draw(left: str, path: pathlib.Path, by_network: dict[str, list[Point]]) -> None:
    """A picture with a panel a network: accuracy against what is left, a line a method."""
    figure = Figure(figsize=(4.5 * len(by_network), 3.6), layout="constrained")
    for i, (network, found) in enumerate(by_network.items()):
        axes: Axes = figure.add_subplot(1, len(by_network), i + 1)
        for method in METHODS:
            line = [point for point in found if point.method == method]
            if method == "dense" and line:
                mean = statistics.mean(line[0].accuracies)
                axes.axhline(mean, color="grey", linewidth=0.8, linestyle=":", label=method)
            elif line:
                x = [getattr(point, left) for point in line]
                y = [statistics.mean(point.accuracies) for point in line]
                axes.plot(x, y, marker="o", markersize=4, linewidth=1, label=method)
        axes.set_title(network)
        axes.set_xscale("log")
        what = {"weights_left": "prunable weights left", "macs_left": "MACs left"}[left]
        axes.set_xlabel(f"{what}, log scale")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7, which="both")
    figure.axes[0].set_ylabel("evaluation accuracy, mean over seeds")
    figure.axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs what has no line yet, and shows what is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=pathlib.Path, help="folder of the workdirs")
    parser.add_argument("--networks", nargs="+", choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--most", type=int, help="end after as many runs")
    parser.add_argument("--show", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if not (arguments.show or arguments.runs):
        parser.error("give --runs, the folder of the workdirs, or --show")
    results = finished()
    left = [
        cell
        for cell in cells(arguments.networks)
        if cell not in results and cell.method in arguments.methods
    ]
    for cell in [] if arguments.show else left[: arguments.most]:
        append_result("backbones", run(cell, arguments.runs))
    if not arguments.show:
        return
    by_network = {network: points(network, results) for network in arguments.networks}
    by_network = {network: found for network, found in by_network.items() if found}
    for network, found in by_network.items():
        table(network, found)
    for what in ("weights_left", "macs_left"):
        draw(what, ROOT / "docs" / f"backbones_{what}.png", by_network)
    missing = len(left)
    print(f"\n{missing} runs are missing." if missing else "", file=sys.stderr)


if __name__ == "__main__":
    main()
