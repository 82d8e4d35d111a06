"""Feather inside a Linen model: a layer whose kernels are thresholded where it is used."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, PyTree

from feather_jax.masks import Mask
from feather_jax.operator import sparsify


def thresholded(
    module: type[nn.Module],
    threshold: PyTree[Float[Array, "..."]],
    *,
    p: float = 3.0,
    prunable: Mask | None = None,
) -> Any:
    """A Linen module class that uses its parameters through `sparsify`, whatever method is called.

    The parameters themselves stay dense and keep the module's own names and shapes: `init` gives
    those of `module`, an optimiser trains them straight through, and a checkpoint does not know
    the difference.

    Args:
      module: a Linen module class, such as `nn.Dense` or a whole network.
      threshold: as for `sparsify`, with respect to the module's own parameters.
      p: the exponent of `threshold_operator`.
      prunable: which of the module's parameters are thresholded; `prunable_weights` by default.

    Returns:
      A subclass of `module` with its name, to be constructed like it. Its methods raise ValueError
      where nothing is prunable. (`apply(..., method="encode")` calls its own `encode`;
      `method=Module.encode` names that of `module`, which is dense.)

    Example:
      >>> import flax.linen as nn
      >>> from feather_jax.linen import thresholded
      >>> class Network(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, threshold):
      ...         x = nn.relu(thresholded(nn.Dense, threshold)(128)(x))
      ...         return thresholded(nn.Dense, threshold)(10)(x)
    """

    def sparse(collections: dict[str, PyTree]) -> dict[str, PyTree]:
        params = collections.get("params", {})  # without any, sparsify says so
        return {"params": sparsify(params, threshold, p=p, prunable=prunable)}

    def through_sparsify(method: Callable[..., Any]) -> Callable[..., Any]:
        def inside(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            object.__setattr__(self, "_is_sparse", True)  # of the copy that has sparse parameters
            return method(self, *args, **kwargs)

        @functools.wraps(method)
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # What is initialised is stored, and stays dense.
            if self.is_initializing() or getattr(self, "_is_sparse", False):
                return method(self, *args, **kwargs)
            return nn.map_variables(inside, "params", trans_in_fn=sparse)(self, *args, **kwargs)

        return call

    methods = {name: through_sparsify(method) for name, method in _methods(module).items()}
    # Flax names the parameters of Dense "Dense_0".
    return type(module.__name__, (module,), {"__module__": module.__module__, **methods})


def _methods(module: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """The methods that a module and its bases define for their users, by name."""
    fields = {field.name for field in dataclasses.fields(module)}
    own = [base for base in module.__mro__ if base not in nn.Module.__mro__]
    return {
        name: getattr(module, name)
        for base in own
        for name, value in vars(base).items()
        if inspect.isfunction(value)
        and name not in fields
        and name != "setup"
        and (name == "__call__" or not name.startswith("_"))
    }
