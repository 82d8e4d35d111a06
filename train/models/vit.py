"""Vision transformers: ViT-Ti, S and B with patches of 16x16 pixels (DeiT's are the same).

References:
  Dosovitskiy et al., An Image is Worth 16x16 Words (2021), https://arxiv.org/abs/2010.11929
  Touvron et al., Training data-efficient image transformers (2021),
  https://arxiv.org/abs/2012.12877, table 1: the sizes Ti and S.
  Huang, Sun, Liu, Sedra and Weinberger, Deep Networks with Stochastic Depth (2016),
  https://arxiv.org/abs/1603.09382
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from train.errors import UserError
from train.fields import Count, Fraction
from train.models.layers import (
    check_images,
    classify,
    dropout,
    fold_in,
    uniform_bias,
    uniform_fan_in,
)
from train.models.norm import at_least_float32

narrow_normal = nn.initializers.normal(0.02)
"""N(0, 0.02^2): DeiT's and timm's, whose truncation is at a hundred deviations."""


def dense(features: int, dtype: Any, name: str) -> nn.Dense:
    """A linear layer of a block; its kernel is [inputs, outputs]."""
    return nn.Dense(
        features,
        kernel_init=narrow_normal,
        dtype=dtype,
        param_dtype=at_least_float32(dtype),
        name=name,
    )


def layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
    """Layer normalisation in at least float32 and, unlike Flax's default, in two passes."""
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=dtype,
        param_dtype=at_least_float32(dtype),
        use_fast_variance=False,
        name=name,
    )


class Attention(nn.Module):
    """Self-attention whose projections are plain matrices.

    Flax's own keeps kernels [width, heads, width / heads], of which a pattern along the inputs, or
    a count of them, would mean something else.

    Attributes:
      heads: how many, each of width / heads features.
      dtype: of the computation; the softmax is in at least float32.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b tokens width"]) -> Float[Array, "b tokens width"]:
        width = x.shape[-1]
        features = width // self.heads

        def project(name: str) -> Float[Array, "b tokens heads features"]:
            y = dense(width, self.dtype, name)(x)
            return y.reshape(*x.shape[:-1], self.heads, features)

        # jax.nn.dot_product_attention would take the softmax of float64 in float32.
        query, key = project("query") / math.sqrt(features), project("key")
        dtype = at_least_float32(self.dtype)
        scores = jnp.einsum("bqhf,bkhf->bhqk", query, key, preferred_element_type=dtype)
        weights = jax.nn.softmax(scores).astype(self.dtype)
        y = jnp.einsum("bhqk,bkhf->bqhf", weights, project("value"))
        return dense(width, self.dtype, "out")(y.reshape(x.shape))


class Block(nn.Module):
    """Attention and two dense layers with GELU, each normalised before and added to what came in.

    Attributes:
      heads: of the attention.
      dropout: see `ViT`.
      stochastic_depth: the probability that an example passes each of the two by, in training.
      dtype: of the computation.
    """

    heads: int
    dropout: float
    stochastic_depth: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b tokens width"], keys: Key[Array, " b"] | None
    ) -> Float[Array, "b tokens width"]:
        def drop(y: Array, number: int) -> Array:
            return dropout(y, self.dropout, fold_in(keys, number))

        def pass_by(y: Array, number: int) -> Array:
            return dropout(y, self.stochastic_depth, fold_in(keys, number), whole=True)

        width = x.shape[-1]
        y = layer_norm(self.dtype, "norm1")(x)
        y = drop(Attention(self.heads, self.dtype, name="attention")(y), 0)
        x = x + pass_by(y, 1)
        y = layer_norm(self.dtype, "norm2")(x)
        # The exact GELU, as in the paper; Flax's default is the approximation by tanh.
        y = drop(nn.gelu(dense(4 * width, self.dtype, "mlp1")(y), approximate=False), 2)
        y = drop(dense(width, self.dtype, "mlp2")(y), 3)
        return x + pass_by(y, 4)


class ViT(nn.Module):
    """A vision transformer on the image's patches, with learned positions.

    The positions are one vector a patch (and one for the class token), so that the variables fit
    images of one size; `resize_positions` makes those of another. The initial weights are DeiT's:
    normal with a standard deviation of 0.02, biases zero, and the patch embedding as PyTorch builds
    it.

    Attributes:
      num_classes: number of logits.
      patch: height and width of a patch in pixels.
      width: features of a token; a multiple of `heads`.
      depth: number of blocks.
      heads: of each attention.
      class_token: whether the logits are made from a token of its own, or from the mean of all.
      dropout: the fraction of entries left out after the positions are added, after each attention
        and each dense layer of a block, in training; in [0, 1).
      stochastic_depth: the probability that an example passes by the last block's attention, and
        its dense layers, in training; it grows linearly from 0 at the first. In [0, 1).
      dtype: of the computation.
    """

    num_classes: int
    patch: Count = 16
    width: Count = 384
    depth: Count = 12
    heads: Count = 6
    class_token: bool = True
    dropout: Fraction = 0.0
    stochastic_depth: Fraction = 0.0
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
        """The logits.

        Args:
          images: height and width are multiples of `patch`.
          train: nothing here differs but by `keys`.
          axis_name: no example sees another.
          keys: one an example, for dropout and stochastic depth; None for neither.

        Raises:
          UserError: the images' size is no multiple of the patch's, or `width` none of `heads`.
        """
        del train, axis_name
        self._check(images)
        dtype = at_least_float32(self.dtype)
        embed = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            padding="VALID",
            kernel_init=uniform_fan_in,
            bias_init=uniform_bias(self.patch**2 * images.shape[-1]),
            dtype=self.dtype,
            param_dtype=dtype,
            name="patch_embedding",
        )
        x = embed(images).reshape(images.shape[0], -1, self.width)
        if self.class_token:
            token = self.param("class_token", narrow_normal, (1, 1, self.width), dtype)
            token = jnp.broadcast_to(token, (images.shape[0], 1, self.width))
            x = jnp.concatenate([token.astype(self.dtype), x], axis=1)
        positions = self.param("positions", narrow_normal, (1, *x.shape[1:]), dtype)
        x = dropout(x + positions.astype(self.dtype), self.dropout, fold_in(keys, 0))
        for number in range(1, self.depth + 1):
            rate = self.stochastic_depth * (number - 1) / max(self.depth - 1, 1)
            block = Block(self.heads, self.dropout, rate, self.dtype, name=f"block{number}")
            x = block(x, fold_in(keys, number))
        x = layer_norm(self.dtype, "norm")(x)
        x = x[:, 0] if self.class_token else jnp.mean(x, axis=1, dtype=dtype)
        return classify(x, self.num_classes, dtype=self.dtype, kernel_init=narrow_normal)

    def _check(self, images: Array) -> None:
        check_images(images, "This ViT", self.patch)
        height, width = images.shape[1:3]
        if height % self.patch or width % self.patch:
            raise UserError(
                f"This ViT cuts images into patches of {self.patch}x{self.patch} pixels, and these "
                f"are {height}x{width}; choose an image size that is a multiple of {self.patch}, "
                "or another config.model.patch."
            )
        if self.width % self.heads:
            raise UserError(
                f"config.model.width is {self.width}, which config.model.heads = {self.heads} "
                "attentions cannot share equally; choose a multiple."
            )


def resize_positions(
    positions: Float[Array, "1 tokens width"], tokens: int
) -> Float[Array, "1 tokens2 width"]:
    """The positions of another square grid of patches, by bicubic interpolation.

    What the number of tokens exceeds a square by, the class token's, is kept as it is.

    Args:
      positions: of n^2 patches, or of 1 + n^2 tokens.
      tokens: how many are wanted, with a class token if there is one.

    Raises:
      ValueError: the patches are no square, or one has a class token and the other has not.

    References:
      Dosovitskiy et al., section 3.2, "Fine-tuning and higher resolution".
    """
    old, new = math.isqrt(positions.shape[1]), math.isqrt(tokens)
    extra = positions.shape[1] - old**2
    if extra > 1 or tokens - new**2 != extra:
        raise ValueError(
            f"{positions.shape[1]} positions cannot become {tokens}: both must be those of a "
            "square of patches, with a class token or without."
        )
    positions = positions.astype(at_least_float32(positions.dtype))
    width = positions.shape[2]
    grid = positions[:, extra:].reshape(1, old, old, width)
    grid = jax.image.resize(grid, (1, new, new, width), "bicubic")
    return jnp.concatenate([positions[:, :extra], grid.reshape(1, -1, width)], axis=1)
