"""The interpreter against JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from feather_jax.cpu.graph import (
    FLOAT32,
    RELU,
    Convolution,
    Graph,
    Input,
    Node,
    Pad,
    Pool,
    Slice,
    constant,
    elementwise,
)
from feather_jax.cpu.interpret import interpret

rng = np.random.default_rng(0)


def argument(*shape: int, index: int = 0) -> Node:
    return Node(Input(index, shape, FLOAT32))


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("strides", "padding", "dilation", "groups"),
    [
        ((1, 1), ((1, 1), (1, 1)), (1, 1), 1),
        ((2, 1), ((0, 1), (2, 0)), (1, 1), 2),
        ((1, 2), ((1, 2), (-1, 3)), (2, 1), 4),
    ],
)
def test_convolution(strides, padding, dilation, groups):
    weights, bias, images = random(3, 2, 4 // groups, 8), random(8), random(2, 7, 6, 4)
    x = argument(2, 7, 6, 4)
    operation = Convolution(weights, bias, strides, padding, dilation, groups)
    node = Node(operation, (x,))
    expected = lax.conv_general_dilated(
        images,
        weights,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision="highest",
    )
    (result,) = interpret(Graph((x,), (node,)), images)
    assert node.shape == expected.shape
    np.testing.assert_allclose(result, expected + bias, rtol=1e-5, atol=1e-5)


def test_residual_and_activation():
    weights, images, other = random(1, 1, 4, 3), random(2, 3, 3, 4), random(2, 3, 3, 3)
    x, y = argument(2, 3, 3, 4), argument(2, 3, 3, 3, index=1)
    node = Node(Convolution(weights, activation=RELU), (x, y))
    (result,) = interpret(Graph((x, y), (node,)), images, other)
    expected = np.maximum(images @ weights[0, 0] + other, 0)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_zero_weights_multiply_nothing():
    """NaN and infinities reach the outputs that have a non-zero weight for them, no others."""
    weights = np.zeros((1, 1, 3, 4), np.float32)
    weights[0, 0, 0, 0] = weights[0, 0, 1, 1] = weights[0, 0, 2, 2] = 2
    x = argument(1, 1, 1, 3)
    node = Node(Convolution(weights), (x,))
    images = np.array([np.nan, np.inf, -1], np.float32).reshape(1, 1, 1, 3)
    (result,) = interpret(Graph((x,), (node,)), images)
    np.testing.assert_array_equal(result.ravel(), [np.nan, np.inf, -2, 0])


@pytest.mark.parametrize(("kind", "fill"), [("max", -jnp.inf), ("min", jnp.inf), ("sum", 0.0)])
def test_pool(kind, fill):
    images = random(2, 7, 6, 3)
    x = argument(2, 7, 6, 3)
    node = Node(Pool(kind, (3, 2), (2, 1), ((1, 0), (0, 1)), (1, 2)), (x,))
    expected = lax.reduce_window(
        images,
        np.float32(fill),
        {"max": lax.max, "min": lax.min, "sum": lax.add}[kind],
        (1, 3, 2, 1),
        (1, 2, 1, 1),
        ((0, 0), (1, 0), (0, 1), (0, 0)),
        window_dilation=(1, 1, 2, 1),
    )
    (result,) = interpret(Graph((x,), (node,)), images)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_pad_and_slice():
    values = random(4, 5)
    x = argument(4, 5)
    padded = Node(Pad(np.float32(7), ((1, -1), (-2, 3)), (0, 2)), (x,))
    sliced = Node(Slice((0, 9), (2, 4), (3, -2)), (padded,))
    pad, cut = interpret(Graph((x,), (padded, sliced)), values)
    expected = lax.pad(values, np.float32(7), ((1, -1, 0), (-2, 3, 2)))
    np.testing.assert_array_equal(pad, expected)
    np.testing.assert_array_equal(cut, expected[0:6:3, 9:2:-2][:2, :4])


def test_float_to_integer():
    """Towards zero, within range, NaN to 0, as XLA converts."""
    values = np.array([-1.5, 2.9, 300, -np.inf, np.nan, np.inf], np.float32)
    x = argument(6)
    for dtype in (np.uint8, np.int32):
        (result,) = interpret(Graph((x,), (elementwise("convert", x, dtype=dtype),)), values)
        np.testing.assert_array_equal(result, jax.jit(lambda v, t=dtype: v.astype(t))(values))


def test_table():
    x = argument(2, 3)
    total = elementwise("add", x, constant(np.float32(1)), name="net/layer")
    table = str(Graph((x,), (total,)))
    assert "%2 add" in table
    assert "%0 %1" in table
    assert "float32[2,3]" in table
    assert "net/layer" in table
