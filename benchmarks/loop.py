"""How fast the program's loop is next to its bare step.

    python -m benchmarks.loop [--steps N] [--rounds N]

A ResNet-20 on scikit-learn's digits at batch 128, on one device: the pace of whole runs of the
program, as their own `metrics.jsonl` has it (every ten steps: batches, placement, metrics read,
checked and logged), against the pace of the compiled step called on one resident batch. Both have
two steps in flight. They take turns, and `ratio` is that of the medians over all rounds. (That
nothing is compiled after the first step is a test, in `tests/train/test_communication.py`.)

Takes some minutes. Appends to `benchmarks/results/loop.jsonl`.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax

from benchmarks.common import append_result, print_table
from train import config as config_lib
from train import experiment, parallel
from train.config import Config
from train.main import run
from train.step import make_train_step

BATCH, EVERY, TRAINING_EXAMPLES = 128, 10, 1437


def make_config(steps: int) -> Config:
    """`steps` updates, evaluated and saved at the end only."""
    return config_lib.parse(
        {
            "data": {"name": "digits", "crop_padding": 1},
            "model": {"name": "resnet20"},
            "batch_size": BATCH,
            "epochs": steps / (TRAINING_EXAMPLES // BATCH),
            "learning_rate": 0.01,
            "sparsity": 0.9,
            "prune_end": 0.0,
            "log_every_steps": EVERY,
            "eval_every_epochs": 1e6,
            "checkpoint_every_steps": 10**9,
        }
    )


def program_pace(config: Config) -> list[float]:
    """Steps a second between the logged steps of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run(config, pathlib.Path(folder, "run"), say=lambda line: None)
        lines = pathlib.Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    paces = [
        record["examples_per_second"] / BATCH
        for record in records
        if "examples_per_second" in record
    ]
    return paces[1:]  # the first one has the loading of the step in it


def bare_pace(config: Config, steps: int) -> list[float]:
    """Steps a second of the compiled step, over every ten of them."""
    built, mesh = experiment.build(config), parallel.device_mesh()
    state = parallel.replicate(experiment.initial_state(built), mesh)
    batch = parallel.shard(next(built.data.train_batches(0)), mesh)
    step = parallel.on_all_devices(make_train_step(built), donate_state=True)
    state, unread = step(state, batch)
    jax.block_until_ready(unread)
    paces, start = [], time.perf_counter()
    for number in range(1, steps + 1):
        state, metrics = step(state, batch)
        jax.block_until_ready(unread)
        unread = metrics
        if number % EVERY == 0:
            now = time.perf_counter()
            paces.append(EVERY / (now - start))
            start = now
    return paces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="updates in a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = make_config(arguments.steps)
    program: list[float] = []
    bare: list[float] = []
    for _ in range(arguments.rounds):
        program += program_pace(config)
        bare += bare_pace(config, arguments.steps)
    result = {
        "rounds": arguments.rounds,
        "bare_ms": 1e3 / statistics.median(bare),
        "program_ms": 1e3 / statistics.median(program),
        "bare_fastest_ms": 1e3 / max(bare),
        "program_fastest_ms": 1e3 / max(program),
        "ratio": statistics.median(program) / statistics.median(bare),
        "ratio_of_fastest": max(program) / max(bare),
    }
    shown = {name: round(value, 3) for name, value in result.items()}
    print_table(list(shown), [list(shown.values())])
    append_result("loop", {"steps": arguments.steps, **result})


if __name__ == "__main__":
    main()
