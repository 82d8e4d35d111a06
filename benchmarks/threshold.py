"""What selecting one threshold for all weights costs, next to what others do for it.

    python -m benchmarks.threshold
    python -m benchmarks.threshold --sizes 1000000 100000000 1000000000
    python -m benchmarks.threshold --sizes resnet50 --only selections

Random normal weights of variance 2 / fan-in: the kernels of ResNet-20 (1.1 million weights) and
ResNet-50 (25.5 million), or 16 equal kernels for a size given as a number.

`one pass` compares every |w| with a constant and counts, in the fastest form that XLA compiles:
the limit for anything that looks at all weights once. `bisection` halves the float's bits in 31
such passes. The others work on the concatenated magnitudes: `top_k` with k the number of weights
kept, `sort bits` sorts them as integers, `torch.sort` runs if PyTorch is installed. They are left
out above 100 million weights. `passes` is the rounds of the search, of which each reads the weights
once. Up to 100 million weights, the threshold is compared with NumPy's before it is timed.

The library's other selections follow: `layer_thresholds` at one sparsity, `budget_thresholds` with
costs a weight between 49 and 50,176, by magnitude and (`per cost`) by magnitude over cost,
`global_threshold` in blocks of 4 and within a bound (no layer above (1 + sparsity) / 2), and
`n_m_thresholds` for 2:4. A second table has the CPU seconds that each takes to trace and compile,
the least of three.

All methods take turns, so that the ratios are of one run; the slow ones take fewer of them. The
spread is the distance between the quartiles. Takes about five minutes on two cores and appends to
`benchmarks/results/threshold.jsonl`.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import feather_jax as feather
from benchmarks.common import append_result, print_table
from feather_jax.rank import ranks
from feather_jax.search import order_statistics
from feather_jax.selection import global_threshold
from feather_jax.survey import Leaf, put_together
from train import models

MODELS: dict[str, tuple[dict[str, Any], tuple[int, int], int]] = {
    "resnet20": ({"name": "resnet20", "widths": (32, 64, 128)}, (32, 32), 100),
    "resnet50": ({"name": "resnet50"}, (224, 224), 1000),
}
REPEATS = 30
SLOW_SECONDS = 20.0  # for each method, but three runs at least
SORTED_UP_TO = 100_000_000

Leaves = list[jax.Array]
Methods = dict[tuple[str, float | None], Callable[[], Any]]


def kernels(size: str) -> Leaves:
    """Random weights in the shapes of a model's kernels, or of a number of weights in all."""
    if size in MODELS:
        spec, image, classes = MODELS[size]
        model = models.build(spec, num_classes=classes)
        variables = jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, *image, 3)), train=False)
        )
        shapes = [leaf.shape for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim > 1]
    else:
        shapes = [(max(int(float(size)) // 2**14, 1), 2**10)] * 16
    rng = np.random.default_rng(0)
    deviations = [np.float32(math.sqrt(2 / math.prod(shape[:-1]))) for shape in shapes]
    return [
        jnp.asarray(rng.standard_normal(shape, np.float32) * deviation)
        for shape, deviation in zip(shapes, deviations, strict=True)
    ]


@jax.jit
def one_pass(leaves: Leaves, constant: jax.Array) -> jax.Array:
    """The number of weights at or below a constant, and below it."""

    def count(leaf):
        # Two results, because XLA's CPU backend compiles a reduction with one into slower ones.
        under = (jnp.abs(leaf) <= constant, jnp.abs(leaf) < constant)
        return lax.reduce(
            tuple(u.astype(jnp.uint32) for u in under),
            (np.uint32(0), np.uint32(0)),
            lambda x, y: (x[0] + y[0], x[1] + y[1]),
            tuple(range(leaf.ndim)),
        )

    return jnp.stack([jnp.stack(count(leaf)) for leaf in leaves]).sum(axis=0)


@jax.jit
def bisection(leaves: Leaves, rank: jax.Array) -> jax.Array:
    """The magnitude of a rank, from 31 passes that halve the range of bits."""

    def halve(_, bits):
        low, high = bits
        middle = low + (high - low) // 2
        weights, constant = lax.optimization_barrier(
            (leaves, lax.bitcast_convert_type(middle, jnp.float32))
        )
        enough = one_pass(weights, constant)[0] > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bits = lax.fori_loop(0, 31, halve, (jnp.uint32(0), jnp.uint32(0x7F800000)))
    return lax.bitcast_convert_type(bits[1], jnp.float32)


@jax.jit
def threshold(leaves: Leaves, sparsity: jax.Array) -> jax.Array:
    return global_threshold(leaves, sparsity, prunable=True)


@jax.jit
def passes(leaves: Leaves, sparsity: jax.Array) -> jax.Array:
    rows, _ = put_together([Leaf(leaf, (0,), 1, ()) for leaf in leaves], apart=False)
    rank = ranks([sparsity], [sum(leaf.size for leaf in leaves)], jnp.float32)
    return order_statistics(rows, rank.floor, jnp.float32)[1]


def selections(leaves: Leaves) -> dict[str, Callable[[Leaves, jax.Array], Any]]:
    """The library's selections, functions of the leaves and a sparsity."""
    cost = [49.0 * 4 ** (i % 6) for i in range(len(leaves))]
    budget = partial(feather.budget_thresholds, cost=cost, prunable=True)
    blocks = feather.block_magnitude((4, 1))
    return {
        "global_threshold": partial(feather.global_threshold, prunable=True),
        "layer_thresholds": partial(feather.layer_thresholds, prunable=True),
        "budget_thresholds": budget,
        "budget_thresholds per cost": partial(budget, exponent=1.0),
        "global_threshold in blocks": partial(
            feather.global_threshold, magnitude=blocks, prunable=True
        ),
    }


def other_selections(leaves: Leaves, sparsities: list[float]) -> Methods:
    """The selections but the global one, as functions of nothing."""
    timed: Methods = {}
    for name, select in selections(leaves).items():
        compiled = jax.jit(select)
        for s in sparsities if name != "global_threshold" else ():
            timed[name, s] = partial(compiled, leaves, jnp.float32(s))
    for s in sparsities:
        bound = partial(feather.global_threshold, max_sparsity=(1 + s) / 2, prunable=True)
        timed["global_threshold bounded", s] = partial(jax.jit(bound), leaves, jnp.float32(s))
    pattern = jax.jit(partial(feather.n_m_thresholds, n=2, m=4, prunable=True))
    patterned = [leaf for leaf in leaves if leaf.shape[-2] % 4 == 0]
    timed["n_m_thresholds 2:4", None] = partial(pattern, patterned)
    return timed


def compilation(leaves: Leaves) -> list[dict[str, Any]]:
    """The CPU seconds that each selection takes to trace and compile."""
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    sparsity = jax.ShapeDtypeStruct((), jnp.float32)
    seconds: dict[str, float] = {}
    for _ in range(3):
        for name, select in selections(leaves).items():
            jax.clear_caches()
            start = time.process_time()
            jax.jit(select).lower(shapes, sparsity).compile()
            seconds[name] = min(seconds.get(name, math.inf), time.process_time() - start)
    ours = seconds["global_threshold"]
    return [
        {"leaves": len(leaves), "method": name, "compile_s": each, "over_global": each / ours}
        for name, each in seconds.items()
    ]


def magnitudes(leaves: Leaves) -> jax.Array:
    return jnp.concatenate([jnp.abs(leaf).ravel() for leaf in leaves])


def methods(leaves: Leaves, sparsities: list[float], *, only_selections: bool) -> Methods:
    """What is timed: functions of nothing by name and, where it matters, sparsity."""
    size = sum(leaf.size for leaf in leaves)
    timed: Methods = {
        ("one pass", None): partial(one_pass, leaves, jnp.float32(0.01)),
        ("bisection", None): partial(bisection, leaves, jnp.uint32(size // 2)),
    }
    for s in sparsities:
        timed["global_threshold", s] = partial(threshold, leaves, jnp.float32(s))
    timed |= other_selections(leaves, sparsities)
    if size > SORTED_UP_TO or only_selections:
        return timed

    sort = jax.jit(lambda leaves: jnp.sort(magnitudes(leaves)))
    sort_bits = jax.jit(lambda leaves: jnp.sort(magnitudes(leaves).view(jnp.uint32)))
    quantile = jax.jit(lambda leaves, s: jnp.quantile(magnitudes(leaves), s))
    top_k = jax.jit(lambda leaves, k: lax.top_k(magnitudes(leaves), k)[0][-1], static_argnums=1)
    timed["jnp.sort", None] = partial(sort, leaves)
    timed["sort bits", None] = partial(sort_bits, leaves)
    for s in sparsities:
        timed["jnp.quantile", s] = partial(quantile, leaves, jnp.float32(s))
        timed["lax.top_k", s] = partial(top_k, leaves, size - int(s * (size - 1)))
    try:
        import torch
    except ImportError:
        return timed
    tensors = [torch.from_numpy(np.array(leaf)) for leaf in leaves]
    timed["torch.sort", None] = lambda: torch.sort(torch.cat([t.abs().ravel() for t in tensors]))[0]
    return timed


def check(leaves: Leaves, sparsities: list[float]) -> None:
    """Raises an AssertionError unless the thresholds have the bits that NumPy's partition gives."""
    flat = np.asarray(magnitudes(leaves))
    for s in sparsities:
        position = float(np.float32(s)) * (flat.size - 1)
        floor = int(position)
        lo, hi = np.partition(flat, (floor, floor + 1))[[floor, floor + 1]]
        between = lo + (hi - lo) * np.float32(position - floor)
        expected = min(between, np.nextafter(hi, lo)) if lo < hi else lo
        np.testing.assert_array_equal(threshold(leaves, jnp.float32(s)), expected)


def measure(timed: Methods) -> dict[tuple[str, float | None], list[float]]:
    """The seconds of each run, the methods taking turns."""
    seconds: dict[tuple[str, float | None], list[float]] = {key: [] for key in timed}
    for function in timed.values():
        jax.block_until_ready(function())
    for _ in range(REPEATS):
        for key, function in timed.items():
            if len(seconds[key]) < 3 or sum(seconds[key]) < SLOW_SECONDS:
                start = time.perf_counter()
                jax.block_until_ready(function())
                seconds[key].append(time.perf_counter() - start)
    return seconds


def summarize(
    leaves: Leaves, sparsities: list[float], *, only_selections: bool
) -> list[dict[str, Any]]:
    if sum(leaf.size for leaf in leaves) <= SORTED_UP_TO:
        check(leaves, sparsities)
    seconds = measure(methods(leaves, sparsities, only_selections=only_selections))
    medians = {key: statistics.median(runs) for key, runs in seconds.items()}
    sort = medians.get(("jnp.sort", None))
    results = []
    for (method, s), runs in seconds.items():
        quartiles = np.percentile(runs, [25, 75])
        ours = method == "global_threshold"
        median = medians[method, s]
        results.append(
            {
                "weights": sum(leaf.size for leaf in leaves),
                "leaves": len(leaves),
                "method": method,
                "sparsity": s,
                "median_s": median,
                "quartiles_s": [float(q) for q in quartiles],
                "min_s": min(runs),
                "runs": len(runs),
                "passes": int(passes(leaves, jnp.float32(s))) if ours else None,
                "times_one_pass": median / medians["one pass", None],
                "faster_than_sort": sort / median if sort else None,
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(MODELS), metavar="MODEL|WEIGHTS")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.9, 0.99])
    parser.add_argument("--only", choices=["selections"], help="leave out what others do")
    args = parser.parse_args()
    results, compiled = [], []
    for size in args.sizes:
        leaves = kernels(size)
        results += summarize(leaves, args.sparsities, only_selections=args.only is not None)
        compiled += compilation(leaves)
    append_result("threshold", {"results": results, "compilation": compiled})

    headers = ["weights", "method", "sparsity", "median ms", "spread ms", "min ms", "passes"]
    rows = [
        [
            f"{r['weights']:,}",
            r["method"],
            "" if r["sparsity"] is None else r["sparsity"],
            f"{1e3 * r['median_s']:.2f}",
            f"{1e3 * (r['quartiles_s'][1] - r['quartiles_s'][0]):.2f}",
            f"{1e3 * r['min_s']:.2f}",
            r["passes"] or "",
            f"{r['times_one_pass']:.1f}",
            f"{r['faster_than_sort']:.1f}" if r["faster_than_sort"] else "",
        ]
        for r in results
    ]
    print_table([*headers, "/ one pass", "jnp.sort / it"], rows)
    print_table(
        ["leaves", "method", "compile s", "/ global_threshold"],
        [
            [r["leaves"], r["method"], f"{r['compile_s']:.2f}", f"{r['over_global']:.2f}"]
            for r in compiled
        ],
    )


if __name__ == "__main__":
    main()
