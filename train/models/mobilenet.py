"""MobileNetV1, for ImageNet and as the released code has it for CIFAR.

References:
  Howard et al., MobileNets (2017), https://arxiv.org/abs/1704.04861, table 1.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from train.fields import Count
from train.models.layers import (
    check_images,
    classify,
    conv,
    pool_globally,
    uniform_bias,
    uniform_fan_in,
)
from train.models.norm import BatchNorm

# Output channels and stride of each separable convolution.
BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class SeparableConv(nn.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across them.

    Attributes:
      features: output channels.
      strides: of the 3x3 convolution.
      pointwise_bias: whether the 1x1 convolution has a bias.
      dtype: of the computation.
    """

    features: int
    strides: int
    pointwise_bias: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, axis_name: str | None
    ) -> Float[Array, "b h2 w2 c2"]:
        channels = x.shape[-1]
        x = conv(
            channels,
            3,
            strides=self.strides,
            groups=channels,
            kernel_init=uniform_fan_in,
            dtype=self.dtype,
            name="depthwise",
        )(x)
        norm = BatchNorm(self.dtype, name="depthwise_norm")
        x = nn.relu(norm(x, train=train, axis_name=axis_name))
        x = conv(
            self.features,
            1,
            kernel_init=uniform_fan_in,
            bias_init=uniform_bias(channels) if self.pointwise_bias else None,
            dtype=self.dtype,
            name="pointwise",
        )(x)
        norm = BatchNorm(self.dtype, name="pointwise_norm")
        return nn.relu(norm(x, train=train, axis_name=axis_name))


class MobileNet(nn.Module):
    """MobileNetV1 at full width. The initial weights are PyTorch's defaults (uniform, fan-in).

    Attributes:
      num_classes: number of logits.
      stem_strides: 2 as published, 1 in the released code for CIFAR.
      pointwise_bias: whether the 1x1 convolutions carry a bias, as the released code's do.
      dtype: of the computation.
    """

    num_classes: int
    stem_strides: Count = 2
    pointwise_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool, axis_name: str | None = None
    ) -> Float[Array, "b classes"]:
        check_images(images, "This MobileNet", 16 * self.stem_strides)
        x = conv(
            32,
            3,
            strides=self.stem_strides,
            kernel_init=uniform_fan_in,
            dtype=self.dtype,
            name="stem",
        )(images)
        norm = BatchNorm(self.dtype, name="stem_norm")
        x = nn.relu(norm(x, train=train, axis_name=axis_name))
        for number, (features, strides) in enumerate(BLOCKS, 1):
            block = SeparableConv(
                features, strides, self.pointwise_bias, self.dtype, name=f"block{number}"
            )
            x = block(x, train=train, axis_name=axis_name)
        return classify(
            pool_globally(x),
            self.num_classes,
            dtype=self.dtype,
            kernel_init=uniform_fan_in,
            bias_init=uniform_bias(x.shape[-1]),
        )
