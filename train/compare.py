"""Puts runs side by side: python -m train.compare runs/dense runs/sparse --out comparison

It prints a table, one row a run, and writes `compare.html`, `compare.md` and `compare.png`: the
table and accuracy against the weights left, with the dense runs as a line. Runs that differ in
their seed alone are one point, their mean, with a bar from the worst to the best.
"""

import sys
from collections.abc import Sequence

from train import program
from train.errors import UserError
from train.look import comparison
from train.store.runs import read_run


def main(argv: Sequence[str]) -> None:
    """Prints the table and, with --out, writes the comparison; names what is left out."""
    parser = program.ArgumentParser("train.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdirs", type=program.path, nargs="+", help="of finished runs")
    parser.add_argument("--out", type=program.path, help="a folder, made if need be")
    arguments = parser.parse_args(argv)
    runs = []
    for workdir in {path.resolve(): path for path in arguments.workdirs}.values():
        try:
            runs.append(read_run(workdir))
        except UserError as error:
            print(f"Left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError("There is nothing to compare; give workdirs of finished runs.")
    data = dict.fromkeys(run.config.data["name"] for run in runs)
    if len(data) > 1:
        program.say(f"These runs are of different data sets: {', '.join(data)}.")
    program.say(comparison.table(comparison.grouped(runs)))
    if arguments.out is not None:
        comparison.write(arguments.out, runs)


if __name__ == "__main__":
    sys.exit(program.run(lambda: main(sys.argv[1:])))
