"""The sparse convolution: LLVM IR that multiplies what is not zero, and the weights it reads.

Every output channel is a list of (weight, offset of the input vector) pairs. A block of pixels'
accumulators stay in registers while a channel's list is gone through: each pair is one 64-bit load,
the weight is broadcast, and multiplied with the vectors that lie `offset` behind each of the
block's pixels. Input channels may be taken in chunks, so that what a block reads of one chunk stays
in the first cache; accumulators are stored and read again in between.
"""

import dataclasses
import math
from typing import Any

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.emit import F32, I32, I64, Builder, Code, Value, i64, vector_of
from feather_jax.cpu.expressions import emit_steps
from feather_jax.cpu.graph import Convolution, Steps
from feather_jax.cpu.tiles import LINE, Tiles

AHEAD = 2048  # bytes of pairs from which on they are fetched into the first cache
PAIR = 8  # bytes of a (weight, offset) or a (first pair, output channel)


@dataclasses.dataclass(frozen=True)
class SparseConvolution:
    """A convolution of one tiled array into another, with the weights as lists of pairs.

    Operands: y, x, residual (y again where there is none), the mask of y's pixels, bias, rows,
    pairs. Work items are blocks of pixels, or output channels.

    Attributes:
      x, y, residual: layouts; the strides of x's windows relate x's tiles to y's.
      strides: by height and width.
      block: rows and columns of a tile that are computed at a time; the columns divide the tile's.
      chunks: of input channels.
      prefetch: how many cache lines of pairs each list fetches, ahead of its own.
      activation: steps of one argument.
      by_channel: whether work items are output channels.
    """

    x: Tiles
    y: Tiles
    residual: Tiles | None
    strides: tuple[int, int]
    block: tuple[int, int]
    chunks: int
    prefetch: int
    activation: Steps
    by_channel: bool

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Groups of images, and rows and columns of blocks."""
        (high, wide), (rows, columns) = self.y.tile, self.block
        return self.y.groups, -(-high // rows), -(-wide // columns)

    @property
    def items(self) -> int:
        return self.y.channels if self.by_channel else math.prod(self.blocks)


def pack(op: Convolution, x: Tiles, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """The lists of a convolution's weights, chunk by chunk and output channel by channel.

    Args:
      op: the convolution.
      x: the layout of its input.
      chunks: how many parts to take the input channels in.

    Returns:
      rows, int32 [chunks, output channels + 1, 2]: the list's first pair, and the channel; a list
      ends where the next begins. Pairs, [non-zeros]: weight (float32) and offset (int32 bytes).
    """
    inputs, outputs = op.weights.shape[2:]
    out, down, across, own = np.nonzero(op.weights.transpose(3, 0, 1, 2))
    channel = own + out // (outputs // op.groups) * inputs
    row = channel * chunks // (inputs * op.groups) * outputs + out

    order = np.lexsort((across, down, channel, row))
    out, down, across, own, channel = (each[order] for each in (out, down, across, own, channel))
    pairs = np.empty(len(row), [("weight", np.float32), ("offset", np.int32)])
    pairs["weight"] = op.weights[down, across, own, out]
    (top, _), (left, _) = op.padding
    place = (down * op.dilation[0] - top) * x.columns + across * op.dilation[1] - left
    offset = channel * x.plane + place * x.vector
    if offset.size and np.abs(offset).max() >= 1 << 31:
        raise ValueError("A layer's input is larger than 2 GiB; compile for a smaller batch.")
    pairs["offset"] = offset

    counts = np.bincount(row, minlength=chunks * outputs)
    starts = np.concatenate([[0], np.cumsum(counts)])
    rows = np.zeros((chunks, outputs + 1, 2), np.int32)
    rows[:, :, 0] = [starts[i * outputs : (i + 1) * outputs + 1] for i in range(chunks)]
    rows[:, :outputs, 1] = np.arange(outputs)
    return rows, pairs


def emit_sparse_convolution(code: Code, spec: SparseConvolution) -> ir.Function:
    """void f(y, x, residual, mask, bias, rows, pairs, begin, end)."""
    b, (y, x, residual, mask, bias, rows, pairs, begin, end) = code.start("convolution", 7)
    high = spec.block[0]
    _, down, across = spec.blocks
    last_high = spec.y.tile[0] - (down - 1) * high

    def visit(first: Value, stop: Value, block: Value) -> None:
        """All chunks of one block of pixels, for a range of output channels."""
        column = b.srem(block, i64(across))
        row = b.srem(b.sdiv(block, i64(across)), i64(down))
        group = b.sdiv(block, i64(across * down))

        def place(base: Value, tiles: Tiles, steps: tuple[int, int]) -> Value:
            """The block's first vector in channel 0."""
            per_row = spec.block[0] * steps[0] * tiles.columns * tiles.vector
            per_column = spec.block[1] * steps[1] * tiles.vector
            offset = b.add(b.scale(row, per_row), b.scale(column, per_column))
            if tiles.groups > 1:
                offset = b.add(offset, b.scale(group, tiles.group))
            return b.address(b.address(base, offset), tiles.at(0, 0))

        own = [
            place(y, spec.y, (1, 1)),
            place(x, spec.x, spec.strides),
            place(residual, spec.residual, (1, 1)) if spec.residual else residual,
            place(mask, mask_tiles(spec.y), (1, 1)),
        ]

        def chunk_by_chunk(height: int) -> None:
            for chunk in range(spec.chunks):
                table = b.address(rows, chunk * PAIR * (spec.y.channels + 1))
                function = _block(code, spec, height, chunk == 0, chunk == spec.chunks - 1)
                b.call(function, [*own, bias, table, pairs, first, stop])

        if last_high == high:
            chunk_by_chunk(high)
        else:
            with b.if_else(b.icmp_signed("==", row, i64(down - 1))) as (lowest, others):
                with lowest:
                    chunk_by_chunk(last_high)
                with others:
                    chunk_by_chunk(high)

    if spec.by_channel:
        b.loop(i64(0), i64(math.prod(spec.blocks)), lambda block: visit(begin, end, block))
    else:
        b.loop(begin, end, lambda block: visit(i64(0), i64(spec.y.channels), block))
    b.ret_void()
    return b.function


def mask_tiles(y: Tiles) -> Tiles:
    """The layout of the mask of y: one plane, without halo."""
    return dataclasses.replace(y, batch=1, channels=1, halo=((0, 0), (0, 0)), pitch=0)


def mask_of(y: Tiles) -> np.ndarray:
    """int32 [tile height, tile width, lanes]: all bits set inside the plane, none outside."""
    return -mask_tiles(y).inside().astype(np.int32)


def _block(code: Code, spec: SparseConvolution, high: int, first: bool, last: bool) -> ir.Function:
    """One chunk of a block of `high` rows, for a range of output channels.

    It depends on less than the specification, so layers share it.
    """
    wide = spec.block[1]
    x, y, residual = spec.x, spec.y, spec.residual if first else None
    vector = y.vector

    def places(tiles: Tiles, down: int = 1, across: int = 1) -> list[int]:
        return [
            (row * down * tiles.columns + column * across) * vector
            for row in range(high)
            for column in range(wide)
        ]

    reads, writes = places(x, *spec.strides), places(y)
    starts = places(residual) if residual else []
    fill = None if y.exact or not last else y.fill
    covers = places(mask_tiles(y)) if fill is not None else []
    activation = spec.activation if last else ()
    planes = (y.plane, residual.plane if residual else 0)
    key = (
        "block",
        *map(tuple, (reads, writes, starts, covers, planes)),
        *(y.lanes, activation, fill, first, spec.prefetch),
    )

    def emit() -> ir.Function:
        b, arguments = code.start("block", 7)
        y_at, x_at, residual_at, mask_at, bias_at, rows, pairs, begin, end = arguments
        kind = vector_of(y.lanes)

        def channel(index: Value) -> None:
            row = b.address(rows, b.scale(index, PAIR))
            low, high = b.read_index(row), b.read_index(row, PAIR)
            number = b.read_index(row, 4)
            out = b.address(y_at, b.scale(number, planes[0]))
            if first:
                start = b.splat(b.read(b.address(bias_at, b.scale(number, 4)), F32), y.lanes)
                sums = [start] * len(writes)
                if starts:
                    old = b.address(residual_at, b.scale(number, planes[1]))
                    sums = [b.fadd(start, b.read(old, kind, place)) for place in starts]
            else:
                sums = [b.read(out, kind, place) for place in writes]

            def pair(k: Value, *sums: Value) -> list[Value]:
                weight, offset = _read_pair(b, b.address(pairs, b.scale(k, PAIR)))
                weight = b.splat(weight, y.lanes)
                source = b.address(x_at, offset)
                return [
                    b.multiply_add(weight, b.read(source, kind, place), total)
                    for place, total in zip(reads, sums, strict=True)
                ]

            for line in range(spec.prefetch):
                ahead = b.address(pairs, b.scale(low, PAIR))
                b.prefetch(b.address(ahead, AHEAD + line * LINE))
            sums = b.loop(low, high, pair, sums)
            if activation:
                sums = [emit_steps(b, activation, [total]) for total in sums]
            if fill is not None:
                sums = [
                    cover(b, total, b.read(mask_at, vector_of(y.lanes, I32), place), fill)
                    for total, place in zip(sums, covers, strict=True)
                ]
            for total, place in zip(sums, writes, strict=True):
                b.write(total, out, place)

        b.loop(begin, end, channel)
        b.ret_void()
        return b.function

    return code.function(key, emit)


def _read_pair(b: Builder, pair: Value) -> tuple[Value, Value]:
    """The weight and the offset of a pair.

    On x86 in one load, the weight going through a general register: that leaves the load units to
    the activations. Elsewhere a product takes the lane of a register, so the weight is loaded.
    """
    if not b.code.target.x86:
        return b.read(pair, F32), b.read_index(pair, 4)
    both = b.read(pair, I64)
    return b.bitcast(b.trunc(both, I32), F32), b.ashr(both, i64(32))


def cover(b: Builder, value: Value, mask: Value, fill: float) -> Value:
    """`value` where the mask's bits are set and `fill` elsewhere."""
    bits = b.bitcast(value, mask.type)
    if fill == 0:
        return b.bitcast(b.and_(bits, mask), value.type)
    word = int(np.float32(fill).view(np.int32))
    filling = ir.Constant(mask.type, [word] * mask.type.count)
    return b.bitcast(b.or_(b.and_(bits, mask), b.and_(b.not_(mask), filling)), value.type)


def describe(spec: SparseConvolution) -> dict[str, Any]:
    """What a table of the plan says of it."""
    block = "x".join(map(str, spec.block))
    return {"tiles": str(spec.y), "block": block, "chunks": spec.chunks}
