"""What stands around a product made part of it: padding, affine maps, the residual, activation."""

import dataclasses
from collections.abc import Callable

import numpy as np

from feather_jax.cpu.graph import (
    FLOAT32,
    Constant,
    Convolution,
    Elementwise,
    Graph,
    Literal,
    Node,
    Pad,
    Pool,
    Reshape,
    Step,
    reshape,
)


def padding_into_window(graph: Graph) -> Graph:
    """Padding of height and width with what the product or pooling takes for its own."""

    def rule(node: Node, old: Node) -> Node:
        operation = node.operation
        if not isinstance(operation, Convolution | Pool):
            return node
        x = node.inputs[0]
        neutral = {"max": -np.inf, "min": np.inf}.get(getattr(operation, "kind", ""), 0)
        match x.operation:
            case Pad(value, ((0, 0), rows, columns, (0, 0)), (0, 0, 0, 0)) if value == neutral:
                # Pixels that are cut off are no padding that a window may have again.
                if min(*rows, *columns, *(n for each in operation.padding for n in each)) < 0:
                    return node
                padding = tuple(
                    (a + c, b + d)
                    for (a, b), (c, d) in zip(operation.padding, (rows, columns), strict=True)
                )
                new = dataclasses.replace(operation, padding=padding)
                return Node(new, (x.inputs[0], *node.inputs[1:]), node.name)
        return node

    return graph.rewrite(rule)


def affine_into_product(graph: Graph) -> Graph:
    """Factors and summands by channel behind a product in its weights and bias."""
    uses = graph.uses()

    def rule(node: Node, old: Node) -> Node:
        found = _affine(node)
        if found is None:
            return node
        index, scale, shift = found
        x = node.inputs[index]
        operation = x.operation
        if not isinstance(operation, Convolution) or uses[old.inputs[index]] > 1:
            return node
        if operation.activation or (len(x.inputs) > 1 and not (scale == 1).all()):
            return node
        weights = operation.weights
        if not (scale == 1).all():
            weights = weights * _rounded(scale)
        bias = 0.0 if operation.bias is None else operation.bias.astype(np.float64)
        channels = weights.shape[-1:]
        bias = _rounded(np.broadcast_to(bias * scale + shift, channels))
        if not (np.isfinite(bias).all() and _finite(weights, operation.weights)):
            return node
        new = dataclasses.replace(operation, weights=weights, bias=bias if bias.any() else None)
        return Node(new, x.inputs, x.name)

    return graph.rewrite(rule)


def product_of_affine(graph: Graph) -> Graph:
    """Factors by channel in front of a product in its weights; summands too if it does not pad."""
    uses = graph.uses()

    def rule(node: Node, old: Node) -> Node:
        operation = node.operation
        if not isinstance(operation, Convolution) or uses[old.inputs[0]] > 1:
            return node
        x, before = node.inputs[0], old.inputs[0]
        if isinstance(x.operation, Reshape) and x.inputs[0].shape[-1:] == x.shape[-1:]:
            x, before = x.inputs[0], before.inputs[0] if before.inputs else before
        found = _affine(x)
        if found is None or uses[before] > 1:
            return node
        index, scale, shift = found
        if shift.any() and any(n > 0 for each in operation.padding for n in each):
            return node  # the border is 0, and not the summand
        height, width, inputs, outputs = operation.weights.shape
        groups = operation.groups
        own = operation.weights.reshape(height, width, inputs, groups, outputs // groups)

        def by_input(values: np.ndarray) -> np.ndarray:
            channels = np.broadcast_to(values, (groups * inputs,))
            return channels.reshape(groups, inputs).T[:, :, None]

        bias = np.zeros(outputs) if operation.bias is None else operation.bias
        if shift.any():
            bias = bias + (own * by_input(shift)).sum((0, 1, 2)).reshape(outputs)
        bias = _rounded(bias)
        weights = (own * by_input(_rounded(scale))).reshape(operation.weights.shape)
        if not (np.isfinite(bias).all() and _finite(weights, operation.weights)):
            return node
        new = dataclasses.replace(operation, weights=weights, bias=bias if bias.any() else None)
        source = reshape(x.inputs[index], node.inputs[0].shape, x.name)
        return Node(new, (source, *node.inputs[1:]), node.name)

    return graph.rewrite(rule)


def _rounded(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _finite(weights: np.ndarray, before: np.ndarray) -> bool:
    return weights is before or bool(np.isfinite(weights).all())


def _affine(node: Node) -> tuple[int, np.ndarray, np.ndarray] | None:
    """(i, scale, shift) if a node is scale * inputs[i] + shift, by its last axis; float64."""
    operation = node.operation
    if not isinstance(operation, Elementwise) or len(operation.steps) != 1:
        return None
    (step,) = operation.steps
    values: list[np.ndarray | None] = []
    variable = None
    for operand in step.operands:
        if isinstance(operand, Literal):
            values.append(np.asarray(operand.value, np.float64))
            continue
        each = node.inputs[operand]
        if isinstance(each.operation, Constant) and each.shape in ((), node.shape[-1:]):
            values.append(each.operation.value.astype(np.float64))
        elif variable is None and each.shape == node.shape and each.dtype == FLOAT32:
            values.append(None)
            variable = operand
        else:
            return None
    if variable is None or step.function not in _AFFINE:
        return None
    with np.errstate(all="ignore"):
        found = _AFFINE[step.function](*values)
    if found is None or not all(np.isfinite(each).all() for each in found):
        return None
    scale, shift = map(np.asarray, found)
    return variable, scale, shift


_Found = tuple[np.ndarray | float, np.ndarray | float] | None

# (scale, shift) of a function whose variable operand is None.
_AFFINE: dict[str, Callable[..., _Found]] = {
    "add": lambda x, y: (1.0, y if x is None else x),
    "divide": lambda x, y: (1 / y, 0.0) if x is None else None,
    "multiply": lambda x, y: (y if x is None else x, 0.0),
    "negative": lambda x: (-1.0, 0.0),
    "subtract": lambda x, y: (1.0, -y) if x is None else (-1.0, x),
}


def residual_into_product(graph: Graph) -> Graph:
    """A sum with what has the product's own shape: that of the product that is last computed."""
    uses = graph.uses()
    order = {node: i for i, node in enumerate(graph.nodes)}

    def rule(node: Node, old: Node) -> Node:
        match node.operation:
            case Elementwise((Step("add", (int(), int())),)) if len(node.inputs) == 2:
                pass
            case _:
                return node
        if any(each.shape != node.shape for each in node.inputs):
            return node
        for i in sorted((0, 1), key=lambda i: -order[old.inputs[i]]):
            x, other = node.inputs[i], node.inputs[1 - i]
            operation = x.operation
            if not isinstance(operation, Convolution) or uses[old.inputs[i]] > 1:
                continue
            if not operation.activation and len(x.inputs) == 1:
                return Node(operation, (x.inputs[0], other), x.name)
        return node

    return graph.rewrite(rule)


def activation_into_product(graph: Graph) -> Graph:
    """An expression of nothing but a product's result."""
    uses = graph.uses()

    def rule(node: Node, old: Node) -> Node:
        if not isinstance(node.operation, Elementwise) or len(node.inputs) != 1:
            return node
        (x,) = node.inputs
        operation = x.operation
        if not isinstance(operation, Convolution) or uses[old.inputs[0]] > 1:
            return node
        if operation.activation or node.dtype != FLOAT32:
            return node
        new = dataclasses.replace(operation, activation=node.operation.steps)
        return Node(new, x.inputs, x.name)

    return graph.rewrite(rule)


# The passes that need the steps of batch normalisation and residuals one by one.
LINEAR = (padding_into_window, affine_into_product, product_of_affine, residual_into_product)
