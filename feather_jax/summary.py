"""How sparse a model is, layer by layer: plain data that prints as a table."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from feather_jax.masks import Mask, path_name, resolve_mask


@dataclasses.dataclass(frozen=True)
class Layer:
    """The weights of one leaf.

    Attributes:
      name: the keys of the leaf's path, as in `Dense_0/kernel`.
      shape: its shape.
      prunable: whether it may be pruned.
      weights: how many weights it has.
      nonzero: how many of them are not zero; NaN counts as non-zero.
    """

    name: str
    shape: tuple[int, ...]
    prunable: bool
    weights: int
    nonzero: int

    @property
    def sparsity(self) -> float:
        """The fraction of zeros; 0 for a leaf without weights."""
        return 1 - self.nonzero / self.weights if self.weights else 0.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """The leaves of a model and their totals. `str` gives a table; `dataclasses.asdict` gives data.

    Attributes:
      layers: every leaf, in the order of `jax.tree.leaves`.
      parameters: the number of weights in all leaves.
      prunable: the number of weights in the prunable leaves.
      nonzero: how many of the prunable weights are not zero.
    """

    layers: tuple[Layer, ...]
    parameters: int
    prunable: int
    nonzero: int

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the prunable weights; 0 if there are none."""
        return 1 - self.nonzero / self.prunable if self.prunable else 0.0

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)) or "scalar",
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
        if not self.nonzero:
            return table
        return f"{table}\n1 in {self.prunable / self.nonzero:.1f} prunable weights is left."


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table with the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "  ".join(aligned).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(headers), rule, *map(line, rows)])


def summarize(params: PyTree, *, prunable: Mask | None = None) -> Summary:
    """Counts the weights and the non-zero weights of every leaf.

    Args:
      params: a pytree of arrays, JAX's or NumPy's, on the host or on devices.
      prunable: which leaves may be pruned; `prunable_weights` by default.

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
        )
        for (path, leaf), selected in zip(leaves, mask, strict=True)
    )
    pruned = [layer for layer in layers if layer.prunable]
    return Summary(
        layers=layers,
        parameters=sum(layer.weights for layer in layers),
        prunable=sum(layer.weights for layer in pruned),
        nonzero=sum(layer.nonzero for layer in pruned),
    )
