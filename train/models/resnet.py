"""Residual networks: ResNet-20 and smaller for small images; ResNet-18, 34 and 50 for ImageNet.

References:
  He, Zhang, Ren and Sun, Deep Residual Learning (2016), https://arxiv.org/abs/1512.03385
  Goyal et al., Accurate, Large Minibatch SGD (2017), https://arxiv.org/abs/1706.02677: the last
  scale of each block begins at zero (section 5.1).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Float

from train.fields import Count, Counts
from train.models.layers import (
    check_images,
    classify,
    conv,
    pool_globally,
    uniform_bias,
    uniform_fan_in,
)
from train.models.norm import BatchNorm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a projection past them where the shape changes.

    Attributes:
      features: output channels.
      strides: of the first convolution and of the projection.
      dtype: of the computation.
      last_scale: the initial scale of the last normalisation.
    """

    features: int
    strides: int
    dtype: Any
    last_scale: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, axis_name: str | None
    ) -> Float[Array, "b h2 w2 c2"]:
        def norm(y: Array, name: str, scale_init: Initializer = nn.initializers.ones) -> Array:
            module = BatchNorm(self.dtype, scale_init, name=name)
            return module(y, train=train, axis_name=axis_name)

        dtype, strides = self.dtype, self.strides
        y = conv(self.features, 3, strides=strides, dtype=dtype, name="conv1")(x)
        y = nn.relu(norm(y, "norm1"))
        y = conv(self.features, 3, dtype=dtype, name="conv2")(y)
        y = norm(y, "norm2", self.last_scale)
        if strides != 1 or x.shape[-1] != self.features:
            x = conv(self.features, 1, strides=strides, dtype=dtype, name="projection")(x)
            x = norm(x, "projection_norm")
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; "v1.5" is to put the stride into the 3x3 one.

    Attributes:
      features: channels of the 3x3 convolution; the block gives four times as many.
      strides: of the 3x3 convolution and of the projection.
      dtype: of the computation.
      last_scale: the initial scale of the last normalisation.
    """

    features: int
    strides: int
    dtype: Any
    last_scale: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, axis_name: str | None
    ) -> Float[Array, "b h2 w2 c2"]:
        def norm(y: Array, name: str, scale_init: Initializer = nn.initializers.ones) -> Array:
            module = BatchNorm(self.dtype, scale_init, name=name)
            return module(y, train=train, axis_name=axis_name)

        dtype, strides, wide = self.dtype, self.strides, 4 * self.features
        y = conv(self.features, 1, dtype=dtype, name="conv1")(x)
        y = nn.relu(norm(y, "norm1"))
        y = conv(self.features, 3, strides=strides, dtype=dtype, name="conv2")(y)
        y = nn.relu(norm(y, "norm2"))
        y = conv(wide, 1, dtype=dtype, name="conv3")(y)
        y = norm(y, "norm3", self.last_scale)
        if strides != 1 or x.shape[-1] != wide:
            x = conv(wide, 1, strides=strides, dtype=dtype, name="projection")(x)
            x = norm(x, "projection_norm")
        return nn.relu(x + y)


class CifarResNet(nn.Module):
    """Stages of basic blocks after one 3x3 convolution, each stage but the first at stride 2.

    The initial weights are the released code's: convolutions He normal (fan-out), the last layer
    normal with a standard deviation of 0.01, its bias zero.

    Attributes:
      num_classes: number of logits.
      widths: channels of each stage.
      blocks_per_stage: three make ResNet-20.
      dtype: of the computation.
    """

    num_classes: int
    widths: Counts = (32, 64, 128)
    blocks_per_stage: Count = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool, axis_name: str | None = None
    ) -> Float[Array, "b classes"]:
        check_images(images, "This ResNet", 2 ** (len(self.widths) - 1))
        x = conv(self.widths[0], 3, dtype=self.dtype, name="stem")(images)
        norm = BatchNorm(self.dtype, name="stem_norm")
        x = nn.relu(norm(x, train=train, axis_name=axis_name))
        for stage, width in enumerate(self.widths, 1):
            for block in range(1, self.blocks_per_stage + 1):
                strides = 2 if stage > 1 and block == 1 else 1
                name = f"stage{stage}_block{block}"
                module = BasicBlock(width, strides, self.dtype, name=name)
                x = module(x, train=train, axis_name=axis_name)
        return classify(
            pool_globally(x),
            self.num_classes,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.01),
        )


class ResNet(nn.Module):
    """Stages of blocks after a 7x7 convolution and a pooling: ResNet-50 v1.5, ResNet-18 and 34.

    Convolutions begin He normal (fan-out), the last scale of each block at zero, and the last
    layer as PyTorch builds it (torchvision's model does not change it).

    Attributes:
      num_classes: number of logits.
      blocks_per_stage: the number of blocks of each stage.
      width: channels of the 3x3 convolutions in the first stage; they double with each stage.
      bottleneck: whether a block is a `Bottleneck` or, as up to 34 layers, a `BasicBlock`.
      dtype: of the computation.
    """

    num_classes: int
    blocks_per_stage: Counts = (3, 4, 6, 3)
    width: Count = 64
    bottleneck: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool, axis_name: str | None = None
    ) -> Float[Array, "b classes"]:
        check_images(images, "This ResNet", 2 ** (len(self.blocks_per_stage) + 1))
        x = conv(self.width, 7, strides=2, dtype=self.dtype, name="stem")(images)
        norm = BatchNorm(self.dtype, name="stem_norm")
        x = nn.relu(norm(x, train=train, axis_name=axis_name))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        make = Bottleneck if self.bottleneck else BasicBlock
        for stage, blocks in enumerate(self.blocks_per_stage, 1):
            for block in range(1, blocks + 1):
                strides = 2 if stage > 1 and block == 1 else 1
                features = self.width * 2 ** (stage - 1)
                name = f"stage{stage}_block{block}"
                module = make(features, strides, self.dtype, nn.initializers.zeros, name=name)
                x = module(x, train=train, axis_name=axis_name)
        return classify(
            pool_globally(x),
            self.num_classes,
            dtype=self.dtype,
            kernel_init=uniform_fan_in,
            bias_init=uniform_bias(x.shape[-1]),
        )
