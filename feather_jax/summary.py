"""How sparse a model is, layer by layer: plain data that prints as a table."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from feather_jax.masks import Mask, is_trainable, path_name, resolve_mask

# A matrix that the mask leaves out is large from this share of all weights on, and weights that are
# zero beyond what was asked are many from this share of the prunable ones on.
_LARGE, _MANY = 0.01, 0.001


@dataclasses.dataclass(frozen=True)
class Layer:
    """The weights of one leaf.

    Attributes:
      name: the keys of the leaf's path, as in `Dense_0/kernel`.
      shape: its shape.
      prunable: whether it may be pruned.
      weights: how many weights it has.
      nonzero: how many of them are not zero; NaN counts as non-zero.
      trainable: whether they are floating-point in at least 16 bits.
    """

    name: str
    shape: tuple[int, ...]
    prunable: bool
    weights: int
    nonzero: int
    trainable: bool = True

    @property
    def sparsity(self) -> float:
        """The fraction of zeros; 0 for a leaf without weights."""
        return 1 - self.nonzero / self.weights if self.weights else 0.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """The leaves of a model and their totals. `str` gives a table; `dataclasses.asdict` gives data.

    Attributes:
      layers: every leaf that is an array of numbers, in the order of `jax.tree.leaves`.
      parameters: the number of weights in all leaves.
      prunable: the number of weights in the prunable leaves.
      nonzero: how many of the prunable weights are not zero.
      asked: the sparsity that was asked for, if that is known.
    """

    layers: tuple[Layer, ...]
    parameters: int
    prunable: int
    nonzero: int
    asked: float | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the prunable weights; 0 if there are none."""
        return 1 - self.nonzero / self.prunable if self.prunable else 0.0

    @property
    def starved(self) -> tuple[Layer, ...]:
        """The prunable layers that are pruned whole or nearly.

        Of these fewer weights are left than they have inputs or outputs (the smaller of the last
        two dimensions).
        """
        return tuple(
            layer
            for layer in self.layers
            if layer.prunable and layer.weights
            if layer.nonzero < min(layer.shape[-2:] if len(layer.shape) > 1 else (1,))
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What should not go unsaid, a sentence each; the table ends with them.

        Layers that are starved; large matrices that the mask leaves out, and the share of the
        weights that it takes; many more zeros than were asked for.
        """
        return (*_nearly_gone(self), *_left_out(self), *_more_than_asked(self))

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                _size(layer),
                f"{layer.weights:,}",
                f"{layer.nonzero:,}",
                f"{layer.sparsity:.2%}",
            )
            for layer in self.layers
            if layer.prunable
        ]
        dense = self.parameters - self.prunable
        if dense:
            rows.append(("not prunable", "", f"{dense:,}", "", ""))
        pruned = (f"{self.prunable:,}", f"{self.nonzero:,}", f"{self.sparsity:.2%}")
        rows.append(("all prunable", "", *pruned))
        table = format_table(("layer", "shape", "weights", "non-zero", "sparsity"), rows)
        left = []
        if self.nonzero:
            left = [f"1 in {self.prunable / self.nonzero:.1f} prunable weights is left."]
        return "\n".join([table, *left, *self.notes])


def _nearly_gone(summary: Summary) -> Iterator[str]:
    whole = [layer.name for layer in summary.starved if not layer.nonzero]
    nearly = [
        f"{layer.name} ({layer.nonzero:,} of {layer.weights:,} left)"
        for layer in summary.starved
        if layer.nonzero
    ]
    if whole:
        yield f"Pruned whole: {_listed(whole)}."
    if nearly:
        yield f"Pruned nearly whole: {_listed(nearly)}."


def _left_out(summary: Summary) -> Iterator[str]:
    large = [
        f"{layer.name} ({_size(layer)}, {layer.weights / summary.parameters:.1%})"
        for layer in summary.layers
        if layer.trainable and not layer.prunable and len(layer.shape) > 1
        if layer.weights >= max(1, _LARGE * summary.parameters)
    ]
    if large:
        yield (
            f"That is {summary.sparsity:.1%} of {summary.prunable / summary.parameters:.1%} of the "
            f"parameters: not prunable are {_listed(large)}; prunable=path_mask(...) chooses "
            "others."
        )


def _more_than_asked(summary: Summary) -> Iterator[str]:
    if summary.asked is None or not summary.prunable:
        return
    expected = math.floor(summary.asked * (summary.prunable - 1)) + 1 if summary.asked else 0
    zeros = summary.prunable - summary.nonzero
    if zeros - expected > _MANY * summary.prunable:
        yield (
            f"{zeros:,} prunable weights are zero where {expected:,} were asked for: those that "
            "tie with the threshold are pruned together, and in 16 bits many do; keep dense "
            "weights in float32."
        )


def _size(layer: Layer) -> str:
    return "x".join(map(str, layer.shape)) or "scalar"


def _listed(items: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(items[:most])
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table with the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "  ".join(aligned).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(headers), rule, *map(line, rows)])


def summarize(
    params: PyTree, *, prunable: Mask | None = None, sparsity: float | None = None
) -> Summary:
    """Counts the weights and the non-zero weights of every leaf.

    Args:
      params: a pytree of arrays, JAX's or NumPy's, on the host or on devices; other leaves, such as
        PRNG keys and the functions in an Equinox module, are passed over.
      prunable: which leaves may be pruned; `prunable_weights` by default.
      sparsity: what one threshold for all of them was asked for, to say if ties gave more.

    Returns:
      A `Summary`: plain data, which prints as a table.

    Raises:
      TypeError, ValueError: the mask does not fit.

    Example:
      >>> import numpy as np
      >>> from feather_jax import summarize
      >>> print(summarize({"kernel": np.eye(4, dtype=np.float32), "bias": np.zeros(4)}))
      layer         shape  weights  non-zero  sparsity
      ------------------------------------------------
      kernel          4x4       16         4    75.00%
      not prunable               4
      all prunable              16         4    75.00%
      1 in 4.0 prunable weights is left.
    """
    mask = jax.tree.leaves(resolve_mask(params, prunable))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    layers = tuple(
        Layer(
            name=path_name(path),
            shape=np.shape(leaf),
            prunable=selected,
            weights=math.prod(np.shape(leaf)),
            nonzero=int(np.count_nonzero(leaf)),
            trainable=is_trainable(leaf),
        )
        for (path, leaf), selected in zip(leaves, mask, strict=True)
        if _is_numbers(leaf)
    )
    pruned = [layer for layer in layers if layer.prunable]
    return Summary(
        layers=layers,
        parameters=sum(layer.weights for layer in layers),
        prunable=sum(layer.weights for layer in pruned),
        nonzero=sum(layer.nonzero for layer in pruned),
        asked=sparsity,
    )


def _is_numbers(leaf: Any) -> bool:
    try:
        return not jax.dtypes.issubdtype(jax.numpy.result_type(leaf), jax.dtypes.extended)
    except TypeError:
        return False
