"""How large a sparse model is as a file, and how fast it is written and read.

    python -m benchmarks.size

Two sets of random normal weights, pruned by one global threshold: one dense layer of 100,352, and
the kernels of ResNet-50, initialised as He et al. do, so that the layers differ in sparsity.

`bound` is the entropy of each leaf's zero pattern and the raw bytes of its non-zero values, `gzip`
the dense file as gzip compresses it by default, `csr` values, int32 columns and int32 row pointers.
Rates are megabytes of dense weights a second on the one core to which the process binds itself:
`save` and `load` by the clock, the flush to the disk included, which a small file waits for most;
`save_cpu` and `load_cpu` by the time the process computed. Takes less than a minute. Appends to
`benchmarks/results/size.jsonl`.
"""

import argparse
import math
import os
import pathlib
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import feather_jax.compact as compact
from benchmarks.common import append_result, keep_to_one_core, print_table
from train import models

SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
REPEATS = 5

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, np.ndarray]


def resnet50_shapes() -> Shapes:
    """The shapes of ResNet-50's convolution and linear kernels, from the model itself."""
    model = models.build({"name": "resnet50"}, num_classes=1000)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda key, image: model.init(key, image, train=False), jax.random.key(0), image
    )
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves if leaf.ndim > 1}


def dense_weights(shapes: Shapes) -> Weights:
    """Random normal float32 weights of variance 2 / fan-in."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32)
        * np.float32(math.sqrt(2 / math.prod(shape[:-1])))
        for name, shape in shapes.items()
    }


def pruned(weights: Weights, sparsity: float) -> Weights:
    """`weights` with those up to the global quantile of their magnitudes set to zero."""
    magnitudes = np.concatenate([np.abs(w).ravel() for w in weights.values()])
    threshold = np.quantile(magnitudes, sparsity)
    return {name: np.where(np.abs(w) > threshold, w, 0) for name, w in weights.items()}


def bound(weights: Iterable[np.ndarray]) -> float:
    """Bytes that no code of independent positions and raw values can fall below, leaf by leaf."""
    total = 0.0
    for w in weights:
        nonzero = np.count_nonzero(w)
        fractions = np.array([nonzero, w.size - nonzero]) / w.size
        used = fractions[fractions > 0]
        total += w.size * -np.sum(used * np.log2(used)) / 8 + nonzero * w.itemsize
    return total


def csr_bytes(weights: Iterable[np.ndarray]) -> int:
    """Compressed sparse rows, the last axis as columns: values and int32 indices."""
    return sum(
        int(np.count_nonzero(w)) * (w.itemsize + 4) + 4 * (w.size // w.shape[-1] + 1)
        for w in weights
    )


def gzip_bytes(weights: Iterable[np.ndarray]) -> int:
    """The dense weights, one after the other, at gzip's default level."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    return sum(len(compressor.compress(w.tobytes())) for w in weights) + len(compressor.flush())


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """The median time of a call, by the clock and of computing."""
    times = []
    for _ in range(REPEATS):
        clock, cpu = time.perf_counter(), time.process_time()
        function()
        times.append((time.perf_counter() - clock, time.process_time() - cpu))
    clocks, cpus = zip(*times, strict=True)
    return statistics.median(clocks), statistics.median(cpus)


def measure(weights: Weights, sparsity: float, path: pathlib.Path) -> dict[str, Any]:
    """One row of the table."""
    sparse = pruned(weights, sparsity)
    dense = sum(w.nbytes for w in sparse.values())
    save, save_cpu = seconds(lambda: compact.save(path, {"params": sparse}))
    load, load_cpu = seconds(lambda: compact.load(path))
    for name, w in compact.load(path)["params"].items():
        if w.tobytes() != sparse[name].tobytes():
            raise AssertionError(f"{name} did not come back as it was.")
    least = bound(sparse.values())
    size = os.path.getsize(path)
    return {
        "weights": dense // 4,
        "leaves": len(sparse),
        "sparsity": sparsity,
        "dense": dense,
        "ours": size,
        "bound": round(least),
        "ratio": round(size / least, 4),
        "gzip": gzip_bytes(sparse.values()),
        "csr": csr_bytes(sparse.values()),
        "save": round(dense / save / 1e6),
        "save_cpu": round(dense / save_cpu / 1e6),
        "load": round(dense / load / 1e6),
        "load_cpu": round(dense / load_cpu / 1e6),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    keep_to_one_core()
    rows = []
    one_layer: Shapes = {"kernel": (784, 128)}
    with tempfile.TemporaryDirectory() as folder:
        for shapes in (one_layer, resnet50_shapes()):
            weights = dense_weights(shapes)
            rows += [measure(weights, s, pathlib.Path(folder, "model.npz")) for s in SPARSITIES]
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    append_result("size", {"rows": rows})


if __name__ == "__main__":
    main()
