"""Rows into lane tiles and back, a square of lanes x lanes values at a time.

The rows of a tile are contiguous in an array [batch, height, width, channels]: their (column,
channel) pairs are floats one behind the other. As many of them as a vector has lanes, from each
lane's tile, are a square whose transpose has a vector for each pair: what tiles hold.
"""

import dataclasses
from collections.abc import Callable, Sequence

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.emit import I32, Builder, Code, Value, i64, vector_of
from feather_jax.cpu.tiles import FLOAT, Tiles

# Squares of a tile's row that are written out one by one, at most.
SQUARES = 64


@dataclasses.dataclass(frozen=True)
class RowsToTiles:
    """An array [batch, height, width, channels] from rows into tiles, without their halos.

    Operands: y, x, `tile_rows(y)`. Work items are the rows of the tiles.
    """

    y: Tiles

    @property
    def items(self) -> int:
        return self.y.groups * self.y.tile[0]


@dataclasses.dataclass(frozen=True)
class TilesToRows:
    """An array from tiles into [batch, height, width, channels].

    Operands: y, x, `tile_rows(x)`. Work items are the rows of the tiles.
    """

    x: Tiles

    @property
    def items(self) -> int:
        return self.x.groups * self.x.tile[0]


def has_squares(tiles: Tiles) -> bool:
    """Whether whole squares make up an array: no tile ends beyond a row, and rows are long enough.

    Where a pixel's channels are no whole squares, the code has one for each square.
    """
    length = tiles.tile[1] * tiles.channels
    few = tiles.channels % tiles.lanes == 0 or length <= SQUARES * tiles.lanes
    return tiles.tile[1] * tiles.grid[2] == tiles.width and length >= tiles.lanes and few


def tile_rows(tiles: Tiles) -> np.ndarray:
    """Where the rows of the tiles begin in the array.

    Returns:
      int32 [groups x tile height, lanes]: the number of the element; of a row outside the array,
      that of its last row, inverted.
    """
    group = np.arange(tiles.groups)[:, None, None]
    row = np.arange(tiles.tile[0])[:, None]
    lane = np.arange(tiles.lanes)
    images, down, across = tiles.grid
    image = group * images + lane // (down * across)
    y = lane // across % down * tiles.tile[0] + row
    x = lane % across * tiles.tile[1]
    outside = (image >= tiles.batch) | (y >= tiles.height)
    image, y = np.minimum(image, tiles.batch - 1), np.minimum(y, tiles.height - 1)
    number = ((image * tiles.height + y) * tiles.width + x) * tiles.channels
    return np.where(outside, ~number, number).reshape(-1, tiles.lanes).astype(np.int32)


def emit_rows_to_tiles(code: Code, spec: RowsToTiles) -> ir.Function:
    """void f(y, x, tile_rows, begin, end)."""
    b, (y, x, table, begin, end) = code.start("rows_to_tiles", 3)
    tiles = spec.y
    covered = tiles.batch % tiles.grid[0] or tiles.grid[1] * tiles.tile[0] > tiles.height

    def row(item: Value) -> None:
        own = b.address(table, b.scale(item, tiles.vector))
        sources = [b.address(x, _start(b, own, lane)) for lane in range(tiles.lanes)]
        out = _first_vector(b, y, tiles, item)
        numbers = b.read(own, vector_of(tiles.lanes, I32))
        mask = b.not_(b.ashr(numbers, ir.Constant(numbers.type, [31] * tiles.lanes)))

        def square(offset: Value, places: Sequence[Value]) -> None:
            rows = [b.read(source, vector_of(tiles.lanes), offset, FLOAT) for source in sources]
            for value, place in zip(_transposed(b, rows), places, strict=True):
                b.write(b.cover(value, mask, tiles.fill) if covered else value, out, place)

        _squares(b, tiles, square)

    b.loop(begin, end, row)
    b.ret_void()
    return b.function


def emit_tiles_to_rows(code: Code, spec: TilesToRows) -> ir.Function:
    """void f(y, x, tile_rows, begin, end)."""
    b, (y, x, table, begin, end) = code.start("tiles_to_rows", 3)
    tiles = spec.x
    partial = tiles.batch % tiles.grid[0] or tiles.grid[1] * tiles.tile[0] > tiles.height

    def row(item: Value) -> None:
        own = b.address(table, b.scale(item, tiles.vector))
        targets = [b.address(y, _start(b, own, lane)) for lane in range(tiles.lanes)]
        inside = [
            b.icmp_signed(">=", b.read(own, I32, FLOAT * lane), ir.Constant(I32, 0))
            for lane in range(tiles.lanes)
        ]
        source = _first_vector(b, x, tiles, item)

        def square(offset: Value, places: Sequence[Value]) -> None:
            vectors = [b.read(source, vector_of(tiles.lanes), place) for place in places]
            for lane, value in enumerate(_transposed(b, vectors)):
                if not partial:
                    b.write(value, targets[lane], offset, FLOAT)
                    continue
                with b.if_then(inside[lane]):
                    b.write(value, targets[lane], offset, FLOAT)

        _squares(b, tiles, square)

    b.loop(begin, end, row)
    b.ret_void()
    return b.function


def _start(b: Builder, row: Value, lane: int) -> Value:
    """Bytes to where a lane's row begins in the array."""
    number = b.read(row, I32, FLOAT * lane)
    number = b.xor(number, b.ashr(number, ir.Constant(I32, 31)))  # as it was, if inverted
    return b.scale(b.sext(number, ir.IntType(64)), FLOAT)


def _first_vector(b: Builder, base: Value, tiles: Tiles, item: Value) -> Value:
    """The first vector of a row of the tiles, in channel 0."""
    high = i64(tiles.tile[0])
    group, row = b.sdiv(item, high), b.srem(item, high)
    own = b.address(base, b.scale(group, tiles.group))
    return b.address(b.address(own, b.scale(row, tiles.columns * tiles.vector)), tiles.at(0, 0))


def _squares(b: Builder, tiles: Tiles, square: Callable[[Value, Sequence[Value]], None]) -> None:
    """square(offset of its first float in a row, offsets of its vectors) for all of a tile's row.

    The last may begin before the one before it ends.
    """
    lanes, channels = tiles.lanes, tiles.channels
    length = tiles.tile[1] * channels
    if channels % lanes:
        starts = [*range(0, length - lanes + 1, lanes)]
        if length % lanes:
            starts.append(length - lanes)
        for start in starts:
            pairs = [divmod(start + i, channels) for i in range(lanes)]
            places = [column * tiles.vector + channel * tiles.plane for column, channel in pairs]
            square(i64(FLOAT * start), [i64(place) for place in places])
        return

    def column(number: Value) -> None:
        def some_channels(first: Value) -> None:
            offset = b.add(b.scale(number, FLOAT * channels), b.scale(first, FLOAT))
            start = b.add(b.scale(number, tiles.vector), b.scale(first, tiles.plane))
            square(offset, [b.add(start, i64(i * tiles.plane)) for i in range(lanes)])

        b.loop(i64(0), i64(channels), some_channels, step=lanes)

    b.loop(i64(0), i64(tiles.tile[1]), column)


def _transposed(b: Builder, rows: Sequence[Value]) -> list[Value]:
    """The columns of a square: halves, quarters ... change places, as in a fast transform."""
    lanes, values = len(rows), list(rows)
    step = lanes // 2
    numbers = np.arange(lanes)
    while step:
        upper = (numbers & step) == 0  # lanes that stay
        first = np.where(upper, numbers, numbers - step + lanes)
        second = np.where(upper, numbers + step, numbers + lanes)
        for i in range(lanes):
            if not i & step:
                x, y = values[i], values[i + step]
                values[i], values[i + step] = b.permute(x, y, first), b.permute(x, y, second)
        step //= 2
    return values
