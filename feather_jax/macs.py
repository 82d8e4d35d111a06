"""Multiply-accumulates of a traced function, layer by layer: the work, dense and sparse.

Everything is read off the jaxpr, so it works for any model, whichever library defines it.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jaxtyping import PyTree

from feather_jax.masks import path_name
from feather_jax.summary import format_table


@dataclasses.dataclass(frozen=True)
class Product:
    """One dot product or convolution of the traced program.

    Attributes:
      name: of its kernel among the parameters, as `summarize` has it (`Conv_0/kernel`), or where no
        parameter is its kernel, the scope it was traced in.
      kind: the primitive, as in `dot_general`.
      shape: of the result.
      macs: multiply-accumulates, over all turns of the loops and all devices around it.
      sparse_macs: those left when the zeros of its kernel are skipped; `macs` without a kernel.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    sparse_macs: int


@dataclasses.dataclass(frozen=True)
class Macs:
    """The products of a program, in its order. `str` gives a table; `dataclasses.asdict` data.

    Attributes:
      layers: the products; a kernel that is used twice is there twice.
    """

    layers: tuple[Product, ...]

    @property
    def total(self) -> int:
        """The multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def sparse_total(self) -> int:
        """The multiply-accumulates of all layers when the zeros of the kernels are skipped."""
        return sum(layer.sparse_macs for layer in self.layers)

    def cost_per_weight(self, params: PyTree) -> PyTree[float]:
        """What each weight costs in multiply-accumulates, as `budget_thresholds` takes it.

        Args:
          params: the parameters that were counted, or Linen's `params` where `variables` were.

        Returns:
          A pytree like `params` of numbers: of each leaf the multiply-accumulates of all products
          that it is the kernel of, over its weights; 0 for what is no kernel.

        Raises:
          ValueError: no leaf of `params` is the kernel of a product.

        Example:
          >>> import jax.numpy as jnp
          >>> from feather_jax import count_macs
          >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
          >>> fn = lambda params, x: x @ params["kernel"] + params["bias"]
          >>> count_macs(fn, params, jnp.ones((8, 4))).cost_per_weight(params)
          {'bias': 0.0, 'kernel': 8.0}
        """
        macs: collections.Counter[str] = collections.Counter()
        for layer in self.layers:
            macs[layer.name] += layer.macs
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for collection in ("", "params/"):
            if any(collection + name in macs for name in names):
                break
        else:
            raise ValueError(
                f"No product that was counted ({', '.join(sorted(macs))}) has its kernel among "
                "these parameters; pass those that count_macs was called with."
            )
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: macs[collection + path_name(path)] / max(math.prod(leaf.shape), 1),
            params,
        )

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{layer.macs:,}",
                f"{layer.sparse_macs:,}",
            )
            for layer in self.layers
        ]
        rows.append(("all", "", f"{self.total:,}", f"{self.sparse_total:,}"))
        return format_table(("layer", "result", "MACs", "sparse MACs"), rows)


def count_macs(fn: Callable[..., Any], *args: Any) -> Macs:
    """Counts the multiply-accumulates of `fn(*args)` without running it.

    Dot products and convolutions count, wherever they are: inside `jit`, `remat`, `scan` (times its
    length), `shard_map` and `pmap` (times the devices), Pallas kernels (times the grid), functions
    with derivatives of their own, and in the branch of a `cond` that has most. A convolution is
    counted as is usual: output elements x taps x input channels of a group, those taps included
    that fall on padding, but not those that fall on the zeros between a dilated input's elements,
    so that a transposed convolution costs what the convolution does. Element-wise work, FFTs,
    factorisations and kernels behind a foreign call are not multiply-accumulates here. The count is
    the program's as it was traced, before XLA removes what nobody uses.

    Args:
      fn: a function that JAX can trace; bind what is not an array with `functools.partial`.
      *args: its arguments, pytrees of arrays or of `jax.ShapeDtypeStruct`. The first holds the
        parameters, as in `model.apply(variables, images)`: where one of its leaves reaches a
        product through nothing but reshaping and element-wise operations (a cast, a transpose,
        the thresholding operator), it is that product's kernel. A bare array has no name and
        counts as data.

    Returns:
      A `Macs`: plain data, which prints as a table. Sparse MACs come from the fraction of
      non-zeros in the kernels as they are given, and equal the dense ones for a
      `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: a product is in a loop whose number of turns is not known before it runs.

    Example:
      >>> import jax.numpy as jnp
      >>> from feather_jax import count_macs
      >>> params = {"dense": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}}
      >>> def fn(params, x):
      ...     return x @ params["dense"]["kernel"] + params["dense"]["bias"]
      >>> print(count_macs(fn, params, jnp.ones((8, 4))))
      layer         result  MACs  sparse MACs
      ---------------------------------------
      dense/kernel     8x4   128           32
      all                    128           32
    """
    closed = jax.make_jaxpr(fn)(*args)
    leaves = jax.tree_util.tree_leaves_with_path(args)
    sources: list[Source] = [
        _Parameter(path_name(path[1:]).removeprefix("params/"), leaf)
        if path[0].idx == 0 and len(path) > 1
        else _DATA
        for path, leaf in leaves
    ]
    products, _ = _walk(closed.jaxpr, sources, "")
    return Macs(tuple(product.counted() for product in products))


@dataclasses.dataclass(frozen=True, eq=False)
class _Parameter:
    """A leaf of the first argument."""

    name: str
    leaf: Any

    def sparse(self, macs: int) -> int:
        """`macs` without those that multiply a zero of this kernel."""
        size = math.prod(self.leaf.shape)
        if isinstance(self.leaf, jax.ShapeDtypeStruct) or not size:
            return macs
        return macs * int(np.count_nonzero(self.leaf)) // size


@dataclasses.dataclass(frozen=True)
class _TracedProduct:
    """A product before its zeros are counted: once, after the loops around it multiplied it."""

    kernel: _Parameter | None
    scope: str
    kind: str
    shape: tuple[int, ...]
    macs: int

    def counted(self) -> Product:
        kernel, macs = self.kernel, self.macs
        name, sparse = (kernel.name, kernel.sparse(macs)) if kernel else (self.scope, macs)
        return Product(name or self.kind, self.kind, self.shape, macs, sparse)


class _Data:
    """Stands for whatever depends on more than one parameter: inputs, activations."""


_DATA = _Data()

# Where a value of the program comes from: one parameter, data, or neither (a constant, a scalar).
Source = _Parameter | _Data | None


def _walk(
    jaxpr: Jaxpr, sources: Sequence[Source], scope: str
) -> tuple[list[_TracedProduct], list[Source]]:
    """The products of a jaxpr, and where its results come from, given that of its arguments."""
    known = dict(zip(jaxpr.invars, sources, strict=True))

    def look_up(atom: Any) -> Source:
        return None if isinstance(atom, Literal) else known.get(atom)

    products = []
    for eqn in jaxpr.eqns:
        inner = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
        found, results = _equation(eqn, [look_up(atom) for atom in eqn.invars], inner)
        products += found
        known.update(zip(eqn.outvars, results, strict=True))
    return products, [look_up(atom) for atom in jaxpr.outvars]


def _equation(
    eqn: JaxprEqn, sources: Sequence[Source], scope: str
) -> tuple[list[_TracedProduct], list[Source]]:
    """The products of one equation with all its inner jaxprs, and where its results come from."""
    kind, params = eqn.primitive.name, eqn.params
    if kind in _COUNTS:
        return [_product(eqn, sources, scope)], [_DATA]

    inner = list(jaxprs_in_params(params))
    if not inner:
        return [], [_origin(eqn, sources, _shape(result)) for result in eqn.outvars]
    if kind == "custom_linear_solve":  # its other jaxprs serve the derivatives
        inner = list(jaxprs_in_params({"solve": params["jaxprs"].solve}))
    if kind == "cond":  # the first operand chooses the branch
        sources = sources[1:]

    walked = [_walk(jaxpr, _fit(sources, len(jaxpr.invars)), scope) for jaxpr in inner]
    results = [_fit(results, len(eqn.outvars)) for _, results in walked]
    merged = [_merge(each) for each in zip(*results, strict=True)]
    if kind == "cond":
        costliest = max(walked, key=lambda branch: sum(product.macs for product in branch[0]))
        return costliest[0], merged
    products = [product for found, _ in walked for product in found]
    turns = _turns(eqn)
    if products and turns is None:
        raise ValueError(
            f"The {kind} loop in {scope or 'the traced function'!r} holds products, and how often "
            f"it turns is not known before it runs; use jax.lax.scan, or fori_loop with bounds "
            f"that are Python numbers, to have them counted."
        )
    repeated = [dataclasses.replace(each, macs=each.macs * (turns or 0)) for each in products]
    return repeated, merged


def _turns(eqn: JaxprEqn) -> int | None:
    """How often an equation runs its inner jaxprs; None if it is not known."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"]
        case "while":
            return None
        case "shard_map":
            axes = eqn.params["newly_manual_axes"]
            return math.prod(eqn.params["mesh"].shape[axis] for axis in axes)
        case "pallas_call":
            grid = eqn.params["grid_mapping"].grid
            return math.prod(grid) if all(isinstance(size, int) for size in grid) else None
        case _:
            return 1


def _product(eqn: JaxprEqn, sources: Sequence[Source], scope: str) -> _TracedProduct:
    """A product and its kernel.

    Of two parameters the right-hand one is the kernel: there it is in `x @ kernel` and in a
    convolution. A vector is none, but a bias or a state.
    """
    kernel = None
    for source, operand in zip(sources[:2], eqn.invars[:2], strict=True):
        if isinstance(source, _Parameter) and len(_shape(operand)) >= 2:
            kernel = source
    kind = eqn.primitive.name
    return _TracedProduct(kernel, scope, kind, _shape(eqn.outvars[0]), _COUNTS[kind](eqn))


def _dot_macs(eqn: JaxprEqn) -> int:
    """Each element of the left-hand side meets each of the right's own (free) dimensions."""
    grouped: tuple[int, ...] = ()
    if eqn.primitive.name == "ragged_dot_general":
        ragged = eqn.params["ragged_dot_dimension_numbers"]
        ((_, contracted), (_, batched)) = ragged.dot_dimension_numbers
        grouped = tuple(ragged.rhs_group_dimensions)
    else:
        ((_, contracted), (_, batched)) = eqn.params["dimension_numbers"]
    left, right = map(_shape, eqn.invars[:2])
    shared = {*contracted, *batched, *grouped}
    return math.prod(left) * math.prod(size for i, size in enumerate(right) if i not in shared)


def _convolution_macs(eqn: JaxprEqn) -> int:
    """Output elements x taps x input channels of a group; along a dilated input, its own elements.

    An input dilated by d is what convolution transposes to: the gradient of a stride of d.
    """
    left, kernel = map(_shape, eqn.invars[:2])
    numbers, dilation = eqn.params["dimension_numbers"], eqn.params["lhs_dilation"]
    batch, features, *result_space = (_shape(eqn.outvars[0])[i] for i in numbers.out_spec)
    _, in_features, *taps = (kernel[i] for i in numbers.rhs_spec)
    _, _, *left_space = (left[i] for i in numbers.lhs_spec)
    positions = (
        own if d > 1 else out
        for own, out, d in zip(left_space, result_space, dilation, strict=True)
    )
    return batch * features * in_features * math.prod(taps) * math.prod(positions)


_COUNTS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot_macs,
    "ragged_dot_general": _dot_macs,
    "conv_general_dilated": _convolution_macs,
}


def _origin(eqn: JaxprEqn, sources: Sequence[Source], shape: tuple[int, ...]) -> Source:
    """Where a result of `shape` comes from: its operands of that size, if there are any.

    Reshaping and arithmetic keep the size. A broadcast value (a threshold, a mean, a scale) tells
    nothing about what it is combined with; all else that data enters is data.
    """
    operands = list(zip(sources, map(_shape, eqn.invars), strict=True))
    alike = [source for source, own in operands if math.prod(own) == math.prod(shape)]
    if alike:
        return _merge(alike)
    return _DATA if _DATA in sources and eqn.primitive.name != "broadcast_in_dim" else None


def _merge(sources: Sequence[Source]) -> Source:
    """The one parameter that all sources are, constants aside; data if there are several."""
    distinct = {source for source in sources if source is not None}
    return distinct.pop() if len(distinct) == 1 else _DATA if distinct else None


def _fit(sources: Sequence[Source], length: int) -> Sequence[Source]:
    """`sources` where they match one to one, and otherwise as many times data."""
    return sources if len(sources) == length else [_DATA] * length


def _shape(atom: Any) -> tuple[int, ...]:
    """The shape of a variable or literal; () of what has none, such as a token."""
    return getattr(atom.aval, "shape", ())
