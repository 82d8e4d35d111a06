"""The sparse convolution: it multiplies what is not zero, in lane tiles.

A block of pixels' accumulators stay in registers while an output channel's weights are gone
through, each broadcast and multiplied with the vectors that lie its offset behind the block's
pixels. Input channels may be taken in chunks, so that what a block reads of one chunk stays in the
first cache; accumulators are stored and read again in between.
"""

import dataclasses
import math

import llvmlite.ir as ir

from feather_jax.cpu.emit import Code, Value, i64
from feather_jax.cpu.graph import Steps
from feather_jax.cpu.pack import ROW
from feather_jax.cpu.tiles import Tiles, mask_tiles
from feather_jax.cpu.visit import Visit, emit_lists, emit_panels, emit_taps


@dataclasses.dataclass(frozen=True)
class SparseConvolution:
    """A convolution of one tiled array into another.

    Operands: y, x, residual (y again where there is none), the mask of y's pixels, bias, and what
    is packed: rows, weights, offsets, panel rows, panels. Work items are blocks of pixels; or
    output channels, as many as a panel has; or groups of channels where there are several, whose
    planes then stay in the cache while all blocks are gone through.

    Attributes:
      x, y, residual: layouts; the strides of x's windows relate x's tiles to y's.
      strides: by height and width.
      block: rows and columns of a tile that are computed at a time; the columns divide the tile's.
      groups: of channels.
      chunks: of input channels.
      panel: output channels of a panel; 0 where all weights are in lists.
      listed: whether the lists of channels with panels have any weights.
      prefetch: how many cache lines of weights each list fetches, ahead of its own.
      first: bytes from a block's first pixel to the first vector that is read for it.
      bits: of an offset.
      step: how many weights of a list are multiplied at a time.
      taps: of a depthwise convolution without zeros, bytes from the first vector to what each
        weight of a channel multiplies; its lists are not gone through.
      activation: steps of one argument.
      by_channel: whether work items are output channels.
    """

    x: Tiles
    y: Tiles
    residual: Tiles | None
    strides: tuple[int, int]
    block: tuple[int, int]
    groups: int
    chunks: int
    panel: int
    listed: bool
    prefetch: int
    first: int
    bits: int
    step: int
    taps: tuple[int, ...]
    activation: Steps
    by_channel: bool

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Groups of images, and rows and columns of blocks."""
        (high, wide), (rows, columns) = self.y.tile, self.block
        return self.y.groups, -(-high // rows), -(-wide // columns)

    @property
    def parts(self) -> int:
        """Panels, with a last one that may be less, or channels where there are none."""
        return -(-self.y.channels // max(1, self.panel))

    @property
    def items(self) -> int:
        if self.groups > 1:
            return self.groups
        return self.parts if self.by_channel else math.prod(self.blocks)


def emit_sparse_convolution(code: Code, spec: SparseConvolution) -> ir.Function:
    """void f(operands ..., begin, end)."""
    b, (*arrays, begin, end) = code.start("convolution", 10)
    y, x, residual, mask, bias, rows, weights, offsets, panel_rows, panels = arrays
    high = spec.block[0]
    _, down, across = spec.blocks
    last_high = spec.y.tile[0] - (down - 1) * high
    channels, panel = spec.y.channels, spec.panel
    whole = channels // panel if panel else 0  # panels

    def block(number: Value, first: Value, stop: Value, x: Value = x) -> None:
        """All chunks of one block of pixels, for parts first to stop of the output channels."""
        column = b.srem(number, i64(across))
        row = b.srem(b.sdiv(number, i64(across)), i64(down))
        group = b.sdiv(number, i64(across * down))

        def place(base: Value, tiles: Tiles, steps: tuple[int, int]) -> Value:
            """The block's first vector in channel 0."""
            per_row = spec.block[0] * steps[0] * tiles.columns * tiles.vector
            per_column = spec.block[1] * steps[1] * tiles.vector
            offset = b.add(b.scale(row, per_row), b.scale(column, per_column))
            if tiles.groups > 1:
                offset = b.add(offset, b.scale(group, tiles.group))
            return b.address(b.address(base, offset), tiles.at(0, 0))

        own_y, own_x = place(y, spec.y, (1, 1)), place(x, spec.x, spec.strides)
        shared = [
            place(residual, spec.residual, (1, 1)) if spec.residual else residual,
            place(mask, mask_tiles(spec.y), (1, 1)),
            bias,
        ]

        def pointers(chunk: int) -> list[Value]:
            channel = spec.x.channels * chunk // spec.chunks
            return [own_y, b.address(own_x, spec.first + channel * spec.x.plane), *shared]

        def lists(chunk: int, height: int, start: bool, low: Value, high: Value) -> None:
            """The lists of channels low to high; `start` if nothing has been added up for them."""
            visit = visit_of(spec, height, chunk == 0 and start, chunk == spec.chunks - 1)
            if spec.taps:
                function = emit_taps(code, visit, spec.taps)
                b.call(function, [*pointers(chunk), weights, low, high])
                return
            table = b.address(rows, chunk * ROW * (channels + 1))
            arguments = [*pointers(chunk), table, weights, offsets, low, high]
            b.call(emit_lists(code, visit), arguments)

        def chunk_by_chunk(height: int) -> None:
            for chunk in range(spec.chunks):
                if not panel:
                    lists(chunk, height, True, first, stop)
                    continue
                last = chunk == spec.chunks - 1 and not spec.listed
                visit = visit_of(spec, height, chunk == 0, last)
                table = b.address(panel_rows, chunk * 4 * (whole + 1))
                until = b.smaller_index(stop, i64(whole))
                function = emit_panels(code, visit, panel)
                b.call(function, [*pointers(chunk), table, panels, first, until])
                if spec.listed:
                    low, high = b.scale(first, panel), b.scale(until, panel)
                    lists(chunk, height, False, low, high)
                if channels % panel:  # those of the last part, which have no panel
                    low = b.larger_index(b.scale(first, panel), i64(whole * panel))
                    high = b.smaller_index(b.scale(stop, panel), i64(channels))
                    lists(chunk, height, True, low, high)

        if last_high == high:
            chunk_by_chunk(high)
        else:
            with b.if_else(b.icmp_signed("==", row, i64(down - 1))) as (lowest, others):
                with lowest:
                    chunk_by_chunk(last_high)
                with others:
                    chunk_by_chunk(high)

    def all_blocks(first: Value, stop: Value, x: Value = x) -> None:
        blocks = i64(math.prod(spec.blocks))
        b.loop(i64(0), blocks, lambda number: block(number, first, stop, x))

    if spec.groups > 1:
        size, planes = channels // spec.groups, spec.x.channels // spec.groups * spec.x.plane

        def one_group(number: Value) -> None:
            first, stop = b.scale(number, size), b.scale(b.add(number, i64(1)), size)
            all_blocks(first, stop, b.address(x, b.scale(number, planes)))

        b.loop(begin, end, one_group)
    elif spec.by_channel:
        all_blocks(begin, end)
    else:
        b.loop(begin, end, lambda number: block(number, i64(0), i64(spec.parts)))
    b.ret_void()
    return b.function


def visit_of(spec: SparseConvolution, high: int, first: bool, last: bool) -> Visit:
    """The visit of a block of `high` rows; `first` and `last` of its output channels."""
    x, y, residual = spec.x, spec.y, spec.residual if first else None

    def places(tiles: Tiles, down: int = 1, across: int = 1) -> tuple[int, ...]:
        return tuple(
            (row * down * tiles.columns + column * across) * tiles.vector
            for row in range(high)
            for column in range(spec.block[1])
        )

    covered = last and not y.exact
    return Visit(
        lanes=y.lanes,
        reads=places(x, *spec.strides),
        writes=places(y),
        starts=places(residual) if residual else (),
        covers=places(mask_tiles(y)) if covered else (),
        planes=(y.plane, residual.plane if residual else 0),
        first=first,
        activation=spec.activation if last else (),
        fill=y.fill if covered else 0.0,
        prefetch=spec.prefetch,
        bits=spec.bits,
        step=spec.step,
    )
