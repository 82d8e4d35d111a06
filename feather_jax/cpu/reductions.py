"""Row-major kernels that make one of many: sums, extremes, their places, and pooling."""

import math
from collections.abc import Callable, Sequence

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.emit import F32, I64, Builder, Value, i64
from feather_jax.cpu.expressions import convert, element, emit_steps
from feather_jax.cpu.functions import F64, constant, resized
from feather_jax.cpu.graph import FLOAT32, Node, Pool, Reduce, Shape, Step
from feather_jax.cpu.views import (
    Place,
    View,
    collapse,
    lane_loops,
    largest,
    nested,
    row_major,
    smallest,
    unravel,
)

# Results of a work item where results are neighbours: a multiple of any vector's lanes.
BLOCK = 16

Emit = Callable[[Builder, Value, Sequence[Value]], None]

_FUNCTIONS = {
    "and": "and",
    "max": "maximum",
    "min": "minimum",
    "or": "or",
    "prod": "multiply",
    "sum": "add",
}


def neutral(kind: str, dtype: np.dtype) -> float | int:
    """What changes nothing when it is combined with a value."""
    if kind in ("sum", "or"):
        return 0
    if kind in ("prod", "and"):
        return 1 if kind == "prod" or dtype == np.bool_ else -1
    if dtype == FLOAT32:
        return -math.inf if kind == "max" else math.inf
    if dtype == np.bool_:
        return kind == "min"
    limits = np.iinfo(dtype)
    return int(limits.min if kind == "max" else limits.max)


def _combine(b: Builder, kind: str, total: Value, own: Value, dtype: np.dtype) -> Value:
    """A total and one more element, or two totals."""
    if _in_float64(kind, dtype):
        return b.fadd(total, b.fpext(own, total.type))
    if dtype == np.bool_:
        kind = {"max": "or", "min": "and", "sum": "or", "prod": "and"}.get(kind, kind)
    return emit_steps(b, (Step(_FUNCTIONS[kind], (0, 1), dtype),), [total, own], [dtype] * 2)


def reduce(operation: Reduce, x: Node, result: Node) -> tuple[int, Emit]:
    """The work items of a reduction and what each does.

    Where the last axis stays, a work item is a vector of results, else one result, whose last axis
    is read by vectors.
    """
    kept = [axis for axis in range(len(x.shape)) if axis not in operation.axes]
    gone = [axis for axis in range(len(x.shape)) if axis in operation.axes]
    strides = row_major(x.shape)
    output = View(result.dtype, row_major(result.shape))
    source = View(x.dtype, tuple(strides[axis] for axis in kept))
    shape, views = collapse(result.shape, [output, source])
    inner_shape, (inner,) = collapse(
        tuple(x.shape[axis] for axis in gone),
        [View(x.dtype, tuple(strides[axis] for axis in gone))],
    )
    *outer, length = shape
    place = operation.kind in ("argmax", "argmin")
    inner_rows = inner_shape[-1] > 1 and inner.strides[-1] == 1 and not place

    def along(b: Builder, sources: Place, lanes: int) -> Value:
        """The result of `lanes` neighbours."""
        if place:
            return _extreme_place(b, operation, sources, inner, inner_shape, lanes, result.dtype)
        return _total(b, operation.kind, sources, inner, inner_shape, lanes)

    def emit(b: Builder, item: Value, arrays: Sequence[Value]) -> None:
        lanes = b.code.target.lanes
        if inner_rows:
            indices = unravel(b, item, shape)
            target, sources = (
                Place(array, view).at(b, indices) for array, view in zip(arrays, views, strict=True)
            )
            target.write(b, _total_of_rows(b, operation.kind, sources, inner, inner_shape, lanes))
            return
        blocks = -(-length // BLOCK)
        indices = unravel(b, b.sdiv(item, i64(blocks)), tuple(outer)) if outer else []
        low = b.mul(b.srem(item, i64(blocks)), i64(BLOCK))
        high = smallest(b, b.add(low, i64(BLOCK)), i64(length))
        rows = [
            Place(array, view).at(b, indices) for array, view in zip(arrays, views, strict=True)
        ]

        def some(i: Value, lanes: int) -> None:
            target, sources = (row.moved(b, b.mul(i, i64(row.view.strides[0]))) for row in rows)
            target.write(b, along(b, sources, lanes))

        lane_loops(b, low, high, lanes, some)

    count = math.prod(shape) if inner_rows else math.prod(outer) * -(-length // BLOCK)
    return (count if math.prod(result.shape) else 0), emit


def _element(b: Builder, sources: Place, inner: View, indices: Sequence[Value]) -> Place:
    """The neighbours of `sources` at `indices` of the axes that are reduced."""
    offset: Value = i64(0)
    for index, stride in zip(indices, inner.strides, strict=True):
        offset = b.add(offset, b.mul(index, i64(stride)))
    return sources.moved(b, offset)


def _start(kind: str, dtype: np.dtype, lanes: int) -> ir.Constant:
    own = F64 if _in_float64(kind, dtype) else element(dtype)
    return constant(ir.VectorType(own, lanes) if lanes else own, neutral(kind, dtype))


def _in_float64(kind: str, dtype: np.dtype) -> bool:
    """Whether to add in float64: a float32 sum one after the other is off by more the more it has,
    and costs no less, as each addition waits for the one before."""
    return kind == "sum" and dtype == FLOAT32


def _rounded(b: Builder, kind: str, total: Value, dtype: np.dtype) -> Value:
    """A total as the result has it."""
    return b.fptrunc(total, resized(total.type, F32)) if _in_float64(kind, dtype) else total


def _total(b: Builder, kind: str, sources: Place, inner: View, shape: Shape, lanes: int) -> Value:
    def add(indices: list[Value], values: Sequence[Value]) -> list[Value]:
        own = _element(b, sources, inner, indices).read(b, lanes)
        return [_combine(b, kind, values[0], own, inner.dtype)]

    (total,) = nested(b, shape, add, [_start(kind, inner.dtype, lanes)])
    return _rounded(b, kind, total, inner.dtype)


def _total_of_rows(
    b: Builder, kind: str, sources: Place, inner: View, shape: Shape, lanes: int
) -> Value:
    """Of one result, whose last axis is contiguous: vectors, then the rest, then the lanes."""
    dtype, (*outer, length) = inner.dtype, shape
    whole = length - length % lanes
    flat = Place(sources.pointer, View(dtype, (1,)))

    def row(indices: list[Value], values: Sequence[Value]) -> list[Value]:
        zero = [*indices, i64(0)]
        start = _element(b, flat, inner, zero)

        def step(i: Value, total: Value, lanes: int) -> list[Value]:
            own = start.moved(b, i).read(b, lanes)
            return [_combine(b, kind, total, own, dtype)]

        vector, rest = values
        if whole:
            (vector,) = b.loop(
                i64(0), i64(whole), lambda i, total: step(i, total, lanes), [vector], step=lanes
            )
        (rest,) = b.loop(i64(whole), i64(length), lambda i, total: step(i, total, 0), [rest])
        return [vector, rest]

    starts = [_start(kind, dtype, lanes), _start(kind, dtype, 0)]
    vector, rest = nested(b, tuple(outer), row, starts)
    if whole:
        rest = _combine(b, kind, rest, _across(b, kind, vector, dtype), dtype)
    return _rounded(b, kind, rest, dtype)


def _across(b: Builder, kind: str, vector: Value, dtype: np.dtype) -> Value:
    """All lanes of a vector, by halves."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        low, high = (b.permute(vector, vector, range(k, k + lanes)) for k in (0, lanes))
        vector = _combine(b, kind, low, high, dtype)
    return b.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def _extreme_place(
    b: Builder,
    operation: Reduce,
    sources: Place,
    inner: View,
    shape: Shape,
    lanes: int,
    dtype: np.dtype,
) -> Value:
    """The first place of the largest or smallest along the one axis; of NaN, if there is one."""
    order = "greater" if operation.kind == "argmax" else "less"
    steps = (Step(order, (0, 1), np.dtype(np.bool_)),)
    first = _element(b, sources, inner, [i64(0)] * len(shape)).read(b, lanes)
    zero = constant(resized(first.type, I64), 0)

    def compare(indices: list[Value], values: Sequence[Value]) -> list[Value]:
        best, where = values
        own = _element(b, sources, inner, indices).read(b, lanes)
        better = emit_steps(b, steps, [own, best], [inner.dtype] * 2)
        if inner.dtype == FLOAT32:
            no_number = b.and_(b.fcmp_unordered("uno", own, own), b.fcmp_ordered("ord", best, best))
            better = b.or_(better, no_number)
        index = b.splat(indices[-1], lanes) if lanes else indices[-1]
        return [b.select(better, own, best), b.select(better, index, where)]

    _, where = nested(b, shape, compare, [first, zero])
    return convert(b, where, np.dtype(np.int64), dtype)


def pool(operation: Pool, x: Node, result: Node) -> tuple[int, Emit]:
    """The work items of pooling, a row of pixels each."""
    (_, height, width, channels), dtype = x.shape, x.dtype
    _, rows, columns, _ = result.shape
    source = View(dtype, row_major(x.shape))
    output = View(dtype, row_major(result.shape))

    def taps(b: Builder, index: Value, axis: int, size: int) -> tuple[Value, Value, Value]:
        """Where a window starts, and its first tap and the one behind the last that are inside."""
        pace = operation.dilation[axis]
        before, _ = operation.padding[axis]
        start = b.sub(b.mul(index, i64(operation.strides[axis])), i64(before))

        def ceil_div(value: Value) -> Value:
            return b.sdiv(b.add(value, i64(pace - 1)), i64(pace))

        first = ceil_div(largest(b, b.neg(start), i64(0)))
        behind = ceil_div(largest(b, b.sub(i64(size), start), i64(0)))
        return start, first, smallest(b, behind, i64(operation.window[axis]))

    def emit(b: Builder, item: Value, arrays: Sequence[Value]) -> None:
        image, row = b.sdiv(item, i64(rows)), b.srem(item, i64(rows))
        top, row_low, row_high = taps(b, row, 0, height)
        lanes = b.code.target.lanes

        def pixel(column: Value) -> None:
            left, low, high = taps(b, column, 1, width)
            target = Place(arrays[0], output).at(b, [image, row, column])

            def some(channel: Value, lanes: int) -> None:
                def over_row(i: Value, total: Value) -> list[Value]:
                    y = b.add(top, b.mul(i, i64(operation.dilation[0])))

                    def tap(j: Value, total: Value) -> list[Value]:
                        place = b.add(left, b.mul(j, i64(operation.dilation[1])))
                        own = Place(arrays[1], source).at(b, [image, y, place]).moved(b, channel)
                        return [_combine(b, operation.kind, total, own.read(b, lanes), dtype)]

                    return b.loop(low, high, tap, [total])

                (total,) = b.loop(
                    row_low, row_high, over_row, [_start(operation.kind, dtype, lanes)]
                )
                total = _rounded(b, operation.kind, total, dtype)
                target.moved(b, channel).write(b, total)

            lane_loops(b, i64(0), i64(channels), lanes, some)

        b.loop(i64(0), i64(columns), pixel)

    return (result.shape[0] * rows if math.prod(result.shape) else 0), emit
