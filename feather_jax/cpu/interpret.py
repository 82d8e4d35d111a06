"""What the operations of a graph mean, in NumPy: the oracle of every stage of the compiler."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from feather_jax.cpu.graph import (
    Broadcast,
    Concatenate,
    Constant,
    Convolution,
    Elementwise,
    Gather,
    Graph,
    Input,
    MatMul,
    Node,
    Pad,
    Padding,
    Pool,
    Reduce,
    Reshape,
    Slice,
    Steps,
    Transpose,
    window_counts,
)

Array = np.ndarray


def interpret(graph: Graph, *arguments: Array) -> tuple[Array, ...]:
    """The results of a graph for `arguments`, arrays of its inputs' shapes and dtypes."""
    values: dict[Node, Array] = {}
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            if isinstance(node.operation, Input):
                values[node] = np.asarray(arguments[node.operation.index])
            else:
                values[node] = evaluate(node, *(values[each] for each in node.inputs))
    return tuple(values[node] for node in graph.outputs)


def evaluate(node: Node, *inputs: Array) -> Array:
    """The result of one node."""
    match node.operation:
        case Constant(value):
            result = value
        case Convolution():
            result = _convolution(node.operation, *inputs)
        case MatMul():
            left, right = (each.astype(np.float64) for each in inputs)
            result = left @ right
        case Pool():
            result = _pool(node.operation, *inputs)
        case Reduce(kind, axes):
            result = _reduce(kind, axes, *inputs)
        case Elementwise(steps):
            result = np.broadcast_to(run_steps(steps, *inputs), node.shape)
        case Concatenate(axis):
            result = np.concatenate(inputs, axis)
        case Transpose(permutation):
            result = np.transpose(inputs[0], permutation)
        case Reshape(shape):
            result = np.reshape(inputs[0], shape)
        case Broadcast(shape):
            result = np.broadcast_to(inputs[0], shape)
        case Slice():
            result = _slice(node.operation, *inputs)
        case Pad():
            result = _pad(node.operation, *inputs)
        case Gather(size):
            x, positions = inputs
            result = np.ravel(x)[positions[..., None] + np.arange(size)]
        case _:
            raise TypeError(f"{node} has no value of its own")
    return result.astype(node.dtype)


def run_steps(steps: Steps, *arguments: Array) -> Array:
    """The value of an element-wise expression."""
    values: list[Any] = list(arguments)
    with np.errstate(all="ignore"):
        for step in steps:
            operands = [
                values[each] if isinstance(each, int) else each.value for each in step.operands
            ]
            if step.function == "convert":
                values.append(_convert(np.asarray(operands[0]), step.dtype))
            else:
                result = FUNCTIONS[step.function](*operands)
                values.append(np.asarray(result).astype(step.dtype))
    return values[-1]


def _convert(x: Array, dtype: np.dtype) -> Array:
    """To `dtype` as XLA does: into an integer towards zero and within its range, NaN to 0."""
    if np.issubdtype(x.dtype, np.floating) and np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        inside = np.where((x > limits.min) & (x < limits.max), x, 0).astype(dtype)
        bounds = np.where(x >= limits.max, limits.max, limits.min).astype(dtype)
        return np.where((x >= limits.max) | (x <= limits.min), bounds, inside)
    return x.astype(dtype)


def _elementwise(function: Callable[[float], float]) -> Callable[[Array], Array]:
    return np.vectorize(function, otypes=[np.float64])


def _divide(x: Array, y: Array) -> Array:
    """Floats divide; integers do towards zero."""
    if np.issubdtype(np.asarray(x).dtype, np.floating):
        return np.divide(x, y)
    return np.trunc(np.divide(x, y))


def _wide(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` in float64, so that the oracle is exact to the last bit or nearly."""
    return lambda *operands: function(*(np.asarray(x, np.float64) for x in operands))


# The element-wise functions by name. "convert" (to the step's dtype) is one more.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "ceil": np.ceil,
    "cos": _wide(np.cos),
    "erf": _elementwise(math.erf),
    "erfc": _elementwise(math.erfc),
    "exp": _wide(np.exp),
    "expm1": _wide(np.expm1),
    "floor": np.floor,
    "is_finite": np.isfinite,
    "log": _wide(np.log),
    "log1p": _wide(np.log1p),
    "logistic": _wide(lambda x: 1 / (1 + np.exp(-x))),
    "negative": np.negative,
    "not": np.invert,
    "round": np.rint,  # halves to the even neighbour
    "rsqrt": _wide(lambda x: 1 / np.sqrt(x)),
    "sign": np.sign,
    "sin": _wide(np.sin),
    "sqrt": np.sqrt,
    "tanh": _wide(np.tanh),
    "add": np.add,
    "and": np.bitwise_and,
    "divide": _divide,
    "equal": np.equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "multiply": np.multiply,
    "not_equal": np.not_equal,
    "or": np.bitwise_or,
    "power": _wide(np.power),
    "remainder": np.fmod,
    "subtract": np.subtract,
    "xor": np.bitwise_xor,
    "select": np.where,  # condition, where it holds, where not
}


def _windows(
    x: Array,
    fill: float,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilation: Sequence[int],
) -> Array:
    """The windows of [n, h, w, c] as [n, h', w', taps, c]."""
    counts = window_counts(x.shape[1:3], window, strides, padding, dilation)
    outer = tuple((max(before, 0), max(after, 0)) for before, after in padding)
    x = np.pad(x, ((0, 0), *outer, (0, 0)), constant_values=fill)
    for axis, (before, _) in enumerate(padding, 1):
        x = np.take(x, np.arange(max(-before, 0), x.shape[axis]), axis)
    taps = []
    for i in range(window[0]):
        for j in range(window[1]):
            rows = i * dilation[0] + strides[0] * np.arange(counts[0])
            columns = j * dilation[1] + strides[1] * np.arange(counts[1])
            taps.append(x[:, rows][:, :, columns])
    return np.stack(taps, 3)


def _convolution(op: Convolution, x: Array, residual: Array | None = None) -> Array:
    height, width, inputs, outputs = op.weights.shape
    windows = _windows(x, 0, (height, width), op.strides, op.padding, op.dilation)
    space, features = windows.shape[:3], outputs // op.groups
    weights = op.weights.reshape(height * width * inputs, op.groups, features)
    result = np.empty((*space, op.groups, features))
    for group in range(op.groups):
        own = windows[..., group * inputs : (group + 1) * inputs]
        result[..., group, :] = _product(own.reshape(*space, len(weights)), weights[:, group])
    result = result.reshape(*space, outputs)
    if op.bias is not None:
        result = result + op.bias
    if residual is not None:
        result = result + residual
    result = result.astype(np.float32)
    return run_steps(op.activation, result) if op.activation else result


def _product(x: Array, weights: Array) -> Array:
    """x @ weights, of which those that are zero multiply nothing, not even infinity."""
    x, weights = x.astype(np.float64), weights.astype(np.float64)
    if np.isfinite(x).all():
        return x @ weights
    result = np.zeros((*x.shape[:-1], weights.shape[-1]))
    for column, row in enumerate(weights):
        result += np.where(row != 0, x[..., column, None] * row, 0)
    return result


_POOLS: dict[str, tuple[float, Callable[..., Array]]] = {
    "max": (-np.inf, np.max),
    "min": (np.inf, np.min),
    "sum": (0, np.sum),
}


def _pool(op: Pool, x: Array) -> Array:
    fill, function = _POOLS[op.kind]
    wide = x.astype(np.float64)
    return function(_windows(wide, fill, op.window, op.strides, op.padding, op.dilation), axis=3)


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "and": np.all,
    "max": np.max,
    "min": np.min,
    "or": np.any,
    "prod": np.prod,
    "sum": np.sum,
}


def _reduce(kind: str, axes: tuple[int, ...], x: Array) -> Array:
    if kind in ("argmax", "argmin"):
        return (np.argmax if kind == "argmax" else np.argmin)(x, axis=axes[0])
    wide = x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x
    return np.asarray(_REDUCTIONS[kind](wide, axis=axes))


def _slice(op: Slice, x: Array) -> Array:
    for axis, (start, size, stride) in enumerate(zip(op.start, op.size, op.stride, strict=True)):
        x = np.take(x, start + stride * np.arange(size), axis)
    return x


def _pad(op: Pad, x: Array) -> Array:
    for axis, ((before, after), interior) in enumerate(zip(op.padding, op.interior, strict=True)):
        size = x.shape[axis]
        shape = list(x.shape)
        shape[axis] = before + after + size + max(size - 1, 0) * interior
        place = before + (interior + 1) * np.arange(size)
        inside = (place >= 0) & (place < shape[axis])
        padded = np.full(shape, op.value, x.dtype)
        padded[(slice(None),) * axis + (place[inside],)] = np.compress(inside, x, axis)
        x = padded
    return x
