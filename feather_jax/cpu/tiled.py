"""Pooling, reductions and element-wise expressions on arrays in lane tiles."""

import dataclasses
from collections.abc import Sequence

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.emit import F32, I32, Builder, Code, Value, float_vector, i64, vector_of
from feather_jax.cpu.expressions import emit_steps
from feather_jax.cpu.graph import Padding, Steps
from feather_jax.cpu.tiles import FLOAT, Tiles

# What is outside a window, and how two values become one.
NEUTRAL = {"max": -np.inf, "min": np.inf, "sum": 0.0}


def combine(b: Builder, kind: str, x: Value, y: Value) -> Value:
    """Two values of a pool or reduction as one."""
    match kind:
        case "max":
            return b.larger(x, y)
        case "min":
            return b.smaller(x, y)
        case _:
            return b.fadd(x, y)


@dataclasses.dataclass(frozen=True)
class TiledPool:
    """The maximum, minimum or sum of windows; x's tiles are `strides` times y's.

    Operands: y, x, the mask of y's pixels. Work items are the planes.

    Attributes:
      x, y: layouts; x is filled with the kind's neutral element outside, or with what does no harm.
      kind, window, strides, padding, dilation: as `feather_jax.cpu.graph.Pool` has them.
    """

    x: Tiles
    y: Tiles
    kind: str
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: Padding
    dilation: tuple[int, int]

    @property
    def items(self) -> int:
        return self.y.groups * self.y.channels


@dataclasses.dataclass(frozen=True)
class TiledReduce:
    """The maximum, minimum or sum over height and width, as rows [batch, channels].

    Operands: y, x. Work items are the planes.
    """

    x: Tiles
    kind: str

    @property
    def items(self) -> int:
        return self.x.groups * self.x.channels


@dataclasses.dataclass(frozen=True)
class TiledElementwise:
    """An expression of arrays with the same tiles, and of values that a channel's pixels share.

    Operands: y, the mask of y's pixels, then the inputs. Work items are the planes.

    Attributes:
      y: layout of the result.
      inputs: of each input its layout or, where a channel's pixels share one value, how many
        elements of a row-major array the value moves from image to image and from channel to
        channel.
      steps: the expression; none for a copy of the only input.
    """

    y: Tiles
    inputs: tuple[Tiles | tuple[int, int], ...]
    steps: Steps

    @property
    def items(self) -> int:
        return self.y.groups * self.y.channels


def _plane(b: Builder, base: Value, tiles: Tiles, group: Value, channel: Value) -> Value:
    """The vector at (0, 0) of a channel's tile."""
    own = b.address(base, b.scale(group, tiles.group))
    return b.address(b.address(own, b.scale(channel, tiles.plane)), tiles.at(0, 0))


def emit_pool(code: Code, spec: TiledPool) -> ir.Function:
    """void f(y, x, mask, begin, end)."""
    b, (y, x, mask, begin, end) = code.start("pool", 3)
    old, new, kind = spec.x, spec.y, vector_of(spec.y.lanes)
    (high, wide), ((top, _), (left, _)) = new.tile, spec.padding
    cover_row = wide * new.vector

    def plane(item: Value) -> None:
        group, channel = b.sdiv(item, i64(new.channels)), b.srem(item, i64(new.channels))
        source = _plane(b, x, old, group, channel)
        out = _plane(b, y, new, group, channel)

        def pixel(row: Value, column: Value) -> None:
            start = b.scale(row, spec.strides[0] * old.columns * old.vector)
            start = b.add(start, b.scale(column, spec.strides[1] * old.vector))
            own = b.address(source, start)
            total = None
            for i in range(spec.window[0]):
                for j in range(spec.window[1]):
                    down, across = i * spec.dilation[0] - top, j * spec.dilation[1] - left
                    value = b.read(own, kind, (down * old.columns + across) * old.vector)
                    total = value if total is None else combine(b, spec.kind, total, value)
            if not new.exact:
                at = b.add(b.scale(row, cover_row), b.scale(column, new.vector))
                bits = b.read(mask, vector_of(new.lanes, I32), at)
                total = b.cover(total, bits, new.fill)
            place = b.add(b.scale(row, new.columns * new.vector), b.scale(column, new.vector))
            b.write(total, out, place)

        b.loop(
            i64(0),
            i64(high),
            lambda row: b.loop(i64(0), i64(wide), lambda column: pixel(row, column)) and None,
        )

    b.loop(begin, end, plane)
    b.ret_void()
    return b.function


def emit_reduce(code: Code, spec: TiledReduce) -> ir.Function:
    """void f(y, x, begin, end)."""
    b, (y, x, begin, end) = code.start("reduce", 2)
    tiles, lanes = spec.x, spec.x.lanes
    high, wide = tiles.tile
    images = tiles.grid[0]
    own = lanes // images
    start = float_vector(NEUTRAL[spec.kind], lanes)

    def plane(item: Value) -> None:
        group, channel = b.sdiv(item, i64(tiles.channels)), b.srem(item, i64(tiles.channels))
        source = _plane(b, x, tiles, group, channel)

        def row(index: Value, total: Value) -> list[Value]:
            first = b.address(source, b.scale(index, tiles.columns * tiles.vector))
            values = [b.read(first, start.type, column * tiles.vector) for column in range(wide)]
            return [combine(b, spec.kind, total, tree(b, spec.kind, values))]

        (total,) = b.loop(i64(0), i64(high), row, [start])
        step = own // 2
        while step:
            other = b.permute(total, total, np.arange(lanes) ^ step)
            total = combine(b, spec.kind, total, other)
            step //= 2
        image = b.scale(group, images)
        for number in range(images):
            at = b.add(image, i64(number))
            with b.if_then(b.icmp_signed("<", at, i64(tiles.batch))):
                place = b.add(b.scale(at, tiles.channels), channel)
                value = b.extract_element(total, ir.Constant(I32, number * own))
                b.write(value, y, b.scale(place, FLOAT))

    b.loop(begin, end, plane)
    b.ret_void()
    return b.function


def tree(b: Builder, kind: str, values: Sequence[Value]) -> Value:
    """Many values as one, neighbours first, which rounds less than one after the other."""
    while len(values) > 1:
        pairs = [combine(b, kind, *values[i : i + 2]) for i in range(0, len(values) - 1, 2)]
        values = [*pairs, *values[len(pairs) * 2 :]]
    return values[0]


def emit_elementwise(code: Code, spec: TiledElementwise) -> ir.Function:
    """void f(y, mask, inputs ..., begin, end)."""
    b, (y, mask, *inputs, begin, end) = code.start("elementwise", 2 + len(spec.inputs))
    new, lanes = spec.y, spec.y.lanes
    high, wide = new.tile
    floats, words = vector_of(lanes), vector_of(lanes, I32)
    lane_image = np.arange(lanes) // (lanes // new.grid[0])

    def shared(base: Value, moves: tuple[int, int], group: Value, channel: Value) -> Value:
        """A vector of the value that a channel's pixels have in common, image by image."""
        per_image, per_channel = moves
        first = b.address(base, b.scale(channel, FLOAT * per_channel))
        if not per_image:
            return b.splat(b.read(first, F32), lanes)
        value: Value = ir.Constant(floats, ir.Undefined)
        for number in range(new.grid[0]):
            image = b.add(b.scale(group, new.grid[0]), i64(number))
            last = i64(new.batch - 1)
            image = b.select(b.icmp_signed("<", image, last), image, last)
            one = b.read(b.address(first, b.scale(image, FLOAT * per_image)), F32)
            blend = np.where(lane_image == number, lanes, np.arange(lanes))
            value = b.permute(value, b.splat(one, lanes), blend)
        return value

    def plane(item: Value) -> None:
        group, channel = b.sdiv(item, i64(new.channels)), b.srem(item, i64(new.channels))
        out = _plane(b, y, new, group, channel)
        operands = [
            _plane(b, base, layout, group, channel)
            if isinstance(layout, Tiles)
            else shared(base, layout, group, channel)
            for base, layout in zip(inputs, spec.inputs, strict=True)
        ]

        def vector(row: Value, column: Value) -> None:
            def place(columns: int) -> Value:
                across = b.scale(column, new.vector)
                return b.add(b.scale(row, columns * new.vector), across)

            values = [
                b.read(operand, floats, place(layout.columns))
                if isinstance(layout, Tiles)
                else operand
                for operand, layout in zip(operands, spec.inputs, strict=True)
            ]
            value = emit_steps(b, spec.steps, values) if spec.steps else values[0]
            if not new.exact:
                value = b.cover(value, b.read(mask, words, place(wide)), new.fill)
            b.write(value, out, place(new.columns))

        b.loop(
            i64(0),
            i64(high),
            lambda row: b.loop(i64(0), i64(wide), lambda column: vector(row, column)) and None,
        )

    b.loop(begin, end, plane)
    b.ret_void()
    return b.function
