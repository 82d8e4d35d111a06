"""How a function's arguments and results are packed into arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from feather_jax.cpu.lower import Lowered


@dataclasses.dataclass(frozen=True)
class Signature:
    """How a function's arguments and results are packed.

    Attributes:
      argument_tree, result_tree: pytree definitions, of the tuple of arguments and of the result.
      arguments, results: shapes and dtypes of the leaves.
    """

    argument_tree: Any
    result_tree: Any
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]

    def flatten(self, arguments: Sequence[Any], inside: Sequence[np.dtype]) -> list[np.ndarray]:
        """The leaves of arguments as contiguous arrays of the dtypes that the code computes in.

        Raises:
          ValueError: the arguments are not of the structure, shapes and dtypes of the examples.
        """
        leaves, tree = jax.tree.flatten(tuple(arguments))
        if tree != self.argument_tree:
            raise ValueError(
                f"The compiled function takes arguments of the structure {self.argument_tree} and "
                f"got {tree}; compile it for examples of that structure."
            )
        arrays = []
        for number, (leaf, wanted) in enumerate(zip(leaves, self.arguments, strict=True)):
            scalar = isinstance(leaf, bool | int | float)
            array = np.asarray(leaf, wanted.dtype) if scalar else np.asarray(leaf)
            if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"Argument {number} of the compiled function is "
                    f"{array.dtype}{list(array.shape)} and must be "
                    f"{wanted.dtype}{list(wanted.shape)}; compile the function for an example of "
                    f"that shape and dtype."
                )
            arrays.append(np.ascontiguousarray(array, inside[number]))
        return arrays

    def unflatten(self, arrays: Sequence[np.ndarray]) -> Any:
        """The result that the caller sees."""
        leaves = [
            array.astype(wanted.dtype, copy=False)
            for array, wanted in zip(arrays, self.results, strict=True)
        ]
        return jax.tree.unflatten(self.result_tree, leaves)


def signature_of(lowered: Lowered) -> Signature:
    return Signature(lowered.argument_tree, lowered.result_tree, lowered.arguments, lowered.results)
