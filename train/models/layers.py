"""What the networks have in common: PyTorch's padding and initial weights, dropout, the head."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Float, Key

from train.errors import UserError
from train.models.norm import at_least_float32

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, 2 / (k k out)): `torch.nn.init.kaiming_normal_(mode="fan_out")` before a ReLU."""

uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-b, b) with b = 1 / sqrt(fan_in): the kernels of PyTorch's layers as they are built."""


def uniform_bias(fan_in: int) -> Initializer:
    """U(-b, b) with b = 1 / sqrt(fan_in): the biases of PyTorch's layers as they are built."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def conv(
    features: int,
    size: int,
    *,
    name: str,
    dtype: Any,
    strides: int = 1,
    groups: int = 1,
    kernel_init: Initializer = he_fan_out,
    bias_init: Initializer | None = None,
) -> nn.Conv:
    """A square convolution, padded alike on both sides.

    Flax's "SAME" pads one side more than the other at stride 2, which PyTorch never does.

    Args:
      features: output channels.
      size: height and width of the kernel, odd.
      name: of the module.
      dtype: of the computation; the weights are float32, or float64 where it is.
      strides: along height and width.
      groups: of channels.
      kernel_init: of the kernel.
      bias_init: of the bias; None for no bias.
    """
    return nn.Conv(
        features,
        (size, size),
        strides=strides,
        padding=size // 2,
        feature_group_count=groups,
        use_bias=bias_init is not None,
        kernel_init=kernel_init,
        bias_init=bias_init or nn.initializers.zeros,
        dtype=dtype,
        param_dtype=at_least_float32(dtype),
        name=name,
    )


def classify(
    x: Float[Array, "b features"],
    num_classes: int,
    *,
    dtype: Any,
    kernel_init: Initializer,
    bias_init: Initializer = nn.initializers.zeros,
) -> Float[Array, "b classes"]:
    """The last layer, `head`: in float32 even where the network computes in bfloat16.

    It is a thousandth of the work, and the loss sees its rounding undamped.
    """
    dtype = at_least_float32(dtype)
    head = nn.Dense(
        num_classes,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        param_dtype=dtype,
        name="head",
    )
    return head(x)


def pool_globally(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """The mean over height and width, in float32 or, of float64, in float64."""
    return jnp.mean(x, (1, 2), dtype=at_least_float32(x.dtype))


def dropout(
    x: Float[Array, "b ..."],
    rate: float,
    keys: Key[Array, " b"] | None,
    *,
    whole: bool = False,
) -> Float[Array, "b ..."]:
    """Zeroes entries at random, and scales the others so that the expectation stays.

    Linen's takes one key for all examples, so that what an example loses depends on which others
    share its device. Here it has a key of its own.

    Args:
      x: the activations.
      rate: the probability of a zero, in [0, 1).
      keys: one an example; None for no dropout, as in evaluation.
      whole: whether an example is zeroed as a whole or not at all, which is stochastic depth where
        `x` is what a residual branch adds.

    Raises:
      UserError: `rate` is 1 or more.
    """
    if not rate < 1:
        raise UserError(
            f"config.model has a rate of dropout or stochastic depth of {rate}, which leaves "
            "nothing; choose one in [0, 1)."
        )
    if not rate or keys is None:
        return x
    shape = (1,) * (x.ndim - 1) if whole else x.shape[1:]
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys)
    return jnp.where(kept, x / (1 - rate), 0)


def fold_in(keys: Key[Array, " b"] | None, number: int) -> Key[Array, " b"] | None:
    """Keys of their own for the part of a network with this number."""
    if keys is None:
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def check_images(images: Array, network: str, least: int) -> None:
    """Refuses what `network` cannot take.

    Raises:
      UserError: `images` is not [batch, height, width, channels], or is smaller than `least` by
        `least` pixels.
    """
    if images.ndim != 4 or min(images.shape[1:3]) < least:
        raise UserError(
            f"{network} needs images of at least {least}x{least} pixels in the layout [batch, "
            f"height, width, channels], and these are {list(images.shape)}; choose another "
            f"config.model.name or larger images."
        )
