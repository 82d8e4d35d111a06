"""How a row-major kernel walks over arrays: their strides, loops over them, reads and writes."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.emit import I8, Builder, Value, i32, i64
from feather_jax.cpu.expressions import element
from feather_jax.cpu.functions import like
from feather_jax.cpu.graph import Shape


@dataclasses.dataclass(frozen=True)
class View:
    """Where the elements of an array lie in memory.

    Attributes:
      dtype: theirs. A bool is a byte.
      strides: by axis, in elements; 0 where an array is repeated, negative where it is reversed.
      offset: of the first, in elements.
    """

    dtype: np.dtype
    strides: tuple[int, ...]
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Place:
    """An array of a kernel: a pointer, and how its elements lie behind it."""

    pointer: Value
    view: View

    def at(self, b: Builder, indices: Sequence[Value]) -> "Place":
        """Its part at `indices` of the first axes."""
        offset: Value = i64(self.view.offset)
        for index, stride in zip(indices, self.view.strides, strict=False):
            offset = b.add(offset, b.mul(index, i64(stride)))
        pointer = b.address(self.pointer, b.mul(offset, i64(self.view.dtype.itemsize)))
        return Place(pointer, View(self.view.dtype, self.view.strides[len(indices) :]))

    def moved(self, b: Builder, elements: Value) -> "Place":
        """The same from so many elements on."""
        bytes_ = b.mul(elements, i64(self.view.dtype.itemsize))
        return Place(b.address(self.pointer, bytes_), self.view)

    def read(self, b: Builder, lanes: int) -> Value:
        """The first elements along its only axis; `lanes` of them as a vector, 0 for one alone."""
        (stride,) = self.view.strides or (0,)
        if lanes and stride == 1:
            return self._load(b, self.pointer, lanes)
        first = self._load(b, self.pointer, 0)
        if not lanes:
            return first
        if stride == 0:
            return b.splat(first, lanes)
        vector: Value = ir.Constant(ir.VectorType(first.type, lanes), ir.Undefined)
        for lane in range(lanes):
            own = b.address(self.pointer, lane * stride * self.view.dtype.itemsize)
            vector = b.insert_element(vector, self._load(b, own, 0), i32(lane))
        return vector

    def write(self, b: Builder, value: Value) -> None:
        """The first elements along its only axis, one or as many as `value` has lanes."""
        (stride,) = self.view.strides or (0,)
        if not isinstance(value.type, ir.VectorType) or stride == 1:
            return self._store(b, value, self.pointer)
        for lane in range(value.type.count):
            own = b.address(self.pointer, lane * stride * self.view.dtype.itemsize)
            self._store(b, b.extract_element(value, i32(lane)), own)
        return None

    def _load(self, b: Builder, pointer: Value, lanes: int) -> Value:
        dtype = self.view.dtype
        kind = I8 if dtype == np.bool_ else element(dtype)
        full = ir.VectorType(kind, lanes) if lanes else kind
        value = b.load(pointer, typ=full, align=dtype.itemsize)
        return b.icmp_unsigned("!=", value, like(value, 0)) if dtype == np.bool_ else value

    def _store(self, b: Builder, value: Value, pointer: Value) -> None:
        if self.view.dtype == np.bool_:
            vector = isinstance(value.type, ir.VectorType)
            value = b.zext(value, ir.VectorType(I8, value.type.count) if vector else I8)
        b.store(value, pointer, align=self.view.dtype.itemsize)


def row_major(shape: Shape) -> tuple[int, ...]:
    """The strides of an array of `shape`."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def broadcast_strides(shape: Shape, result: Shape) -> tuple[int, ...]:
    """The strides of an array of `shape` as NumPy repeats it to `result`."""
    shape = (1,) * (len(result) - len(shape)) + shape
    own = zip(row_major(shape), shape, strict=True)
    return tuple(stride if size > 1 else 0 for stride, size in own)


def collapse(shape: Shape, views: Sequence[View]) -> tuple[Shape, list[View]]:
    """The same elements with as few axes as possible, and at least one."""
    axes: list[list[int]] = []  # size, then a stride for each view
    for size, *strides in zip(shape, *(view.strides for view in views), strict=True):
        if size == 1:
            continue
        if axes and all(
            outer == inner * size for outer, inner in zip(axes[-1][1:], strides, strict=True)
        ):
            axes[-1] = [axes[-1][0] * size, *strides]
        else:
            axes.append([size, *strides])
    columns = list(zip(*(axes or [[1] * (len(views) + 1)]), strict=True))
    return tuple(columns[0]), [
        dataclasses.replace(view, strides=tuple(strides))
        for view, strides in zip(views, columns[1:], strict=True)
    ]


def unravel(b: Builder, index: Value, shape: Shape) -> list[Value]:
    """The indices of the `index`-th element of an array of `shape`."""
    indices: list[Value] = []
    for size in reversed(shape[1:]):
        indices.insert(0, b.srem(index, i64(size)))
        index = b.sdiv(index, i64(size))
    return [index, *indices] if shape else []


def nested(
    b: Builder,
    shape: Shape,
    body: Callable[[list[Value], Sequence[Value]], Sequence[Value]],
    carried: Sequence[Value] = (),
) -> list[Value]:
    """carried = body(indices, carried), over all indices of an array of `shape`, in order."""

    def inner(indices: list[Value], values: Sequence[Value]) -> list[Value]:
        if len(indices) == len(shape):
            return list(body(indices, values))
        high = i64(shape[len(indices)])
        return b.loop(i64(0), high, lambda i, *own: inner([*indices, i], own), values)

    return inner([], carried)


def lane_loops(
    b: Builder, low: Value, high: Value, lanes: int, body: Callable[[Value, int], None]
) -> None:
    """body(i, lanes) for as many whole vectors as there are between low and high, then body(i, 0)
    for each one left."""
    whole = b.add(low, b.and_(b.sub(high, low), i64(-lanes)))
    b.loop(low, whole, lambda i: body(i, lanes), step=lanes)
    b.loop(whole, high, lambda i: body(i, 0))


def smallest(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed("<", x, y), x, y)


def largest(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed(">", x, y), x, y)
