"""What the primitives that read, write and find at indices are in a graph's operations.

Reading and writing is gathering: an array's elements at positions, which are computed from the
indices. Known indices make constant positions.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from feather_jax.cpu.equation import Equation, Rule, Unsupported, known
from feather_jax.cpu.graph import (
    Concatenate,
    Gather,
    Node,
    Reduce,
    Slice,
    broadcast,
    constant,
    elementwise,
    reshape,
)

INDEX = np.dtype(np.int64)

# So many places of the largest a network may ask for: each takes three passes over all values.
MOST_PLACES = 64


def gather(eqn: Equation, x: Node, indices: Node) -> Node:
    """lax.gather."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    room = [
        x.shape[axis] - params["slice_sizes"][axis] for axis in numbers.start_index_map
    ]  # how far a slice may start
    parts = [_component(indices, number) for number in range(len(room))]
    starts = _starts(eqn, x, parts, numbers.start_index_map, room)
    starts = broadcast(starts, indices.shape[:-1], eqn.name)
    batch = [axis for axis in range(len(eqn.shape)) if axis not in numbers.offset_dims]
    shape = [1] * len(eqn.shape)
    for axis, size in zip(batch, indices.shape[:-1], strict=True):
        shape[axis] = size

    at_zero = {**params, "fill_value": -1, "mode": lax.GatherScatterMode.CLIP}
    first = np.zeros(indices.shape, np.int32)
    base = np.asarray(lax.gather_p.bind(_positions(x), first, **at_zero))
    result = _pick(eqn, x, base, reshape(starts, tuple(shape)))
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return result
    inside = constant(np.array(True))
    for part, most in zip(parts, room, strict=True):
        for function, bound in (("greater_equal", 0), ("less_equal", most)):
            fits = elementwise(function, part, constant(INDEX.type(bound)), dtype=np.bool_)
            inside = elementwise("and", inside, fits)
    inside = reshape(broadcast(inside, indices.shape[:-1]), tuple(shape), eqn.name)
    fill = constant(_fill(params["fill_value"], x.dtype))
    return elementwise("select", broadcast(inside, eqn.shape), result, fill, name=eqn.name)


def dynamic_slice(eqn: Equation, x: Node, *starts: Node) -> Node:
    room = [size - window for size, window in zip(x.shape, eqn.shape, strict=True)]
    parts = [_as_index(start) for start in starts]
    base = _positions(x)[tuple(slice(size) for size in eqn.shape)]
    return _pick(eqn, x, base, _starts(eqn, x, parts, range(len(starts)), room))


def dynamic_update_slice(eqn: Equation, x: Node, update: Node, *starts: Node) -> Node:
    places = [known(start) for start in starts]
    which = lax.dynamic_update_slice(_positions(x), _positions(update, behind=x), places)
    return _pick(eqn, _both(x, update), np.asarray(which))


def scatter(function: str | None) -> Rule:
    """lax.scatter, which combines by `function` with what was there; None to overwrite it.

    Its indices are known.
    """

    def rule(eqn: Equation, x: Node, indices: Node, updates: Node) -> Node:
        numbers, where = eqn.params["dimension_numbers"], known(indices)

        def apply(scatter: Any, target: np.ndarray, values: np.ndarray) -> np.ndarray:
            return np.asarray(scatter(target, where, values, numbers, mode=eqn.params["mode"]))

        which = apply(lax.scatter, _positions(x), _positions(updates, behind=x))
        written = _pick(eqn, _both(x, updates), which)
        if function is None:
            return written
        zeros, ones = np.zeros(x.shape, np.int32), np.ones(updates.shape, np.int32)
        count = apply(lax.scatter_add, zeros, ones)
        if count.max(initial=0) > 1:
            raise Unsupported("with indices of which several are the same")
        both = elementwise(function, x, written, name=eqn.name)
        return elementwise("select", constant(count > 0), both, x, name=eqn.name)

    return rule


def top_k(eqn: Equation, x: Node) -> tuple[Node, ...]:
    """The largest along the last axis, in order, and their places: one after the other.

    The next is the first, among those that are not taken, that is as large as any of them; NaN is
    larger than all numbers.
    """
    size, k, last = x.shape[-1], eqn.results[0].shape[-1], len(x.shape) - 1
    if eqn.params["axis"] != last:
        raise Unsupported("of another axis than the last")
    if k > MOST_PLACES:
        raise Unsupported(f"of {k} values, where it knows up to {MOST_PLACES}")
    where = np.dtype(eqn.results[1].dtype)
    floats = np.issubdtype(x.dtype, np.floating)
    least = constant(x.dtype.type(-np.inf if floats else np.iinfo(x.dtype).min))
    numbers = constant(np.arange(size, dtype=where))
    row = (*x.shape[:-1], 1)

    def each(function: str, *operands: Node, dtype: np.dtype | type = np.bool_) -> Node:
        return elementwise(function, *operands, dtype=dtype, name=eqn.name)

    def reduced(kind: str, y: Node, dtype: np.dtype) -> Node:
        return reshape(Node(Reduce(kind, (last,), dtype), (y,), eqn.name), row, eqn.name)

    free, unordered = constant(np.ones(x.shape, np.bool_)), each("not_equal", x, x)
    values, places = [], []
    for _ in range(k):
        best = reduced("max", each("select", free, x, least, dtype=x.dtype), x.dtype)
        as_large = each(
            "or", each("equal", x, best), each("and", unordered, each("not_equal", best, best))
        )
        place = reduced("argmax", each("and", as_large, free), where)
        free = each("and", free, each("not_equal", numbers, place))
        values.append(best)
        places.append(place)
    return tuple(Node(Concatenate(last), tuple(parts), eqn.name) for parts in (values, places))


def _positions(x: Node, behind: Node | None = None) -> np.ndarray:
    """Where each element of an array is, by rows, perhaps behind another one."""
    first = math.prod(behind.shape) if behind else 0
    return np.arange(first, first + math.prod(x.shape), dtype=np.int32).reshape(x.shape)


def _both(x: Node, y: Node) -> Node:
    """The elements of two arrays one behind the other."""
    return Node(Concatenate(0), tuple(reshape(each, (math.prod(each.shape),)) for each in (x, y)))


def _as_index(x: Node) -> Node:
    return x if x.dtype == INDEX else elementwise("convert", x, dtype=INDEX)


def _component(indices: Node, number: int) -> Node:
    """indices[..., number], as positions are computed."""
    flat = reshape(indices, (math.prod(indices.shape[:-1]), indices.shape[-1]))
    own = Node(Slice((0, number), (flat.shape[0], 1), (1, 1)), (flat,))
    return _as_index(reshape(own, indices.shape[:-1]))


def _starts(
    eqn: Equation, x: Node, parts: Sequence[Node], axes: Sequence[int], room: Sequence[int]
) -> Node:
    """The position of x[indices], these moved to where a slice that starts there is inside."""
    total = constant(INDEX.type(0))
    for part, axis, most in zip(parts, axes, room, strict=True):
        stride = math.prod(x.shape[axis + 1 :])
        part = elementwise("maximum", part, constant(INDEX.type(0)), name=eqn.name)
        part = elementwise("minimum", part, constant(INDEX.type(most)), name=eqn.name)
        part = elementwise("multiply", part, constant(INDEX.type(stride)), name=eqn.name)
        total = elementwise("add", total, part, name=eqn.name)
    return total


def _pick(eqn: Equation, x: Node, base: np.ndarray, starts: Node | None = None) -> Node:
    """The elements of `x` at base + starts, as many neighbours at a time as there are."""
    shape = base.shape
    starts = starts or constant(np.zeros((1,) * len(shape), INDEX))
    starts = reshape(starts, (1,) * (len(shape) - len(starts.shape)) + starts.shape, eqn.name)
    axis = len(shape)
    while axis and starts.shape[axis - 1] == 1 and _neighbours(base, axis - 1):
        axis -= 1
    lead, size = shape[:axis], math.prod(shape[axis:])
    first = base.reshape(*lead, size)[..., 0] if base.size else np.zeros(lead)
    own = reshape(starts, starts.shape[:axis], eqn.name)
    positions = elementwise("add", own, constant(first.astype(INDEX)), name=eqn.name)
    positions = broadcast(positions, lead, eqn.name)
    return reshape(Node(Gather(size), (x, positions), eqn.name), shape, eqn.name)


def _neighbours(base: np.ndarray, axis: int) -> bool:
    """Whether what the axes from `axis` on hold is one run of positions each."""
    runs = base.reshape(math.prod(base.shape[:axis]), -1)
    return bool((runs == runs[:, :1] + np.arange(runs.shape[1])).all())


def _fill(value: Any, dtype: np.dtype) -> np.ndarray:
    """What a gather gives out of bounds."""
    if value is None:
        if np.issubdtype(dtype, np.floating):
            value = np.nan
        elif dtype == np.bool_:
            value = True
        else:
            limits = np.iinfo(dtype)
            value = limits.min if np.issubdtype(dtype, np.signedinteger) else limits.max
    return np.asarray(value, dtype)
