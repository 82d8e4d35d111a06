"""MobileNetV2, for ImageNet.

References:
  Sandler, Howard, Zhu, Zhmoginov and Chen, MobileNetV2: Inverted Residuals and Linear Bottlenecks
  (2018), https://arxiv.org/abs/1801.04381, table 2.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from train.fields import Fraction
from train.models.layers import check_images, classify, conv, dropout, pool_globally
from train.models.norm import BatchNorm

# Expansion, output channels, number of blocks and stride of the first of them.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Channels are expanded, each is convolved by itself, and few are made of them, linearly.

    Attributes:
      features: output channels.
      expansion: how many times more channels there are inside; with 1 nothing expands them.
      strides: of the 3x3 convolution.
      dtype: of the computation.
    """

    features: int
    expansion: int
    strides: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, axis_name: str | None
    ) -> Float[Array, "b h2 w2 c2"]:
        def norm(y: Array, name: str) -> Array:
            return BatchNorm(self.dtype, name=name)(y, train=train, axis_name=axis_name)

        channels, y = self.expansion * x.shape[-1], x
        if self.expansion > 1:
            y = conv(channels, 1, dtype=self.dtype, name="expand")(y)
            y = nn.relu6(norm(y, "expand_norm"))
        depthwise = conv(
            channels, 3, strides=self.strides, groups=channels, dtype=self.dtype, name="depthwise"
        )
        y = nn.relu6(norm(depthwise(y), "depthwise_norm"))
        y = norm(conv(self.features, 1, dtype=self.dtype, name="project")(y), "project_norm")
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """MobileNetV2 at full width.

    The initial weights are torchvision's: convolutions He normal (fan-out), the last layer normal
    with a standard deviation of 0.01, its bias zero.

    Attributes:
      num_classes: number of logits.
      dropout: the fraction of features that the last layer does not see in training, in [0, 1).
      dtype: of the computation.
    """

    num_classes: int
    dropout: Fraction = 0.2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w c"],
        *,
        train: bool,
        axis_name: str | None = None,
        keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b classes"]:
        check_images(images, "This MobileNetV2", 32)

        def activate(x: Array, name: str) -> Array:
            return nn.relu6(BatchNorm(self.dtype, name=name)(x, train=train, axis_name=axis_name))

        x = conv(32, 3, strides=2, dtype=self.dtype, name="stem")(images)
        x, number = activate(x, "stem_norm"), 0
        for expansion, features, blocks, first_strides in GROUPS:
            for strides in (first_strides, *[1] * (blocks - 1)):
                number += 1
                block = InvertedResidual(
                    features, expansion, strides, self.dtype, name=f"block{number}"
                )
                x = block(x, train=train, axis_name=axis_name)
        x = activate(conv(1280, 1, dtype=self.dtype, name="last")(x), "last_norm")
        return classify(
            dropout(pool_globally(x), self.dropout, keys),
            self.num_classes,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.01),
        )
