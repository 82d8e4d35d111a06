"""Kernels for every operation but convolutions, on row-major arrays of any rank and shape.

What an operation takes from where is a matter of strides alone for most of them (`View`), so that
one loop serves broadcasting, transposing, slicing, padding and concatenating.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.emit import Builder, Code, Value, i64
from feather_jax.cpu.expressions import emit_steps
from feather_jax.cpu.graph import (
    Broadcast,
    Concatenate,
    Constant,
    Convolution,
    Elementwise,
    Gather,
    Input,
    Literal,
    MatMul,
    Node,
    Pad,
    Pool,
    Reduce,
    Reshape,
    Shape,
    Slice,
    Step,
    Steps,
    Transpose,
)
from feather_jax.cpu.matmul import matmul
from feather_jax.cpu.reductions import pool, reduce
from feather_jax.cpu.views import (
    Place,
    View,
    broadcast_strides,
    collapse,
    lane_loops,
    largest,
    row_major,
    smallest,
    unravel,
)

# Elements of a row that one work item does.
BLOCK = 4096


def items(node: Node) -> int:
    """How many work items the kernel of a node has: independent of one another, in any order."""
    return sum(part.items for part in _parts(node))


def emit(code: Code, node: Node) -> ir.Function:
    """The kernel of a node: void f(output, inputs ..., begin, end), doing items [begin, end).

    Arrays are row-major, at no more than their elements' alignment; a bool is a byte. However the
    items are split, the bits are the same.

    Args:
      code: the module it is written to, unless the same kernel is there already.
      node: any but an input, a constant, and a convolution. An element-wise one may write where an
        input of its own shape and dtype was.
    """

    def write() -> ir.Function:
        b, (*pointers, begin, end) = code.start(f"{_word(node)}_", 1 + len(node.inputs))
        base = 0
        for part in _parts(node):
            first = largest(b, b.sub(begin, i64(base)), i64(0))
            last = smallest(b, b.sub(end, i64(base)), i64(part.items))
            b.loop(first, last, lambda item, part=part: part.emit(b, item, pointers))
            base += part.items
        b.ret_void()
        return b.function

    arguments = tuple((each.shape, each.dtype) for each in node.inputs)
    return code.function(("loops", node.operation, arguments), write)


def _word(node: Node) -> str:
    return type(node.operation).__name__.lower()


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of a kernel's work items: emit(b, item, pointers) writes what one of them does."""

    items: int
    emit: Callable[[Builder, Value, Sequence[Value]], None]


def _parts(node: Node) -> list[Part]:
    shape, dtype = node.shape, node.dtype
    output = View(dtype, row_major(shape))
    own = [View(each.dtype, row_major(each.shape)) for each in node.inputs]
    match node.operation:
        case Elementwise(steps):
            inputs = [
                View(each.dtype, broadcast_strides(each.shape, shape)) for each in node.inputs
            ]
            return [_map(shape, output, inputs, steps)]
        case Broadcast():
            strides = broadcast_strides(node.inputs[0].shape, shape)
            return [_map(shape, output, [View(dtype, strides)])]
        case Reshape():
            return [_map(shape, output, [output])]
        case Transpose(permutation):
            strides = tuple(own[0].strides[axis] for axis in permutation)
            return [_map(shape, output, [View(dtype, strides)])]
        case Slice(start, _, stride):
            offset = sum(map(math.prod, zip(start, own[0].strides, strict=True)))
            strides = tuple(map(math.prod, zip(stride, own[0].strides, strict=True)))
            return [_map(shape, output, [View(dtype, strides, offset)])]
        case Concatenate(axis):
            starts = itertools.accumulate((each.shape[axis] for each in node.inputs), initial=0)
            return [
                _map(
                    each.shape,
                    View(dtype, output.strides, start * output.strides[axis]),
                    [view],
                    pointers=(0, 1 + i),
                )
                for i, (each, view, start) in enumerate(zip(node.inputs, own, starts, strict=False))
            ]
        case Pad():
            return _pad(node.operation, node.inputs[0].shape, shape, dtype)
        case Gather(size):
            x, positions = node.inputs
            return [_gather(x, positions, size)]
        case Reduce():
            return [Part(*reduce(node.operation, node.inputs[0], node))]
        case Pool():
            return [Part(*pool(node.operation, node.inputs[0], node))]
        case MatMul():
            return [Part(*matmul(*node.inputs))]
        case Input() | Constant() | Convolution():
            raise TypeError(f"{node} is not for these kernels")


def _map(
    shape: Shape,
    output: View,
    inputs: Sequence[View],
    steps: Steps = (),
    pointers: Sequence[int] | None = None,
) -> Part:
    """output[i] = steps(inputs[i] ...) for all i of `shape`; a work item is (part of) a row.

    Without steps it is a copy of the input. `pointers` are the numbers of the kernel's arrays that
    output and inputs are, by default in this order.
    """
    if not math.prod(shape):
        return Part(0, lambda b, item, arrays: None)
    used = pointers or range(1 + len(inputs))
    shape, views = collapse(shape, [output, *inputs])
    *outer, length = shape
    blocks = -(-length // BLOCK)
    lanes_wanted = steps or all(view.strides[-1] in (0, 1) for view in views)

    def emit(b: Builder, item: Value, arrays: Sequence[Value]) -> None:
        block, row = b.srem(item, i64(blocks)), b.sdiv(item, i64(blocks))
        indices = unravel(b, row, tuple(outer)) if outer else []
        places = [
            Place(arrays[i], view).at(b, indices) for i, view in zip(used, views, strict=True)
        ]
        target, *sources = places
        dtypes = [view.dtype for view in views[1:]]

        def some(i: Value, lanes: int) -> None:
            here = [
                place.moved(b, b.mul(i, i64(place.view.strides[0]))) for place in (target, *sources)
            ]
            values = [place.read(b, lanes) for place in here[1:]]
            here[0].write(b, emit_steps(b, steps, values, dtypes) if steps else values[0])

        low = b.mul(block, i64(BLOCK))
        high = smallest(b, b.add(low, i64(BLOCK)), i64(length))
        if lanes_wanted:
            lane_loops(b, low, high, b.code.target.lanes, some)
        else:
            b.loop(low, high, lambda i: some(i, 0))

    return Part(math.prod(outer) * blocks, emit)


def _fill(shape: Shape, output: View, value: np.generic) -> Part:
    """output[i] = value for all i of `shape`. It reads the output that it overwrites, unused."""
    steps = (Step("select", (Literal(np.True_), Literal(value), 0), output.dtype),)
    return _map(shape, output, [output], steps, pointers=(0, 0))


def _pad(operation: Pad, old: Shape, shape: Shape, dtype: np.dtype) -> list[Part]:
    """The input's elements where they come to lie, and boxes of the value all around them."""
    strides, source = row_major(shape), row_major(old)
    parts: list[Part] = []

    def boxes(axis: int, counts: Shape, steps: Shape, offset: int, origin: int) -> None:
        """All axes from `axis` on, given how the output is walked along those before."""
        if axis == len(shape):
            target = View(dtype, steps, offset)
            parts.append(_map(counts, target, [View(dtype, source, origin)]))
            return
        before = operation.padding[axis][0]
        pace, size, rest = operation.interior[axis] + 1, shape[axis], shape[axis + 1 :]
        places = [before + pace * i for i in range(old[axis])]
        inside = [i for i, place in enumerate(places) if 0 <= place < size]
        runs = _gaps(size, places, pace)
        for start, count, stride in runs:
            box, view = (
                (*counts, count, *rest),
                (*steps, stride * strides[axis], *strides[axis + 1 :]),
            )
            parts.append(
                _fill(box, View(dtype, view, offset + start * strides[axis]), operation.value)
            )
        if inside:
            boxes(
                axis + 1,
                (*counts, len(inside)),
                (*steps, pace * strides[axis]),
                offset + places[inside[0]] * strides[axis],
                origin + inside[0] * source[axis],
            )

    boxes(0, (), (), 0, 0)
    return parts


def _gaps(size: int, places: Sequence[int], pace: int) -> list[tuple[int, int, int]]:
    """(start, count, stride) of runs of all numbers below `size` that are not in `places`."""
    taken = set(places)
    free = [i for i in range(size) if i not in taken]
    first, last = (places[0], places[-1]) if places else (size, size)
    runs = [
        ([i for i in free if i < first], 1),
        *(([i for i in free if first < i < last and i % pace == k], pace) for k in range(pace)),
        ([i for i in free if i > last], 1),
    ]
    return [(run[0], len(run), stride) for run, stride in runs if run]


def _gather(x: Node, positions: Node, size: int) -> Part:
    """A work item is the neighbours from one position on."""
    dtype = x.dtype

    def emit(b: Builder, item: Value, arrays: Sequence[Value]) -> None:
        output, source = (Place(array, View(dtype, (1,))) for array in arrays[:2])
        place = Place(arrays[2], View(positions.dtype, (1,))).moved(b, item).read(b, 0)
        target, own = output.moved(b, b.mul(item, i64(size))), source.moved(b, place)

        def some(i: Value, lanes: int) -> None:
            target.moved(b, i).write(b, own.moved(b, i).read(b, lanes))

        lane_loops(b, i64(0), i64(size), b.code.target.lanes, some)

    return Part(math.prod(positions.shape) if size else 0, emit)
