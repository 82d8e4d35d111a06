"""Pytrees as a model file has them: leaves by paths of strings and integers, and trees of these."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import ml_dtypes
import numpy as np
from jax.tree_util import DictKey, GetAttrKey, SequenceKey
from jaxtyping import PyTree

Path: TypeAlias = tuple[str | int, ...]

_NUMPY_NAMES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
EXTENDED = {
    np.dtype(scalar).name: np.dtype(scalar)
    for scalar in vars(ml_dtypes).values()
    if isinstance(scalar, type) and issubclass(scalar, np.generic)
}
DTYPES: dict[str, np.dtype] = {name: np.dtype(name) for name in _NUMPY_NAMES} | EXTENDED


def name_of(path: Path | list[str | int]) -> str:
    """How errors call what is at `path`."""
    return "variables" + "".join(f"[{key!r}]" for key in path)


def leaves_of(variables: PyTree) -> list[tuple[Path, np.ndarray | None]]:
    """Every array with its path, in the order of the paths; None stands for an empty dict.

    The root, if it is an empty dict, is left out, and so is what is no data: functions, and numbers
    and strings that are a module's attributes.

    Raises:
      TypeError: a key or a leaf is of a kind that a model file cannot hold.
    """
    leaves: list[tuple[Path, np.ndarray | None]] = []

    def collect(path: Path, leaf: Any) -> None:
        if not isinstance(leaf, Mapping):
            leaves.append((path, _to_array(path, leaf)))
        elif path:
            leaves.append((path, None))

    map_leaves(collect, variables)
    return sorted(leaves, key=lambda item: [(isinstance(key, str), key) for key in item[0]])


def insert(tree: dict[str | int, Any], path: Any, leaf: Any) -> None:
    """Puts `leaf` at its place in nested dicts, which must still be free."""
    if not (isinstance(path, list) and path and all(type(key) in (str, int) for key in path)):
        raise ValueError("a leaf's path is not a list of strings and integers")
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{name_of(path)} is below another leaf")
    if path[-1] in tree:
        raise ValueError(f"{name_of(path)} is there twice")
    tree[path[-1]] = leaf


def rebuild(like: PyTree, variables: dict[str | int, Any], source: str) -> PyTree:
    """A pytree like `like` with the arrays of `variables`, what `insert` has made of them.

    Args:
      like: a pytree of arrays or of their shapes (`jax.ShapeDtypeStruct`).
      variables: nested dicts of NumPy arrays.
      source: where they come from, for the errors.

    Returns:
      A pytree with the structure of `like`, and arrays of its dtypes: of JAX where `like` has
      such, on the same devices, else NumPy's.

    Raises:
      TypeError: `like` holds a key or a leaf that a model file cannot.
      ValueError: a leaf is missing, or there is one too many, or its shape or kind is another.
    """
    taken: set[Path] = set()

    def restore(path: Path, leaf: Any) -> Any:
        taken.add(path)
        array: Any = variables
        for key in path:
            array = array.get(key) if isinstance(array, dict) else None
        if isinstance(leaf, Mapping):
            if array != {}:
                raise ValueError(f"{source} has no empty {name_of(path)}, as `like` has.")
            return leaf
        return _restored(path, array, leaf, source)

    tree = map_leaves(restore, like)
    for path, _ in leaves_of(variables):
        if path not in taken:
            raise ValueError(
                f"{source} has {name_of(path)}, which `like` has not; give the whole of what was "
                "saved, or load without `like` and choose."
            )
    return tree


def map_leaves(function: Callable[[Path, Any], Any], node: PyTree, path: Path = ()) -> PyTree:
    """`node` with `function(path, leaf)` for every leaf that is data, and for every empty mapping.

    A pytree of any kind, and dicts whose keys JAX cannot sort. An NNX variable or a partitioning
    box is the array in it.
    """
    if node is None or (callable(node) and jax.tree_util.all_leaves([node])):
        return node
    if isinstance(node, Mapping) and not node:
        return function(path, node)
    rebuilt: Callable[[list[Any]], PyTree]
    if type(node) is dict:
        level = [((DictKey(key),), child) for key, child in node.items()]
        rebuilt = lambda values: dict(zip(node, values, strict=True))  # noqa: E731
    else:
        level, structure = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda child: child is not node
        )
        if level and not level[0][0]:
            return function(path, node)
        rebuilt = functools.partial(jax.tree_util.tree_unflatten, structure)
        if [keys for keys, _ in level] == [(GetAttrKey("value"),)]:
            return rebuilt([map_leaves(function, level[0][1], path)])
    return rebuilt(
        [
            child
            if isinstance(key, GetAttrKey) and isinstance(child, bool | int | float | complex | str)
            else map_leaves(function, child, (*path, _plain(path, key)))
            for (key,), child in level
        ]
    )


def _plain(path: Path, key: Any) -> str | int:
    if isinstance(key, GetAttrKey):
        return key.name
    plain = key.idx if isinstance(key, SequenceKey) else key.key
    if not isinstance(plain, str | int) or isinstance(plain, bool):
        raise TypeError(
            f"{name_of(path)} has the key {plain!r}, a {type(plain).__name__}; keys are strings or "
            "integers."
        )
    return plain


def _dtype_of(path: Path, leaf: Any) -> np.dtype:
    # An nnx.Variable is no array, but has a dtype and turns into one.
    dtype = getattr(leaf, "dtype", None)
    if issubclass(getattr(dtype, "type", object), jax.dtypes.prng_key):
        raise TypeError(
            f"{name_of(path)} holds PRNG keys; leave them out, or save jax.random.key_data of them."
        )
    if not path or not isinstance(dtype, np.dtype) or not hasattr(leaf, "shape"):
        raise TypeError(
            f"{name_of(path)} is a {type(leaf).__name__}; a model file holds a pytree of arrays."
        )
    if dtype.name not in DTYPES:
        raise TypeError(
            f"{name_of(path)} is an array of {dtype.name}; a model file holds arrays of numbers."
        )
    return dtype


def _to_array(path: Path, leaf: Any) -> np.ndarray:
    _dtype_of(path, leaf)
    return np.asarray(leaf)


def _restored(path: Path, array: Any, leaf: Any, source: str) -> Any:
    """`array`, as `leaf` is: of its dtype, and on its devices."""
    dtype = _dtype_of(path, leaf)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{source} has no array {name_of(path)}, as `like` has.")
    if array.shape != leaf.shape:
        raise ValueError(
            f"{source} has {name_of(path)} of shape {array.shape}, and `like` of {leaf.shape}."
        )
    if array.dtype != dtype:
        if not all(jax.dtypes.issubdtype(kind, np.floating) for kind in (array.dtype, dtype)):
            raise ValueError(
                f"{source} has {name_of(path)} in {array.dtype.name}, and `like` in {dtype.name}."
            )
        array = array.astype(dtype)
    sharding = getattr(leaf, "sharding", None)
    return array if sharding is None else jax.device_put(array, sharding)
