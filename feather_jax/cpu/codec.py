"""Plans, targets and pytrees' structures as JSON, and back: nothing is made but what is listed."""

import base64
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from feather_jax.cpu import (
    convolution,
    dense,
    graph,
    layouts,
    plan,
    target,
    tiled,
    tiles,
    transpose,
)

KIND = "$"

CLASSES: dict[str, type] = {
    f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}": kind
    for kind in (
        *(dense.SparseProduct, dense.DenseProduct),
        *(graph.Broadcast, graph.Concatenate, graph.Elementwise, graph.Gather, graph.Literal),
        *(graph.MatMul, graph.Pad, graph.Pool, graph.Reduce, graph.Reshape, graph.Slice),
        *(graph.Step, graph.Transpose),
        *(layouts.ToTiles, layouts.ToRows, layouts.Halo, layouts.Retile),
        *(plan.Array, plan.Copy, plan.Place, plan.Plan, plan.RowsKernel, plan.Step),
        *(convolution.SparseConvolution, target.Target, tiles.Tiles),
        *(tiled.TiledPool, tiled.TiledReduce, tiled.TiledElementwise),
        *(transpose.RowsToTiles, transpose.TilesToRows),
    )
}
"""The dataclasses that a file may hold, by the names that it has for them."""

_NAMES = {kind: name for name, kind in CLASSES.items()}


def encode(value: Any) -> Any:
    """JSON for frozen dataclasses of numbers, strings, dtypes, tuples and arrays.

    Raises:
      TypeError: there is something else in it.
    """
    match value:
        case np.dtype():
            return {KIND: "dtype", "name": value.name}
        case np.generic():
            return {KIND: "scalar", "dtype": value.dtype.name, "bytes": value.tobytes().hex()}
        case np.ndarray():
            content = base64.b64encode(value.tobytes()).decode()
            shape = list(value.shape)
            return {KIND: "array", "dtype": value.dtype.name, "shape": shape, "bytes": content}
        case float() if not math.isfinite(value):
            return {KIND: "float", "value": str(value)}
        case None | bool() | int() | float() | str():
            return value
        case tuple():
            return [encode(each) for each in value]
        case _ if type(value) in _NAMES:
            fields = {
                field.name: encode(getattr(value, field.name))
                for field in dataclasses.fields(value)
                if field.init
            }
            return {KIND: _NAMES[type(value)], **fields}
    raise TypeError(f"A program's plan holds no {type(value).__name__}.")


def decode(value: Any) -> Any:
    """What `encode` was given.

    Raises:
      ValueError, TypeError, LookupError: it was not made by `encode`.
    """
    if isinstance(value, list):
        return tuple(decode(each) for each in value)
    if not isinstance(value, dict):
        return value
    fields = dict(value)
    match fields.pop(KIND):
        case "dtype":
            return np.dtype(fields["name"])
        case "scalar":
            return np.frombuffer(bytes.fromhex(fields["bytes"]), np.dtype(fields["dtype"]))[0]
        case "array":
            content = np.frombuffer(base64.b64decode(fields["bytes"]), np.dtype(fields["dtype"]))
            return content.reshape(fields["shape"])
        case "float":
            return float(fields["value"])
        case name:
            return CLASSES[name](**{key: decode(each) for key, each in fields.items()})


def encode_tree(tree: Any) -> Any:
    """JSON for the structure of a pytree of dicts, lists, tuples and None.

    Args:
      tree: its `jax.tree.structure`.

    Raises:
      TypeError: there is another container in it, which it names.
    """
    return _encode_node(jax.tree.unflatten(tree, range(tree.num_leaves)))


def _encode_node(node: Any) -> Any:
    if type(node) is dict and all(isinstance(key, str | int) for key in node):
        pairs = [[key, _encode_node(value)] for key, value in node.items()]
        return {KIND: "dict", "items": pairs}
    if type(node) in (list, tuple):
        return {KIND: type(node).__name__, "items": [_encode_node(each) for each in node]}
    if node is None or type(node) is int:
        return node
    raise TypeError(f"{type(node).__name__}")


def decode_tree(value: Any) -> Any:
    """The structure that `encode_tree` was given.

    Raises:
      ValueError, TypeError, LookupError: it was not made by `encode_tree`.
    """
    return jax.tree.structure(_decode_node(value))


def _decode_node(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    items: Iterable[Any] = value["items"]
    match value[KIND]:
        case "dict":
            return {key: _decode_node(each) for key, each in items}
        case "list":
            return [_decode_node(each) for each in items]
        case "tuple":
            return tuple(_decode_node(each) for each in items)
    raise ValueError(f"There is no pytree of kind {value[KIND]!r}.")
