"""From a plan to LLVM IR: the kernels, and the function that runs them one after the other."""

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir

from feather_jax.cpu import loops
from feather_jax.cpu.convolution import SparseConvolution, emit_sparse_convolution
from feather_jax.cpu.dense import (
    DenseProduct,
    SparseProduct,
    emit_dense_product,
    emit_sparse_product,
)
from feather_jax.cpu.emit import I8, I32, I64, POINTER, VOID, Builder, Code, Value, i64
from feather_jax.cpu.layouts import (
    Halo,
    Retile,
    ToRows,
    ToTiles,
    emit_halo,
    emit_retile,
    emit_to_rows,
    emit_to_tiles,
)
from feather_jax.cpu.plan import Copy, Kernel, Place, Plan, RowsKernel, step_bytes
from feather_jax.cpu.target import Target
from feather_jax.cpu.tiled import (
    TiledElementwise,
    TiledPool,
    TiledReduce,
    emit_elementwise,
    emit_pool,
    emit_reduce,
)
from feather_jax.cpu.tiles import LINE
from feather_jax.cpu.transpose import (
    RowsToTiles,
    TilesToRows,
    emit_rows_to_tiles,
    emit_tiles_to_rows,
)

ENTRY = "feather_run"

PARTS = 2  # of a thread's share of a step
SPINS = 1000  # looks at a counter that others change, about 2 us, before the thread yields


def emit_copy(code: Code, spec: Copy) -> ir.Function:
    """void f(y, x, begin, end)."""
    b, (y, x, _, _) = code.start("copy", 2)
    b.loop(i64(0), i64(spec.nbytes), lambda i: b.write(b.read(x, I8, i), y, i))
    b.ret_void()
    return b.function


_EMITTERS: dict[type, Callable[[Code, Any], ir.Function]] = {
    SparseConvolution: emit_sparse_convolution,
    SparseProduct: emit_sparse_product,
    DenseProduct: emit_dense_product,
    TiledPool: emit_pool,
    TiledReduce: emit_reduce,
    TiledElementwise: emit_elementwise,
    ToTiles: emit_to_tiles,
    ToRows: emit_to_rows,
    Halo: emit_halo,
    Retile: emit_retile,
    RowsToTiles: emit_rows_to_tiles,
    TilesToRows: emit_tiles_to_rows,
    Copy: emit_copy,
}


def emit_kernel(code: Code, kernel: Kernel) -> ir.Function:
    """The function of a kernel: void f(operand ..., begin, end), for a range of its work items."""
    if isinstance(kernel, RowsKernel):
        return loops.emit(code, kernel.node)
    return code.function(kernel, lambda: _EMITTERS[type(kernel)](code, kernel))


def emit_program(plan: Plan, target: Target, timed: bool = True) -> ir.Module:
    """A module with void feather_run(inputs, outputs, workspace, weights, stamps).

    `inputs` and `outputs` point to the addresses of the arrays. Where `stamps` is not null and the
    program is to be `timed`, a clock is written there before the first step and after each of every
    turn, int64.
    """
    code = Code(target)
    kind = ir.FunctionType(VOID, [POINTER] * 5)
    function = ir.Function(code.module, kind, ENTRY)
    b = Builder(code, function)
    inputs, outputs, workspace, weights, stamps = function.args
    bases = {"workspace": workspace, "weights": weights}
    me = b.atomic_rmw("add", workspace, i64(1), "acq_rel") if plan.threads > 1 else i64(0)

    def operand(place: Place, turn: Value) -> Value:
        if place.space in bases:
            return b.address(bases[place.space], place.offset)
        table, arrays = (inputs, plan.inputs) if place.space == "input" else (outputs, plan.outputs)
        base = b.read(table, POINTER, 8 * place.index)
        if plan.turns > 1:
            base = b.address(base, b.scale(turn, arrays[place.index].nbytes // plan.turns))
        return b.address(base, place.offset)

    def stamp(number: Value) -> None:
        if not timed:
            return
        with b.if_then(b.icmp_unsigned("!=", stamps, ir.Constant(POINTER, None))):
            b.write(_clock(b), stamps, b.scale(number, 8))

    def all_steps(turn: Value) -> None:
        for number, step in enumerate(plan.steps):
            kernel, items = emit_kernel(code, step.kernel), step.kernel.items
            operands = [operand(place, turn) for place in step.operands]
            index = b.add(b.scale(turn, len(plan.steps)), i64(number))
            if plan.threads == 1:
                b.call(kernel, [*operands, i64(0), i64(items)])
            else:
                counters = b.scale(index, step_bytes(plan.threads))
                own = b.address(b.address(workspace, LINE), counters)
                parts = parts_of(step.kernel, plan.threads)
                _call_shared(b, kernel, operands, items, (me, plan.threads, parts), own)
            stamp(b.add(index, i64(1)))

    stamp(i64(0))
    if plan.turns == 1:
        all_steps(i64(0))
    else:
        b.loop(i64(0), i64(plan.turns), all_steps)
    b.ret_void()
    return code.module


def parts_of(kernel: Kernel, threads: int) -> int:
    """Into how many parts a kernel's work is cut.

    A part of some output channels reads all of the input: then a thread's share is one.
    """
    by_channel = isinstance(kernel, SparseConvolution) and kernel.by_channel
    return min(kernel.items, threads if by_channel else PARTS * threads)


def _call_shared(
    b: Builder,
    kernel: ir.Function,
    operands: list[Value],
    items: int,
    sharing: tuple[Value, int, int],
    counters: Value,
) -> None:
    """Calls a kernel part by part: those of a thread's own share, then what others left.

    The same share of one step after another is much of the same memory, which stays in the cache of
    its thread. Nobody waits for a thread that has not come: a step is done when its parts are. The
    counters are of the parts that were taken from each share, and behind them of those done. Who
    waits for the others' parts spins for some microseconds and then lets other processes run.

    Args:
      sharing: the thread's number, of how many, and of how many parts.
      counters: `step_bytes` bytes, zero before the first thread comes.
    """
    me, threads, parts = sharing
    done = b.address(counters, step_bytes(threads) - LINE)

    def cut(number: Value, whole: int, pieces: int) -> Value:
        return b.sdiv(b.scale(number, whole), i64(pieces))

    def share(turn: Value) -> None:
        number = b.srem(b.add(me, turn), i64(threads))
        low, high = (cut(b.add(number, i64(i)), parts, threads) for i in (0, 1))
        taken = b.address(counters, b.scale(number, 8))
        take, work, left = (b.append_basic_block(name) for name in ("take", "work", "left"))
        b.branch(take)

        b.position_at_end(take)
        part = b.add(low, b.atomic_rmw("add", taken, i64(1), "acq_rel"))
        b.cbranch(b.icmp_signed("<", part, high), work, left)

        b.position_at_end(work)
        bounds = [cut(b.add(part, i64(i)), items, parts) for i in (0, 1)]
        b.call(kernel, [*operands, *bounds])
        b.atomic_rmw("add", done, i64(1), "acq_rel")
        b.branch(take)

        b.position_at_end(left)

    b.loop(i64(0), i64(threads), share)
    before = b.block
    look, spin, rest, behind = (
        b.append_basic_block(name) for name in ("look", "spin", "rest", "behind")
    )
    b.branch(look)

    b.position_at_end(look)
    turns = b.phi(I64)
    turns.add_incoming(i64(0), before)
    finished = b.load_atomic(done, "acquire", 8, typ=I64)
    b.cbranch(b.icmp_signed("<", finished, i64(parts)), spin, behind)

    b.position_at_end(spin)
    following = b.add(turns, i64(1))
    turns.add_incoming(following, spin)
    turns.add_incoming(following, rest)
    b.cbranch(b.icmp_signed("<", following, i64(SPINS)), look, rest)

    b.position_at_end(rest)
    b.call(b.code.intrinsic("sched_yield", I32, []), [])
    b.branch(look)

    b.position_at_end(behind)


def _clock(b: Builder) -> Value:
    if b.code.target.x86:
        return b.call(b.code.intrinsic("llvm.readcyclecounter", I64, []), [])
    return b.asm(ir.FunctionType(I64, []), "mrs $0, cntvct_el0", "=r", [], True)
