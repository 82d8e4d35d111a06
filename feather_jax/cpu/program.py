"""A compiled function: its machine code, its weights, and the calls."""

import concurrent.futures
import ctypes
import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from feather_jax.cpu.codegen import ENTRY, emit_program
from feather_jax.cpu.lower import Lowered, lower
from feather_jax.cpu.machine_code import allocate, assemble, link
from feather_jax.cpu.plan import Plan
from feather_jax.cpu.planner import make_plan
from feather_jax.cpu.profile import Profile, profile
from feather_jax.cpu.saved import read_program, write_program
from feather_jax.cpu.signature import Signature, signature_of
from feather_jax.cpu.simplify import simplify
from feather_jax.cpu.target import Target, host

# Below this many multiply-accumulates threads cost more than they save: about 0.1 ms of work.
WORTH_THREADS = 4_000_000


class Program:
    """A function as machine code; `compile` makes one.

    Call it as the function that it was compiled from, from as many threads at once as you like:
    each call has working memory of its own. Arguments are arrays (NumPy's, JAX's), results NumPy
    arrays. `str` gives the plan.

    Attributes:
      plan: what is done, in order.
      weights: uint8, what the plan's places refer to.
      code: the object file.
      target: the machine it is for.
      signature: of the function.
    """

    def __init__(
        self, plan: Plan, weights: np.ndarray, code: bytes, target: Target, signature: Signature
    ):
        self.plan, self.code, self.target, self.signature = plan, code, target, signature
        self.weights = allocate(weights.size)
        self.weights[:] = weights
        self._function = link(code, ENTRY, 5, target)
        self._idle: list[np.ndarray] = []  # working memory that no call has
        self._helpers: concurrent.futures.ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        """Runs it.

        Raises:
          ValueError: an argument's structure, shape or dtype is not the examples'.
        """
        arrays = self.signature.flatten(arguments, [each.dtype for each in self.plan.inputs])
        results = [np.empty(each.shape, each.dtype) for each in self.plan.outputs]
        self.run(arrays, results)
        return self.signature.unflatten(results)

    def run(
        self,
        arrays: Sequence[np.ndarray],
        results: Sequence[np.ndarray],
        stamps: np.ndarray | None = None,
    ) -> None:
        """Runs it on flat contiguous arrays; `stamps` get the clock, before and after each step."""
        try:
            workspace = self._idle.pop()
        except IndexError:
            workspace = allocate(self.plan.workspace)
        tables = (_addresses(arrays), _addresses(results))
        common = (*tables, workspace.ctypes.data, self.weights.ctypes.data)
        threads = self.plan.threads
        if threads == 1:
            self._function(*common, stamps.ctypes.data if stamps is not None else None)
        else:
            workspace[: self.plan.counters] = 0
            helpers = [
                self._pool().submit(self._function, *common, None)
                for _ in range(0 if _busy(threads) else threads - 1)
            ]
            self._function(*common, stamps.ctypes.data if stamps is not None else None)
            for helper in helpers:  # one that has not begun is not needed any more
                if not helper.cancel():
                    helper.result()
        self._idle.append(workspace)

    def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._lock:
            if self._helpers is None:
                self._helpers = concurrent.futures.ThreadPoolExecutor(
                    self.plan.threads - 1, "feather_jax.cpu"
                )
            return self._helpers

    def profile(self, *arguments: Any) -> Profile:
        """Runs it some times and says where the time goes; prints as a table."""
        arrays = self.signature.flatten(arguments, [each.dtype for each in self.plan.inputs])
        results = [np.empty(each.shape, each.dtype) for each in self.plan.outputs]
        return profile(lambda stamps: self.run(arrays, results, stamps), self.plan, self.target)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the program to a file that `load` reads, whole or not at all.

        Raises:
          TypeError: the arguments or results have containers other than dicts, lists and tuples.
          OSError: the file cannot be written.
        """
        write_program(path, self.plan, self.weights, self.code, self.target, self.signature)

    @property
    def nbytes(self) -> int:
        """Bytes of weights and code."""
        return self.weights.nbytes + len(self.code)

    def __str__(self) -> str:
        return str(self.plan)


def load(path: str | os.PathLike[str]) -> Program:
    """Reads a program that `Program.save` wrote.

    Nothing is traced. On the machine that it was compiled on nothing is generated either, and on
    another one LLVM makes the code again from the plan.

    The machine code in the file is run: load only files that you would run as a program.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no such file, it is damaged, or a later version wrote it.
    """
    plan, weights, code, made_for, signature = read_program(path)
    # The plan is laid out for vectors of its own machine, which LLVM cuts to those of this one.
    here = dataclasses.replace(host(), lanes=made_for.lanes, accumulators=made_for.accumulators)
    if here != made_for:
        code = assemble(emit_program(plan, here), here, jit=True)
    return Program(plan, weights, code, here, signature)


def compile(fn: Callable[..., Any], *examples: Any, threads: int = 1) -> Program:
    """Compiles a function that JAX can trace to machine code of this CPU.

    The weights that `fn` closes over become part of the program; those that are zero are not in it
    at all, so that the time it takes follows the multiply-accumulates that are left. Results agree
    with XLA's to 1e-5 of the largest; a weight that is zero multiplies nothing, not even infinity.

    Args:
      fn: a function of pytrees of arrays that closes over its weights.
      *examples: its arguments, arrays or `jax.ShapeDtypeStruct`s; their shapes and dtypes are those
        of every later call, batch size included.
      threads: how many threads a call uses; the results are the same bits.

    Returns:
      A `Program`: call it like `fn`.

    Raises:
      NotImplementedError: `fn` computes something that the compiler does not know; the message
        names the primitive, its layer and the source line.
      ValueError: `threads` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from feather_jax import cpu
      >>> kernel = jnp.eye(4)
      >>> double = cpu.compile(lambda x: 2 * (x @ kernel), jnp.ones((2, 4)))
      >>> double(jnp.arange(8.0).reshape(2, 4)).tolist()
      [[0.0, 2.0, 4.0, 6.0], [8.0, 10.0, 12.0, 14.0]]
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; a program needs at least one.")
    lowered, target = lower(fn, *examples), host()
    plan, weights = plan_for(lowered, target, threads)
    code = assemble(emit_program(plan, target), target, jit=True)
    return Program(plan, weights, code, target, signature_of(lowered))


def plan_for(lowered: Lowered, target: Target, threads: int = 1) -> tuple[Plan, np.ndarray]:
    """The plan of a lowered function and its weights.

    It is for one thread where there is little to share, and on Windows, which has no sched_yield.
    """
    graph = simplify(lowered.graph)
    plan, weights = make_plan(graph, target, threads)
    little = plan.macs < WORTH_THREADS * plan.turns
    if threads > 1 and (little or sys.platform == "win32"):
        return make_plan(graph, target)
    return plan, weights


def _busy(threads: int) -> bool:
    """Whether more wants to run than there are cores, or than this process may have.

    A helper would then be stopped in the middle of a part that the others wait for.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < min(threads, cores):
        return True
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > cores + 0.5


def _addresses(arrays: Sequence[np.ndarray]) -> ctypes.Array:
    return (ctypes.c_void_p * max(1, len(arrays)))(*[array.ctypes.data for array in arrays])
