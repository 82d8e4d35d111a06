"""Transposes and reshapes moved behind what does not care, where they meet others and vanish.

So a network in channels-first order computes in channels-last, and a dense layer's bias,
activation and residual come next to its product.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from feather_jax.cpu.graph import (
    Concatenate,
    Constant,
    Convolution,
    Elementwise,
    Graph,
    Node,
    Pad,
    Reduce,
    Reshape,
    Shape,
    Slice,
    Transpose,
    constant,
    reshape,
    transpose,
)


def sink_layouts(graph: Graph) -> Graph:
    """Each transpose and reshape behind the operation that it is an input of, where that can be."""

    def rule(node: Node, old: Node) -> Node:
        if any(isinstance(each.operation, Transpose) for each in node.inputs):
            return _behind_transpose(node)
        if isinstance(node.operation, Elementwise):
            return _behind_reshape(node)
        if isinstance(node.operation, Reduce):
            return _split_reduction(node)
        return node

    return graph.rewrite(rule)


def keeps_order(permutation: Sequence[int], shape: Shape) -> bool:
    """Whether a transpose of an array of `shape` moves nothing but axes of size 1."""
    moved = [axis for axis in permutation if shape[axis] != 1]
    return moved == sorted(moved)


def _behind_transpose(node: Node) -> Node:
    """operation(transpose(x)) as transpose(operation(x)), if all inputs allow it."""
    first = next(each for each in node.inputs if isinstance(each.operation, Transpose))
    assert isinstance(first.operation, Transpose)
    permutation = first.operation.permutation
    inverse = tuple(np.argsort(permutation).tolist())

    def move(values: Sequence) -> tuple:
        return tuple(values[axis] for axis in inverse)

    operation, name = node.operation, node.name
    match operation:
        case Elementwise():
            rank = len(node.shape)
            inputs = [_unmoved(each, permutation, inverse, rank) for each in node.inputs]
        case Concatenate() | Slice() | Pad():
            inputs = [
                each.inputs[0] if each.operation == first.operation else None
                for each in node.inputs
            ]
        case Reduce():
            inputs = [first.inputs[0]]
        case _:
            return node
    if any(each is None for each in inputs):
        return node
    own = tuple(each for each in inputs if each is not None)

    match operation:
        case Elementwise():
            result = Node(operation, own, name)
        case Concatenate(axis):
            result = Node(Concatenate(permutation[axis]), own, name)
        case Slice(start, size, stride):
            result = Node(Slice(move(start), move(size), move(stride)), own, name)
        case Pad(value, padding, interior):
            result = Node(Pad(value, move(padding), move(interior)), own, name)
        case Reduce(kind, axes, dtype):
            gone = tuple(sorted(permutation[axis] for axis in axes))
            result = Node(Reduce(kind, gone, dtype), own, name)
            left = [permutation[axis] for axis in range(len(permutation)) if axis not in axes]
            permutation = tuple(np.argsort(np.argsort(left)).tolist())
    return transpose(result, permutation, name)


def _unmoved(
    node: Node, permutation: tuple[int, ...], inverse: tuple[int, ...], rank: int
) -> Node | None:
    """An input of an expression as it is before the transpose; None if that is work."""
    if isinstance(node.operation, Transpose) and node.operation.permutation == permutation:
        return node.inputs[0]
    full = (1,) * (rank - len(node.shape)) + node.shape
    moved = tuple(full[axis] for axis in inverse)
    if keeps_order(inverse, full):
        return _reshaped(node, moved)
    if isinstance(node.operation, Constant):
        value = node.operation.value.reshape(full)
        return constant(np.ascontiguousarray(value.transpose(inverse)), node.name)
    return None


def _reshaped(node: Node, shape: Shape) -> Node:
    if isinstance(node.operation, Constant):
        return constant(node.operation.value.reshape(shape), node.name)
    return reshape(node, shape, node.name)


def _behind_reshape(node: Node) -> Node:
    """expression(reshape(x), ...) as reshape(expression(x, ...)), if all inputs allow it.

    The shape is that of the first product among the reshaped inputs, or else the one that all have.
    """
    full = [
        each
        for each in node.inputs
        if each.shape == node.shape and not isinstance(each.operation, Constant)
    ]
    sources = [each.inputs[0] for each in full if isinstance(each.operation, Reshape)]
    shapes = [each.shape for each in sources if isinstance(each.operation, Convolution)]
    if not shapes and len(sources) == len(full):
        shapes = list({each.shape for each in sources})
        shapes = shapes if len(shapes) == 1 else []
    if not shapes or any(isinstance(each.operation, Convolution) for each in full):
        return node
    shape = shapes[0]
    inputs = []
    for each in node.inputs:
        if each in full:
            inputs.append(reshape(each, shape, each.name))
        elif each.shape == ():
            inputs.append(each)
        elif isinstance(each.operation, Constant):
            value = _refit(each.operation.value, node.shape, shape)
            if value is None:
                return node
            inputs.append(constant(value, each.name))
        else:
            return node
    return reshape(Node(node.operation, tuple(inputs), node.name), node.shape, node.name)


def _split_reduction(node: Node) -> Node:
    """A reduction over axes that a reshape left as they were, and others: over those first.

    A group norm's sum over pixels and part of the channels is one over pixels, which tiles and
    vectors of channels do well, and a small one.
    """
    assert isinstance(node.operation, Reduce)
    (x,), operation = node.inputs, node.operation
    if not isinstance(x.operation, Reshape) or operation.kind in ("argmax", "argmin"):
        return node
    source = x.inputs[0]
    pairs = zip(source.shape, x.shape, strict=False)
    alike = sum(1 for _ in itertools.takewhile(lambda sizes: sizes[0] == sizes[1], pairs))
    first = tuple(axis for axis in operation.axes if axis < alike)
    kept = tuple(axis for axis in range(alike) if axis not in first)
    if not first or alike in (len(source.shape), len(x.shape)):
        return node
    inner = Node(Reduce(operation.kind, first), (source,), node.name)
    left = tuple(x.shape[axis] for axis in kept) + x.shape[alike:]
    rest = tuple(axis - len(first) for axis in operation.axes if axis >= alike)
    parts = reshape(inner, left, node.name)
    return Node(Reduce(operation.kind, rest), (parts,), node.name) if rest else parts


def _refit(value: np.ndarray, old: Shape, new: Shape) -> np.ndarray | None:
    """A constant that broadcasts to `old`, for the same elements as `new`; None if none does."""
    trailing = old[len(old) - value.ndim :]
    size = math.prod(trailing)
    for axis in range(len(new) - 1, -1, -1):
        if math.prod(new[axis:]) == size:
            return np.broadcast_to(value, trailing).reshape(new[axis:])
    return None
