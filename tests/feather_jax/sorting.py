"""Thresholds by sorting, in NumPy, and weights that are hard to search."""

from fractions import Fraction

import jax
import numpy as np

from feather_jax import search

# Whether a comparison takes a denormal for zero: on CPU it does, on a GPU it does not.
FLUSHES = not jax.jit(lambda x: x > 0)(np.float32(1e-45))


def flush(x):
    return np.where(FLUSHES & (np.abs(x) < np.finfo(x.dtype).tiny), x.dtype.type(0), x)[()]


def sorted_threshold(arrays, sparsity, *, exact=False):
    """The interpolated quantile of DESIGN.md, from NumPy's sort and exact fractions."""
    dtype = np.result_type(np.float32, *(a.dtype for a in arrays if a.dtype.itemsize >= 4))
    # A float32 that is a denormal counts as zero also where it would be none as a float64.
    arrays = [flush(a) if a.dtype == np.float32 else a for a in arrays]
    magnitudes = np.sort(np.concatenate([np.abs(a.astype(dtype)).ravel() for a in arrays]))
    last = magnitudes.size - 1
    if np.isnan(magnitudes[-1]):
        return dtype.type(np.nan)
    if sparsity <= 0:
        return dtype.type(0)
    position = Fraction(float(sparsity)) * last if exact else np.float64(sparsity) * last
    floor = int(position)
    lo, hi = flush(magnitudes[floor]), flush(magnitudes[min(floor + 1, last)])
    # A float64 holds the fraction of a float32 times an integer below 2**29.
    fraction = flush(dtype.type(float(position - floor)))
    if lo == hi or lo == 0 or fraction == 0:
        return lo
    with np.errstate(over="ignore"):
        between = flush(lo + flush(flush(hi - lo) * fraction))
    return flush(min(between, np.nextafter(hi, lo)))


def adversarial():
    rng = np.random.default_rng(0)
    size = 300_000
    normal = rng.standard_normal(size, dtype=np.float32)
    cluster = 1 + rng.random(size, dtype=np.float32) * 1e-3
    stride = size // search._LEAST_SAMPLE | 1
    lying = normal.copy()
    lying[::stride] = 1e6
    return {
        "normal": normal,
        "all zero": np.zeros(size, np.float32),
        "all equal": np.full(size, -0.1, np.float32),
        "half zero": np.where(rng.random(size) < 0.5, 0, normal).astype(np.float32),
        "few values": rng.integers(0, 5, size).astype(np.float32),
        "ternary": rng.choice(np.array([-1, 0, 1], np.float32), size, p=[0.05, 0.9, 0.05]),
        "two clusters": np.where(rng.random(size) < 0.9, cluster, 1000 * cluster),
        "two rounding errors": np.where(rng.random(size) < 0.9, 0.1, np.nextafter(0.1, 1)),
        "sample of outliers": lying,
        "alternating": np.where(np.arange(size) % stride == 0, 1e-6, normal),
        "every magnitude": np.exp(rng.uniform(-103, 88, size)),
        "every bit pattern": rng.integers(0, 0x7F800000, size, np.uint32).view(np.float32),
        "infinities": np.where(rng.random(size) < 0.3, np.inf, normal),
        "sorted": np.sort(np.abs(normal)),
        "one outlier": np.where(np.arange(size) == 7, np.finfo(np.float32).max, 1e-30),
        "consecutive floats": np.arange(0x3F000000, 0x3F000000 + size, dtype=np.uint32).view("f4"),
        "doubling gaps": np.ldexp(1.0, rng.integers(-126, 127, size)),
        "one NaN": np.where(np.arange(size) == size // 2, np.nan, normal),
    }


ADVERSARIAL = {name: array.astype(np.float32) for name, array in adversarial().items()}
