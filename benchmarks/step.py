"""What Feather adds to a training step: time, memory, compilation, passes over the weights.

    python -m benchmarks.step [resnet20] [resnet50] [resnet50_bfloat16] [--pairs N]

The step of the program, sparse (90 %, the final sparsity) and dense, compiled in one process and
run in turns on random data: ResNet-20 at batch 128, ResNet-50 at batch 32, and, where there is an
accelerator, ResNet-50 in bfloat16 at batch 256. ResNet-50 takes a quarter of an hour on two cores.

`ratio` is the median over the pairs of steps, with the quartiles beside it, `minimums` the ratio of
the shortest steps, `cpu` that of the least computing time (of all cores, which another process on
the machine disturbs less). `memory` is what the sparse step needs beyond the dense one at its peak,
in copies of the prunable weights, and `passes` how many more bytes it moves, in the same unit, as
XLA counts them: a loop's body once. `compile` is the ratio of the times to trace and compile.

`threshold` and `operator` are the parts of it, each compiled alone, as fractions of the dense step.
Appends to `benchmarks/results/step.jsonl`.
"""

import argparse
import statistics
from typing import Any

import jax

from benchmarks.common import append_result, print_table
from benchmarks.program import CASES, SPARSITY, in_turns, make, prunable_bytes, ratio, running

COMPILATIONS = 2
PAIRS = {"resnet20": 30, "resnet50": 6, "resnet50_bfloat16": 100}


def measure(name: str, pairs: int) -> dict[str, Any]:
    """One row of the table, and the times behind it."""
    programs = [make(CASES[name], sparsity) for sparsity in (SPARSITY, 0.0)]
    sparse = programs[0]
    compiled: list[Any] = [None, None]

    def compile_anew(which: int) -> None:
        jax.clear_caches()
        compiled[which] = programs[which].lower().compile()

    compile_times = in_turns([lambda: compile_anew(0), lambda: compile_anew(1)], COMPILATIONS)

    size = prunable_bytes(sparse.state.params)
    temporary = [each.memory_analysis().temp_size_in_bytes for each in compiled]
    moved = [each.cost_analysis()["bytes accessed"] for each in compiled]

    prune = sparse.prune
    assert prune is not None
    params = jax.tree.map(lambda leaf: leaf.copy(), sparse.state.params)
    select = jax.jit(lambda params: prune.threshold(params, 0))
    threshold = select(params)
    sparsify = jax.jit(prune.sparsify)

    steps = [running(step, program) for step, program in zip(compiled, programs, strict=True)]
    parts = [
        lambda: select(params).block_until_ready(),
        lambda: jax.block_until_ready(sparsify(params, threshold)),
    ]
    for function in [*steps, *parts]:
        function()
    sparse_times, dense_times = in_turns(steps, pairs)
    part_times = in_turns(parts, max(pairs, 10))
    step_seconds = statistics.median(dense_times.clock)
    return {
        "case": name,
        "weights": size // 4,
        "batch": CASES[name].batch_size,
        "sparse": sparse_times.summary(),
        "dense": dense_times.summary(),
        "ratio": ratio(sparse_times, dense_times),
        "compile_dense": compile_times[1].summary(),
        "compile_ratio": ratio(*compile_times),
        "temporary_bytes": temporary,
        "memory": (temporary[0] - temporary[1]) / size,
        "passes": (moved[0] - moved[1]) / size,
        "threshold": statistics.median(part_times[0].clock) / step_seconds,
        "operator": statistics.median(part_times[1].clock) / step_seconds,
    }


def row(result: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a result."""
    step, compiling = result["ratio"], result["compile_ratio"]
    return {
        "model": result["case"],
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
    parser.add_argument("--pairs", type=int, help="of steps that are timed")
    arguments = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    names = arguments.cases or [name for name in CASES if ("bfloat16" in name) != on_cpu]
    results = [measure(name, arguments.pairs or PAIRS[name]) for name in names]
    rows = [row(result) for result in results]
    print_table(list(rows[0]), [list(each.values()) for each in rows])
    append_result("step", {"sparsity": SPARSITY, "results": results})


if __name__ == "__main__":
    main()
