"""A traced function as a graph of few, orthogonal operations: plain data, which prints as a table.

A `Node` is an operation applied to other nodes; its shape and dtype follow from them. Images are
[batch, height, width, channels] and kernels [height, width, input channels of a group, output
channels]. `feather_jax.cpu.interpret` says in NumPy what every operation means.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from feather_jax.summary import format_table

Shape = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]

FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Literal:  # not a bare scalar, as np.float32(1) equals the operand 1
    """A number in an expression."""

    value: np.generic


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of an element-wise expression.

    Attributes:
      function: one of the functions that `feather_jax.cpu.interpret.FUNCTIONS` defines.
      operands: what it is applied to. An int below the number of the expression's arguments is
        an argument, and from there on the result of an earlier step.
      dtype: of the result.
    """

    function: str
    operands: tuple[int | Literal, ...]
    dtype: np.dtype = FLOAT32


Steps = tuple[Step, ...]

RELU: Steps = (Step("maximum", (0, Literal(np.float32(0)))),)


@dataclasses.dataclass(frozen=True)
class Input:
    """The `index`-th argument of the function, flattened."""

    index: int
    shape: Shape
    dtype: np.dtype

    def result(self) -> tuple[Shape, np.dtype]:
        return self.shape, self.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An array that is known."""

    value: np.ndarray

    def result(self) -> tuple[Shape, np.dtype]:
        return self.value.shape, self.value.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Convolution:
    """activation(convolution(x) + bias + residual), of x [n, h, w, c]; a dense layer at 1 x 1.

    The residual, if there is one, is the second input and has the result's shape. A weight that is
    zero multiplies nothing.

    Attributes:
      weights: float32 [kernel height, kernel width, c / groups, output channels].
      bias: float32 [output channels], or None.
      strides, padding, dilation: by height and width; padding is (before, after) and may be
        negative; dilation is the kernel's.
      groups: of channels, as in a depthwise convolution.
      activation: steps of one argument; none for none.
    """

    weights: np.ndarray
    bias: np.ndarray | None = None
    strides: tuple[int, int] = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: Steps = ()

    def result(self, x: "Node", residual: "Node | None" = None) -> tuple[Shape, np.dtype]:
        batch, height, width, channels = x.shape
        *window, inputs, outputs = self.weights.shape
        assert channels == inputs * self.groups
        assert outputs % self.groups == 0
        space = window_counts((height, width), window, self.strides, self.padding, self.dilation)
        shape = (batch, *space, outputs)
        assert residual is None or residual.shape == shape
        return shape, x.dtype


@dataclasses.dataclass(frozen=True)
class MatMul:
    """[b, m, k] times [b, k, n], both activations."""

    def result(self, left: "Node", right: "Node") -> tuple[Shape, np.dtype]:
        (batch, rows, inner), (batch2, inner2, columns) = left.shape, right.shape
        assert (batch, inner) == (batch2, inner2)
        return (batch, rows, columns), left.dtype


@dataclasses.dataclass(frozen=True)
class Pool:
    """The `kind` ("max", "min" or "sum") of each window of height and width of [n, h, w, c].

    Padding is of the kind's neutral element (-inf, inf or 0).
    """

    kind: str
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: Padding = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)

    def result(self, x: "Node") -> tuple[Shape, np.dtype]:
        batch, *space, channels = x.shape
        counts = window_counts(space, self.window, self.strides, self.padding, self.dilation)
        return (batch, *counts, channels), x.dtype


@dataclasses.dataclass(frozen=True)
class Reduce:
    """The `kind` over `axes`, which vanish.

    "sum", "prod", "max", "min", "and" or "or"; or "argmax" or "argmin", over one axis, the first of
    equals, NaN before all, with the result in `dtype`.
    """

    kind: str
    axes: tuple[int, ...]
    dtype: np.dtype | None = None

    def result(self, x: "Node") -> tuple[Shape, np.dtype]:
        shape = tuple(size for axis, size in enumerate(x.shape) if axis not in self.axes)
        return shape, self.dtype or x.dtype


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """An expression over the elements of its inputs, which broadcast as NumPy's do.

    The inputs are the arguments of the steps, and the last step's result is the node's.
    """

    steps: Steps

    def result(self, *inputs: "Node") -> tuple[Shape, np.dtype]:
        return np.broadcast_shapes(*(node.shape for node in inputs)), self.steps[-1].dtype


@dataclasses.dataclass(frozen=True)
class Concatenate:
    axis: int

    def result(self, *inputs: "Node") -> tuple[Shape, np.dtype]:
        shape = list(inputs[0].shape)
        shape[self.axis] = sum(node.shape[self.axis] for node in inputs)
        return tuple(shape), inputs[0].dtype


@dataclasses.dataclass(frozen=True)
class Transpose:
    """Axis i of the result is axis permutation[i] of the input."""

    permutation: tuple[int, ...]

    def result(self, x: "Node") -> tuple[Shape, np.dtype]:
        return tuple(x.shape[axis] for axis in self.permutation), x.dtype


@dataclasses.dataclass(frozen=True)
class Reshape:
    """The same elements in row-major order."""

    shape: Shape

    def result(self, x: "Node") -> tuple[Shape, np.dtype]:
        assert math.prod(x.shape) == math.prod(self.shape), (x.shape, self.shape)
        return self.shape, x.dtype


@dataclasses.dataclass(frozen=True)
class Broadcast:
    """The input repeated to `shape`, as NumPy broadcasts."""

    shape: Shape

    def result(self, x: "Node") -> tuple[Shape, np.dtype]:
        assert np.broadcast_shapes(x.shape, self.shape) == self.shape
        return self.shape, x.dtype


@dataclasses.dataclass(frozen=True)
class Slice:
    """size[i] elements of axis i, from start[i] on in strides of stride[i]; of -1 to reverse it."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def result(self, x: "Node") -> tuple[Shape, np.dtype]:
        return self.size, x.dtype


@dataclasses.dataclass(frozen=True)
class Pad:
    """`value` before, after (both may be negative) and `interior` times between the elements."""

    value: np.generic
    padding: Padding
    interior: tuple[int, ...]

    def result(self, x: "Node") -> tuple[Shape, np.dtype]:
        shape = (
            before + after + size + max(size - 1, 0) * inner
            for size, (before, after), inner in zip(
                x.shape, self.padding, self.interior, strict=True
            )
        )
        return tuple(shape), x.dtype


@dataclasses.dataclass(frozen=True)
class Gather:
    """`size` neighbours of the first input by rows, from each int64 position in the second."""

    size: int

    def result(self, x: "Node", positions: "Node") -> tuple[Shape, np.dtype]:
        return (*positions.shape, self.size), x.dtype


# fmt: off
Operation = (
    Input | Constant | Convolution | MatMul | Pool | Reduce | Elementwise | Concatenate | Transpose
    | Reshape | Broadcast | Slice | Pad | Gather
)
# fmt: on


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Node:
    """An operation applied to other nodes; compared by identity.

    Attributes:
      operation: what is done.
      inputs: to what.
      name: the layer that it stands in, as in `ResNet/Conv_0`.
      shape, dtype: of the result.
    """

    operation: Operation
    inputs: tuple["Node", ...] = ()
    name: str = ""
    shape: Shape = dataclasses.field(init=False)
    dtype: np.dtype = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        shape, dtype = self.operation.result(*self.inputs)  # type: ignore[call-arg]
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", np.dtype(dtype))

    def __repr__(self) -> str:
        return f"<{self.kind} {self.dtype}{list(self.shape)} {self.name}>"

    @property
    def kind(self) -> str:
        """The operation in one word, or the functions of an element-wise expression."""
        match self.operation:
            case Elementwise(steps):
                return " ".join(step.function for step in steps)
            case Pool(detail) | Reduce(detail):
                pass
            case Convolution(activation=steps):
                detail = " ".join(step.function for step in steps)
            case _:
                detail = ""
        return f"{type(self.operation).__name__.lower()} {detail}".rstrip()


def constant(value: np.ndarray | np.generic, name: str = "") -> Node:
    return Node(Constant(np.asarray(value)), (), name)


def elementwise(
    function: str, *inputs: Node, dtype: np.dtype | type | None = None, name: str = ""
) -> Node:
    """A single function of nodes; `dtype` is the last one's if it is not given."""
    result = np.dtype(dtype) if dtype is not None else inputs[-1].dtype
    step = Step(function, tuple(range(len(inputs))), result)
    return Node(Elementwise((step,)), inputs, name)


def reshape(x: Node, shape: Shape, name: str = "") -> Node:
    return x if x.shape == shape else Node(Reshape(shape), (x,), name)


def transpose(x: Node, permutation: tuple[int, ...], name: str = "") -> Node:
    if permutation == tuple(range(len(permutation))):
        return x
    return Node(Transpose(permutation), (x,), name)


def broadcast(x: Node, shape: Shape, name: str = "") -> Node:
    return x if x.shape == shape else Node(Broadcast(shape), (x,), name)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A function of arrays: `str` gives a table of its nodes.

    Attributes:
      inputs: one `Input` node an argument, in their order, whether it is used or not.
      outputs: the results.
    """

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that the outputs depend on, inputs first, each after those that it depends on."""
        order = dict.fromkeys(self.inputs)
        stack = list(reversed(self.outputs))
        while stack:
            node = stack[-1]
            waiting = [each for each in reversed(node.inputs) if each not in order]
            if node in order or not waiting:
                order[stack.pop()] = None
            else:
                stack += waiting
        return tuple(order)

    def uses(self) -> collections.Counter[Node]:
        """How often each node is an input of another, or a result."""
        counts = collections.Counter(self.outputs)
        for node in self.nodes:
            counts.update(node.inputs)
        return counts

    def rewrite(self, rule: Callable[[Node, Node], Node]) -> "Graph":
        """The graph of rule(node, old) for each node `old`, in order.

        `node` is `old` of the inputs that took its own's place; the rule keeps shape and dtype.
        """
        new = {node: node for node in self.inputs}
        for old in self.nodes[len(self.inputs) :]:
            inputs = tuple(new[each] for each in old.inputs)
            node = old if inputs == old.inputs else Node(old.operation, inputs, old.name)
            result = rule(node, old)
            assert (result.shape, result.dtype) == (node.shape, node.dtype), (node, result)
            new[old] = result
        return Graph(self.inputs, tuple(new[node] for node in self.outputs))

    def __str__(self) -> str:
        number = {node: f"%{i}" for i, node in enumerate(self.nodes)}
        rows = [
            (
                f"{number[node]} {node.kind}",
                " ".join(number[each] for each in node.inputs),
                f"{node.dtype}[{','.join(map(str, node.shape))}]",
                node.name,
            )
            for node in number
        ]
        rows.append(("results", " ".join(number[node] for node in self.outputs), "", ""))
        return format_table(("node", "of", "result", "layer"), rows)


def window_counts(
    sizes: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> Shape:
    """How many windows fit each axis."""
    axes = zip(sizes, window, strides, padding, dilation, strict=True)
    return tuple(
        max(0, (size + before + after - (taps - 1) * step - 1) // stride + 1)
        for size, taps, stride, (before, after), step in axes
    )
