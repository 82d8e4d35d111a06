"""DenseNet-BC for small images: DenseNet40-24-BC.

References:
  Huang, Liu, van der Maaten and Weinberger, Densely Connected Convolutional Networks (2017),
  https://arxiv.org/abs/1608.06993
"""

from typing import Annotated, Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from train.errors import UserError
from train.fields import Count
from train.models.layers import check_images, classify, conv, pool_globally, uniform_fan_in
from train.models.norm import BatchNorm


class DenseNet(nn.Module):
    """Three blocks whose layers each see the outputs of all before them.

    The initial weights are the released code's: convolutions N(0, 2 / (k k out)), the last layer's
    kernel as PyTorch builds it (uniform, fan-in) and its bias zero.

    Attributes:
      num_classes: number of logits.
      layers_per_block: bottleneck layers in each block; six make 40 layers in all.
      growth: channels that each layer adds.
      reduction: the fraction of channels that a transition keeps.
      dtype: of the computation.
    """

    num_classes: int
    layers_per_block: Count = 6
    growth: Count = 24
    reduction: Annotated[float, Field(gt=0, le=1)] = 0.5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool, axis_name: str | None = None
    ) -> Float[Array, "b classes"]:
        check_images(images, "This DenseNet", 4)

        def activate(x: Array, name: str) -> Array:
            norm = BatchNorm(self.dtype, name=f"{name}_norm")
            return nn.relu(norm(x, train=train, axis_name=axis_name))

        x = conv(2 * self.growth, 3, dtype=self.dtype, name="stem")(images)
        for block in range(1, 4):
            for layer in range(1, self.layers_per_block + 1):
                name = f"block{block}_layer{layer}"
                y = activate(x, f"{name}_conv1")
                y = conv(4 * self.growth, 1, dtype=self.dtype, name=f"{name}_conv1")(y)
                y = activate(y, f"{name}_conv2")
                y = conv(self.growth, 3, dtype=self.dtype, name=f"{name}_conv2")(y)
                x = jnp.concatenate([x, y], axis=-1)
            if block < 3:
                kept = int(x.shape[-1] * self.reduction)
                if not kept:
                    raise UserError(
                        f"config.model.reduction is {self.reduction}, which leaves none of "
                        f"{x.shape[-1]} channels; choose a larger one."
                    )
                x = activate(x, f"transition{block}")
                x = conv(kept, 1, dtype=self.dtype, name=f"transition{block}")(x)
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return classify(
            pool_globally(activate(x, "head")),
            self.num_classes,
            dtype=self.dtype,
            kernel_init=uniform_fan_in,
        )
