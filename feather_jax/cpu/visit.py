"""A visit: the products of one block of pixels with one chunk of input channels, in registers."""

import dataclasses
from collections.abc import Sequence

import llvmlite.ir as ir

from feather_jax.cpu.emit import F32, I32, I64, Builder, Code, Value, float_vector, i64, vector_of
from feather_jax.cpu.expressions import emit_steps
from feather_jax.cpu.graph import Steps
from feather_jax.cpu.pack import ROW, panel_bytes
from feather_jax.cpu.tiles import FLOAT, LINE

AHEAD = 512  # weights from which on they are fetched into the first cache
CHAINS = 8  # independent sums that hide the latency of the multiply-add


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
      bits: of an offset.
      step: how many weights of a list are multiplied at a time.
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
    bits: int
    step: int


@dataclasses.dataclass(frozen=True)
class _Pointers:
    """The block's first vectors in channel 0, of x the chunk's first one, and the biases."""

    y: Value
    x: Value
    residual: Value
    mask: Value
    bias: Value


def emit_lists(code: Code, visit: Visit) -> ir.Function:
    """void f(y, x, residual, mask, bias, rows, weights, offsets, begin, end): lists of `rows`."""

    def emit() -> ir.Function:
        b, arguments = code.start("lists", 8)
        *pointers, rows, weights, offsets, begin, end = arguments
        at = _Pointers(*pointers)

        def row(index: Value) -> None:
            own = b.address(rows, b.scale(index, ROW))
            low, high = b.read_index(own), b.read_index(own, ROW)
            channel = b.read_index(own, 4)
            sums = _start(b, visit, at, channel)
            own_weights = b.address(weights, b.scale(low, FLOAT))
            own_offsets = b.address(offsets, b.scale(low, visit.bits // 8))
            _prefetch(b, visit, own_weights, own_offsets)
            sums = _add_list(b, visit, at.x, own_weights, own_offsets, b.sub(high, low), sums)
            _finish(b, visit, at, channel, sums)

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
                b.prefetch(b.address(entry, FLOAT * AHEAD))
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


def emit_taps(code: Code, visit: Visit, taps: tuple[int, ...]) -> ir.Function:
    """void f(y, x, residual, mask, bias, weights, begin, end): channels that read one plane of x.

    `taps` are where the weights of a channel find what they multiply, bytes behind x. A vector that
    several pixels read is read once.
    """
    readers: dict[int, list[tuple[int, int]]] = {}  # pixels and taps, by the vector that they read
    for pixel, place in enumerate(visit.reads):
        for number, tap in enumerate(taps):
            readers.setdefault(place + tap, []).append((pixel, number))

    def emit() -> ir.Function:
        b, arguments = code.start("taps", 6)
        *pointers, weights, begin, end = arguments
        at, kind = _Pointers(*pointers), vector_of(visit.lanes)

        def row(channel: Value) -> None:
            own = b.address(weights, b.scale(channel, FLOAT * len(taps)))
            numbers = range(len(taps))
            factors = [b.splat(b.read(own, F32, FLOAT * i), visit.lanes) for i in numbers]
            sums = _start(b, visit, at, channel)
            for place in sorted(readers):
                vector = b.read(at.x, kind, place)
                for pixel, number in readers[place]:
                    sums[pixel] = b.multiply_add(factors[number], vector, sums[pixel])
            _finish(b, visit, at, channel, sums)

        b.loop(begin, end, row)
        b.ret_void()
        return b.function

    return code.function(("taps", visit, taps), emit)


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


def _prefetch(b: Builder, visit: Visit, weights: Value, offsets: Value) -> None:
    """Asks for as much of the lists to come as this one is long."""
    for line in range(visit.prefetch):
        b.prefetch(b.address(weights, FLOAT * AHEAD + line * LINE))
    for line in range((visit.prefetch - 1) * visit.bits // 32 + 1):
        b.prefetch(b.address(offsets, visit.bits // 8 * AHEAD + line * LINE))


def _add_list(
    b: Builder,
    visit: Visit,
    x: Value,
    weights: Value,
    offsets: Value,
    count: Value,
    sums: Sequence[Value],
) -> list[Value]:
    """The accumulators with `count` products, `step` at a time.

    A word of offsets is read before the products of the one before it, so that no address waits
    for it. Where there are few vectors, each has several accumulators.
    """
    vectors, step = len(sums), visit.step
    copies = max(1, min(step, CHAINS // vectors))
    unit = visit.lanes * FLOAT

    def read_word(number: Value) -> Value:
        return b.read(b.address(offsets, b.scale(number, visit.bits // 8)), I64, 0, visit.bits // 8)

    def product(number: Value, word: Value, sums: Sequence[Value]) -> list[Value]:
        offset = b.sext(b.trunc(word, ir.IntType(visit.bits)), I64)
        weight = b.read(b.address(weights, b.scale(number, FLOAT)), F32)
        return _multiply_add(b, visit, [weight], b.address(x, b.scale(offset, unit)), sums)

    def whole_step(number: Value, word: Value, *sums: Value) -> list[Value]:
        following, results = read_word(b.add(number, i64(step))), list(sums)
        for i in range(step):
            own = slice(i % copies * vectors, (i % copies + 1) * vectors)
            shifted = b.lshr(word, i64(i * visit.bits))
            results[own] = product(b.add(number, i64(i)), shifted, results[own])
        return [following, *results]

    def one(number: Value, word: Value, *sums: Value) -> list[Value]:
        return [b.lshr(word, i64(visit.bits)), *product(number, word, sums)]

    zeros = [float_vector(0.0, visit.lanes)] * (vectors * (copies - 1))
    whole = b.sub(count, b.urem(count, i64(step)))
    start = [read_word(i64(0)), *sums, *zeros]
    word, *results = b.loop(i64(0), whole, whole_step, start, step)
    while len(results) > vectors:
        *results, copy = results
        results[len(results) % vectors] = b.fadd(results[len(results) % vectors], copy)
    return results if step == 1 else b.loop(whole, count, one, [word, *results])[1:]
