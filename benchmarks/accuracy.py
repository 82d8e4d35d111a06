"""The Fashion-MNIST sweep: accuracy against sparsity, for p = 3, 1 and infinity.

  python -m train.prepare fashion_mnist
  python -m benchmarks.accuracy --runs runs/fashion_mnist

Each point is one run of `python -m train.main` in a workdir of its own under --runs; stopped at
any moment and started again, the sweep goes on. At the end it prints the tables in Markdown
(mean over the seeds, and the spread: the largest less the smallest).
"""

import argparse
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

SPARSITIES = (0.9, 0.95, 0.98, 0.99)
EXPONENTS = ("3", "1", "inf")
SEEDS = {"lenet": 3, "resnet": 1}


class Point(NamedTuple):
    """One run: a network, a sparsity (0 is dense), an exponent and a seed."""

    network: str
    sparsity: float
    p: str
    seed: int

    @property
    def name(self) -> str:
        pruning = f"{self.sparsity:g}_p{self.p}" if self.sparsity else "dense"
        return f"{self.network}_{pruning}_seed{self.seed}"


def points(networks: Sequence[str]) -> Iterator[Point]:
    """All points, seed by seed, so that a sweep that is not finished has whole columns."""
    for network in networks:
        for seed in range(SEEDS[network]):
            yield Point(network, 0.0, "3", seed)
            for p, sparsity in itertools.product(EXPONENTS, SPARSITIES):
                yield Point(network, sparsity, p, seed)


def train(point: Point, workdir: pathlib.Path) -> None:
    """Runs the program for one point, from where it is; a failure ends the sweep."""
    command = [
        *(sys.executable, "-m", "train.main"),
        f"--config=configs/fashion_mnist_{point.network}.py",
        f"--workdir={workdir}",
        f"--config.sparsity={point.sparsity}",
        f"--config.p={point.p}",
        f"--config.seed={point.seed}",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def accuracy(workdir: pathlib.Path) -> float | None:
    """The accuracy of a finished run; None of one that is not."""
    path = workdir / "summary.json"
    return json.loads(path.read_text())["eval/accuracy"] if path.exists() else None


def table(network: str, runs: pathlib.Path) -> str:
    """The finished runs of one network as a Markdown table of accuracies in percent."""

    def cell(sparsity: float, p: str) -> str:
        seeds = (Point(network, sparsity, p, seed) for seed in range(SEEDS[network]))
        found = [accuracy(runs / point.name) for point in seeds]
        values = [100 * value for value in found if value is not None]
        if not values:
            return "-"
        mean = f"{statistics.mean(values):.2f}"
        return mean if len(values) == 1 else f"{mean} ({max(values) - min(values):.2f})"

    rows = [["p", "dense", *(f"{sparsity:.0%}" for sparsity in SPARSITIES)]]
    rows.append(["---"] * len(rows[0]))
    rows += [
        [p, cell(0.0, "3") if p == "3" else "", *(cell(sparsity, p) for sparsity in SPARSITIES)]
        for p in EXPONENTS
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description="The Fashion-MNIST sweep.")
    parser.add_argument("--runs", type=pathlib.Path, required=True, help="folder of the workdirs")
    parser.add_argument("--networks", nargs="+", choices=SEEDS, default=list(SEEDS))
    arguments = parser.parse_args()
    todo = list(points(arguments.networks))
    for number, point in enumerate(todo, 1):
        workdir = arguments.runs / point.name
        if accuracy(workdir) is None:
            print(f"{number} of {len(todo)}: {point.name}", file=sys.stderr)
            train(point, workdir)
    for network in arguments.networks:
        print(f"\n{network}, accuracy in percent\n\n{table(network, arguments.runs)}")


if __name__ == "__main__":
    main()
