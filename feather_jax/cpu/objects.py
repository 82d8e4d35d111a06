"""Object files: a compiled function with a C header, for places without Python."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.codegen import ENTRY, emit_program
from feather_jax.cpu.emit import I8, POINTER, VOID, i64
from feather_jax.cpu.lower import lower
from feather_jax.cpu.machine_code import assemble
from feather_jax.cpu.plan import Array, Plan
from feather_jax.cpu.program import plan_for
from feather_jax.cpu.target import Target, named
from feather_jax.cpu.tiles import LINE

C_TYPES = {
    "bool": "uint8_t",
    "float32": "float",
    **{f"{kind}{bits}": f"{kind}{bits}_t" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}


def write_object(
    fn: Callable[..., Any],
    *examples: Any,
    path: str | os.PathLike[str],
    target: str | None = None,
    cpu: str | None = None,
    name: str | None = None,
    external: bool = False,
) -> None:
    """Compiles a function to an object file and a C header beside it.

    The C function takes a pointer to each argument and then one to each result, the leaves of the
    pytrees in JAX's order, as contiguous arrays by rows. It needs no library but, where LLVM makes
    use of them, memcpy and memset, and on 32-bit processors the division of 64-bit integers that
    comes with a C compiler (libgcc).

    Args:
      fn: a function of pytrees of arrays that closes over its weights.
      *examples: its arguments, arrays or `jax.ShapeDtypeStruct`s.
      path: of the object file; the header is there too, with the suffix `.h`.
      target: the machine, as LLVM names it: `x86_64-linux-gnu`, `aarch64-linux-gnu`,
        `arm64-apple-macosx`, ...; None for this one.
      cpu: its processor, as LLVM names it: `x86-64-v3`, `znver4`, `cortex-a76`, ...; None for this
        one where `target` is None too, and else for any processor of that target.
      name: of the C function; the file's without its suffix if it is None.
      external: whether the caller gives the weights and the working memory. Then they are not in
        the object file: the weights are a file with the suffix `.weights`, and the function may be
        called from several threads at once, each with working memory of its own. Otherwise both are
        inside, and the function is not re-entrant.

    Raises:
      NotImplementedError: as `compile`.
      ValueError: LLVM knows no such target or processor, or the name is none that C could use.
      OSError: a file cannot be written.

    Example:
      >>> cpu.write_object(classify, images, path="model.o")  # doctest: +SKIP
    """
    path = pathlib.Path(path)
    symbol = path.stem if name is None else name
    if not (symbol.isidentifier() and symbol.isascii()):
        raise ValueError(
            f"{symbol!r} cannot be the name of a C function; give another one as name=."
        )
    machine = named(target, cpu)
    plan, weights = plan_for(lower(fn, *examples), machine)
    module = emit_program(plan, machine, timed=False)
    _add_interface(module, symbol, plan, None if external else weights)
    path.write_bytes(assemble(module, machine, jit=False))
    header = _header(symbol, plan, machine, weights.size, external)
    path.with_suffix(".h").write_text(header, encoding="utf-8")
    if external:
        path.with_suffix(".weights").write_bytes(weights.tobytes())


def _add_interface(module: ir.Module, symbol: str, plan: Plan, weights: np.ndarray | None) -> None:
    """Adds the C function; with `weights` they and the working memory are in the module."""
    entry = module.get_global(ENTRY)
    entry.linkage = "internal"
    arrays = len(plan.inputs) + len(plan.outputs)
    given = 0 if weights is not None else 2
    function = ir.Function(module, ir.FunctionType(VOID, [POINTER] * (given + arrays)), symbol)
    b = ir.IRBuilder(function.append_basic_block())
    if weights is not None:
        weights_address = _memory(module, "weights", weights.size, weights)
        workspace_address = _memory(module, "workspace", plan.workspace, None)
    else:
        weights_address, workspace_address = function.args[:2]

    def table(pointers: Sequence[ir.Value]) -> ir.Value:
        place = b.alloca(POINTER, max(1, len(pointers)))
        for number, pointer in enumerate(pointers):
            b.store(pointer, b.gep(place, [i64(number)], source_etype=POINTER))
        return place

    inputs = function.args[given : given + len(plan.inputs)]
    outputs = function.args[given + len(plan.inputs) :]
    no_clock = ir.Constant(POINTER, None)
    b.call(entry, [table(inputs), table(outputs), workspace_address, weights_address, no_clock])
    b.ret_void()


def _memory(module: ir.Module, name: str, nbytes: int, content: np.ndarray | None) -> ir.Value:
    """Memory aligned to cache lines: constant with a content, and zeros without one."""
    kind = ir.ArrayType(I8, max(1, nbytes))
    memory = ir.GlobalVariable(module, kind, name)
    memory.linkage, memory.align = "internal", LINE
    memory.global_constant = content is not None
    if content is not None and nbytes:
        # As llvmlite escapes bytes, a hundred times as fast.
        memory.initializer = ir.FormattedConstant(kind, f'c"\\{content.tobytes().hex(chr(92))}"')
    else:
        memory.initializer = ir.Constant(kind, None)
    return ir.FormattedConstant(POINTER, memory.get_reference())  # llvmlite's own has a type


def _header(symbol: str, plan: Plan, machine: Target, weights: int, external: bool) -> str:
    """The C header."""

    def parameter(array: Array, name: str, const: str) -> str:
        return f"{const}{C_TYPES[array.dtype.name]} {name}[{max(1, int(np.prod(array.shape)))}]"

    def described(array: Array, name: str) -> str:
        return f" * {name}: {array.dtype.name} [{', '.join(map(str, array.shape))}]"

    inputs = [(array, f"x{i}") for i, array in enumerate(plan.inputs)]
    outputs = [(array, f"y{i}") for i, array in enumerate(plan.outputs)]
    parameters = [
        *(["const void *weights, void *workspace"] if external else []),
        *(parameter(array, name, "const ") for array, name in inputs),
        *(parameter(array, name, "") for array, name in outputs),
    ]
    guard, upper = f"{symbol.upper()}_H", symbol.upper()
    if external:
        memory = [
            f" * weights: {weights:,} bytes, those of {symbol}.weights, at a multiple of {LINE}.",
            f" * workspace: {plan.workspace:,} bytes at a multiple of {LINE}, of each call's own.",
        ]
        sizes = [
            f"#define {upper}_WEIGHTS_BYTES {weights}",
            f"#define {upper}_WORKSPACE_BYTES {plan.workspace}",
            f"#define {upper}_ALIGNMENT {LINE}",
            "",
        ]
    else:
        memory = [" * One call at a time: the working memory is inside."]
        sizes = []
    lines = [
        f"/* Compiled by feather_jax.cpu for {machine.triple} ({machine.cpu}).",
        f" * {plan.macs:,} multiply-accumulates. Arrays are contiguous, by rows.",
        *(described(array, name) for array, name in inputs + outputs),
        *memory,
        " */",
        f"#ifndef {guard}",
        f"#define {guard}",
        "",
        "#include <stdint.h>",
        "",
        *sizes,
        "#ifdef __cplusplus",
        'extern "C" {',
        "#endif",
        "",
        f"void {symbol}({', '.join(parameters)});",
        "",
        "#ifdef __cplusplus",
        "}",
        "#endif",
        "",
        "#endif",
    ]
    return "\n".join(lines) + "\n"
