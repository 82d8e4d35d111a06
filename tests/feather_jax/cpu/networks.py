"""Random networks, for the tests of every stage of the compiler."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "silu": nn.silu,
    "hard_swish": nn.hard_swish,
    "gelu": nn.gelu,
    "exact_gelu": lambda x: nn.gelu(x, approximate=False),
    "softmax": nn.softmax,
    "elu": nn.elu,
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Network:
    """A function of images, an example of them, and its layers in words."""

    layers: tuple[tuple[str, Callable[[Any], Any]], ...]
    images: np.ndarray

    def __call__(self, x):
        for name, layer in self.layers:
            with jax.named_scope(name.split()[0]):
                x = layer(x)
        return x

    def __repr__(self) -> str:
        shape = f"{self.images.dtype}{list(self.images.shape)}"
        return f"Network({shape}, {', '.join(name for name, _ in self.layers)})"


@st.composite
def networks(draw, most_layers: int = 6, floats: bool = False) -> Network:
    """Of convolutions and all that stands around them, and perhaps dense layers at the end.

    Args:
      most_layers: besides preprocessing and those at the end.
      floats: whether images are float32, and never bytes with preprocessing.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    shape = (
        draw(st.sampled_from([1, 2, 5, 16])),
        draw(st.integers(4, 12)),
        draw(st.integers(4, 12)),
        draw(st.sampled_from([1, 3, 4, 8])),
    )
    if not floats and draw(st.booleans()):
        images = rng.integers(0, 256, shape).astype(np.uint8)
        layers = [_preprocessing(shape[-1])]
    else:
        images, layers = rng.standard_normal(shape).astype(np.float32), []
    builder = _Builder(draw, rng)
    for _ in range(draw(st.integers(1, most_layers))):
        layer = getattr(builder, draw(st.sampled_from(LAYERS)))(shape)
        after = _shape(layer[1], shape)
        if 0 not in after:
            layers.append(layer)
            shape = after
    if draw(st.booleans()):
        layers += builder.head(shape)
    return Network(tuple(layers), images)


def _shape(fn: Callable[[Any], Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    return jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


def _preprocessing(channels: int) -> tuple[str, Callable[[Any], Any]]:
    mean = np.linspace(100, 130, channels).astype(np.float32)
    return "preprocessing", lambda x: (x.astype(jnp.float32) - mean) / 60.0


LAYERS = (
    ["convolution"] * 4
    + ["norm", "activation"] * 3
    + ["residual", "branches", "pool", "squeeze_and_excite", "depthwise", "pad", "mean_of_rows"]
    + ["layer_norm", "channels_first", "slice"]
)


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Layers of the network, each a name and a function, given the shape that comes in."""

    draw: Any
    rng: np.random.Generator

    def weights(self, *shape: int) -> np.ndarray:
        """Sparse, wholly zero or dense; with a channel that is zero, or denormal."""
        density = self.draw(st.sampled_from([0.0, 0.1, 0.3, 0.3, 1.0]))
        values = self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))
        values = np.where(self.rng.random(shape) < density, values, 0)
        if self.draw(st.integers(0, 5)) == 0:
            values[..., 0] *= 1e-39
        return values.astype(np.float32)

    def convolution(self, shape, groups: int = 1, out: int | None = None):
        _, height, width, channels = shape
        kernel = tuple(self.draw(st.integers(1, min(3, n))) for n in (height, width))
        strides = self.draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1)]))
        dilation = self.draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 1)]))
        padding = self.draw(st.sampled_from(["SAME", "SAME", "VALID", ((1, 0), (0, 2))]))
        if groups == 1 and channels % 2 == 0 and self.draw(st.integers(0, 4)) == 0:
            groups = 2
        features = out or groups * self.draw(st.integers(1, 8))
        weights = self.weights(*kernel, channels // groups, features)
        bias = self.weights(features) if self.draw(st.booleans()) else None

        def layer(x):
            x = lax.conv_general_dilated(
                x,
                weights,
                strides,
                padding,
                rhs_dilation=dilation,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
                precision="highest",
            )
            return x if bias is None else x + bias

        words = f"{kernel} to {features}, strides {strides}, {padding}, groups {groups}"
        return f"convolution {words}, dilation {dilation}", layer

    def depthwise(self, shape):
        return self.convolution(shape, groups=shape[-1], out=shape[-1])

    def norm(self, shape):
        mean, scale, bias = (self.rng.standard_normal(shape[-1:]).astype(np.float32) for _ in "123")
        return "norm", lambda x: (x - mean) * scale + bias

    def activation(self, shape):
        name = self.draw(st.sampled_from(sorted(ACTIVATIONS)))
        return name, ACTIVATIONS[name]

    def layer_norm(self, shape):
        return "layer_norm", lambda x: nn.standardize(x, epsilon=1e-2)

    def _same(self, shape):
        """A convolution that keeps the shape."""
        channels = shape[-1]
        weights = self.weights(3, 3, channels, channels)
        return lambda x: lax.conv_general_dilated(
            x, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def residual(self, shape):
        first, second = self._same(shape), self._same(shape)
        two = self.draw(st.booleans())
        return "residual", lambda x: nn.relu(first(x) + (second(x) if two else x))

    def branches(self, shape):
        first = self._same(shape)
        return "branches", lambda x: jnp.concatenate([x, nn.relu(first(x))], axis=-1)

    def pool(self, shape):
        kind = self.draw(st.sampled_from([nn.max_pool, nn.avg_pool]))
        padding = self.draw(st.sampled_from(["SAME", "VALID", ((1, 1), (0, 1))]))
        window = tuple(min(n, self.draw(st.integers(1, 3))) for n in shape[1:3])
        name = f"{kind.__name__} {window} {padding}"
        return name, lambda x: kind(x, window, (2, 1), padding)

    def squeeze_and_excite(self, shape):
        weights = self.weights(shape[-1], shape[-1])

        def layer(x):
            return x * nn.sigmoid(jnp.mean(x, (1, 2)) @ weights)[:, None, None]

        return "squeeze_and_excite", layer

    def pad(self, shape):
        value = self.draw(st.sampled_from([0.0, 1.0]))
        widths = ((0, 0), (1, 0), (0, 2), (0, 0))
        return f"pad {value}", lambda x: jnp.pad(x, widths, constant_values=value)

    def mean_of_rows(self, shape):
        return "mean_of_rows", lambda x: x - jnp.mean(x, axis=1, keepdims=True)

    def slice(self, shape):
        return "slice", lambda x: x[:, ::2, -3:]

    def channels_first(self, shape):
        """A convolution and its norm in the other layout."""
        channels = shape[-1]
        weights = self.weights(4, channels, 1, 1)
        scale = self.rng.standard_normal((4, 1, 1)).astype(np.float32)

        def layer(x):
            x = jnp.transpose(x, (0, 3, 1, 2))
            x = nn.relu(lax.conv(x, weights, (1, 1), "SAME") * scale)
            return jnp.transpose(x, (0, 2, 3, 1))

        return "channels_first", layer

    def head(self, shape):
        """Global mean or not, dense layers, and perhaps the class."""
        flat = self.draw(st.sampled_from(["mean", "flatten", "tokens"]))
        if flat == "mean":
            width, first = shape[-1], ("mean", lambda x: jnp.mean(x, (1, 2)))
        elif flat == "flatten":
            width, first = int(np.prod(shape[1:])), ("flatten", lambda x: x.reshape(len(x), -1))
        else:
            width = shape[-1]
            first = ("tokens", lambda x: x.reshape(len(x), -1, width))
        kernel, bias, last = self.weights(width, 7), self.weights(7), self.weights(7, 7)
        layers = [first, ("dense", lambda x: nn.gelu(x @ kernel + bias))]
        layers.append(("residual", lambda x: x + x @ last))
        end = self.draw(st.sampled_from(["", "log_softmax", "argmax"]))
        if end == "log_softmax":
            layers.append((end, nn.log_softmax))
        elif end == "argmax":
            layers.append((end, lambda x: (x, jnp.argmax(jnp.round(x), -1))))
        return layers


def assert_close(result: Any, expected: Any, tolerance: float = 1e-5, message: str = "") -> None:
    """Each leaf within `tolerance` of its largest value, NaN and infinities in the same places."""
    for own, want in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        own, want = np.asarray(own), np.asarray(want)
        assert own.shape == want.shape
        if not np.issubdtype(want.dtype, np.floating):
            continue  # decided by differences within the tolerance
        finite = np.isfinite(want)
        np.testing.assert_array_equal(own[~finite], want[~finite], err_msg=message)
        scale = np.abs(want[finite]).max(initial=1e-30)
        np.testing.assert_allclose(
            own[finite] / scale, want[finite] / scale, rtol=0, atol=tolerance, err_msg=message
        )
