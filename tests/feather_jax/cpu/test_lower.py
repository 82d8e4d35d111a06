"""From a traced function to a graph: its interpretation against JAX's own."""

import functools

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from feather_jax.cpu.graph import Constant, Convolution
from feather_jax.cpu.interpret import interpret
from feather_jax.cpu.lower import lower

KEY = jax.random.key(0)
BOX = np.ones((1, 1, 3, 3, 3), np.float32)


def check(fn, *examples, tolerance=1e-5):
    """Interprets `fn` as it is lowered and compares with XLA, relative to the largest value."""
    lowered = lower(fn, *examples)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(examples)]
    results = interpret(lowered.graph, *leaves)
    expected, tree = jax.tree.flatten(jax.jit(lambda *each: fn(*each))(*examples))
    assert lowered.result_tree == tree
    for result, want in zip(results, expected, strict=True):
        want = np.asarray(want)
        assert result.shape == want.shape
        scale = np.abs(want, where=np.isfinite(want), out=np.ones(want.shape)).max(initial=1e-30)
        np.testing.assert_allclose(result, want, rtol=tolerance, atol=tolerance * scale)
    return lowered.graph


def images(*shape):
    return np.asarray(jax.random.normal(KEY, shape))


ACTIVATIONS = [
    nn.relu,
    jax.nn.relu6,
    nn.leaky_relu,
    nn.sigmoid,
    jnp.tanh,
    nn.silu,
    jax.nn.hard_swish,
    jax.nn.hard_sigmoid,
    nn.gelu,
    functools.partial(nn.gelu, approximate=False),
    nn.softmax,
    nn.log_softmax,
    nn.softplus,
    nn.elu,
    nn.celu,
    nn.selu,
    jax.nn.mish,
    nn.glu,
    nn.soft_sign,
    nn.hard_tanh,
    nn.log_sigmoid,
    jax.nn.squareplus,
    nn.standardize,
    jax.nn.logsumexp,
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation):
    check(activation, 3 * images(3, 8))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[:, 0] + x[:, -1],
        lambda x: x[::2, ::-1],
        lambda x: jnp.take(x, 1, axis=1),
        lambda x: x[:, jnp.array([2, 0, 0])],
        lambda x: lax.dynamic_slice(x, (1, 5), (2, 2)),
        lambda x: jnp.split(x, 2, axis=1),
        lambda x: jnp.concatenate([x, 2 * x, jnp.ones((3, 1))], axis=1),
        lambda x: jnp.pad(x, ((1, 2), (0, 1)), constant_values=3),
        lambda x: jnp.stack([x, x.T.reshape(3, 4)]),
        lambda x: (jnp.cumsum(x, 0), lax.cummax(x, axis=1, reverse=True)),
        lambda x: jnp.tile(x, (2, 3)),
        lambda x: jnp.roll(x, 1, axis=1),
        lambda x: x[:, None, :] * x[:, :, None],
        lambda x: jnp.where(x > 0, x, jnp.arange(4.0)),
        lambda x: (jnp.argmax(x, -1), jnp.argmin(x, 0)),
        lambda x: (jnp.any(x > 1), jnp.all(x > -3, axis=0), jnp.prod(x, 1), jnp.min(x)),
        lambda x: jnp.clip(x, -0.5, 0.25),
        lambda x: (x**3, x**-2, x**0, x**1, jnp.abs(x) ** 2.5, jnp.square(x), jnp.exp2(x)),
        lambda x: (jnp.floor(x), jnp.ceil(x), jnp.round(x), jnp.sign(x), jnp.isfinite(x)),
        lambda x: (x > 0) & ~(x > 1) | (x < -1) ^ (x >= 2),
        lambda x: jnp.mean(x, 1, keepdims=True) + jnp.var(x),
        lambda x: jax.image.resize(x, (6, 2), "nearest"),
        lambda x: jnp.einsum("ij,kj->ik", x, x),
        lambda x: {"a": (x, [x.astype(jnp.int32)]), "b": 1.0},
        lambda x: lax.select_n(jnp.array([[0, 1, 2, 1]] * 3) + 0 * x.astype(int), x, 2 * x, -x),
        lambda x: jax.checkpoint(jnp.sin)(x) + jax.jit(jnp.cos)(x),
        lambda x: x,
        lambda x: jnp.arange(3.0),
    ],
)  # fmt: skip
def test_shapes_and_functions(fn):
    check(fn, images(3, 4))


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("ij,jk->ik", (3, 4), (4, 5)),
        ("j,jk->k", (4,), (4, 5)),
        ("bij,jk->bik", (2, 3, 4), (4, 5)),
        ("bijc,chd->bijhd", (2, 3, 2, 4), (4, 2, 3)),
        ("bthd,hdo->bto", (2, 3, 2, 4), (2, 4, 5)),
        ("bih,hio->bho", (2, 3, 4), (4, 3, 5)),
        ("kj,ij->ki", (3, 4), (5, 4)),
    ],
)
def test_products(equation, left, right):
    """With either side known, and with neither."""
    x, y = images(*left), images(*right)
    for fn, arguments in (
        (lambda x: jnp.einsum(equation, x, y), (x,)),
        (lambda y: jnp.einsum(equation, x, y), (y,)),
        (lambda x, y: jnp.einsum(equation, x, y), (x, y)),
    ):
        check(fn, *arguments)


@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
@pytest.mark.parametrize("options", [
    {"padding": "SAME", "window_strides": (2, 2)},
    {"padding": ((1, 0), (2, 3)), "window_strides": (1, 2), "rhs_dilation": (2, 1)},
    {"padding": ((1, 2), (2, 1)), "window_strides": (1, 1), "lhs_dilation": (2, 3)},
])  # fmt: skip
def test_convolution(layout, options):
    x, kernel = images(2, 7, 6, 4), images(3, 2, 4, 5)
    if layout[0] == "NCHW":
        x, kernel = x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)
    check(lambda x: lax.conv_general_dilated(x, kernel, dimension_numbers=layout, **options), x)


@pytest.mark.parametrize("pool", [
    functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME"),
    functools.partial(nn.avg_pool, window_shape=(2, 3), strides=(2, 1)),
    functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False),
    lambda x: lax.reduce_window(x, jnp.inf, lax.min, (1, 2, 2, 1), (1, 1, 1, 1), "SAME"),
    lambda x: nn.max_pool(x[:, :, 0], (3,), (2,)),
    lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 1, 2), "VALID"),
    lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1, 1, 2), (1, 1, 1, 2), "VALID"),
])  # fmt: skip
def test_pool(pool):
    check(pool, images(2, 6, 7, 4))


class Block(nn.Module):
    """A convolution with all that usually stands around it."""

    @nn.compact
    def __call__(self, images):
        x = (images.astype(jnp.float32) - 120.0) / 60.0
        x = nn.Conv(8, (3, 3), 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        y = nn.Conv(8, (3, 3), feature_group_count=8)(x)
        s = nn.sigmoid(nn.Dense(8)(jnp.mean(y, (1, 2))))
        return nn.Dense(5)(nn.GroupNorm(2)(x + y * s[:, None, None]).mean((1, 2)))


def test_linen_with_preprocessing_of_bytes():
    batch = np.arange(2 * 9 * 9 * 3, dtype=np.uint8).reshape(2, 9, 9, 3)
    variables = Block().init(KEY, batch)
    graph = check(lambda images: Block().apply(variables, images), batch)
    convolutions = [node for node in graph.nodes if isinstance(node.operation, Convolution)]
    assert [node.name for node in convolutions] == [
        "Block/Conv_0",
        "Block/Conv_1",
        "Block/Dense_0",
        "Block/Dense_1",
    ]
    assert convolutions[1].operation.groups == 8


def test_attention():
    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
            y = nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
            return (x + y)[:, 0]

    tokens = images(2, 5, 8)
    variables = Encoder().init(KEY, tokens)
    check(lambda x: Encoder().apply(variables, x), tokens)


def test_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.conv = nnx.Conv(8, 4, (3,), rngs=rngs)

        def __call__(self, x):
            return self.conv(nnx.relu(self.norm(self.dense(x))))

    net = Net(nnx.Rngs(0))
    net.eval()
    check(net, images(2, 5, 4))


def test_equinox():
    eqx = equinox.nn
    keys = jax.random.split(KEY, 3)
    net = eqx.Sequential([
        eqx.Conv2d(3, 4, 3, key=keys[0]),
        eqx.Lambda(jax.nn.relu),
        eqx.MaxPool2d(2, 2),
        eqx.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, key=keys[1]),
        eqx.AdaptiveAvgPool2d(2),
        eqx.Lambda(jnp.ravel),
        eqx.Linear(24, 5, key=keys[2]),
    ])  # fmt: skip
    check(net, images(3, 10, 10))
    check(jax.vmap(net), images(2, 3, 10, 10))


def test_scan_and_cond():
    kernels = images(3, 4, 4)

    def fn(x, flags):
        def layer(carry, inputs):
            kernel, flag = inputs
            carry = jnp.tanh(carry @ kernel) + flag
            return carry, carry.sum()

        carry, sums = lax.scan(layer, x, (kernels, flags))
        positive = lax.cond(kernels.sum() > 1e9, lambda x: x, lambda x: -x, carry)
        back = lax.scan(layer, x, (kernels, flags), reverse=True)
        return positive, sums, back

    check(fn, images(2, 4), images(3))


def test_branches_that_depend_on_an_argument():
    def fn(x, which):
        x = lax.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, x)
        return lax.switch(which, [jnp.sin, jnp.cos, lambda x: 1 / x], x)

    for which in (-1, 0, 1, 2, 3):
        check(fn, images(3), np.int32(which))


def test_random_numbers_of_a_key_that_is_closed_over():
    check(lambda x: x + jax.random.normal(KEY, x.shape), images(3))


def test_what_depends_on_weights_alone_is_constant():
    w = images(4, 4)

    def fn(x):
        q, _ = jnp.linalg.qr(w)
        order = jnp.argsort(w[0])
        return x @ jnp.where(jnp.abs(q) > jnp.median(jnp.abs(q)), q, 0) + order

    graph = check(fn, images(2, 4))
    (weights,) = (
        node.operation.weights for node in graph.nodes if isinstance(node.operation, Convolution)
    )
    assert np.count_nonzero(weights) == 8
    assert sum(isinstance(node.operation, Constant) for node in graph.nodes) == 1


def test_half_precision_is_computed_in_float32():
    kernel = jnp.asarray(images(4, 3), jnp.bfloat16)
    x = jnp.asarray(images(2, 4), jnp.bfloat16)
    lowered = lower(lambda x: x @ kernel, x)
    assert lowered.results[0].dtype == jnp.bfloat16
    assert all(node.dtype == np.float32 for node in lowered.graph.nodes)


def test_an_unknown_primitive_is_named_with_its_layer_and_line():
    class Sorted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sort(x)

    with pytest.raises(NotImplementedError) as error:
        lower(lambda x: Sorted().apply({}, x), images(3))
    message = str(error.value)
    assert "primitive sort" in message
    assert "Sorted" in message
    assert "test_lower.py:" in message
    assert message.count(". ") == 0


@pytest.mark.parametrize(("fn", "reason"), [
    (lambda x: lax.conv_general_dilated(x, x, (1, 1, 1), "SAME"), "kernel depends"),
    (lambda x: lax.conv_general_dilated(x, BOX, (1, 1, 1), "SAME"), "3 spatial axes"),
    (lambda x: lax.conv_general_dilated(x[0], x[0], (1, 1), "SAME"), "kernel depends"),
    (lambda x: lax.dynamic_update_slice(x, x, (0, 0, 0, 0, x.astype(int).max())), "constant"),
    (lambda x: x.astype(int) @ jnp.ones(3, int), "int32"),
    (lambda x: x + 1j, "complex64"),
])  # fmt: skip
def test_an_unknown_form_is_explained(fn, reason):
    with pytest.raises(NotImplementedError, match=reason):
        lower(fn, images(1, 1, 3, 3, 3))


def test_an_argument_of_another_kind_is_explained():
    with pytest.raises(NotImplementedError, match="argument or result of key<fry>"):
        lower(lambda key: jax.random.normal(key, (3,)), KEY)
