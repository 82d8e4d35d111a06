"""What Feather adds to a training step: time, memory, compilation, passes over the weights.

    python -m benchmarks.step [resnet20] [resnet50] [resnet50_bfloat16] [--pairs N]
    python -m benchmarks.step resnet20 --backbones global uniform erk macs n_m asl blocks

The step of the program, sparse (90 %, the final sparsity) and dense, compiled in one process and
run in turns on random data: ResNet-20 at batch 128, ResNet-50 at batch 32, and, where there is an
accelerator, ResNet-50 in bfloat16 at batch 256. ResNet-50 takes a quarter of an hour on two cores.

`ratio` is the median over the pairs of steps, with the quartiles beside it, `minimums` the ratio of
the shortest steps, `cpu` that of the least computing time (of all cores, which another process on
the machine disturbs less). `memory` is what the sparse step needs beyond the dense one at its peak,
in copies of the prunable weights, and `passes` how many more bytes it moves, in the same unit, as
XLA counts them: a loop's body once. `compile` is the ratio of the times to trace and compile.

With `--backbones` the steps of several, compiled in the same process, take turns with the one dense
step: of N:M 2:4 at its 50 %, `blocks` is one threshold for blocks of 4 input channels.

`threshold` and `operator` are the parts of it, each compiled alone, as fractions of the dense step.
Appends to `benchmarks/results/step.jsonl`.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from benchmarks.common import append_result, print_table
from benchmarks.program import (
    CASES,
    SPARSITY,
    Program,
    in_turns,
    make,
    prunable_bytes,
    ratio,
    running,
)

COMPILATIONS = 2
PAIRS = {"resnet20": 30, "resnet50": 6, "resnet50_bfloat16": 100}
BACKBONES: dict[str, dict[str, Any]] = {
    "global": {},
    **{name: {"backbone": {"name": name}} for name in ("uniform", "erk", "macs", "asl")},
    "n_m": {"backbone": {"name": "n_m", "n": 2, "m": 4}, "sparsity": 0.5},
    "blocks": {"block": (4, 1)},
}


def measure(name: str, backbones: list[str], pairs: int) -> list[dict[str, Any]]:
    """A row of the table for each backbone, and the times behind it."""
    case = CASES[name]
    pruned: dict[str, Any] = {"sparsity": SPARSITY}
    programs = [make(case, **pruned | BACKBONES[backbone]) for backbone in backbones]
    programs.append(make(case, 0.0))
    compiled: list[Any] = [None] * len(programs)

    def compile_anew(which: int) -> None:
        jax.clear_caches()
        compiled[which] = programs[which].lower().compile()

    *compile_times, compile_dense = in_turns(
        [partial(compile_anew, which) for which in range(len(programs))], COMPILATIONS
    )
    part_functions = [function for program in programs[:-1] for function in parts(program)]
    steps = [running(step, program) for step, program in zip(compiled, programs, strict=True)]
    for function in [*steps, *part_functions]:
        function()
    *sparse_times, dense_times = in_turns(steps, pairs)
    part_times = in_turns(part_functions, max(pairs, 10))

    size = prunable_bytes(programs[-1].state.params)
    *temporary, temporary_dense = [each.memory_analysis().temp_size_in_bytes for each in compiled]
    *moved, moved_dense = [each.cost_analysis()["bytes accessed"] for each in compiled]
    step_seconds = statistics.median(dense_times.clock)
    shares = [statistics.median(times.clock) / step_seconds for times in part_times]
    return [
        {
            "case": name,
            "backbone": backbone,
            "weights": size // 4,
            "batch": case.batch_size,
            "sparse": sparse_times[i].summary(),
            "dense": dense_times.summary(),
            "ratio": ratio(sparse_times[i], dense_times),
            "compile_dense": compile_dense.summary(),
            "compile_ratio": ratio(compile_times[i], compile_dense),
            "temporary_bytes": [temporary[i], temporary_dense],
            "memory": (temporary[i] - temporary_dense) / size,
            "passes": (moved[i] - moved_dense) / size,
            "threshold": shares[2 * i],
            "operator": shares[2 * i + 1],
        }
        for i, backbone in enumerate(backbones)
    ]


def parts(program: Program) -> list[Callable[[], Any]]:
    """What a sparse step does beside a dense one: functions that select, and that sparsify."""
    prune = program.prune
    assert prune is not None
    params = jax.tree.map(lambda leaf: leaf.copy(), program.state.params)
    select = jax.jit(lambda params: prune.threshold(params, 0))
    threshold, sparsify = select(params), jax.jit(prune.sparsify)
    return [
        lambda: jax.block_until_ready(select(params)),
        lambda: jax.block_until_ready(sparsify(params, threshold)),
    ]


def row(result: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a result."""
    step, compiling = result["ratio"], result["compile_ratio"]
    return {
        "model": result["case"],
        "backbone": result["backbone"],
        "batch": result["batch"],
        "dense, ms": round(1e3 * result["dense"]["median"], 1),
        "sparse, ms": round(1e3 * result["sparse"]["median"], 1),
        "ratio": round(step["median"], 3),
        "quartiles": "-".join(f"{value:.3f}" for value in step["quartiles"]),
        "minimums": round(step["of_minimums"], 3),
        "cpu": round(step["of_cpu_minimums"], 3),
        "threshold": round(result["threshold"], 4),
        "operator": round(result["operator"], 4),
        "memory": round(result["memory"], 2),
        "passes": round(result["passes"], 1),
        "compile": round(compiling["of_minimums"], 2),
        "compile, cpu": round(compiling["of_cpu_minimums"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all that fit by default")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["global"])
    parser.add_argument("--pairs", type=int, help="of steps that are timed")
    arguments = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    names = arguments.cases or [name for name in CASES if ("bfloat16" in name) != on_cpu]
    results = [
        result
        for name in names
        for result in measure(name, arguments.backbones, arguments.pairs or PAIRS[name])
    ]
    rows = [row(result) for result in results]
    print_table(list(rows[0]), [list(each.values()) for each in rows])
    append_result("step", {"sparsity": SPARSITY, "results": results})


if __name__ == "__main__":
    main()
