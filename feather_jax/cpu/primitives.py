"""What each primitive of JAX is in a graph's operations: one rule a primitive."""

from collections.abc import Sequence

import jax
import numpy as np

from feather_jax.cpu import indexing
from feather_jax.cpu.equation import Equation, Rule, Unsupported, known
from feather_jax.cpu.graph import (
    Concatenate,
    Elementwise,
    Literal,
    Node,
    Pad,
    Reduce,
    Slice,
    Step,
    broadcast,
    constant,
    elementwise,
    reshape,
    transpose,
)
from feather_jax.cpu.products import convolution, cumulative, dot, pooling


def leading(x: Node, index: int) -> Node:
    """x[index]."""
    zeros, ones = (0,) * (len(x.shape) - 1), (1,) * len(x.shape)
    own = Node(Slice((index, *zeros), (1, *x.shape[1:]), ones), (x,))
    return reshape(own, x.shape[1:])


def stack(parts: Sequence[Node], axis: int = 0, name: str = "") -> Node:
    """Nodes of one shape along a new axis."""
    shape = parts[0].shape
    shape = (*shape[:axis], 1, *shape[axis:])
    return Node(Concatenate(axis), tuple(reshape(each, shape, name) for each in parts), name)


def choose(which: Node, *cases: Node, name: str = "") -> Node:
    """The case with the number `which`, or the nearest one."""
    result = cases[-1]
    for index, case in reversed(list(enumerate(cases[:-1]))):
        number = constant(which.dtype.type(index))
        chosen = elementwise("less_equal", which, number, dtype=np.bool_, name=name)
        result = elementwise("select", chosen, case, result, name=name)
    return result


def _function(function: str) -> Rule:
    def rule(eqn: Equation, *operands: Node) -> Node:
        return elementwise(function, *operands, dtype=eqn.dtype, name=eqn.name)

    return rule


def _identity(eqn: Equation, *operands: Node) -> tuple[Node, ...]:
    return operands


def _convert(eqn: Equation, x: Node) -> Node:
    if x.dtype == eqn.dtype:
        return x
    return elementwise("convert", x, dtype=eqn.dtype, name=eqn.name)


def _power(eqn: Equation, x: Node, exponent: Node) -> Node:
    return elementwise("power", x, _convert(eqn, exponent), name=eqn.name)


def _exp2(eqn: Equation, x: Node) -> Node:
    two = Literal(np.float32(2))
    return Node(Elementwise((Step("power", (two, 0), x.dtype),)), (x,), eqn.name)


def _round(eqn: Equation, x: Node) -> Node:
    if eqn.params["rounding_method"] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        raise Unsupported("which rounds halves away from zero")
    return elementwise("round", x, name=eqn.name)


def _square(eqn: Equation, x: Node) -> Node:
    return Node(Elementwise(power_steps(2, x.dtype)), (x,), eqn.name)


def _integer_pow(eqn: Equation, x: Node) -> Node:
    return Node(Elementwise(power_steps(eqn.params["y"], x.dtype)), (x,), eqn.name)


def power_steps(exponent: int, dtype: np.dtype) -> tuple[Step, ...]:
    """x to an integer power by repeated squaring."""
    one = Literal(dtype.type(1))
    if exponent == 0:
        return (Step("select", (Literal(np.True_), one, 0), dtype),)
    steps: list[Step] = []

    def multiply(left: int, right: int) -> int:
        steps.append(Step("multiply", (left, right), dtype))
        return len(steps)

    square, result, bits = 0, -1, abs(exponent)
    while bits:
        if bits & 1:
            result = square if result < 0 else multiply(result, square)
        bits >>= 1
        if bits:
            square = multiply(square, square)
    if exponent < 0:
        steps.append(Step("divide", (one, result), dtype))
    elif not steps:
        steps.append(Step("convert", (0,), dtype))
    return tuple(steps)


def _select(eqn: Equation, which: Node, *cases: Node) -> Node:
    """Two cases are chosen by a bool, more by an integer; the first is that of False."""
    if which.dtype == np.bool_:
        return elementwise("select", which, cases[1], cases[0], name=eqn.name)
    return choose(which, *cases, name=eqn.name)


def _clamp(eqn: Equation, low: Node, x: Node, high: Node) -> Node:
    above = elementwise("maximum", low, x, name=eqn.name)
    return elementwise("minimum", above, high, name=eqn.name)


def _broadcast_in_dim(eqn: Equation, x: Node) -> Node:
    shape = [1] * len(eqn.shape)
    for axis, size in zip(eqn.params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return broadcast(reshape(x, tuple(shape), eqn.name), eqn.shape, eqn.name)


def _reshape(eqn: Equation, x: Node) -> Node:
    if eqn.params.get("dimensions") is not None:
        x = transpose(x, tuple(eqn.params["dimensions"]), eqn.name)
    return reshape(x, eqn.shape, eqn.name)


def _squeeze(eqn: Equation, x: Node) -> Node:
    return reshape(x, eqn.shape, eqn.name)


def _stack(eqn: Equation, *operands: Node) -> Node:
    return stack(operands, eqn.params["axis"], eqn.name)


def _tile(eqn: Equation, x: Node) -> Node:
    sizes = list(zip(eqn.params["reps"], x.shape, strict=True))
    once = reshape(x, tuple(n for _, size in sizes for n in (1, size)), eqn.name)
    every = broadcast(once, tuple(n for pair in sizes for n in pair), eqn.name)
    return reshape(every, eqn.shape, eqn.name)


def _transpose(eqn: Equation, x: Node) -> Node:
    return transpose(x, tuple(eqn.params["permutation"]), eqn.name)


def _concatenate(eqn: Equation, *operands: Node) -> Node:
    return Node(Concatenate(eqn.params["dimension"]), operands, eqn.name)


def _slice(eqn: Equation, x: Node) -> Node:
    start = tuple(map(int, eqn.params["start_indices"]))
    stride = tuple(map(int, eqn.params["strides"] or (1,) * len(start)))
    return Node(Slice(start, eqn.shape, stride), (x,), eqn.name)


def _split(eqn: Equation, x: Node) -> tuple[Node, ...]:
    axis, start, parts = eqn.params["axis"], [0] * len(x.shape), []
    for result in eqn.results:
        operation = Slice(tuple(start), tuple(result.shape), (1,) * len(start))
        parts.append(Node(operation, (x,), eqn.name))
        start[axis] += result.shape[axis]
    return tuple(parts)


def _rev(eqn: Equation, x: Node) -> Node:
    flipped = [axis in eqn.params["dimensions"] for axis in range(len(x.shape))]
    start = tuple(n - 1 if flip else 0 for n, flip in zip(x.shape, flipped, strict=True))
    stride = tuple(-1 if flip else 1 for flip in flipped)
    return Node(Slice(start, x.shape, stride), (x,), eqn.name)


def _pad(eqn: Equation, x: Node, value: Node) -> Node:
    config = [tuple(map(int, axis)) for axis in eqn.params["padding_config"]]
    padding = tuple((low, high) for low, high, _ in config)
    interior = tuple(inner for *_, inner in config)
    return Node(Pad(known(value).reshape(1)[0], padding, interior), (x,), eqn.name)


def _reduction(kind: str) -> Rule:
    def rule(eqn: Equation, x: Node) -> Node:
        return Node(Reduce(kind, tuple(eqn.params["axes"])), (x,), eqn.name)

    return rule


def _arg_reduction(kind: str) -> Rule:
    def rule(eqn: Equation, x: Node) -> Node:
        operation = Reduce(kind, tuple(eqn.params["axes"]), eqn.dtype)
        return Node(operation, (x,), eqn.name)

    return rule


_SAME_NAME = [
    *("abs", "add", "and", "ceil", "cos", "erf", "erfc", "exp", "expm1", "floor", "is_finite"),
    *("log", "log1p", "logistic", "not", "or", "rsqrt", "sign", "sin", "sqrt", "tanh", "xor"),
]

_OTHER_NAME = {
    "add_any": "add",
    "div": "divide",
    "eq": "equal",
    "ge": "greater_equal",
    "gt": "greater",
    "le": "less_equal",
    "lt": "less",
    "max": "maximum",
    "min": "minimum",
    "mul": "multiply",
    "ne": "not_equal",
    "neg": "negative",
    "rem": "remainder",
    "sub": "subtract",
}

_COMBINED = ["add", "max", "min", "mul", "sub"]

_IDENTITIES = [
    *("copy", "copy_p", "device_put", "mesh_cast", "optimization_barrier", "pvary", "reshard"),
    *("sharding_constraint", "stop_gradient"),
]

RULES: dict[str, Rule] = {
    **{name: _function(name) for name in _SAME_NAME},
    **{name: _function(function) for name, function in _OTHER_NAME.items()},
    **dict.fromkeys(_IDENTITIES, _identity),
    **{f"reduce_{kind}": _reduction(kind) for kind in ("and", "max", "min", "or", "prod", "sum")},
    **{f"reduce_window_{kind}": pooling(kind) for kind in ("max", "min", "sum")},
    **{f"scatter-{name}": indexing.scatter(_OTHER_NAME.get(name, name)) for name in _COMBINED},
    **{f"cum{kind}": cumulative(kind) for kind in ("max", "min", "sum")},
    "argmax": _arg_reduction("argmax"),
    "argmin": _arg_reduction("argmin"),
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "conv_general_dilated": convolution,
    "convert_element_type": _convert,
    "dot_general": dot,
    "dynamic_slice": indexing.dynamic_slice,
    "dynamic_update_slice": indexing.dynamic_update_slice,
    "exp2": _exp2,
    "gather": indexing.gather,
    "integer_pow": _integer_pow,
    "pad": _pad,
    "pow": _power,
    "reshape": _reshape,
    "rev": _rev,
    "round": _round,
    "scatter": indexing.scatter(None),
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "square": _square,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": indexing.top_k,
    "transpose": _transpose,
}
