"""A batch as its images one by one, where that is what its graph computes.

The activations of one image fit a cache where those of a batch do not.
"""

import dataclasses
import math

import numpy as np

from feather_jax.cpu.graph import (
    Broadcast,
    Concatenate,
    Constant,
    Convolution,
    Elementwise,
    Graph,
    Input,
    MatMul,
    Node,
    Operation,
    Pad,
    Pool,
    Reduce,
    Reshape,
    Slice,
    Transpose,
    constant,
)
from feather_jax.cpu.tiles import FLOAT, choose_tiles

# Bytes of the largest product's result from which on a batch is computed image by image: two such
# arrays fill the second cache of many cores.
LARGE = 1_000_000

# How many lanes for each pixel are too many: where planes are so small that tiles leave much of a
# vector empty, lanes are better filled with images.
WASTE = 1.3


def is_by_image(graph: Graph, lanes: int) -> bool:
    """Whether a batch is faster image by image: its arrays are large, and tiles fill vectors."""
    products = [
        (node.shape, int(np.count_nonzero(node.operation.weights)))
        for node in graph.nodes
        if isinstance(node.operation, Convolution)
    ]
    if all(FLOAT * math.prod(shape) <= LARGE for shape, _ in products):
        return False
    work = sum(nonzeros * math.prod(shape[1:3]) for shape, nonzeros in products)
    filled = sum(
        nonzeros * lanes * math.prod(choose_tiles((1, *shape[1:]), lanes).tile)
        for shape, nonzeros in products
        if math.prod(shape)
    )
    return filled <= WASTE * work


def one_image(graph: Graph) -> tuple[Graph, int] | None:
    """The function of one image, if the graph's images do not depend on one another.

    Returns:
      The graph, and how many images the batch has: the results of the images, one behind the
      other, are the batch's. None where there is no such batch, along the first axis of all inputs
      and outputs.
    """
    sizes = {node.shape[0] if node.shape else 1 for node in graph.inputs}
    if len(sizes) != 1:
        return None
    (batch,) = sizes
    if batch < 2:
        return None

    new: dict[Node, Node] = {}
    for node in graph.nodes:
        if isinstance(node.operation, Constant):
            continue
        part = _of_image(node, new, batch)
        if part is None:
            return None
        new[node] = part
    if any(isinstance(node.operation, Constant) for node in graph.outputs):
        return None
    inputs, outputs = (
        tuple(new[node] for node in nodes) for nodes in (graph.inputs, graph.outputs)
    )
    return Graph(inputs, outputs), batch


def _of_image(node: Node, new: dict[Node, Node], batch: int) -> Node | None:
    """A node's part of one image, or None: its first axis is that of images, or begins with it."""
    if not node.shape or node.shape[0] % batch:
        return None
    wanted = (node.shape[0] // batch, *node.shape[1:])
    operation = _of_one(node, wanted)
    inputs = [new.get(each) or _constant_part(each, node, batch) for each in node.inputs]
    if operation is None or None in inputs:
        return None
    try:
        part = Node(operation, tuple(each for each in inputs if each), node.name)
    except (AssertionError, ValueError):  # a constant does not fit one image
        return None
    return part if part.shape == wanted else None


def _constant_part(node: Node, user: Node, batch: int) -> Node | None:
    """What one image sees of a constant: all of it, if it is the same for all images."""
    assert isinstance(node.operation, Constant)
    value, rank = node.operation.value, len(user.shape)
    if isinstance(user.operation, Elementwise | Broadcast) and (
        value.ndim < rank or value.shape[0] == 1
    ):
        return node
    if not value.ndim or value.shape[0] % batch:
        return None
    parts = value.reshape(batch, value.shape[0] // batch, *value.shape[1:])
    if any(not np.array_equal(part, parts[0]) for part in parts[1:]):
        return None
    return constant(parts[0], node.name)


def _of_one(node: Node, wanted: tuple[int, ...]) -> Operation | None:
    """The operation that gives a result of the shape `wanted` from inputs of one image."""
    match node.operation:
        case Input() as operation:
            return dataclasses.replace(operation, shape=wanted)
        case Convolution() | Pool() | Elementwise() | MatMul() as operation:
            return operation
        case Reduce(axes=axes) as operation if 0 not in axes:
            return operation
        case Concatenate(axis) as operation if axis:
            return operation
        case Transpose(permutation) as operation if permutation[0] == 0:
            return operation
        case Reshape():
            return Reshape(wanted)
        case Broadcast():
            return Broadcast(wanted)
        case Slice(start, size, stride) if (start[0], stride[0]) == (0, 1):
            return Slice(start, (wanted[0], *size[1:]), stride) if size == node.shape else None
        case Pad(_, padding, interior) as operation if (padding[0], interior[0]) == ((0, 0), 0):
            return operation
        case _:
            return None
