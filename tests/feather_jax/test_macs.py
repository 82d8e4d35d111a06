"""The count against closed forms, and against products of ones, whose results are counts."""

import dataclasses
import doctest
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

import feather_jax.macs
from feather_jax import sparsify
from feather_jax.macs import count_macs


def ones(*shape):
    return jnp.ones(shape)


def zeros_and_ones(*shape, seed=0, density=0.3):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < density, jnp.float32)


def only(macs):
    (layer,) = macs.layers
    return layer


def test_example():
    assert doctest.testmod(feather_jax.macs).failed == 0


def test_dense_layer():
    params = {"dense": {"kernel": zeros_and_ones(5, 7), "bias": ones(7)}}
    nonzero = int(params["dense"]["kernel"].sum())

    layer = only(
        count_macs(
            lambda p, x: jnp.tanh(x @ p["dense"]["kernel"] + p["dense"]["bias"]), params, ones(3, 5)
        )
    )

    assert (layer.name, layer.kind, layer.shape) == ("dense/kernel", "dot_general", (3, 7))
    assert (layer.macs, layer.sparse_macs) == (3 * 5 * 7, 3 * nonzero)


@pytest.mark.parametrize(
    ("equation", "left", "right", "macs"),
    [
        ("ij,jk->ik", (2, 3), (3, 5), 2 * 3 * 5),
        ("bij,bjk->bik", (4, 2, 3), (4, 3, 5), 4 * 2 * 3 * 5),
        ("bqhd,bkhd->bhqk", (2, 7, 3, 4), (2, 5, 3, 4), 2 * 3 * 7 * 5 * 4),
        ("i,i->", (6,), (6,), 6),
        ("i,j->ij", (6,), (5,), 30),
    ],
)
def test_einsum(equation, left, right, macs):
    fn = functools.partial(jnp.einsum, equation)
    assert count_macs(fn, ones(*left), ones(*right)).total == macs
    assert float(fn(ones(*left), ones(*right)).sum()) == macs


@settings(max_examples=15)
@given(
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    taps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.integers(1, 3),
    channels=st.integers(1, 3),
    features=st.integers(1, 3),
    batch_groups=st.booleans(),
    seed=st.integers(0, 100),
)
def test_convolution_of_ones_sums_to_its_macs(
    batch, size, taps, strides, dilation, groups, channels, features, batch_groups, seed
):
    grouping = {"batch_group_count" if batch_groups else "feature_group_count": groups}
    images, inputs = (batch * groups, channels) if batch_groups else (batch, channels * groups)
    params = {"kernel": zeros_and_ones(*taps, channels, features * groups, seed=seed, density=0.5)}

    def fn(params, x):
        return lax.conv_general_dilated(
            x,
            params["kernel"],
            strides,
            "VALID",
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            **grouping,
        )

    x = ones(images, *size, inputs)
    layer = only(count_macs(fn, params, x))
    assert layer.macs == float(fn({"kernel": jnp.ones_like(params["kernel"])}, x).sum())
    assert layer.sparse_macs == float(fn(params, x).sum())
    assert layer.name == "kernel"


def test_taps_on_padding_count():
    def fn(w, x):
        return lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert count_macs(fn, ones(3, 3, 4, 8), ones(2, 7, 7, 4)).total == 2 * (4 * 4) * (3 * 3 * 4 * 8)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_transposed_convolution_counts_its_inputs_once_a_tap(stride):
    kernel = zeros_and_ones(3, 3, 4, 8)
    strides = (stride, stride)

    def fn(params, x):
        return lax.conv_transpose(x, params["kernel"], strides, "VALID")

    x = ones(2, 5, 5, 4)
    layer = only(count_macs(fn, {"kernel": kernel}, x))
    if stride == 1:  # an ordinary convolution of a padded input, which is counted with its padding
        assert layer.macs == 2 * 7 * 7 * kernel.size
    else:
        assert layer.macs == 2 * 5 * 5 * kernel.size
        assert layer.sparse_macs == float(fn({"kernel": kernel}, x).sum())


@pytest.mark.parametrize("strides", [1, 2])
def test_gradient_costs_twice_the_function_and_nothing_for_its_input(strides):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Conv(4, (3, 3), strides, use_bias=False)(x))
            x = jnp.tanh(nn.Conv(6, (3, 3), strides, feature_group_count=2)(x))
            return jnp.sum(jnp.tanh(nn.Dense(3)(x.reshape(x.shape[0], -1))))

    model, x = Net(), ones(2, 8, 8, 2)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    forward = count_macs(model.apply, variables, x)
    first = forward.layers[0].macs
    assert [layer.name for layer in forward.layers] == [
        f"{name}/kernel" for name in ("Conv_0", "Conv_1", "Dense_0")
    ]

    gradient = count_macs(jax.grad(model.apply), variables, x)
    assert gradient.total == 3 * forward.total - first
    with_inputs = count_macs(jax.grad(model.apply, argnums=(0, 1)), variables, x)
    assert with_inputs.total == 3 * forward.total

    remat = jax.checkpoint(model.apply)
    assert count_macs(remat, variables, x) == forward
    assert count_macs(jax.grad(remat), variables, x).total == 4 * forward.total - first


def test_gradient_names_the_layers_whose_kernel_it_uses():
    params = {"a": {"kernel": zeros_and_ones(4, 5)}, "b": {"kernel": zeros_and_ones(5, 6, seed=1)}}

    def loss(params, x):
        hidden = jnp.tanh(x @ params["a"]["kernel"])
        return jnp.sum(jnp.tanh(hidden @ params["b"]["kernel"]))

    macs = count_macs(jax.grad(loss), params, ones(3, 4))
    names = [layer.name for layer in macs.layers]
    assert names[:2] == ["a/kernel", "b/kernel"]
    assert names.count("b/kernel") == 2  # forward, and the gradient of its input
    assert names.count("a/kernel") == 1
    weight_gradients = [layer for layer in macs.layers if not layer.name.endswith("kernel")]
    assert [layer.sparse_macs for layer in weight_gradients] == [
        layer.macs for layer in weight_gradients
    ]
    assert sorted(layer.macs for layer in weight_gradients) == [3 * 4 * 5, 3 * 5 * 6]


def test_scan_over_stacked_layers():
    kernels = zeros_and_ones(6, 4, 4)

    def fn(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])[0]

    layer = only(count_macs(fn, {"layers": {"kernel": kernels}}, ones(3, 4)))
    assert layer.name == "layers/kernel"
    assert (layer.macs, layer.sparse_macs) == (6 * 3 * 4 * 4, 3 * int(kernels.sum()))


def test_loops_multiply_when_nested():
    def fn(params, x):
        def outer(_, x):
            return lax.fori_loop(0, 5, lambda _, x: x @ params["kernel"], x)

        return lax.fori_loop(0, 7, outer, x)

    layer = only(count_macs(fn, {"kernel": ones(4, 4)}, ones(3, 4)))
    assert (layer.name, layer.macs) == ("kernel", 7 * 5 * 3 * 4 * 4)


def test_while_is_refused_only_where_it_holds_products():
    def fn(w, x, limit):
        return lax.while_loop(lambda x: x.sum() < limit, lambda x: x @ w + 1, x)

    with pytest.raises(
        ValueError, match=r"while loop .*not known before it runs; use jax\.lax\.scan"
    ):
        count_macs(fn, ones(4, 4), ones(3, 4), 10.0)
    with pytest.raises(ValueError, match="'here'"):
        count_macs(jax.named_scope("here")(fn), ones(4, 4), ones(3, 4), 10.0)

    def counting(w, x):
        return lax.while_loop(lambda x: x.sum() < 3, lambda x: x + 1, x) @ w

    assert count_macs(counting, ones(4, 4), ones(3, 4)).total == 3 * 4 * 4


def test_cond_counts_the_costliest_branch():
    def fn(params, x):
        return lax.switch(
            params["which"],
            [
                lambda x: x,
                lambda x: x @ params["kernel"] @ params["kernel"],
                lambda x: x @ params["kernel"],
            ],
            x,
        )

    macs = count_macs(fn, {"which": 1, "kernel": ones(4, 4)}, ones(3, 4))
    assert [layer.name for layer in macs.layers] == ["kernel", "kernel"]
    assert macs.total == 2 * 3 * 4 * 4


def test_nested_jit_and_custom_derivatives():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (square(x), x), lambda x, g: (g @ x.T + x.T @ g,))

    @jax.custom_jvp
    def cube(x):
        return x @ x @ x

    cube.defjvp(lambda x, t: (cube(*x), cube(*t)))

    @jax.jit
    def fn(x):
        return cube(jax.jit(jax.jit(square))(x))

    assert count_macs(fn, ones(4, 4)).total == 3 * 4**3
    gradient = jax.grad(lambda x: square(jnp.tanh(x)).sum())
    assert count_macs(gradient, ones(4, 4)).total == 3 * 4**3


def test_every_device_of_pmap_and_shard_map_counts():
    devices = jax.device_count()
    params = {"kernel": zeros_and_ones(4, 5)}

    mapped = jax.pmap(lambda p, x: x @ p["kernel"], axis_name="batch", in_axes=(None, 0))
    layer = only(count_macs(mapped, params, ones(devices, 3, 4)))
    assert layer.macs == devices * 3 * 4 * 5
    assert (layer.name, layer.sparse_macs) == ("kernel", devices * 3 * int(params["kernel"].sum()))

    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda p, x: x @ p["kernel"],
        mesh=mesh,
        in_specs=(P(None, "batch"), P()),
        out_specs=P(None, "batch"),
    )
    kernel = zeros_and_ones(4, 5 * devices)
    layer = only(count_macs(sharded, {"kernel": kernel}, ones(3, 4)))
    assert (layer.name, layer.macs) == ("kernel", 3 * 4 * 5 * devices)
    assert layer.sparse_macs == 3 * int(kernel.sum())


def test_vmap_over_a_stack_of_kernels():
    params = {"kernel": zeros_and_ones(6, 4, 5)}
    fn = jax.vmap(lambda p, x: x @ p["kernel"])
    layer = only(count_macs(fn, params, ones(6, 3, 4)))
    assert (layer.name, layer.macs) == ("kernel", 6 * 3 * 4 * 5)
    assert layer.sparse_macs == 3 * int(params["kernel"].sum())


@pytest.mark.parametrize("grouped", ["experts", "contraction"])
def test_ragged_dot(grouped):
    sizes = jnp.array([2, 4])
    if grouped == "experts":
        macs = count_macs(lax.ragged_dot, ones(6, 4), ones(2, 4, 5), sizes)
    else:
        numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        fn = functools.partial(lax.ragged_dot_general, ragged_dot_dimension_numbers=numbers)
        macs = count_macs(fn, ones(6, 4), ones(6, 5), sizes)
    assert macs.total == 6 * 4 * 5


def test_pallas_kernel_counts_once_a_grid_point():
    pl = pytest.importorskip("jax.experimental.pallas")

    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    fn = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((16, 8), jnp.float32),
        grid=(4,),
        in_specs=[pl.BlockSpec((4, 8), lambda i: (i, 0)), pl.BlockSpec((8, 8), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((4, 8), lambda i: (i, 0)),
        interpret=True,
    )
    assert count_macs(fn, ones(16, 8), ones(8, 8)).total == 16 * 8 * 8


def test_linear_solve_is_no_product_but_its_own():
    assert count_macs(jnp.linalg.solve, ones(4, 4), ones(4, 2)).total == 0


def test_attention_of_linen():
    length, width, heads, batch = 5, 12, 3, 2
    model = nn.MultiHeadDotProductAttention(num_heads=heads)
    x = ones(batch, length, width)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    macs = count_macs(model.apply, variables, x)

    projections = [f"{name}/kernel" for name in ("query", "key", "value", "out")]
    by_name = {layer.name: layer for layer in macs.layers}
    assert set(projections) < set(by_name)
    assert all(by_name[name].macs == batch * length * width**2 for name in projections)
    scores = [layer for layer in macs.layers if layer.name not in projections]
    assert [layer.macs for layer in scores] == [batch * length**2 * width] * 2
    assert [layer.sparse_macs for layer in scores] == [batch * length**2 * width] * 2


def test_activations_are_no_kernels_even_with_a_batch_of_one():
    rng = np.random.default_rng(0)
    params = {
        "qkv": {"kernel": jnp.asarray(rng.normal(size=(4, 12)))},
        "position": jnp.zeros((1, 5, 4)),
    }

    def fn(params, x):
        query, key, value = jnp.split(x @ params["qkv"]["kernel"], 3, axis=-1)
        scores = jnp.einsum("bqd,bkd->bqk", query, key + params["position"])
        return jax.nn.softmax(scores) @ value

    macs = count_macs(fn, params, ones(1, 5, 4))
    assert macs.layers[0].name == "qkv/kernel"
    assert "position" not in {layer.name for layer in macs.layers}
    assert macs.sparse_total == macs.total == 5 * 4 * 12 + 2 * 5 * 5 * 4


def test_kernel_is_found_on_the_left_and_behind_elementwise_operations():
    params = {"head": {"kernel": zeros_and_ones(4, 7)}, "bias": jnp.zeros(7)}
    nonzero = int(params["head"]["kernel"].sum())

    def fn(params, x, scale):
        kernel = sparsify(params, 0.5)["head"]["kernel"].astype(jnp.bfloat16)
        kernel = (
            kernel
            * jnp.broadcast_to(scale, kernel.shape)
            / jnp.linalg.norm(params["head"]["kernel"])
        )
        kernel = jnp.swapaxes(kernel.reshape(2, 2, 7).reshape(4, 7), 0, 1)
        return lax.dot_general(kernel, x.astype(kernel.dtype), (((1,), (1,)), ((), ())))

    for traced in (fn, jax.jit(fn)):
        layer = only(count_macs(traced, params, ones(3, 4), jnp.arange(7.0)))
        assert (layer.name, layer.shape) == ("head/kernel", (7, 3))
        assert (layer.macs, layer.sparse_macs) == (3 * 4 * 7, 3 * nonzero)


def test_layers_without_a_parameter_are_named_by_their_scope():
    weights = ones(4, 5)

    @jax.named_scope("block")
    def fn(x):
        return x @ weights

    assert only(count_macs(fn, ones(3, 4))).name == "block"
    assert only(count_macs(jnp.dot, ones(3, 4), ones(4, 5))).name
    data = count_macs(lambda params, x: x @ x.T, {}, zeros_and_ones(3, 4))
    assert data.sparse_total == data.total == 3 * 3 * 4


def test_tied_kernel_counts_each_time():
    embedding = zeros_and_ones(9, 4)

    def fn(params, tokens):
        x = params["embedding"][tokens]
        return (x + jnp.tanh(x)) @ params["embedding"].T

    layer = only(count_macs(fn, {"embedding": embedding}, jnp.zeros((2, 3), int)))
    assert (layer.name, layer.macs) == ("embedding", 2 * 3 * 4 * 9)
    assert layer.sparse_macs == 2 * 3 * int(embedding.sum())


def test_shapes_do_for_arrays():
    shapes = {"kernel": jax.ShapeDtypeStruct((4, 5), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
    layer = only(count_macs(lambda p, x: x @ p["kernel"], shapes, x))
    assert (layer.name, layer.macs, layer.sparse_macs) == ("kernel", 60, 60)


def test_counts_beyond_32_bits():
    x = jax.ShapeDtypeStruct((2**17, 2**17), jnp.float32)
    assert count_macs(jnp.dot, x, x).total == 2**51


def test_nnx_state_and_module():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(jax.nn.relu(self.conv(x)).mean((1, 2)))

    model, x = Net(nnx.Rngs(0)), ones(2, 6, 6, 2)
    graph, state = nnx.split(model)
    macs = count_macs(lambda state, x: nnx.merge(graph, state)(x), state, x)
    assert [(layer.name, layer.macs) for layer in macs.layers] == [
        ("conv/kernel", 2 * 6 * 6 * 3 * 3 * 2 * 4),
        ("head/kernel", 2 * 4 * 3),
    ]
    assert count_macs(lambda model, x: model(x), model, x).total == macs.total


def test_plain_data_that_prints_as_a_table():
    macs = count_macs(lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(1000)}, ones(2, 1000))
    assert dataclasses.asdict(macs)["layers"][0]["macs"] == 2_000_000
    header, _, row, total = str(macs).splitlines()
    assert header.split("  ")[0] == "layer"
    assert row.split() == ["kernel", "2x1000", "2,000,000", "2,000"]
    assert total.split() == ["all", "2,000,000", "2,000"]
