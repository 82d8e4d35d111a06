"""Sparse networks on a CPU: `feather_jax.cpu` beside ONNX Runtime, OpenVINO and XLA.

    python -m benchmarks.inference --int8       # one core, ResNet-50, batch 1; rivals in 8 bits too
    python -m benchmarks.inference --network resnet20 densenet40 imagenet_mobilenet vit_small
    python -m benchmarks.inference --threads 2 --sparsity 0.9 0.95
    python -m benchmarks.inference --batch 16 --rounds 5
    python -m benchmarks.inference --tables     # measures nothing: prints those of the results

All run in one process that is bound to as many cores as there are threads, in turn, round by round;
a figure is the median over the rounds, a ratio the median of the rounds' own ratios, so that a
disturbance meets both sides. One thread is timed by the CPU time of the process, more by the clock,
and then one thread beside them (`over one thread`): on a quiet machine, as a call takes no second
thread on a busy one. `difference` is the largest to XLA's result, over the largest value of that.

The weights are random. `uniform` prunes every layer alike. `global` leaves of a layer what one
global threshold leaves about: a share in proportion to (fan-in)^-1/2 and at most all of it, of the
first layer at least 40 %. The rivals get the same weights as an ONNX model, zeros included; their
time does not depend on them. Needs onnx, onnxruntime and openvino, which nothing else here does.

Appends to `benchmarks/results/inference.jsonl`; the tables have the latest figures of each case.
"""

import argparse
import functools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from benchmarks.common import RESULTS, append_result, print_table
from benchmarks.onnx_model import channels_first, onnx_model
from feather_jax import cpu
from feather_jax.cpu.lower import lower
from feather_jax.cpu.simplify import simplify
from feather_jax.cpu.target import host
from train import models

NETWORKS: dict[str, tuple[int, int]] = {  # image size, classes
    "resnet50": (224, 1000),
    "resnet20": (32, 100),
    "densenet40": (32, 100),
    "imagenet_mobilenet": (224, 1000),
    "vit_small": (224, 1000),
}
SPARSITIES = (0.0, 0.8, 0.9, 0.95, 0.98)
MASKS = ("uniform", "global")

Call = Callable[[], Any]
Times = dict[str, list[float]]


def kept_shares(
    kernels: Mapping[str, tuple[int, ...]], sparsity: float, masks: str
) -> dict[str, float]:
    """The share of non-zeros of each kernel, so that all together have the sparsity."""
    if masks == "uniform" or not sparsity:
        return dict.fromkeys(kernels, 1 - sparsity)
    sizes = {name: math.prod(shape) for name, shape in kernels.items()}
    fan_in = {name: math.prod(shape[:-1]) for name, shape in kernels.items()}
    wanted = (1 - sparsity) * sum(sizes.values())
    low, high = 0.0, 1e4
    for _ in range(60):
        factor = (low + high) / 2
        shares = {name: min(1, factor * fan_in[name] ** -0.5) for name in kernels}
        left = sum(shares[name] * sizes[name] for name in kernels)
        low, high = (factor, high) if left < wanted else (low, factor)
    first = next(name for name, shape in kernels.items() if shape[-2] == 3)  # of images' channels
    return shares | {first: max(shares[first], 0.4)}


def random_variables(shapes: PyTree, sparsity: float, masks: str) -> PyTree:
    """Variables with random masks and weights of a scale that keeps activations about even."""
    rng = np.random.default_rng(3)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    kernels = {name: leaf.shape for name, leaf in named.items() if name.endswith("['kernel']")}
    shares = kept_shares(kernels, sparsity, masks)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in kernels:
            share = shares[name]
            deviation = 1.2 / math.sqrt(max(1.0, math.prod(shape[:-1]) * share))
            weights = rng.standard_normal(shape, np.float32) * np.float32(deviation)
            zeros = rng.permutation(weights.size)[: round((1 - share) * weights.size)]
            weights.reshape(-1)[zeros] = 0
            return weights
        noise = rng.standard_normal(shape, np.float32) * np.float32(0.05)
        return 1 + np.abs(noise) if name.endswith(("['scale']", "['var']")) else noise

    return jax.tree.unflatten(structure, [values(name, leaf.shape) for name, leaf in named.items()])


def network(name: str, batch: int) -> tuple[Callable[[PyTree, Any], Any], PyTree, np.ndarray]:
    """A network as a function of variables and images, its variables' shapes, and images."""
    size, classes = NETWORKS[name]
    model = models.build({"name": name}, num_classes=classes)
    images = np.random.default_rng(4).standard_normal((batch, size, size, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(images), train=False))
    return lambda variables, x: model.apply(variables, x, train=False), shapes, images


def onnx_runtime(model: bytes | str, inputs: Sequence[np.ndarray], threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {f"x{number}": channels_first(x) for number, x in enumerate(inputs)}
    return lambda: session.run(None, feed)[0]


def open_vino(model: bytes | str, inputs: Sequence[np.ndarray], threads: int) -> Call:
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()
    feed = {number: channels_first(x) for number, x in enumerate(inputs)}
    return lambda: next(iter(request.infer(feed, share_inputs=True, share_outputs=True).values()))


def in_8_bits(model: bytes, inputs: Sequence[np.ndarray], folder: str) -> str:
    """The path of the model quantised by ONNX Runtime: weights by channel, activations unsigned."""
    import onnx
    from onnxruntime import quantization as quant

    class Reader(quant.CalibrationDataReader):
        def __init__(self) -> None:
            feed = {f"x{number}": channels_first(x) for number, x in enumerate(inputs)}
            self.left = [feed] * 2

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    whole, quantised = os.path.join(folder, "fp32.onnx"), os.path.join(folder, "int8.onnx")
    onnx.save(onnx.load_from_string(model), whole)
    quant.quantize_static(
        whole,
        quantised,
        Reader(),
        quant_format=quant.QuantFormat.QDQ,
        per_channel=True,
        weight_type=quant.QuantType.QInt8,
        activation_type=quant.QuantType.QUInt8,
    )
    return quantised


def interleaved(calls: Mapping[str, Call], rounds: int, clock: Callable[[], float]) -> Times:
    """Seconds of every call in every round; short ones are repeated within a round."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(0.01 / (time.perf_counter() - start)))
    times: Times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            times[name].append((clock() - start) / repeats[name])
    return times


def ratio(times: Times, of: str, to: str) -> float:
    """How many times as long `of` takes as `to`: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def measure(
    name: str, cases: Iterable[tuple[float, str]], batch: int, threads: int, rounds: int, int8: bool
) -> list[dict[str, Any]]:
    """One row for each case of sparsity and masks."""
    fn, shapes, images = network(name, batch)
    calls: dict[str, Call] = {}
    rows: dict[str, dict[str, Any]] = {}
    for sparsity, masks in cases:
        variables = random_variables(shapes, sparsity, masks)
        traced = functools.partial(fn, variables)
        start = time.perf_counter()
        program = cpu.compile(traced, images, threads=threads)
        seconds = time.perf_counter() - start
        expected = np.asarray(jax.jit(traced)(images))
        difference = np.abs(program(images) - expected).max() / np.abs(expected).max()
        key = f"{sparsity:.0%} {masks}"
        calls[key] = functools.partial(program, images)
        if threads > 1:
            calls[f"{key} one thread"] = functools.partial(cpu.compile(traced, images), images)
        rows[key] = {
            "network": name,
            "batch": batch,
            "threads": threads,
            "sparsity": sparsity,
            "masks": masks,
            "macs": program.plan.macs,
            "program_bytes": program.nbytes,
            "compile_seconds": round(seconds, 2),
            "difference": float(f"{difference:.1e}"),
        }
    dense = random_variables(shapes, 0.0, "uniform")
    model = onnx_model(simplify(lower(functools.partial(fn, dense), images).graph))
    placed = jax.device_put(dense)
    compiled = jax.jit(fn).lower(placed, images).compile()
    rivals: dict[str, Call] = {
        "onnxruntime": onnx_runtime(model, [images], threads),
        "openvino": open_vino(model, [images], threads),
        "xla": lambda: jax.block_until_ready(compiled(placed, images)),
    }
    with tempfile.TemporaryDirectory() as folder:
        if int8:
            path = in_8_bits(model, [images], folder)
            rivals["onnxruntime int8"] = onnx_runtime(path, [images], threads)
            rivals["openvino int8"] = open_vino(path, [images], threads)
        times = interleaved(
            rivals | calls, rounds, time.process_time if threads == 1 else time.perf_counter
        )
    for key, row in rows.items():
        row["ms"] = round(1e3 * statistics.median(times[key]), 3)
        for rival in rivals:
            row[f"{rival} ms"] = round(1e3 * statistics.median(times[rival]), 3)
            row[f"over {rival}"] = round(ratio(times, rival, key), 2)
        if threads > 1:
            row["over one thread"] = round(ratio(times, f"{key} one thread", key), 2)
        row["over the better fp32"] = min(row["over onnxruntime"], row["over openvino"])
        if int8:
            row["over the better int8"] = min(
                row["over onnxruntime int8"], row["over openvino int8"]
            )
    return list(rows.values())


def latest_rows() -> list[dict[str, Any]]:
    """The last row of each case in the results."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    with open(RESULTS / "inference.jsonl") as file:
        for line in file:
            for row in json.loads(line)["rows"]:
                case = ("network", "batch", "threads", "sparsity", "masks")
                key = tuple(row[name] for name in case)
                rows[key] = {**rows.get(key, {}), **row}
    return list(rows.values())


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """A table for each network, batch and number of threads."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["batch"], row["threads"]), []).append(row)
    columns = {
        "ms": "ms",
        "over the better fp32": "over fp32",
        "over the better int8": "over int8",
        "over one thread": "over one thread",
    }
    for (name, batch, threads), own in sorted(groups.items()):
        print(f"\n{name}, batch {batch}, threads: {threads}\n")
        cells = {(row["sparsity"], row["masks"]): row for row in own}
        shown = [
            (masks, column)
            for masks in MASKS
            for column in columns
            if any(column in row and row["masks"] == masks for row in own)
        ]
        table = [
            [f"{sparsity:.0%}", *(cells.get((sparsity, m), {}).get(c, "") for m, c in shown)]
            for sparsity in sorted({row["sparsity"] for row in own})
        ]
        print_table(["sparsity", *(f"{m}, {columns[c]}" for m, c in shown)], table)
        last = own[-1]
        seconds = [row["compile_seconds"] for row in own]
        rivals = (each for each in last if each.endswith(" ms"))
        print(
            f"\nDense: {', '.join(f'{each} {last[each]}' for each in rivals)}. Compiled in "
            f"{min(seconds)} to {max(seconds)} s, into "
            f"{min(row['program_bytes'] for row in own) / 1e6:.1f} to "
            f"{max(row['program_bytes'] for row in own) / 1e6:.1f} MB. Largest difference to XLA "
            f"{max(row['difference'] for row in own)}."
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["resnet50"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--int8", action="store_true", help="the rivals in 8 bits as well")
    parser.add_argument("--tables", action="store_true", help="of the results so far")
    args = parser.parse_args()
    if args.tables:
        print_tables(latest_rows())
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])
    cases = [
        (sparsity, masks)
        for sparsity in args.sparsity
        for masks in args.masks
        if sparsity or masks == args.masks[0]
    ]
    for name in args.network:
        rows = measure(name, cases, args.batch, args.threads, args.rounds, args.int8)
        shown = [{**row, "macs": f"{row['macs'] / 1e6:,.0f} M"} for row in rows]
        print_table(list(shown[0]), [list(row.values()) for row in shown])
        append_result("inference", {"core": host().cpu, "rows": rows})


if __name__ == "__main__":
    main()
