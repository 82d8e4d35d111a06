"""Programs and single kernels, run on arrays."""

import ctypes

import jax
import numpy as np
import pytest

from feather_jax.cpu.codegen import ENTRY, emit_program
from feather_jax.cpu.machine_code import allocate, assemble, link
from feather_jax.cpu.plan import Array, Place, Plan, Step
from feather_jax.cpu.planner import make_plan
from feather_jax.cpu.program import Program
from feather_jax.cpu.signature import Signature
from feather_jax.cpu.target import host


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch):
    """Threads help, however busy the machine that tests."""
    monkeypatch.setattr("feather_jax.cpu.program._busy", lambda threads: False)


@pytest.fixture(scope="session")
def build():
    """A graph as a program of a list of arrays."""

    def build(graph, threads=1, target=None):
        target = target or host()
        plan, weights = make_plan(graph, target, threads)
        code = assemble(emit_program(plan, target), target, jit=True)
        arguments, results = (
            tuple(jax.ShapeDtypeStruct(node.shape, node.dtype) for node in nodes)
            for nodes in (graph.inputs, graph.outputs)
        )
        trees = jax.tree.structure(arguments), jax.tree.structure(results)
        return Program(plan, weights, code, target, Signature(*trees, arguments, results))

    return build


@pytest.fixture(scope="session")
def run_kernel():
    """The bytes that a kernel leaves in its first operand."""

    def run_kernel(kernel, result, *operands, target=None):
        target, operands = target or host(), (result, *operands)
        nothing = Array((0,), np.dtype(np.uint8))
        places = tuple(Place("input", 0, index) for index in range(len(operands)))
        step = Step("", kernel, places, ())
        plan = Plan((nothing,) * len(operands), (), (step,), 0, 1)
        code = assemble(emit_program(plan, target), target, jit=True)
        function = link(code, ENTRY, 5, target)
        arrays = []
        for operand in operands:
            raw = np.ascontiguousarray(operand).reshape(-1).view(np.uint8)
            arrays.append(allocate(raw.size))
            arrays[-1][:] = raw
        addresses = (ctypes.c_void_p * len(arrays))(*[each.ctypes.data for each in arrays])
        function(addresses, None, None, None, None)
        return arrays[0]

    return run_kernel
