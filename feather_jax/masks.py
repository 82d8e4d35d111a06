"""Which weights may be pruned: pytrees of bools, as Optax's masks are."""

import functools
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, GetAttrKey, KeyPath
from jaxtyping import PyTree

Mask: TypeAlias = PyTree[bool] | Callable[[PyTree], PyTree[bool]]
"""A pytree of bools, or a prefix of one, or a function of the parameters that returns either."""


def path_name(path: KeyPath) -> str:
    """The keys of a leaf's path joined by "/", as in `Dense_0/kernel`.

    The attribute `value` at its end, of an NNX variable or of a Linen partitioning box, is left
    out.
    """
    return jax.tree_util.keystr(_unboxed(path), simple=True, separator="/")


def _unboxed(path: KeyPath) -> KeyPath:
    while len(path) > 1 and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return path


def is_floating(leaf: Any) -> bool:
    """Whether `leaf` holds real floating-point numbers, bfloat16 and the 8-bit floats included."""
    try:
        return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    except TypeError:  # no array at all: an activation function in an Equinox module
        return False


def is_trainable(leaf: Any) -> bool:
    """Whether `leaf` is floating-point in at least 16 bits: narrower floats are for storage."""
    return is_floating(leaf) and jnp.result_type(leaf).itemsize >= 2


def prunable_weights(params: PyTree) -> PyTree[bool]:
    """The default mask: the kernels of dense, convolutional and attention layers.

    A leaf is prunable if it is floating-point, has at least two dimensions and is called `kernel`,
    by a dict's key or as an attribute. That is every convolution and linear layer of Flax, the
    first and the last included, and neither a bias (an attention projection's has two dimensions),
    a normalisation's scale nor an embedding; nor the parts of a kernel that is not one array, as
    the scale of a quantised one. Kernels in floats of 8 bits or fewer, which are stored and not
    trained in them, are left alone. `path_mask` chooses by other names.

    Args:
      params: a pytree of arrays: Linen's `params`, an `nnx.State`, a module, nested dicts.

    Returns:
      A pytree of Python bools with the structure of `params`.

    References:
      Feather's released code prunes the weights of every convolution and every linear layer
      (Glentis Georgoulakis et al., BMVC 2023, https://arxiv.org/abs/2310.02448).
    """

    def is_prunable(path: KeyPath, leaf: Any) -> bool:
        named = _unboxed(path)[-1:] in ((DictKey("kernel"),), (GetAttrKey("kernel"),))
        return named and is_trainable(leaf) and jnp.ndim(leaf) >= 2

    return jax.tree_util.tree_map_with_path(is_prunable, params)


def path_mask(
    include: str | Sequence[str] = (), exclude: str | Sequence[str] = ()
) -> Callable[[PyTree], PyTree[bool]]:
    """A mask by name: regular expressions that match the whole path of a parameter.

    A path is what `summarize` shows, keys and attributes joined by "/": `Dense_0/kernel`, or
    `layers/0/weight` in an Equinox module, or `linear/w` in Haiku's parameters.

    Args:
      include: floating-point leaves that one of these matches in full are prunable; without any,
        those of the default mask (`prunable_weights`) are.
      exclude: of these leaves, those that one of these matches in full are not.

    Returns:
      A function of the parameters, for every argument that is called `prunable`. It raises
      ValueError if an expression matches nothing: an `include` no floating-point leaf, an
      `exclude` none of those that would be prunable without it. (Where Optax's `partition` and
      `masked` hide a part of the parameters, that is not known, and not an error.)

    Raises:
      ValueError: an expression is none.

    Example:
      >>> import numpy as np
      >>> from feather_jax import path_mask
      >>> layer = {"w": np.ones((2, 2)), "b": np.ones(2)}
      >>> path_mask(include=[".*/w"], exclude=["head/.*"])({"body": layer, "head": layer})
      {'body': {'b': False, 'w': True}, 'head': {'b': False, 'w': False}}
    """
    return functools.partial(_select_by_name, *map(_expressions, (include, exclude)))


def _expressions(given: str | Sequence[str]) -> tuple[str, ...]:
    expressions = (given,) if isinstance(given, str) else tuple(given)
    for expression in expressions:
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"path_mask takes regular expressions, and {expression!r} is none: {error}."
            ) from None
    return expressions


def _select_by_name(
    include: tuple[str, ...], exclude: tuple[str, ...], params: PyTree
) -> PyTree[bool]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    default = jax.tree.leaves(prunable_weights(params))
    named = {path: path_name(path) for path, leaf in leaves if is_trainable(leaf)}
    if include:
        chosen = {path: name for path, name in named.items() if _matches(include, name)}
    else:
        chosen = {
            path: named[path]
            for (path, _), selected in zip(leaves, default, strict=True)
            if selected
        }
    if not _has_masked_nodes(params):
        _check_matches("include", include, named.values())
        _check_matches("exclude", exclude, chosen.values())
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path in chosen and not _matches(exclude, chosen[path]), params
    )


def _matches(expressions: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(expression, name) for expression in expressions)


def _check_matches(what: str, expressions: tuple[str, ...], names: Collection[str]) -> None:
    for expression in expressions:
        if not any(_matches((expression,), name) for name in names):
            raise ValueError(
                f"{what} holds {expression!r}, which matches no parameter's whole path; "
                f"{'the prunable ones' if what == 'exclude' else 'these'} are {_listed(names)}."
            )


def _listed(names: Collection[str], most: int = 8) -> str:
    shown = [name or "one without a name" for name in itertools.islice(names, most)]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*shown, *more]) or "none"


def resolve_mask(params: PyTree, prunable: Mask | None = None) -> PyTree[bool]:
    """The mask that `prunable` means for `params`, spelled out leaf by leaf.

    Args:
      params: a pytree of arrays. Where Optax has put a `MaskedNode` there is no leaf, and the
        mask has none either.
      prunable: None for `prunable_weights`, a pytree prefix of bools, or a function of `params`
        that returns one. A pytree may be callable itself, as modules are, and may hold NNX
        variables or partitioning boxes where `params` does not, or the other way round.

    Returns:
      A pytree of Python bools with the structure of `params`.

    Raises:
      TypeError: the mask holds something else than bools, or selects a leaf that is not
        floating-point in at least 16 bits.
      ValueError: the mask is not a prefix of `params`.
    """
    if prunable is None:
        return prunable_weights(params)
    is_function = callable(prunable) and jax.tree_util.all_leaves([prunable])
    mask = _without_boxes(prunable(params) if is_function else prunable)

    def spread(path: KeyPath, selected: Any, subtree: PyTree) -> PyTree[bool]:
        if not isinstance(selected, bool | np.bool_):
            raise TypeError(
                f"A mask of prunable weights holds bools, and this one holds {selected!r} at "
                f"{path_name(path)!r}; give True or False for each leaf or for a whole subtree."
            )
        for below, leaf in jax.tree_util.tree_leaves_with_path(subtree) if selected else ():
            if not is_trainable(leaf):
                raise TypeError(
                    f"The mask selects {path_name(path + below)!r} for pruning, whose "
                    f"{_kind(leaf)}; only floating-point weights of at least 16 bits can be pruned."
                )
        return jax.tree.map(lambda _: bool(selected), subtree)

    try:
        return map_prefix(spread, mask, params)
    except ValueError as error:
        raise ValueError(
            "The mask of prunable weights must have the structure of the parameters or be a "
            "prefix of it, and this one is neither (the error above says where they differ)."
        ) from error


def pruning_mask(params: PyTree, prunable: Mask | None = None) -> PyTree[bool]:
    """`resolve_mask` for who prunes: that there is nothing to prune is an error.

    Raises:
      TypeError, ValueError: as `resolve_mask`; or nothing is prunable, unless Optax has hidden a
        part of `params` behind a `MaskedNode`: then what is prunable may be there.
    """
    mask = resolve_mask(params, prunable)
    if not any(jax.tree.leaves(mask)) and not _has_masked_nodes(params):
        raise no_prunable_weight(params)
    return mask


def no_prunable_weight(params: PyTree) -> ValueError:
    """The error that says so."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return ValueError(
        f"There is no prunable weight among the parameters ({_listed(names)}): by default a leaf "
        "is prunable if it is named 'kernel' and has two dimensions or more; choose others with "
        "prunable=path_mask(include=...), or with a pytree of bools."
    )


def _kind(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return f"type is {type(leaf).__name__}" if dtype is None else f"dtype is {dtype}"


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _has_masked_nodes(params: PyTree) -> bool:
    return any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked)))


def _without_boxes(mask: PyTree) -> PyTree:
    """`mask` with NNX variables and partitioning boxes replaced by the bools in them."""

    def is_box(node: Any) -> bool:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(node)]
        return paths == [(GetAttrKey("value"),)]

    return jax.tree.map(
        lambda node: jax.tree.leaves(node)[0] if is_box(node) else node, mask, is_leaf=is_box
    )


def map_prefix(
    function: Callable[[KeyPath, Any, PyTree], PyTree], prefix: PyTree, params: PyTree
) -> PyTree:
    """`function(path, value, subtree)` for every leaf of a pytree prefix of `params`.

    Where Optax has put a `MaskedNode` for a part of `params` it is passed over, together with
    whatever the prefix, made for the whole of them, holds there.

    Raises:
      ValueError: `prefix` is not a prefix of `params`.
    """
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_masked)
    masked = {path for path, node in nodes if _is_masked(node)}
    visible = jax.tree_util.tree_map_with_path(
        lambda path, value: optax.MaskedNode() if path in masked else value,
        prefix,
        is_leaf=lambda path, _: path in masked,
        is_leaf_takes_path=True,
    )
    return jax.tree_util.tree_map_with_path(function, visible, params)


def prunable_leaves(params: PyTree, prunable: Mask | None = None) -> list[Any]:
    """The leaves of `params` that `prunable` selects, in the order of `jax.tree.leaves`."""
    mask = resolve_mask(params, prunable)
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
    return [leaf for leaf, selected in leaves if selected]
