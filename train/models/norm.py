"""Batch normalisation with PyTorch's semantics, over one device or all of them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Float

MOMENTUM = 0.9
EPSILON = 1e-5


def at_least_float32(dtype: Any) -> Any:
    """float32 for bfloat16 and float32, float64 for float64: where weights and statistics live."""
    return jnp.promote_types(jnp.float32, dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as `torch.nn.BatchNorm2d` does it.

    Flax's keeps the biased variance as its running statistic; PyTorch's keeps the unbiased one,
    and the paper's networks were trained with that. The statistics are computed and kept in
    float32, or float64 where `dtype` is.

    Attributes:
      dtype: of the result.
      scale_init: of the scale; zero for the last normalisation of a residual block that should
        begin as the identity.

    References:
      Ioffe and Szegedy, Batch Normalization (2015), https://arxiv.org/abs/1502.03167
    """

    dtype: Any = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch channels"], *, train: bool, axis_name: str | None = None
    ) -> Float[Array, "*batch channels"]:
        """Normalises `x`, with its own statistics in training and the running ones otherwise.

        Args:
          x: any floating dtype.
          train: whether to use this batch's statistics, and to move the running ones towards them.
          axis_name: the mapped axis over which the batch is spread, if it is.
        """
        dtype, channels = at_least_float32(self.dtype), x.shape[-1:]
        scale = self.param("scale", self.scale_init, channels, dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, dtype)

        x = x.astype(dtype)
        mean, var = running_mean.value, running_var.value
        if train:
            mean, var = moments(x, axis_name)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                if axis_name is not None:
                    count *= jax.lax.axis_size(axis_name)
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
                running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * unbiased
        normalised = (x - mean) * (scale * jax.lax.rsqrt(var + EPSILON)) + bias
        return normalised.astype(self.dtype)


def moments(
    x: Float[Array, "*batch channels"], axis_name: str | None = None
) -> tuple[Float[Array, " channels"], Float[Array, " channels"]]:
    """The mean and the biased variance of each channel, over all devices if there is an axis.

    In two passes: the difference E[x^2] - E[x]^2 takes one, and has lost every digit where the
    mean is some thousand times the deviation (in float32).
    """
    axes = tuple(range(x.ndim - 1))

    def mean_over_all(values: Array) -> Array:
        mean = jnp.mean(values, axes)
        return mean if axis_name is None else jax.lax.pmean(mean, axis_name)

    mean = mean_over_all(x)
    return mean, mean_over_all(jnp.square(x - mean))
