"""One pass over the weights: how many lie at or below some candidates, and which lie next to them.

This is where the weights are: in what dtypes, in how many leaves, on which devices. What is learnt
of them is small and the same everywhere, so that the search knows nothing of either.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.typing import DTypeLike
from jaxtyping import Array, UInt, UInt32

# Leaves of at most as many weights are copied into one array where they are not looked at apart.
_SMALL_LEAF = 2**18
# Where they are looked at apart, each fills lines of at most as many weights.
_LINE = 2**12


class Leaf(NamedTuple):
    """Magnitudes of a leaf of the parameters, which is one row, or of several small ones."""

    values: Array  # weights, of which |w| is taken in every pass, or magnitudes
    padding: tuple[int, ...]  # of each row the zeros that it ends with
    repeat: int  # how many weights each value stands for
    axes: tuple[str, ...]  # the manual axes of the mesh over which the devices have different parts
    lines: tuple[int, ...] = (1,)  # of each row, how many of the lines of `values` it takes

    @property
    def filled(self) -> list[int]:
        """The values of each row, without its padding."""
        length = self.values.size // sum(self.lines)
        return [n * length - zeros for n, zeros in zip(self.lines, self.padding, strict=True)]

    @property
    def sizes(self) -> list[int]:
        """The weights of each row, on all devices."""
        copies = self.repeat * lax.axis_size(self.axes)
        return [filled * copies for filled in self.filled]


class Survey(NamedTuple):
    """What one pass learns of each leaf about its candidates. Magnitudes are in bits."""

    upto: UInt32[Array, "rows k"]  # the number of weights at or below the candidate
    below: UInt[Array, "rows k"]  # the nearest weight at or below it; zero if there is none
    above: UInt[Array, "rows k"]  # the nearest weight above it; the largest integer if none
    largest: UInt[Array, " rows"]  # of all weights; NaNs are above infinity


def survey(leaves: list[Leaf], candidates: UInt[Array, "rows k"]) -> Survey:
    """One pass over the weights, those on other devices included."""
    bits, origin = candidates.dtype, candidates + 1
    sign, most = np.iinfo(bits).bits - 1, bits.type(np.iinfo(bits).max)
    rows = [len(leaf.padding) for leaf in leaves]
    origins = [origin[end - n : end] for n, end in zip(rows, np.cumsum(rows), strict=True)]
    found = [_survey_leaf(leaf, each) for leaf, each in zip(leaves, origins, strict=True)]
    count, below, above, largest = (
        jnp.stack([jnp.concatenate(column) for column in zip(*results, strict=True)], axis=1)
        for results in zip(*found, strict=True)
    )
    padding = np.array([[zeros] for leaf in leaves for zeros in leaf.padding], np.uint32)
    count -= padding
    result = Survey(
        count * _by_row(leaves, [leaf.repeat for leaf in leaves], np.uint32),
        jnp.where(count > 0, below + origin, 0),
        jnp.where(above >> sign, most, above + origin),
        largest,
    )
    for axis in sorted({axis for leaf in leaves for axis in leaf.axes}):
        varies = _by_row(leaves, [axis in leaf.axes for leaf in leaves], bool)
        # What does not vary is the same on all devices, and JAX is to know that of everything.
        count = jnp.where(varies, lax.psum(result.upto, axis), lax.pmax(result.upto, axis))
        below, largest = lax.pmax((result.below, result.largest), axis)
        result = Survey(count, below, lax.pmin(result.above, axis), largest)
    return result._replace(largest=result.largest[:, 0])


def _by_row(leaves: list[Leaf], values: Sequence, dtype: DTypeLike) -> np.ndarray:
    return np.repeat(np.array(values, dtype), [len(leaf.padding) for leaf in leaves])[:, None]


_Found: TypeAlias = tuple[list[Array], list[Array], list[Array], list[Array]]
"""Counts, largest and least differences, and the largest weights."""


def _survey_leaf(leaf: Leaf, origin: UInt[Array, "rows k"]) -> _Found:
    """Of each origin, one above a candidate: how many weights lie below it, and the differences to
    the nearest at or below the candidate and to the nearest above; and the largest weight.
    """
    bits = origin.dtype
    sign = np.iinfo(bits).bits - 1
    rows, lines = len(leaf.lines), sum(leaf.lines)
    row = np.repeat(np.arange(rows), leaf.lines)  # of each line
    magnitudes = magnitude_bits(leaf.values, bits)
    # At or below a candidate the difference wraps around: its sign bit counts, its maximum is
    # the nearest weight there, and its minimum, unless it too has wrapped, the nearest above.
    columns = origin[row].T[..., None] if lines > 1 else origin[0]
    differences = [magnitudes - column for column in columns]
    counted = [(difference >> sign).astype(jnp.uint32) for difference in differences]
    found = _merged(
        (counted, differences, differences, [magnitudes]), range(lines > 1, magnitudes.ndim)
    )
    if lines > rows:
        own = row[:, None] == np.arange(rows)
        each = jax.tree.map(
            lambda x, nothing: jnp.where(own, x[:, None], nothing), found, _nothing(found)
        )
        found = _merged(each, [0])
    return jax.tree.map(lambda x: x.reshape(rows), found)


def _merged(found: _Found, axes: Iterable[int]) -> _Found:
    """Several along axes as one.

    Several results of one reduction are one pass, and XLA's CPU backend rewrites a reduction with a
    single result into slower ones that materialise its operand.
    """

    def combine(x, y):
        pairs = [list(zip(*parts, strict=True)) for parts in zip(x, y, strict=True)]
        return tuple(
            [merge(a, b) for a, b in part]
            for merge, part in zip((lax.add, lax.max, lax.min, lax.max), pairs, strict=True)
        )

    return lax.reduce(found, _nothing(found), combine, tuple(axes))


def _nothing(found: _Found) -> tuple[list[Any], ...]:
    """What changes nothing that it is merged with."""
    counts, below, above, largest = found
    bits = largest[0].dtype.type
    most = bits(np.iinfo(bits).max)
    none = [np.uint32(0)] * len(counts), [bits(0)] * len(below), [most] * len(above)
    return (*none, [bits(0)] * len(largest))


def magnitude_bits(leaf: Array, bits: DTypeLike) -> UInt[Array, "..."]:
    """|w| as integers, in whose order non-negative floats are."""
    dtype = jnp.float64 if bits == jnp.uint64 else jnp.float32
    return lax.bitcast_convert_type(jnp.abs(leaf).astype(dtype), bits)


def put_together(leaves: Sequence[Leaf], *, apart: bool) -> tuple[list[Leaf], np.ndarray]:
    """The same weights with small leaves put together, and where each has gone.

    Each array that is surveyed costs XLA time to compile, and a launch on a GPU. Leaves that may be
    spread over devices stay as they are, for to put them together would gather them.

    Args:
      leaves: of one row each.
      apart: whether each remains a row of its own, of lines of the same length for all.

    Returns:
      The leaves, and of each of the given ones the row that it is in.
    """
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if leaf.values.size > _SMALL_LEAF or not _is_whole(leaf.values):
            groups[i] = [i]
        else:
            groups.setdefault((leaf.values.dtype, leaf.repeat, leaf.axes), []).append(i)
    order = [i for members in groups.values() for i in members]
    rows = np.argsort(order) if apart else np.zeros(len(leaves), int)
    join = _as_rows if apart else _as_one
    together = [
        join([leaves[i] for i in members]) if len(members) > 1 else leaves[members[0]]
        for members in groups.values()
    ]
    return together, rows


def _as_one(leaves: list[Leaf]) -> Leaf:
    """Leaves one after another."""
    return leaves[0]._replace(values=jnp.concatenate([leaf.values.ravel() for leaf in leaves]))


def _as_rows(leaves: list[Leaf]) -> Leaf:
    """Leaves as rows of as many lines as each needs."""
    arrays = [leaf.values.ravel() for leaf in leaves]
    length = min(max(array.size for array in arrays), _LINE)
    padding = [-array.size % length for array in arrays]
    zeros = [np.zeros(missing, arrays[0].dtype) for missing in padding]
    parts = [part for row in zip(arrays, zeros, strict=True) for part in row if part.size]
    lines = tuple(math.ceil(array.size / length) for array in arrays)
    values = jnp.concatenate(parts).reshape(-1, length)
    return leaves[0]._replace(values=values, padding=tuple(padding), lines=lines)


def _is_whole(leaf: Array) -> bool:
    """Whether a leaf is known to be on one device, or on each, in one piece."""
    sharding = jax.typeof(leaf).sharding
    mesh, spec = sharding.mesh, sharding.spec
    if mesh.empty:  # not said where it is
        return jax.device_count() == 1
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    hidden = [size for size, kind in sizes if kind == AxisType.Auto]
    return max(hidden, default=1) == 1 and not any(spec)


def sample(leaf: Leaf, shares: np.ndarray) -> tuple[Array, list[np.ndarray]]:
    """About as many values of each row as its share, or more, at regular distances.

    Returns:
      Values of all devices, and of each row their places among these.
    """
    # An odd stride takes every column of a leaf whose last dimension is even.
    strides = [max(n // share, 1) | 1 for n, share in zip(leaf.filled, shares, strict=True)]
    if not _is_whole(leaf.values):
        values = _grid(leaf.values, shares[0]).ravel()
    elif len(shares) == 1:
        values = leaf.values.ravel()[: leaf.filled[0] : strides[0]]
    else:
        starts = np.cumsum((0, *leaf.lines[:-1])) * leaf.values.shape[1]
        rows = zip(starts, shares, strides, leaf.filled, strict=True)
        steps = [start + np.arange(n) * stride % filled for start, n, stride, filled in rows]
        values = leaf.values.ravel()[np.concatenate(steps)]
    length = values.size
    places = np.split(np.arange(length), np.cumsum(shares)[:-1])
    if not leaf.axes:
        return values, places
    # What varies over devices becomes the same on all of them by a sum.
    devices = lax.axis_size(leaf.axes)
    own = jnp.zeros((devices, length), values.dtype).at[lax.axis_index(leaf.axes)].set(values)
    firsts = np.arange(devices)[:, None] * length
    return lax.psum(own, leaf.axes).ravel(), [(firsts + each).ravel() for each in places]


def _grid(array: Array, size: int) -> Array:
    """About `size` values, at regular distances in every dimension.

    Such a slice keeps the sharding, whichever dimensions are sharded, where to flatten the array
    would gather it. Where the distance does not divide what a device has, or leaves it nothing,
    those dimensions come last, and the few values are picked by index: to that every device adds
    what it has, where a slice would leave parts that XLA moves from device to device.
    """
    strides: dict[int, int] = {}
    for axis in sorted(range(array.ndim), key=lambda axis: array.shape[axis]):
        length = array.shape[axis]
        kept = min(length, math.ceil(size ** (1 / (array.ndim - len(strides)))))
        strides[axis] = _stride(length, length // kept)
        size = max(size * strides[axis] // length, 1)
    for axis in sorted(strides, key=lambda axis: -_power_of_two(array.shape[axis] / strides[axis])):
        length, stride = array.shape[axis], strides[axis]
        if stride > 1 and (length / stride) % jax.device_count():
            array = jnp.take(array, np.arange(0, length, stride), axis, mode="clip")
        else:
            array = lax.slice_in_dim(array, 0, length, stride, axis)
    return array


def _stride(length: int, most: int) -> int:
    """Of the divisors of `length` close to `most`, the one that leaves the most powers of two.

    They are what the number of devices is made of.
    """
    divisors = [stride for stride in range(most // 2 + 1, most + 1) if length % stride == 0]
    return max(divisors, key=lambda stride: _power_of_two(length / stride), default=most)


def _power_of_two(number: float) -> int:
    """The largest that divides it; 0 for what is not whole."""
    return int(number) & -int(number) if number == int(number) else 0
