"""What zeros speed up, and what they don't, where a model is used.

    python -m benchmarks.deployment

1. The exported program of a ResNet-20 (see `train.export`), dense and pruned, as files and in time
   for one image on this machine's XLA.
2. One matrix times one vector, as in a linear layer or a 1x1 convolution on one pixel: NumPy's
   dense product against SciPy's compressed sparse rows, in float32, on one core.

Times are the medians of interleaved repetitions. Takes about two minutes. Appends to
`benchmarks/results/deployment.jsonl`.
"""

import argparse
import functools
import gzip
import operator
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import numpy as np
import scipy.sparse
from threadpoolctl import threadpool_limits

import feather_jax as feather
from benchmarks.common import append_result, print_table
from train import export, models
from train.store.model_file import Metadata, Preprocessing, SavedModel

SPARSITIES = (0.0, 0.9, 0.95, 0.98, 0.99)
PROGRAM_REPEATS, PRODUCT_REPEATS = 40, 200
ROWS, COLUMNS = 1000, 2048  # the linear layer of ResNet-50


def medians(calls: Mapping[float, Callable[[], Any]], repeats: int) -> dict[float, float]:
    """Seconds a call, taken in turn so that all meet the same load."""
    times: dict[float, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def programs() -> list[dict[str, Any]]:
    """The same network at every sparsity: sizes in bytes, seconds for one image."""
    network = models.build({"name": "resnet20"}, num_classes=100)
    metadata = Metadata.model_construct(
        preprocessing=Preprocessing(image_shape=(32, 32, 3), mean=(0.5,) * 3, std=(0.25,) * 3)
    )
    image = np.zeros((1, 32, 32, 3), np.uint8)
    zeros = np.zeros(image.shape, np.float32)
    variables = jax.jit(lambda: network.init(jax.random.key(0), zeros, train=False))()
    calls: dict[float, Callable[[], Any]] = {}
    sizes = {}
    for sparsity in SPARSITIES:
        params = variables["params"]
        if sparsity:
            params = jax.jit(feather.Feather(sparsity, end_step=1).finalize)(params)
        pruned = jax.device_get({**variables, "params": params})
        exported = export.export(SavedModel(pathlib.Path(), network, pruned, metadata))
        program = exported.serialize()
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "model.npz"
            feather.save(path, pruned)
            compact = path.stat().st_size
        sizes[sparsity] = {
            "program_bytes": len(program),
            "program_gzip_bytes": len(gzip.compress(bytes(program))),
            "model_bytes": compact,
        }
        compiled = jax.jit(jax.export.deserialize(program).call).lower(image).compile()
        calls[sparsity] = functools.partial(_run, compiled, image)
    times = medians(calls, PROGRAM_REPEATS)
    return [{"sparsity": s, **sizes[s], "seconds": times[s]} for s in SPARSITIES]


def _run(compiled: Callable[..., jax.Array], image: np.ndarray) -> None:
    compiled(image).block_until_ready()


def products() -> list[dict[str, float]]:
    """Seconds for a matrix times a vector, as a dense and as a sparse matrix."""
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(COLUMNS, np.float32)
    calls: dict[float, Callable[[], Any]] = {}
    dense = rng.standard_normal((ROWS, COLUMNS), np.float32)
    calls[-1.0] = functools.partial(operator.matmul, dense, vector)
    for sparsity in SPARSITIES:
        matrix = scipy.sparse.csr_array(np.where(rng.random(dense.shape) < sparsity, 0, dense))
        calls[sparsity] = functools.partial(operator.matmul, matrix, vector)
    times = medians(calls, PRODUCT_REPEATS)
    return [{"sparsity": s, "dense": times[-1.0], "sparse": times[s]} for s in SPARSITIES]


def main() -> None:
    """Measures both, prints them and keeps them."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    found = programs()
    print_table(
        ("sparsity", "program, MB", "gzipped", "model.npz", "one image, ms"),
        [
            (
                f"{row['sparsity']:.0%}",
                *(f"{row[name] / 1e6:.2f}" for name in list(row)[1:4]),
                f"{row['seconds'] * 1e3:.2f}",
            )
            for row in found
        ],
    )
    with threadpool_limits(1):
        matrices = products()
    print()
    print_table(
        ("sparsity", "dense, us", "sparse rows, us", "times as fast"),
        [
            (
                f"{row['sparsity']:.0%}",
                f"{row['dense'] * 1e6:.0f}",
                f"{row['sparse'] * 1e6:.0f}",
                f"{row['dense'] / row['sparse']:.2f}",
            )
            for row in matrices
        ],
    )
    append_result("deployment", {"programs": found, "products": matrices})


if __name__ == "__main__":
    main()
