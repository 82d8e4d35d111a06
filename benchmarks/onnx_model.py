"""A graph of `feather_jax.cpu` as an ONNX model: how the engines that ours is compared with get it.

Images and their activations are [batch, channels, height, width] there, as those engines like them,
and dense layers are matrix products; nothing is transposed but where a network itself turns an
image into tokens.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from feather_jax.cpu.graph import (
    RELU,
    Broadcast,
    Concatenate,
    Constant,
    Convolution,
    Elementwise,
    Graph,
    Input,
    MatMul,
    Node,
    Pad,
    Pool,
    Reduce,
    Reshape,
    Slice,
    Steps,
    Transpose,
)

_OPSET = 17

_FUNCTIONS = {
    "abs": "Abs",
    "add": "Add",
    "divide": "Div",
    "equal": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "greater": "Greater",
    "greater_equal": "GreaterOrEqual",
    "less": "Less",
    "less_equal": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "maximum": "Max",
    "minimum": "Min",
    "multiply": "Mul",
    "negative": "Neg",
    "power": "Pow",
    "select": "Where",
    "sqrt": "Sqrt",
    "subtract": "Sub",
    "tanh": "Tanh",
}


def onnx_model(graph: Graph) -> bytes:
    """The ONNX model of a graph, serialised.

    Four-dimensional inputs are images and become [batch, channels, height, width]; the inputs are
    called `x0`, `x1`, ... and the outputs `y0`, `y1`, ...

    Raises:
      NotImplementedError: an operation has no counterpart here.
    """
    writer = _Writer()
    for node in graph.nodes:
        writer.write(node)
    outputs = []
    for number, node in enumerate(graph.outputs):
        writer.add("Identity", [writer.plain(node)], output=f"y{number}")
        outputs.append(_info(f"y{number}", node.dtype, node.shape))
    inputs = [
        _info(f"x{node.operation.index}", node.dtype, _first(node.shape))
        for node in graph.inputs
        if isinstance(node.operation, Input)
    ]
    used = {name for node in writer.nodes for name in node.input}
    constants = [each for each in writer.constants if each.name in used]
    made = helper.make_graph(writer.nodes, "network", inputs, outputs, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def channels_first(x: np.ndarray) -> np.ndarray:
    """An argument of the function as an input of its ONNX model."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x


class _Writer:
    """The ONNX nodes so far, and where the value of each node of the graph is."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._names: dict[Node, str] = {}
        self._channels_first: set[Node] = set()

    def add(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, value: np.ndarray | np.generic) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def plain(self, node: Node) -> str:
        """The name of a value in the graph's own order of axes."""
        if node in self._channels_first:
            return self.add("Transpose", [self._names[node]], perm=[0, 2, 3, 1])
        return self._names[node]

    def planes(self, node: Node) -> str:
        """The name of a four-dimensional value as [batch, channels, height, width]."""
        if node in self._channels_first:
            return self._names[node]
        return self.add("Transpose", [self._names[node]], perm=[0, 3, 1, 2])

    def write(self, node: Node) -> None:
        first = False
        match node.operation:
            case Input(index):
                name, first = f"x{index}", len(node.shape) == 4
            case Constant(value):
                name = self.constant(value)
            case Convolution() if self._is_dense(node):
                name = self._dense(node, node.operation)
            case Convolution():
                name, first = self._convolution(node, node.operation), True
            case MatMul():
                name = self.add("MatMul", [self.plain(each) for each in node.inputs])
            case Pool():
                name, first = self._pool(node, node.operation), True
            case Reduce(kind, axes):
                name = self._reduce(kind, axes, node)
            case Elementwise(steps):
                name, first = self._elementwise(steps, node)
            case Concatenate(axis) if any(each in self._channels_first for each in node.inputs):
                names = [self.planes(each) for each in node.inputs]
                name, first = self.add("Concat", names, axis=(0, 2, 3, 1)[axis]), True
            case Concatenate(axis):
                name = self.add("Concat", [self.plain(each) for each in node.inputs], axis=axis)
            case Transpose(permutation):
                name = self.add("Transpose", [self.plain(node.inputs[0])], perm=permutation)
            case Reshape(shape):
                source = node.inputs[0]
                of_one_pixel = len(source.shape) == 4 and source.shape[1:3] == (1, 1)
                name = self._names[source] if of_one_pixel else self.plain(source)
                name = self.add("Reshape", [name, self.constant(np.array(shape, np.int64))])
            case Broadcast(shape):
                target = self.constant(np.array(shape, np.int64))
                name = self.add("Expand", [self.plain(node.inputs[0]), target])
            case Slice(start, size, stride):
                ends = [a + n * s for a, n, s in zip(start, size, stride, strict=True)]
                along = tuple(range(len(start)))
                numbers = [np.array(each, np.int64) for each in (start, ends, along, stride)]
                parts = [self.constant(each) for each in numbers]
                name = self.add("Slice", [self.plain(node.inputs[0]), *parts])
            case Pad(value, padding, interior) if not any(interior):
                pads = np.array(padding, np.int64).T.ravel()
                source_name = self.plain(node.inputs[0])
                name = self.add("Pad", [source_name, self.constant(pads), self.constant(value)])
            case _:
                raise NotImplementedError(f"{node.kind} has no counterpart in ONNX here.")
        self._names[node] = name
        if first:
            self._channels_first.add(node)

    def _is_dense(self, node: Node) -> bool:
        """Whether a convolution is a dense layer over a batch or tokens."""
        operation = node.operation
        assert isinstance(operation, Convolution)
        plain = operation.strides == operation.dilation == (1, 1) and operation.groups == 1
        one = operation.weights.shape[:2] == (1, 1) and operation.padding == ((0, 0), (0, 0))
        return node.inputs[0] not in self._channels_first and plain and one

    def _dense(self, node: Node, operation: Convolution) -> str:
        name = self.add(
            "MatMul", [self._names[node.inputs[0]], self.constant(operation.weights[0, 0])]
        )
        if operation.bias is not None:
            name = self.add("Add", [name, self.constant(operation.bias)])
        return self._residual_and_activation(name, node, operation, self.plain)

    def _convolution(self, node: Node, operation: Convolution) -> str:
        inputs = [
            self.planes(node.inputs[0]),
            self.constant(operation.weights.transpose(3, 2, 0, 1)),
        ]
        if operation.bias is not None:
            inputs.append(self.constant(operation.bias))
        name = self.add(
            "Conv",
            inputs,
            kernel_shape=operation.weights.shape[:2],
            strides=operation.strides,
            dilations=operation.dilation,
            group=operation.groups,
            pads=_pads(operation.padding),
        )
        return self._residual_and_activation(name, node, operation, self.planes)

    def _residual_and_activation(
        self, name: str, node: Node, operation: Convolution, of: Callable[[Node], str]
    ) -> str:
        if len(node.inputs) == 2:
            name = self.add("Add", [name, of(node.inputs[1])])
        return self._steps(operation.activation, [name]) if operation.activation else name

    def _pool(self, node: Node, operation: Pool) -> str:
        if operation.kind == "min":
            raise NotImplementedError("A minimum over windows has no counterpart in ONNX here.")
        attributes: dict[str, Any] = {
            "kernel_shape": operation.window,
            "strides": operation.strides,
            "pads": _pads(operation.padding),
        }
        x = [self.planes(node.inputs[0])]
        if operation.kind == "max":
            return self.add("MaxPool", x, dilations=operation.dilation, **attributes)
        mean = self.add("AveragePool", x, count_include_pad=1, **attributes)
        return self.add("Mul", [mean, self.constant(np.float32(np.prod(operation.window)))])

    def _reduce(self, kind: str, axes: tuple[int, ...], node: Node) -> str:
        source = node.inputs[0]
        if kind == "argmax":
            found = self.add("ArgMax", [self.plain(source)], axis=axes[0], keepdims=0)
            return self.add("Cast", [found], to=helper.np_dtype_to_tensor_dtype(node.dtype))
        pixels = source in self._channels_first and axes == (1, 2)
        name, over = (self._names[source], (2, 3)) if pixels else (self.plain(source), axes)
        if kind == "sum":
            return self.add(
                "ReduceSum", [name, self.constant(np.array(over, np.int64))], keepdims=0
            )
        name_of = {"max": "ReduceMax", "min": "ReduceMin", "prod": "ReduceProd"}[kind]
        return self.add(name_of, [name], axes=over, keepdims=0)

    def _elementwise(self, steps: Steps, node: Node) -> tuple[str, bool]:
        first = any(each in self._channels_first for each in node.inputs)
        names = []
        for each in node.inputs:
            if not first or each in self._channels_first:
                names.append(self._names[each])
            elif isinstance(each.operation, Constant):
                value = each.operation.value
                full = value.reshape((1,) * (4 - value.ndim) + value.shape)
                names.append(self.constant(full.transpose(0, 3, 1, 2)))
            else:
                name = self._names[each]
                if len(each.shape) < 4:
                    shape = np.array((1,) * (4 - len(each.shape)) + each.shape, np.int64)
                    name = self.add("Reshape", [name, self.constant(shape)])
                names.append(self.add("Transpose", [name], perm=[0, 3, 1, 2]))
        return self._steps(steps, names), first

    def _steps(self, steps: Steps, arguments: list[str]) -> str:
        if steps == RELU:
            return self.add("Relu", arguments)
        values = list(arguments)
        for step in steps:
            operands = [
                values[each] if isinstance(each, int) else self.constant(each.value)
                for each in step.operands
            ]
            match step.function:
                case "convert":
                    to = helper.np_dtype_to_tensor_dtype(step.dtype)
                    values.append(self.add("Cast", operands, to=to))
                case "square":
                    values.append(self.add("Mul", operands * 2))
                case "rsqrt":
                    root = self.add("Sqrt", operands)
                    values.append(self.add("Div", [self.constant(np.float32(1)), root]))
                case "erfc":
                    one = self.constant(np.float32(1))
                    values.append(self.add("Sub", [one, self.add("Erf", operands)]))
                case function if function in _FUNCTIONS:
                    values.append(self.add(_FUNCTIONS[function], operands))
                case function:
                    raise NotImplementedError(f"{function} has no counterpart in ONNX here.")
        return values[-1]


def _pads(padding: tuple[tuple[int, int], ...]) -> list[int]:
    return [before for before, _ in padding] + [after for _, after in padding]


def _first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in (0, 3, 1, 2)) if len(shape) == 4 else shape


def _info(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
    kind = TensorProto.DataType.Value(
        {"float32": "FLOAT", "int32": "INT32", "uint8": "UINT8", "bool": "BOOL"}[str(dtype)]
    )
    return helper.make_tensor_value_info(name, kind, shape)
