"""A program as plain data: its steps in order, where each finds its operands, and the weights."""

import dataclasses
import math
from typing import Literal

import numpy as np

from feather_jax.cpu import loops
from feather_jax.cpu.convolution import SparseConvolution
from feather_jax.cpu.dense import DenseProduct, SparseProduct
from feather_jax.cpu.graph import Input, Node, Operation, Shape
from feather_jax.cpu.layouts import Halo, Retile, ToRows, ToTiles
from feather_jax.cpu.tiled import TiledElementwise, TiledPool, TiledReduce
from feather_jax.cpu.tiles import LINE
from feather_jax.cpu.transpose import RowsToTiles, TilesToRows
from feather_jax.summary import format_table


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape and dtype of an array of rows."""

    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Copy:
    """`nbytes` bytes. Operands: y, x."""

    nbytes: int

    @property
    def items(self) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class RowsKernel:
    """Any other operation, on arrays of rows. Operands: y, then the inputs.

    Attributes:
      operation: what is done.
      inputs: to what.
    """

    operation: Operation
    inputs: tuple[Array, ...]

    @property
    def node(self) -> Node:
        """The operation, applied to inputs of those shapes and dtypes."""
        inputs = (Node(Input(i, x.shape, x.dtype)) for i, x in enumerate(self.inputs))
        return Node(self.operation, tuple(inputs))

    @property
    def items(self) -> int:
        return loops.items(self.node)


Kernel = (
    SparseConvolution
    | SparseProduct
    | DenseProduct
    | TiledPool
    | TiledReduce
    | TiledElementwise
    | ToTiles
    | ToRows
    | Halo
    | Retile
    | RowsToTiles
    | TilesToRows
    | RowsKernel
    | Copy
)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an operand begins.

    Attributes:
      space: the program's arguments, its results, its working memory or its weights.
      offset: bytes.
      index: which argument or result.
    """

    space: Literal["input", "output", "workspace", "weights"]
    offset: int = 0
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """One kernel's work.

    Attributes:
      layer: the layer that it is part of.
      kernel: what determines its code.
      operands: the result, then what the kernel's class lists.
      shape: of the result, as an array of rows.
      nonzeros: weights that are not zero.
      macs: multiply-accumulates of a turn.
    """

    layer: str
    kernel: Kernel
    operands: tuple[Place, ...]
    shape: Shape
    nonzeros: int = 0
    macs: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program. `str` gives a table of its steps.

    Attributes:
      inputs, outputs: the arguments and results, flattened.
      steps: in order.
      workspace: bytes of working memory, to be aligned to cache lines.
      threads: for how many the work is cut.
      turns: how often the steps are done, each time for the next part of all inputs and outputs
        along their first axes: for a batch that is computed image by image.
    """

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    steps: tuple[Step, ...]
    workspace: int
    threads: int
    turns: int = 1

    @property
    def counters(self) -> int:
        """Bytes at the start of the working memory with which threads share the steps."""
        return counter_bytes(self.threads, len(self.steps) * self.turns)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all turns."""
        return self.turns * sum(step.macs for step in self.steps)

    def __str__(self) -> str:
        rows = [
            (
                step.layer,
                describe(step.kernel),
                "x".join(map(str, step.shape)),
                f"{step.nonzeros:,}" if step.macs else "",
                f"{step.macs:,}" if step.macs else "",
            )
            for step in self.steps
        ]
        nonzeros = sum(step.nonzeros for step in self.steps)
        turns = f", {self.turns} turns" if self.turns > 1 else ""
        size = f"{self.workspace:,} bytes{turns}"
        rows.append(("all", size, "", f"{nonzeros:,}", f"{self.macs:,}"))
        return format_table(("layer", "kernel", "result", "non-zeros", "MACs"), rows)


def counter_bytes(threads: int, steps: int) -> int:
    """Bytes with which threads share steps: a cache line of who has come, and each step's."""
    return LINE + steps * step_bytes(threads) if threads > 1 else 0


def step_bytes(threads: int) -> int:
    """Bytes of a step's counters: one for each thread, and on another cache line one for all."""
    return LINE * (-(-8 * threads // LINE) + 1)


def describe(kernel: Kernel) -> str:
    """A kernel in a few words."""
    match kernel:
        case SparseConvolution(y=y, block=block, chunks=chunks):
            parts = f", {chunks} chunks" if chunks > 1 else ""
            return f"sparse convolution, {y}, {block[0]}x{block[1]} at a time{parts}"
        case SparseProduct():
            return "sparse product"
        case DenseProduct():
            return "dense product"
        case TiledPool(y=y, kind=kind):
            return f"pool {kind}, {y}"
        case TiledReduce(kind=kind):
            return f"reduce {kind}"
        case TiledElementwise(y=y, steps=steps):
            return f"{' '.join(step.function for step in steps) or 'copy'}, {y}"
        case ToTiles(y) | RowsToTiles(y):
            return f"to {y}"
        case ToRows() | TilesToRows():
            return "to rows"
        case Halo():
            return "halo"
        case Retile(y=y):
            return f"to {y}"
        case RowsKernel(operation):
            return type(operation).__name__.lower()
        case Copy():
            return "copy"
