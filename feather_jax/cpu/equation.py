"""What the rules that turn primitives into nodes are given, and how they refuse."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from feather_jax.cpu.graph import FLOAT32, Constant, Node, Shape


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation of a jaxpr as the rules see it.

    Attributes:
      params: its primitive's parameters.
      results: the results' abstract values.
      name: the layer that it stands in.
    """

    params: Mapping[str, Any]
    results: tuple[Any, ...]
    name: str

    @property
    def shape(self) -> Shape:
        return tuple(self.results[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return inside(self.results[0].dtype)


Rule = Callable[..., Node | tuple[Node, ...]]


class Unsupported(Exception):
    """A form of a primitive that the compiler does not know, as the end of a sentence."""


def inside(dtype: Any) -> np.dtype:
    """The dtype that a value of `dtype` has in the graph: float32 for half-precision floats."""
    if dtype in (ml_dtypes.bfloat16, np.float16):
        return FLOAT32
    with contextlib.suppress(TypeError):  # of the keys of random numbers
        if dtype in (np.bool_, np.float32) or np.issubdtype(dtype, np.integer):
            return np.dtype(dtype)
    raise Unsupported(f"of {dtype}, where it computes in float32")


def known(node: Node) -> np.ndarray:
    """The value of a constant."""
    if isinstance(node.operation, Constant):
        return node.operation.value
    raise Unsupported("with an operand that depends on the arguments where it wants a constant")
