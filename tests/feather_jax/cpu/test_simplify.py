"""Every pass keeps the function, and each does what it is for."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

from feather_jax.cpu import absorb, sink
from feather_jax.cpu.graph import RELU, Convolution, Elementwise, Pool, Reduce, Reshape, Transpose
from feather_jax.cpu.interpret import interpret
from feather_jax.cpu.lower import lower
from feather_jax.cpu.simplify import fold_constants, fuse_elementwise, simplify, tidy
from tests.feather_jax.cpu.networks import assert_close, networks

PASSES = [
    fold_constants,
    tidy,
    sink.sink_layouts,
    *absorb.LINEAR,
    fuse_elementwise,
    absorb.activation_into_product,
    simplify,
]
KEY = jax.random.key(0)


@given(networks())
@settings(max_examples=8, deadline=None)
def test_random_networks(network):
    """The lowered graph is XLA's function, and every pass's result the lowered graph's."""
    graph = lower(network, network.images).graph
    results = interpret(graph, network.images)
    with np.errstate(all="ignore"):
        assert_close(results, jax.jit(network)(network.images), message=str(network))
    for each in PASSES:
        after = each(graph)
        message = f"{each.__name__} of {network}\n{graph}\n{after}"
        assert_close(interpret(after, network.images), results, message=message)
    again = simplify(simplify(graph))
    assert str(again) == str(simplify(graph))


def simplified(fn, *examples):
    """The simplified graph, which computes what `fn` does."""
    lowered = lower(fn, *examples)
    graph = simplify(lowered.graph)
    assert_close(interpret(graph, *examples), jax.jit(fn)(*examples))
    return graph


def test_a_group_norm_is_summed_over_pixels_first():
    """So that tiles need not become rows for it."""
    x = np.asarray(jax.random.normal(KEY, (2, 8, 6, 12)))
    graph = simplified(lambda x: jnp.mean(x.reshape(2, 8, 6, 3, 4), (1, 2, 4)), x)
    first, second = (node.operation for node in graph.nodes if isinstance(node.operation, Reduce))
    assert (first.axes, second.axes) == ((1, 2), (2,))
    graph = simplified(lambda x: jnp.max(x.reshape(2, 8, 6, 3, 4), (1, 2)), x)
    assert [node.kind for node in graph.nodes if node.inputs] == ["reduce max", "reshape"]
    graph = simplified(lambda x: jnp.sum(x.reshape(2, 48, 12), (1,)), x)
    assert [node.kind for node in graph.nodes if node.inputs] == ["reshape", "reduce sum"]


def kinds(graph, *left_out):
    return [
        node.kind for node in graph.nodes[len(graph.inputs) :]
        if not isinstance(node.operation, left_out)
    ]  # fmt: skip


def images(*shape):
    return np.asarray(jax.random.normal(KEY, shape))


class Residual(nn.Module):
    """Two of ResNet's blocks, with its stem."""

    @nn.compact
    def __call__(self, x):
        def norm():
            scale, bias = nn.initializers.normal(), nn.initializers.normal()
            return nn.BatchNorm(use_running_average=True, scale_init=scale, bias_init=bias)

        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        y = norm()(nn.Conv(16, (3, 3), 2, use_bias=False)(x))
        x = nn.relu(y + norm()(nn.Conv(16, (1, 1), 2, use_bias=False)(x)))
        x = nn.relu(x + norm()(nn.Conv(16, (3, 3))(x)))
        return nn.Dense(5)(x.mean((1, 2)))


def test_a_residual_network_is_products_and_pooling():
    x = images(2, 9, 9, 3)
    variables = Residual().init(KEY, x)
    graph = simplified(lambda x: Residual().apply(variables, x), x)
    assert kinds(graph, Reshape) == [
        *("convolution maximum", "pool max", "convolution", "convolution maximum"),
        *("convolution maximum", "reduce sum", "convolution"),
    ]
    products = [n for n in graph.nodes if isinstance(n.operation, Convolution)]
    assert [len(node.inputs) for node in products] == [1, 1, 2, 2, 1]
    assert products[0].operation.activation == RELU


def test_channels_first_becomes_channels_last():
    kernels, scale = [images(4, 4, 3, 3), images(4, 4, 3, 3)], images(4, 1, 1)

    def fn(x):
        for kernel in kernels:
            x = nn.relu(lax.conv(x, kernel, (1, 1), "SAME") * scale)
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return jnp.concatenate([x, -x], 1)[:, 1:].mean((2, 3))

    graph = simplified(fn, images(2, 4, 7, 6))
    assert sum(isinstance(node.operation, Transpose) for node in graph.nodes) == 1


def test_dense_layers_take_bias_activation_and_residual():
    first, second, bias = images(6, 8), images(8, 6), images(8)

    def fn(x):
        return x + nn.gelu(x @ first + bias) @ second / 3

    graph = simplified(fn, images(2, 5, 6))
    products = [node for node in graph.nodes if isinstance(node.operation, Convolution)]
    assert kinds(graph, Reshape) == [node.kind for node in products]
    assert products[1].inputs[1].kind == "reshape"


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_preprocessing_is_folded_where_that_is_exact(padding):
    """A border is 0 of what the product sees, so that with padding the mean cannot be its bias."""
    kernel, mean = images(3, 3, 3, 4), np.float32([120, 110, 100])

    def fn(x):
        x = (x.astype(jnp.float32) - mean) / 60
        return lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    batch = np.arange(2 * 6 * 6 * 3, dtype=np.uint8).reshape(2, 6, 6, 3)
    found = kinds(simplified(fn, batch))
    expected = (
        ["convert subtract", "convolution"] if padding == "SAME" else ["convert", "convolution"]
    )
    assert [kind for kind in found if kind != "constant"] == expected


def test_padding_joins_the_window():
    kernel = images(3, 3, 2, 4)

    def fn(x):
        x = jnp.pad(x, ((0, 0), (1, 1), (2, 0), (0, 0)))
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=-jnp.inf)
        return nn.max_pool(x, (2, 2))

    graph = simplified(fn, images(1, 5, 5, 2))
    assert [type(node.operation) for node in graph.nodes[1:]] == [Convolution, Pool]


def test_a_shared_product_stays_as_it_is():
    kernel = images(4, 4)

    def fn(x):
        y = x @ kernel
        return nn.relu(y), y + 1

    graph = simplified(fn, images(3, 4))
    products = [node for node in graph.nodes if isinstance(node.operation, Convolution)]
    assert len(products) == 1
    assert not products[0].operation.activation


def test_elementwise_work_is_one_expression():
    def fn(x, y):
        return nn.hard_swish(x * y + 1) * jnp.tanh(y)

    graph = simplified(fn, images(3, 4), images(3, 4))
    assert sum(isinstance(node.operation, Elementwise) for node in graph.nodes) <= 2


def test_factors_that_are_not_finite_stay_outside():
    """Zero weights would become NaN if they took them in."""
    kernel = np.eye(3, dtype=np.float32)
    scale = np.float32([1, np.inf, np.nan])
    graph = simplified(lambda x: (x @ kernel) * scale, np.ones((2, 3), np.float32))
    (product,) = (node for node in graph.nodes if isinstance(node.operation, Convolution))
    assert np.isfinite(product.operation.weights).all()
