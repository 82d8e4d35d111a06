"""A visit: the products of one block of pixels with one chunk of input channels, in registers."""

import dataclasses
from collections.abc import Sequence

import llvmlite.ir as ir

from feather_jax.cpu.emit import F32, I32, I64, Builder, Code, Value, i64, vector_of
from feather_jax.cpu.expressions import emit_steps
from feather_jax.cpu.graph import Steps
from feather_jax.cpu.pack import PAIR, panel_bytes
from feather_jax.cpu.tiles import FLOAT, LINE

AHEAD = 2048  # bytes of weights from which on they are fetched into the first cache


@dataclasses.dataclass(frozen=True)
class Visit:
    """What a visit's code depends on: less than a layer does, so that layers share it.

    Attributes:
      lanes: of a vector.
      reads: bytes from the block's first input vector to that of each of its pixels.
      writes: the same in the output.
      starts: in the residual that is added; none without one.
      covers: in the mask of what is inside the plane; none where it all is.
      planes: bytes from one channel to the next, of the output and of the residual.
      first: whether accumulators start from the bias and residual, or from what the output holds.
      activation, fill: applied to the accumulators, and put outside the plane, at the last visit.
      prefetch: how many cache lines of weights are fetched for each list, ahead of its own.
    """

    lanes: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    starts: tuple[int, ...]
    covers: tuple[int, ...]
    planes: tuple[int, int]
    first: bool
    activation: Steps
    fill: float
    prefetch: int


@dataclasses.dataclass(frozen=True)
class _Pointers:
    """The block's first vectors in channel 0, and the biases."""

    y: Value
    x: Value
    residual: Value
    mask: Value
    bias: Value


def emit_lists(code: Code, visit: Visit) -> ir.Function:
    """void f(y, x, residual, mask, bias, rows, pairs, begin, end): lists begin to end of `rows`."""

    def emit() -> ir.Function:
        b, arguments = code.start("lists", 7)
        *pointers, rows, pairs, begin, end = arguments
        at = _Pointers(*pointers)

        def row(index: Value) -> None:
            own = b.address(rows, b.scale(index, PAIR))
            low, high = b.read_index(own), b.read_index(own, PAIR)
            channel = b.read_index(own, 4)
            sums = _start(b, visit, at, channel)
            _prefetch(b, visit, b.address(pairs, b.scale(low, PAIR)))

            def pair(k: Value, *sums: Value) -> list[Value]:
                weight, offset = _read_pair(b, b.address(pairs, b.scale(k, PAIR)))
                return _multiply_add(b, visit, [weight], b.address(at.x, offset), sums)

            _finish(b, visit, at, channel, b.loop(low, high, pair, sums))

        b.loop(begin, end, row)
        b.ret_void()
        return b.function

    return code.function(("lists", visit), emit)


def emit_panels(code: Code, visit: Visit, panel: int) -> ir.Function:
    """void f(y, x, residual, mask, bias, rows, panels, begin, end): panels of `panel` channels.

    An input vector is read once for all channels of a panel.
    """

    def emit() -> ir.Function:
        b, arguments = code.start("panels", 7)
        *pointers, rows, panels, begin, end = arguments
        at, size, count = _Pointers(*pointers), panel_bytes(panel), len(visit.writes)

        def group(index: Value) -> None:
            own = b.address(rows, b.scale(index, 4))
            low, high = b.read_index(own), b.read_index(own, 4)
            channels = [b.add(b.scale(index, panel), i64(i)) for i in range(panel)]
            sums = [total for channel in channels for total in _start(b, visit, at, channel)]

            def column(k: Value, *sums: Value) -> list[Value]:
                entry = b.address(panels, b.scale(k, size))
                b.prefetch(b.address(entry, AHEAD))
                weights = [b.read(entry, F32, FLOAT * (i + 1)) for i in range(panel)]
                source = b.address(at.x, b.read_index(entry))
                return _multiply_add(b, visit, weights, source, sums)

            sums = b.loop(low, high, column, sums)
            for i, channel in enumerate(channels):
                _finish(b, visit, at, channel, sums[i * count : (i + 1) * count])

        b.loop(begin, end, group)
        b.ret_void()
        return b.function

    return code.function(("panels", visit, panel), emit)


def _start(b: Builder, visit: Visit, at: _Pointers, channel: Value) -> list[Value]:
    """The accumulators of a channel."""
    kind = vector_of(visit.lanes)
    if not visit.first:
        out = b.address(at.y, b.scale(channel, visit.planes[0]))
        return [b.read(out, kind, place) for place in visit.writes]
    bias = b.splat(b.read(b.address(at.bias, b.scale(channel, FLOAT)), F32), visit.lanes)
    if not visit.starts:
        return [bias] * len(visit.writes)
    old = b.address(at.residual, b.scale(channel, visit.planes[1]))
    return [b.fadd(bias, b.read(old, kind, place)) for place in visit.starts]


def _multiply_add(
    b: Builder, visit: Visit, weights: Sequence[Value], source: Value, sums: Sequence[Value]
) -> list[Value]:
    """The accumulators, channel by channel, with a weight of each times the block's vectors."""
    kind, count = vector_of(visit.lanes), len(visit.reads)
    factors = [b.splat(weight, visit.lanes) for weight in weights]
    results = list(sums)
    for i, place in enumerate(visit.reads):
        vector = b.read(source, kind, place)
        for j, factor in enumerate(factors):
            results[j * count + i] = b.multiply_add(factor, vector, sums[j * count + i])
    return results


def _finish(b: Builder, visit: Visit, at: _Pointers, channel: Value, sums: Sequence[Value]) -> None:
    """Activates and writes a channel's accumulators."""
    out = b.address(at.y, b.scale(channel, visit.planes[0]))
    if visit.activation:
        sums = [emit_steps(b, visit.activation, [total]) for total in sums]
    if visit.covers:
        masks = [b.read(at.mask, vector_of(visit.lanes, I32), place) for place in visit.covers]
        pairs = zip(sums, masks, strict=True)
        sums = [b.cover(total, mask, visit.fill) for total, mask in pairs]
    for total, place in zip(sums, visit.writes, strict=True):
        b.write(total, out, place)


def _prefetch(b: Builder, visit: Visit, weights: Value) -> None:
    for line in range(visit.prefetch):
        b.prefetch(b.address(weights, AHEAD + line * LINE))


def _read_pair(b: Builder, pair: Value) -> tuple[Value, Value]:
    """The weight and the offset of a pair.

    On x86 in one load, the weight going through a general register: that leaves the load units to
    the activations. Elsewhere a product takes the lane of a register, so the weight is loaded.
    """
    if not b.code.target.x86:
        return b.read(pair, F32), b.read_index(pair, 4)
    both = b.read(pair, I64)
    return b.bitcast(b.trunc(both, I32), F32), b.ashr(both, i64(32))
