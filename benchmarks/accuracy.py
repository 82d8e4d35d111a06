"""The Fashion-MNIST sweep: accuracy against sparsity, for p = 3, 1 and infinity.

  python -m train.prepare fashion_mnist
  python -m benchmarks.accuracy --runs runs/fashion_mnist

Each run is one of `python -m train.main` in a workdir of its own under --runs; stopped at any
moment and started again, the sweep goes on. At the end it compares the runs of each network, as
`python -m train.compare` does, and writes the comparison to --runs too.
"""

import argparse
import itertools
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

from benchmarks.common import append_result
from train.look import comparison
from train.program import path
from train.store.runs import Run, read_run

SPARSITIES = (0.9, 0.95, 0.98, 0.99)
EXPONENTS = ("3", "1", "inf")
SEEDS = {"lenet": 3, "resnet": 1}


def sweep(network: str) -> Iterator[tuple[str, list[str]]]:
    """The name and the flags of each run, seed by seed."""
    for seed in range(SEEDS[network]):
        yield f"dense_seed{seed}", ["--config.sparsity=0", f"--config.seed={seed}"]
        for p, sparsity in itertools.product(EXPONENTS, SPARSITIES):
            pruning = [f"--config.sparsity={sparsity}", f"--config.p={p}"]
            yield f"{sparsity}_p{p}_seed{seed}", [*pruning, f"--config.seed={seed}"]


def run(network: str, workdir: pathlib.Path, flags: Sequence[str]) -> Run:
    """Trains to the end from where it was left; a failure ends the sweep."""
    if not (workdir / "summary.json").exists():
        print(workdir, file=sys.stderr)
        config = f"--config=configs/fashion_mnist_{network}.py"
        command = [sys.executable, "-m", "train.main", config, f"--workdir={workdir}", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_run(workdir)


def main() -> None:
    """Runs what is missing and compares."""
    parser = argparse.ArgumentParser(description="The Fashion-MNIST sweep.")
    parser.add_argument("--runs", type=path, required=True, help="folder of the workdirs")
    parser.add_argument("--networks", nargs="+", choices=SEEDS, default=list(SEEDS))
    arguments = parser.parse_args()
    for network in arguments.networks:
        folder = arguments.runs / network
        runs = [run(network, folder / name, flags) for name, flags in sweep(network)]
        comparison.write(folder / "comparison", runs)
        print(f"{comparison.markdown(runs)}\n")
        summaries = {each.workdir.name: each.summary for each in runs}
        append_result("accuracy", {"network": network, "runs": summaries})


if __name__ == "__main__":
    main()
