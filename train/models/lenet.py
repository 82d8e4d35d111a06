"""LeNet-300-100 and LeNet-5, the small networks of the pruning literature.

Both begin as in Frankle and Carbin's lottery tickets: kernels Glorot normal, biases zero.

References:
  LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document Recognition (1998)
  Han, Pool, Tran and Dally, Learning both Weights and Connections (2015),
  https://arxiv.org/abs/1506.02626, tables 1, 3 and 4: the sizes that the name LeNet-5 has had since
  Caffe, 431,080 parameters.
  Frankle and Carbin, The Lottery Ticket Hypothesis (2019), https://arxiv.org/abs/1803.03635
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from train.fields import Counts
from train.models.layers import check_images, classify
from train.models.norm import at_least_float32

glorot_normal = nn.initializers.glorot_normal()


class LeNet300(nn.Module):
    """Two hidden layers, of 300 and 100 units by default, with ReLU.

    Attributes:
      num_classes: number of logits.
      hidden: units of each hidden layer.
      dtype: of the computation.
    """

    num_classes: int
    hidden: Counts = (300, 100)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool, axis_name: str | None = None
    ) -> Float[Array, "b classes"]:
        del train, axis_name  # nothing here differs between training and evaluation
        check_images(images, "LeNet-300-100", 1)
        x = images.reshape(images.shape[0], -1)
        for number, units in enumerate(self.hidden, 1):
            dense = nn.Dense(
                units,
                kernel_init=glorot_normal,
                dtype=self.dtype,
                param_dtype=at_least_float32(self.dtype),
                name=f"hidden{number}",
            )
            x = nn.relu(dense(x))
        return classify(x, self.num_classes, dtype=self.dtype, kernel_init=glorot_normal)


class LeNet5(nn.Module):
    """Caffe's LeNet-5: two 5x5 convolutions without padding, each max-pooled, and 500 units.

    With a ReLU after every layer; Caffe's own has none after the convolutions.

    Attributes:
      num_classes: number of logits.
      dtype: of the computation.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], *, train: bool, axis_name: str | None = None
    ) -> Float[Array, "b classes"]:
        del train, axis_name  # nothing here differs between training and evaluation
        check_images(images, "LeNet-5", 16)
        common = {
            "kernel_init": glorot_normal,
            "dtype": self.dtype,
            "param_dtype": at_least_float32(self.dtype),
        }
        x = images
        for number, features in enumerate((20, 50), 1):
            x = nn.relu(nn.Conv(features, (5, 5), padding=0, **common, name=f"conv{number}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(500, **common, name="hidden")(x.reshape(x.shape[0], -1)))
        return classify(x, self.num_classes, dtype=self.dtype, kernel_init=glorot_normal)
