"""Runs a node's row-major kernel, for the tests of these kernels."""

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.emit import I64, POINTER, VOID, Builder, Code
from feather_jax.cpu.graph import Node
from feather_jax.cpu.loops import emit, items
from feather_jax.cpu.machine_code import assemble, link
from feather_jax.cpu.target import Target, host


class Compiled:
    """A node's kernel in this process.

    Called with the inputs it gives the node's value, doing the work items in as many calls as
    `pieces`, and `in_place` writing it where the first input was.
    """

    def __init__(self, node: Node, target: Target | None = None):
        self.node, target = node, target or host()
        code = Code(target, "kernel")
        kernel = emit(code, node)
        count = 1 + len(node.inputs)
        kind = ir.FunctionType(VOID, [*[POINTER] * count, I64, I64])
        function = ir.Function(code.module, kind, "run")
        b = Builder(code, function)
        b.call(kernel, function.args)
        b.ret_void()
        self.items = items(node)
        self.function = link(assemble(code.module, target, jit=True), "run", count + 2, target)

    def __call__(self, *inputs: np.ndarray, pieces: int = 1, in_place: bool = False) -> np.ndarray:
        node = self.node
        # A guard behind the output shows writes out of bounds.
        size = int(np.prod(node.shape)) * node.dtype.itemsize
        memory = np.full(size + 64, 0xA5, np.uint8)
        output = memory[:size].view(node.dtype).reshape(node.shape)
        arrays = [np.ascontiguousarray(each) for each in inputs]
        if in_place:
            output[...] = inputs[0]
            arrays[0] = output
        pointers = [array.ctypes.data for array in (output, *arrays)]
        for piece in reversed(range(pieces)):
            begin, end = (self.items * (piece + i) // pieces for i in (0, 1))
            self.function(*pointers, begin, end)
        assert (memory[size:] == 0xA5).all()
        return output.copy()


def run(node: Node, *inputs: np.ndarray, target: Target | None = None) -> np.ndarray:
    """The node's value by its kernel."""
    return Compiled(node, target)(*inputs)
