"""The product of two activations, as attention has it: row-major, in register tiles."""

from collections.abc import Callable, Sequence

import llvmlite.ir as ir

from feather_jax.cpu.emit import F32, Builder, Value, i64
from feather_jax.cpu.functions import constant, multiply_add
from feather_jax.cpu.graph import Node

# Rows of a register tile; it has as many vectors of columns as fit `Target.accumulators`.
ROWS = 4


def matmul(
    left: Node, right: Node
) -> tuple[int, Callable[[Builder, Value, Sequence[Value]], None]]:
    """The work items of [batch, m, k] x [batch, k, n], some rows each, and what each does."""
    (batch, m, k), n = left.shape, right.shape[2]
    strips = -(-m // ROWS)

    def emit(b: Builder, item: Value, arrays: Sequence[Value]) -> None:
        output, x, y = arrays
        image, strip = b.sdiv(item, i64(strips)), b.srem(item, i64(strips))
        row = b.add(b.mul(image, i64(m)), b.mul(strip, i64(ROWS)))
        x = b.address(x, b.mul(row, i64(4 * k)))
        output = b.address(output, b.mul(row, i64(4 * n)))
        y = b.address(y, b.mul(image, i64(4 * k * n)))
        if m % ROWS == 0:
            return _strip(b, output, x, y, ROWS, k, n)
        short = b.icmp_signed("==", strip, i64(strips - 1))
        with b.if_else(short) as (last, others):
            with last:
                _strip(b, output, x, y, m % ROWS, k, n)
            with others:
                if m > ROWS:
                    _strip(b, output, x, y, ROWS, k, n)
        return None

    return batch * strips if n else 0, emit


def _strip(b: Builder, output: Value, x: Value, y: Value, rows: int, k: int, n: int) -> None:
    """Some rows: tiles of vectors, then what is left of the columns in ever smaller ones."""
    lanes = b.code.target.lanes
    vectors = max(1, b.code.target.accumulators // ROWS)
    column = 0
    for width, count in ((lanes, vectors), *((lanes >> i, 1) for i in range(lanes.bit_length()))):
        tile = width * count
        turns = (n - column) // tile
        if turns:
            high = i64(column + turns * tile)

            def one(j: Value, width: int = width, count: int = count) -> None:
                _tile(b, output, x, y, rows, k, n, j, width, count)

            b.loop(i64(column), high, one, step=tile)
            column += turns * tile


def _tile(
    b: Builder,
    output: Value,
    x: Value,
    y: Value,
    rows: int,
    k: int,
    n: int,
    column: Value,
    width: int,
    count: int,
) -> None:
    """`rows` by `count` vectors of `width` columns, in registers over all of k."""
    kind = F32 if width == 1 else ir.VectorType(F32, width)
    y, output = (b.address(each, b.mul(column, i64(4))) for each in (y, output))

    def step(i: Value, *sums: Value) -> list[Value]:
        row = b.address(y, b.mul(i, i64(4 * n)))
        right = [b.read(row, kind, 4 * width * j, align=4) for j in range(count)]
        place = b.address(x, b.mul(i, i64(4)))
        result = []
        for r in range(rows):
            own = b.read(place, F32, 4 * k * r)
            factor = own if width == 1 else b.splat(own, width)
            for j in range(count):
                result.append(multiply_add(b, factor, right[j], sums[r * count + j]))
        return result

    sums = b.loop(i64(0), i64(k), step, [constant(kind, 0)] * (rows * count))
    for r in range(rows):
        for j in range(count):
            b.write(sums[r * count + j], output, 4 * (n * r + width * j), align=4)
