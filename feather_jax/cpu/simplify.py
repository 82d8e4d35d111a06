"""Simpler graphs of the same function: passes from graph to graph, repeated while they find work.

The products end up with all that can be done in their visit of a pixel: batch normalisation,
affine preprocessing, padding, the residual, the activation. What element-wise work is left is
fused into few expressions.
"""

from collections.abc import Callable, Sequence

import numpy as np

from feather_jax.cpu import absorb, sink
from feather_jax.cpu.graph import (
    FLOAT32,
    Broadcast,
    Concatenate,
    Constant,
    Elementwise,
    Graph,
    Input,
    Literal,
    Node,
    Pad,
    Reshape,
    Slice,
    Step,
    Transpose,
    broadcast,
    constant,
    reshape,
    transpose,
)
from feather_jax.cpu.interpret import evaluate

Pass = Callable[[Graph], Graph]

# Inputs that an expression may have: all of them are read side by side.
ARGUMENTS = 6


def simplify(graph: Graph) -> Graph:
    """The graph of the same function that the back end likes best.

    Results differ from the graph's by rounding alone, and where a weight, or the factor that it is
    multiplied with, is zero: that multiplies nothing.
    """
    graph = _repeat(graph, (fold_constants, tidy, sink.sink_layouts, *absorb.LINEAR))
    return _repeat(graph, (fuse_elementwise, absorb.activation_into_product, tidy))


def _repeat(graph: Graph, passes: Sequence[Pass]) -> Graph:
    """All passes, again and again until none changes anything."""
    before: tuple[Node, ...] | None = None
    while before != graph.outputs:
        before = graph.outputs
        for each in passes:
            graph = each(graph)
    return graph


def fold_constants(graph: Graph) -> Graph:
    """What depends on constants alone is one; not what only repeats a constant."""

    def rule(node: Node, old: Node) -> Node:
        operation = node.operation
        if isinstance(operation, Input | Constant | Broadcast):
            return node
        values = [each.operation for each in node.inputs]
        known = [each.value for each in values if isinstance(each, Constant)]
        if len(known) < len(values):
            return node
        return constant(evaluate(node, *known), node.name)

    return graph.rewrite(rule)


def tidy(graph: Graph) -> Graph:
    """Without operations that do nothing, and with those in a row as one."""
    seen: dict[object, Node] = {}

    def rule(node: Node, old: Node) -> Node:
        node = _tidied(node)
        if isinstance(node.operation, Input):
            return node
        key = (node.operation, node.inputs)  # those that hold arrays are equal to none
        return seen.setdefault(key, node)

    return graph.rewrite(rule)


def _tidied(node: Node) -> Node:
    if not node.inputs:
        return node
    x, name = node.inputs[0], node.name
    unchanged = x.shape == node.shape and x.dtype == node.dtype
    match node.operation:
        case Reshape(shape):
            if isinstance(x.operation, Reshape):
                return reshape(x.inputs[0], shape, name)
            return x if unchanged else node
        case Transpose(permutation):
            if isinstance(x.operation, Transpose):
                inner = x.operation.permutation
                x, permutation = x.inputs[0], tuple(inner[axis] for axis in permutation)
            if sink.keeps_order(permutation, x.shape):
                return reshape(x, node.shape, name)
            return node if x is node.inputs[0] else transpose(x, permutation, name)
        case Broadcast(shape):
            if isinstance(x.operation, Broadcast):
                x = x.inputs[0]
            return node if x is node.inputs[0] and not unchanged else broadcast(x, shape, name)
        case Slice(start, _, stride) if unchanged:
            return x if all(s == 1 for s in stride) and not any(start) else node
        case Pad(_, padding, interior) if unchanged and not any(map(any, padding)):
            return node if any(interior) and np.prod(x.shape) > 1 else x
        case Concatenate() if len(node.inputs) == 1:
            return x
        case Elementwise():
            return _tidied_expression(node)
    return node


def _tidied_expression(node: Node) -> Node:
    """Inputs no larger than need be, and numbers among them in the steps."""
    assert isinstance(node.operation, Elementwise)
    steps = node.operation.steps
    if len(steps) == 1 and steps[0].function == "convert" and node.inputs[0].dtype == node.dtype:
        return node.inputs[0]
    inputs = [_narrow(each) for each in node.inputs]
    kept = [
        each for each in inputs if not (isinstance(each.operation, Constant) and each.shape == ())
    ]
    if not kept or np.broadcast_shapes(*(each.shape for each in kept)) != node.shape:
        inputs = list(node.inputs)  # they carry the result's shape
        kept = inputs
    numbers: list[int | Literal] = []
    unique = list(dict.fromkeys(kept))
    for each in inputs:
        if each in kept:
            numbers.append(unique.index(each))
        else:
            assert isinstance(each.operation, Constant)
            numbers.append(Literal(each.operation.value.reshape(1)[0]))
    new = renumber(steps, numbers, len(unique))
    new = tuple(map(_cheaper, new))
    if new == steps and tuple(unique) == node.inputs:
        return node
    return Node(Elementwise(new), tuple(unique), node.name)


def renumber(
    steps: Sequence[Step], arguments: Sequence[int | Literal], first: int
) -> tuple[Step, ...]:
    """Steps whose arguments are others, and whose results count from `first`."""

    def operand(each: int | Literal) -> int | Literal:
        if isinstance(each, Literal):
            return each
        return arguments[each] if each < len(arguments) else each - len(arguments) + first

    return tuple(
        Step(step.function, tuple(map(operand, step.operands)), step.dtype) for step in steps
    )


def _narrow(node: Node) -> Node:
    """An input of an expression, not repeated along axes that broadcasting repeats anyway."""
    if isinstance(node.operation, Broadcast):
        return _narrow(node.inputs[0])
    if not isinstance(node.operation, Constant):
        return node
    value = node.operation.value
    for axis in range(value.ndim):
        first = value.take([0], axis) if value.shape[axis] else value
        if value.shape[axis] > 1 and (value == first).all():
            value = first
    shape = value.shape
    while shape and shape[0] == 1:
        shape = shape[1:]
    return node if shape == node.shape else constant(value.reshape(shape), node.name)


def _cheaper(step: Step) -> Step:
    """A division by a number is a product, where its reciprocal is normal."""
    if step.function != "divide" or step.dtype != FLOAT32:
        return step
    left, right = step.operands
    if isinstance(left, int) and isinstance(right, Literal):
        with np.errstate(all="ignore"):
            inverse = np.float32(1 / right.value.item()) if right.value else np.float32(np.inf)
        if np.finfo(np.float32).tiny <= abs(inverse) < np.inf:
            return Step("multiply", (left, Literal(inverse)), step.dtype)
    return step


def fuse_elementwise(graph: Graph) -> Graph:
    """Expressions take in those they alone use, of the same shape."""
    uses = graph.uses()

    def rule(node: Node, old: Node) -> Node:
        if not isinstance(node.operation, Elementwise):
            return node
        taken = [
            isinstance(each.operation, Elementwise)
            and each.shape == node.shape
            and uses[before] == old.inputs.count(before)
            for each, before in zip(node.inputs, old.inputs, strict=True)
        ]
        pairs = list(zip(node.inputs, taken, strict=True))
        inputs = [inner for each, own in pairs for inner in (each.inputs if own else (each,))]
        unique = list(dict.fromkeys(inputs))
        if not any(taken) or len(unique) > ARGUMENTS:
            return node
        steps: list[Step] = []

        def append(operation: Elementwise, arguments: Sequence[int | Literal]) -> int:
            """The number of the result of an expression of arguments that are known here."""
            steps.extend(renumber(operation.steps, arguments, len(unique) + len(steps)))
            return len(unique) + len(steps) - 1

        arguments = [
            append(each.operation, [unique.index(inner) for inner in each.inputs])
            if own and isinstance(each.operation, Elementwise)
            else unique.index(each)
            for each, own in pairs
        ]
        append(node.operation, arguments)
        return Node(Elementwise(tuple(steps)), tuple(unique), node.name)

    return graph.rewrite(rule)
