"""Feather inside a Linen model: a layer whose kernels are thresholded where it is called."""

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
    """A Linen module class that uses its parameters through `sparsify`.

    The parameters themselves stay dense and keep the module's own names and shapes: `init` gives
    those of `module`, an optimiser trains them straight through, and a checkpoint does not know
    the difference.

    Args:
      module: a Linen module class, such as `nn.Dense` or a whole network, used by calling it.
      threshold: as for `sparsify`, with respect to the module's own parameters.
      p: the exponent of `threshold_operator`.
      prunable: which of the module's parameters are thresholded; `prunable_weights` by default.

    Returns:
      A subclass of `module` with its name, to be constructed like it.

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
        return {
            name: sparsify(params, threshold, p=p, prunable=prunable)
            for name, params in collections.items()
        }

    class Thresholded(module):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self.is_initializing():  # what is initialised is stored, and stays dense
                return super().__call__(*args, **kwargs)
            call = nn.map_variables(module.__call__, "params", trans_in_fn=sparse)
            return call(self, *args, **kwargs)

    Thresholded.__name__ = module.__name__  # Flax names the parameters of Dense "Dense_0"
    return Thresholded
