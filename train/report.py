"""The report of a run: python -m train.report runs/digits --dense runs/digits_dense

train.main writes `report.html` at the end of every run. This program writes it anew, with --dense
beside the accuracy of the dense twin: the same configuration with --config.sparsity=0.
"""

import sys
from collections.abc import Sequence

from jaxtyping import PyTree

from train import asl, parallel, program
from train.errors import UserError
from train.look import report
from train.store import checkpoint, model_file
from train.store.leaves import matched
from train.store.model_file import SavedModel
from train.store.runs import Run, differences, read_run


def main(argv: Sequence[str]) -> None:
    """Writes the report of a finished run anew."""
    parser = program.ArgumentParser("train.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdir", type=program.path, help="of a finished run")
    parser.add_argument("--dense", type=program.path, help="the workdir of its dense twin")
    parser.add_allow_import()
    arguments = parser.parse_args(argv)
    parallel.devices()
    run = read_run(arguments.workdir)
    twin = None if arguments.dense is None else read_run(arguments.dense)
    if twin is not None:
        _check_twin(run, twin)
    model = model_file.load(run.workdir / "model.npz", allow_import=arguments.allow_import)
    report.write(run, model, trained_params(run, model), twin)
    program.say(run.workdir / "report.html")


def _check_twin(run: Run, twin: Run) -> None:
    """Raises UserError unless the twin is dense, with the same configuration otherwise."""
    differing = differences([run, twin])
    if differing or not twin.dense:
        why = f"they differ in {', '.join(differing)}" if differing else "it is sparse"
        raise UserError(
            f"{twin.workdir} is no dense twin of {run.workdir}: {why}; give a run of the same "
            "configuration with --config.sparsity=0."
        )


def trained_params(run: Run, model: SavedModel) -> PyTree:
    """The dense weights that a run's model was made of, from its newest checkpoint.

    Raises:
      UserError: the newest checkpoint is not there, not whole, or not this run's.
    """
    folder = run.workdir / "checkpoints"
    found = checkpoint.newest(folder, ["variables"])
    if found is None:
        raise UserError(
            f"There is no checkpoint in {folder}; bring it back, or train again in a new --workdir."
        )
    if found.passed_over:
        step, reason = next(iter(found.passed_over.items()))
        raise UserError(
            f"The checkpoint of step {step} in {folder} is damaged ({reason}), and older ones do "
            "not hold the weights that model.npz was made of; start the run again to mend it."
        )
    kind = "average/params/" if run.config.average_decay else "params/"
    params = {
        f"params/{name.removeprefix(f'variables/{kind}')}": leaf
        for name, leaf in found.leaves.items()
        if name.startswith(f"variables/{kind}") and not name.startswith(f"variables/{kind}{asl.R}/")
    }
    like = {"params": model.variables["params"]}
    where = f"The newest checkpoint in {folder} is not that of model.npz: it"
    return matched(params, like, where, "bring back the run's own")["params"]


if __name__ == "__main__":
    sys.exit(program.run(lambda: main(sys.argv[1:])))
