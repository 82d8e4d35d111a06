"""How the cost of Feather grows with the model and with the devices, and what is communicated.

    python -m benchmarks.scaling [--largest WEIGHTS] [--devices 1 2 4 8]

`models`: one kernel of normal weights, from 1 million on as long as half of the free memory holds
it four times: the time to select the threshold and to apply the operator, next to one pass (the
count of |w| above a number), each taking turns. `devices`: the sparse and the dense step of a
ResNet-8 at batch 64 on virtual CPU devices, in a process a number, with the bytes that the compiled
program gives to collectives. Virtual devices share the cores and each selects the threshold for
itself, so the ratio of the times rises with their number here, as it does not on real ones.

Takes some minutes. Appends to `benchmarks/results/scaling.jsonl`.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp

import feather_jax as feather
from benchmarks.common import append_result, print_table
from benchmarks.hlo import collective_bytes
from benchmarks.program import SPARSITY, Case, in_turns, make, ratio, running
from benchmarks.threshold import one_pass

CASE = Case({"name": "resnet8"}, (32, 32, 3), 100, 64, crop_padding=4)
PAIRS = 5


def free_bytes() -> int:
    """Memory that a process can still have (Linux, macOS)."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def model_row(weights: int) -> dict[str, Any]:
    """The cost of the parts at one size."""
    key = jax.random.key(0)
    params = {"kernel": jax.jit(lambda: jax.random.normal(key, (weights // 1024, 1024)))()}
    prune = feather.Feather(SPARSITY, end_step=0)
    select = jax.jit(lambda params: prune.threshold(params, 0))
    sparsify = jax.jit(prune.sparsify)
    threshold = select(params)
    functions = [
        lambda: one_pass([params["kernel"]], jnp.float32(1)).block_until_ready(),
        lambda: select(params).block_until_ready(),
        lambda: jax.block_until_ready(sparsify(params, threshold)),
    ]
    for function in functions:
        function()
    counting, selection, operator = in_turns(functions, PAIRS)
    return {
        "weights": weights,
        "one pass, ms": round(1e3 * min(counting.clock), 2),
        "threshold, ms": round(1e3 * min(selection.clock), 2),
        "operator, ms": round(1e3 * min(operator.clock), 2),
        "threshold, passes": round(ratio(selection, counting)["of_minimums"], 1),
        "operator, passes": round(ratio(operator, counting)["of_minimums"], 1),
    }


def device_row() -> dict[str, Any]:
    """The cost of the step on the devices of this process."""
    programs = [make(CASE, sparsity) for sparsity in (SPARSITY, 0.0)]
    compiled = [program.lower().compile() for program in programs]
    steps = [running(step, program) for step, program in zip(compiled, programs, strict=True)]
    for step in steps:
        step()
    sparse, dense = in_turns(steps, PAIRS)
    communicated = [sum(collective_bytes(each).values()) for each in compiled]
    return {
        "devices": jax.device_count(),
        "dense, ms": round(1e3 * min(dense.clock), 1),
        "sparse, ms": round(1e3 * min(sparse.clock), 1),
        "ratio": round(ratio(sparse, dense)["median"], 3),
        "cpu": round(ratio(sparse, dense)["of_cpu_minimums"], 3),
        "dense, bytes": communicated[1],
        "sparse, bytes": communicated[0],
    }


def on_virtual_devices(number: int) -> dict[str, Any]:
    """`device_row` in a process with so many devices."""
    flag = f"--xla_force_host_platform_device_count={number}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--this_process"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--largest", type=int, default=2**30, help="weights of the largest model")
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--this_process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.this_process:
        print(json.dumps(device_row()))
        return
    most = min(arguments.largest, free_bytes() // (2 * 4 * 4))
    models = [model_row(weights) for weights in (2**20 * 4**k for k in range(6)) if weights <= most]
    devices = [on_virtual_devices(number) for number in arguments.devices]
    for rows in (models, devices):
        if rows:
            print_table(list(rows[0]), [list(row.values()) for row in rows])
            print()
    append_result("scaling", {"sparsity": SPARSITY, "models": models, "devices": devices})


if __name__ == "__main__":
    main()
