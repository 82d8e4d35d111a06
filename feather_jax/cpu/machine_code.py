"""Machine code of a plan: LLVM's object, and the function that it becomes in this process."""

import ctypes
import mmap
import weakref
from collections.abc import Callable, Sequence

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.emit import F32, POINTER, VOID, Builder, Code, Value, i64, vector_of
from feather_jax.cpu.memory import ALIGNMENT
from feather_jax.cpu.target import Target, initialize

HUGE_PAGE = 2 << 20


def assemble(module: ir.Module, target: Target, jit: bool) -> bytes:
    """An object file, for this process or to be linked into a program.

    Args:
      module: as `feather_jax.cpu.codegen` emits it.
      target: the machine.
      jit: whether it is for this process.
    """
    initialize()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return target.machine(jit).emit_object(parsed)


def link(code: bytes, name: str, arguments: int, target: Target) -> Callable[..., None]:
    """The function `name` of an object file, void name(void *, ...), in this process.

    It lives as long as what is returned.
    """
    empty = llvm.parse_assembly(f'target triple = "{target.triple}"')
    engine = llvm.create_mcjit_compiler(empty, target.machine(True))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)
    function = kind(engine.get_function_address(name))
    weakref.finalize(function, engine.close).atexit = False
    return function


def allocate(nbytes: int) -> np.ndarray:
    """Zeros, uint8, aligned to cache lines and where it is large to huge pages.

    A huge page needs one entry of the translation buffer where small ones need hundreds.
    """
    if nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + nbytes]
    pages = mmap.mmap(-1, nbytes + HUGE_PAGE)
    raw = np.frombuffer(pages, np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    pages.madvise(mmap.MADV_HUGEPAGE)
    return raw[start : start + nbytes]


def emit_peak(target: Target, chains: int = 16) -> ir.Module:
    """A module with void peak(memory, turns): 64 multiply-adds of vectors a turn, from registers.

    As many independent ones as hide their latency.
    """
    code = Code(target, "peak")
    function = ir.Function(code.module, ir.FunctionType(VOID, [POINTER, POINTER]), "peak")
    b = Builder(code, function)
    memory, turns = function.args
    lanes = target.lanes
    factor = b.read(memory, vector_of(lanes))
    number = b.ptrtoint(turns, ir.IntType(64))

    def turn(_: Value, *sums: Value) -> Sequence[Value]:
        for _ in range(64 // chains):
            sums = tuple(b.multiply_add(factor, factor, total) for total in sums)
        return sums

    start = [b.splat(ir.Constant(F32, float(i)), lanes) for i in range(chains)]
    for i, total in enumerate(b.loop(i64(0), number, turn, start)):
        b.write(total, memory, 4 * lanes * i)
    b.ret_void()
    return code.module
