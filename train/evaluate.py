"""Evaluates a model file: python -m train.evaluate --model runs/digits/model.npz"""

import sys
from collections.abc import Sequence

from train import parallel, program
from train.errors import UserError
from train.run.cache import use_compilation_cache
from train.run.evaluation import evaluate_compiled, evaluate_model, open_data
from train.store import model_file


def main(argv: Sequence[str]) -> None:
    """Prints the accuracy of a model file beside the one that the file says it had."""
    parser = program.ArgumentParser("train.evaluate", description=__doc__)
    parser.add_argument("--model", type=program.path, required=True, help="a model.npz")
    parser.add_argument("--data", help="another data set of the same shape, by its name")
    parser.add_argument(
        "--data_dir",
        help="where the data set is, or the folder of pictures, if not where the run had it",
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="compiled by feather_jax.cpu, with the images a second that it takes beside XLA",
    )
    parser.add_argument("--threads", type=int, help="of --compiled; 1 if it is not given")
    parser.add_allow_import()
    arguments = parser.parse_args(argv)
    if arguments.threads is not None and not arguments.compiled:
        raise UserError("--threads is of --compiled; without it XLA chooses.")
    threads = 1 if arguments.threads is None else arguments.threads
    parallel.devices()
    use_compilation_cache()
    model = model_file.load(arguments.model, allow_import=arguments.allow_import)
    data = open_data(model, arguments.data, arguments.data_dir)
    if arguments.compiled:
        compiled = evaluate_compiled(model, data, threads)
        found = compiled.predictions.figures
    else:
        found = evaluate_model(model, data).figures
    program.say(
        f"{found['eval/accuracy']:.2%} of {found['eval/examples']} evaluation examples of "
        f"{data.name} right"
    )
    if arguments.compiled:
        own_threads = "1 thread" if threads == 1 else f"{threads} threads"
        program.say(
            f"{compiled.images_per_second:,.0f} images/s compiled, on {own_threads}; "
            f"{compiled.images_per_second_of_xla:,.0f} by XLA; {compiled.batch_size} at a time"
        )
    own = data.name == model.metadata.data["name"]
    for name, value in found.items():
        says = model.metadata.evaluation.get(name)
        same = "as in the file" if value == says else f"{says!r} in the file"
        program.say(f"{name} {value!r}" + (f", {same}" if own else ""))


if __name__ == "__main__":
    sys.exit(program.run(lambda: main(sys.argv[1:])))
