"""Moves between layouts: rows to lane tiles and back, halos, and from tiles to other tiles."""

import dataclasses
import functools
from collections.abc import Iterator

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.emit import (
    F32,
    I1,
    I32,
    I64,
    POINTER,
    Code,
    Value,
    float_vector,
    i32,
    i64,
    vector_of,
)
from feather_jax.cpu.tiles import FLOAT, Tiles


@dataclasses.dataclass(frozen=True)
class ToTiles:
    """An array [batch, height, width, channels] from rows into tiles, their halos included.

    Operands: y, x, `places(y)`. Work items are the planes.
    """

    y: Tiles

    @property
    def items(self) -> int:
        return self.y.groups * self.y.channels


@dataclasses.dataclass(frozen=True)
class ToRows:
    """An array from tiles into [batch, height, width, channels].

    Operands: y, x, `pixels(x)`. Work items are the rows of each image.
    """

    x: Tiles

    @property
    def items(self) -> int:
        return self.x.batch * self.x.height


@dataclasses.dataclass(frozen=True)
class Halo:
    """The halos of an array in tiles, from the tiles around each. Work items are the planes.

    Operands: y, changed in place.
    """

    y: Tiles

    @property
    def items(self) -> int:
        return self.y.groups * self.y.channels


@dataclasses.dataclass(frozen=True)
class Retile:
    """From tiles into other tiles, halos included, by permutations of lanes.

    Operands: y, x. Work items are y's planes.
    """

    x: Tiles
    y: Tiles

    @property
    def items(self) -> int:
        return self.y.groups * self.y.channels


def places(y: Tiles) -> np.ndarray:
    """Where each lane of each vector of a plane lies in one group of images of an array of rows.

    Returns:
      int32 [rows, columns, lanes]: the number of the element in channel 0; -1 outside.
    """
    image, row, column = y.coordinates()
    number = ((image * y.height + row) * y.width + column) * y.channels
    return np.where(y.inside(), number, -1).astype(np.int32)


def pixels(x: Tiles) -> np.ndarray:
    """Where each pixel of one group of images lies in channel 0 of its tiles.

    Returns:
      int32 [images of a group, height, width]: bytes.
    """
    _, down, across = x.grid
    image, row, column = (
        np.arange(size).reshape(shape)
        for size, shape in zip(
            (x.grid[0], x.height, x.width), ((-1, 1, 1), (-1, 1), (-1,)), strict=True
        )
    )
    (high, wide), ((top, _), (left, _)) = x.tile, x.halo
    lane = (image * down + row // high) * across + column // wide
    vector = (row % high + top) * x.columns + column % wide + left
    return (vector * x.vector + FLOAT * lane).astype(np.int32)


def emit_to_tiles(code: Code, spec: ToTiles) -> ir.Function:
    """void f(y, x, places, begin, end): a gather a vector, its outer lanes masked."""
    b, (y, x, table, begin, end) = code.start("to_tiles", 3)
    tiles, lanes = spec.y, spec.y.lanes
    images = tiles.grid[0]
    image_bytes = FLOAT * tiles.height * tiles.width * tiles.channels
    numbers, floats, flags = (vector_of(lanes, kind) for kind in (I32, F32, I1))
    wide, pointers = vector_of(lanes, I64), vector_of(lanes, POINTER)
    gather = code.intrinsic(
        f"llvm.masked.gather.v{lanes}f32.v{lanes}p0", floats, [pointers, flags, floats]
    )
    lane_image = np.arange(lanes) // (lanes // images)

    def plane(item: Value) -> None:
        group, channel = b.sdiv(item, i64(tiles.channels)), b.srem(item, i64(tiles.channels))
        source = b.address(x, b.scale(group, images * image_bytes))
        source = b.address(source, b.scale(channel, FLOAT))
        out = b.address(y, b.scale(group, tiles.group))
        out = b.address(out, b.scale(channel, tiles.plane))
        base = b.splat(b.ptrtoint(source, I64), lanes)
        left = b.sub(i32(tiles.batch), b.scale(b.trunc(group, I32), images))
        exists = b.icmp_signed("<", ir.Constant(numbers, lane_image.tolist()), b.splat(left, lanes))

        def vector(index: Value) -> None:
            at = b.read(b.address(table, b.scale(index, tiles.vector)), numbers)
            inside = b.and_(exists, b.icmp_signed(">=", at, ir.Constant(numbers, [0] * lanes)))
            bytes_behind = b.mul(b.sext(at, wide), ir.Constant(wide, [FLOAT] * lanes))
            addresses = b.inttoptr(b.add(base, bytes_behind), pointers)
            value = b.call(gather, [addresses, inside, float_vector(tiles.fill, lanes)])
            b.write(value, out, b.scale(index, tiles.vector))

        b.loop(i64(0), i64(tiles.rows * tiles.columns), vector)

    b.loop(begin, end, plane)
    b.ret_void()
    return b.function


def emit_to_rows(code: Code, spec: ToRows) -> ir.Function:
    """void f(y, x, pixels, begin, end)."""
    b, (y, x, table, begin, end) = code.start("to_rows", 3)
    tiles = spec.x
    row_bytes = FLOAT * tiles.width * tiles.channels

    def row(item: Value) -> None:
        image, number = b.sdiv(item, i64(tiles.height)), b.srem(item, i64(tiles.height))
        group, lane = b.sdiv(image, i64(tiles.grid[0])), b.srem(image, i64(tiles.grid[0]))
        source = b.address(x, b.scale(group, tiles.group))
        out = b.address(y, b.scale(item, row_bytes))
        numbers = b.add(b.scale(lane, tiles.height), number)
        own = b.address(table, b.scale(numbers, FLOAT * tiles.width))

        def pixel(column: Value) -> None:
            first = b.address(source, b.read_index(own, b.scale(column, FLOAT)))
            place = b.address(out, b.scale(column, FLOAT * tiles.channels))

            def channel(index: Value) -> None:
                value = b.read(first, F32, b.scale(index, tiles.plane))
                b.write(value, place, b.scale(index, FLOAT))

            b.loop(i64(0), i64(tiles.channels), channel)

        b.loop(i64(0), i64(tiles.width), pixel)

    b.loop(begin, end, row)
    b.ret_void()
    return b.function


def emit_halo(code: Code, spec: Halo) -> ir.Function:
    """void f(y, begin, end): a halo's vector is one of the tile's, its lanes moved by whole tiles.

    Along an edge the move is the same for all vectors, so that rows and columns are loops.
    """
    b, (y, begin, end) = code.start("halo", 1)
    tiles = spec.y
    (high, wide), ((top, bottom), (left, right)) = tiles.tile, tiles.halo
    fill = float_vector(tiles.fill, tiles.lanes)
    kind = vector_of(tiles.lanes)

    def move(plane: Value, row: int, column: int, more: Value | None = None) -> None:
        """Fills the vector at (row, column), and `more` bytes behind it."""
        down, across = row // high, column // wide
        source = tiles.at(row - down * high, column - across * wide)
        lanes = _neighbours(tiles, down, across)
        target = b.address(plane, more) if more is not None else plane
        value = b.permute(b.read(target, kind, source), fill, lanes)
        b.write(value, target, tiles.at(row, column))

    def plane(item: Value) -> None:
        channel = b.srem(item, i64(tiles.channels))
        own = b.address(y, b.scale(b.sdiv(item, i64(tiles.channels)), tiles.group))
        own = b.address(own, b.scale(channel, tiles.plane))
        sides = [*range(-left, 0), *range(wide, wide + right)]

        def inner_row(offset: Value) -> None:
            for column in sides:
                move(own, 0, column, offset)

        if sides:
            step = tiles.columns * tiles.vector
            b.loop(i64(0), i64(high * step), inner_row, step=step)
        for row in [*range(-top, 0), *range(high, high + bottom)]:
            for column in sides:
                move(own, row, column)
            b.loop(
                i64(0),
                i64(wide * tiles.vector),
                functools.partial(move, own, row, 0),
                step=tiles.vector,
            )

    b.loop(begin, end, plane)
    b.ret_void()
    return b.function


def _neighbours(tiles: Tiles, down: int, across: int) -> list[int]:
    """For each lane, the lane of the tile `down` and `across` of it in the same image.

    The number of lanes where there is none.
    """
    images, high, wide = tiles.grid
    lanes = np.full((images, high, wide), tiles.lanes)
    numbers = np.arange(tiles.lanes).reshape(images, high, wide)
    rows = slice(max(0, -down), max(0, min(high, high - down)))
    columns = slice(max(0, -across), max(0, min(wide, wide - across)))
    from_rows = slice(max(0, down), max(0, min(high, high + down)))
    from_columns = slice(max(0, across), max(0, min(wide, wide + across)))
    lanes[:, rows, columns] = numbers[:, from_rows, from_columns]
    return lanes.ravel().tolist()


def emit_retile(code: Code, spec: Retile) -> ir.Function:
    """void f(y, x, begin, end): every vector of y is a blend of those of x it needs."""
    b, (y, x, begin, end) = code.start("retile", 2)
    old, new = spec.x, spec.y
    if old.grid[0] != new.grid[0]:
        raise ValueError("Only tiles with as many images to a vector turn into each other.")
    kind, fill = vector_of(new.lanes), float_vector(new.fill, new.lanes)

    def plane(item: Value) -> None:
        group, channel = b.sdiv(item, i64(new.channels)), b.srem(item, i64(new.channels))
        source = b.address(x, b.scale(group, old.group))
        source = b.address(source, b.scale(channel, old.plane))
        out = b.address(y, b.scale(group, new.group))
        out = b.address(out, b.scale(channel, new.plane))
        for place, parts in _blends(old, new):
            value: Value = fill
            for offset, lanes in parts:
                value = b.permute(value, b.read(source, kind, offset), lanes)
            b.write(value, out, place)

    b.loop(begin, end, plane)
    b.ret_void()
    return b.function


def _blends(old: Tiles, new: Tiles) -> Iterator[tuple[int, list[tuple[int, list[int]]]]]:
    """For each vector of a plane of `new`: its offset, and what it takes of which of old's."""
    image, row, column = np.broadcast_arrays(*new.coordinates())
    inside = new.inside()
    _, down, across = old.grid
    lane = (image * down + row // old.tile[0]) * across + column // old.tile[1]
    (top, _), (left, _) = new.halo
    for i, j in np.ndindex(inside.shape[:2]):
        parts: dict[int, list[int]] = {}
        for own in np.flatnonzero(inside[i, j]):
            place = old.at(row[i, j, own] % old.tile[0], column[i, j, own] % old.tile[1])
            lanes = parts.setdefault(int(place), list(range(new.lanes)))
            lanes[own] = new.lanes + int(lane[i, j, own])
        yield new.at(i - top, j - left), list(parts.items())
