"""The row-major kernels against the interpreter, for any shape, in pieces and on any width."""

import shutil
import subprocess

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from feather_jax.cpu.emit import Code
from feather_jax.cpu.graph import (
    FLOAT32,
    Broadcast,
    Concatenate,
    Gather,
    Input,
    MatMul,
    Node,
    Pad,
    Pool,
    Reduce,
    Slice,
    Transpose,
    elementwise,
)
from feather_jax.cpu.interpret import evaluate
from feather_jax.cpu.loops import emit
from feather_jax.cpu.machine_code import assemble
from feather_jax.cpu.target import host, named
from tests.feather_jax.cpu.kernels import Compiled

settings.register_profile("kernels", max_examples=12, deadline=None)
settings.load_profile("kernels")

SHAPES = arrays.array_shapes(min_dims=0, max_dims=5, min_side=1, max_side=20).filter(
    lambda shape: np.prod(shape) < 20_000
)
WIDTHS = st.sampled_from([None, "x86-64-v2"])


def values(draw, shape, dtype=FLOAT32):
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.random(shape) < 0.5
    if dtype != FLOAT32:
        return rng.integers(0, 100, shape).astype(dtype)
    result = np.asarray(rng.standard_normal(shape)).astype(np.float32)
    return np.where(rng.random(shape) < 0.01, np.float32(np.nan), result)


def arguments(*inputs):
    return tuple(Node(Input(i, each.shape, each.dtype)) for i, each in enumerate(inputs))


def check(draw, operation, *inputs, exact=True):
    """The kernel's result is the interpreter's, and the same bits however it is split."""
    node = Node(operation, arguments(*inputs))
    cpu = draw(WIDTHS)
    kernel = Compiled(node, named(cpu=cpu) if cpu else None)
    result, expected = kernel(*inputs), evaluate(node, *inputs)
    if exact:
        np.testing.assert_array_equal(result, expected)
    else:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(kernel(*inputs, pieces=draw(st.integers(2, 5))), result)


@given(st.data())
def test_elementwise_broadcasts(data):
    shape = data.draw(SHAPES)
    inputs = []
    for _ in range(2):
        own = shape[data.draw(st.integers(0, len(shape))) :]
        own = tuple(1 if data.draw(st.booleans()) else size for size in own)
        inputs.append(values(data.draw, own))
    x, y = arguments(*inputs)
    check(data.draw, elementwise("add", x, y).operation, *inputs)


@given(st.data())
def test_elementwise_in_place(data):
    x = values(data.draw, data.draw(SHAPES))
    kernel = Compiled(elementwise("tanh", *arguments(x)))
    np.testing.assert_array_equal(kernel(x, in_place=True), kernel(x))


@given(st.data())
def test_broadcast(data):
    shape = data.draw(SHAPES)
    own = tuple(1 if data.draw(st.booleans()) else size for size in shape)
    check(data.draw, Broadcast(shape), values(data.draw, own))


@given(st.data(), st.sampled_from([np.float32, np.uint8, np.bool_, np.int64]))
def test_transpose(data, dtype):
    shape = data.draw(SHAPES)
    order = data.draw(st.permutations(range(len(shape))))
    check(data.draw, Transpose(tuple(order)), values(data.draw, shape, np.dtype(dtype)))


@given(st.data())
def test_slice(data):
    shape = data.draw(SHAPES)
    start, size, stride = [], [], []
    for length in shape:
        pace = data.draw(st.sampled_from([1, 2, 3, -1, -2]))
        first = data.draw(st.integers(0, length - 1))
        room = (length - 1 - first if pace > 0 else first) // abs(pace) + 1
        start.append(first)
        size.append(data.draw(st.integers(1, room)))
        stride.append(pace)
    check(data.draw, Slice(tuple(start), tuple(size), tuple(stride)), values(data.draw, shape))


@given(st.data())
def test_concatenate(data):
    shape = data.draw(SHAPES.filter(len))
    axis = data.draw(st.integers(0, len(shape) - 1))
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    parts = [values(data.draw, (*shape[:axis], size, *shape[axis + 1 :])) for size in sizes]
    check(data.draw, Concatenate(axis), *parts)


@given(st.data())
def test_pad(data):
    shape = data.draw(
        arrays.array_shapes(min_dims=1, max_dims=4, max_side=6).filter(lambda s: np.prod(s) < 200)
    )
    interior = tuple(data.draw(st.integers(0, 2)) for _ in shape)
    padding = []
    for size, inner in zip(shape, interior, strict=True):
        length = size + (size - 1) * inner
        before = data.draw(st.integers(-min(2, length - 1), 3))
        after = data.draw(st.integers(max(-2, 1 - length - before), 3))
        padding.append((before, after))
    check(data.draw, Pad(np.float32(7), tuple(padding), interior), values(data.draw, shape))


@given(st.data())
def test_gather(data):
    x = values(data.draw, data.draw(SHAPES))
    size = data.draw(st.integers(1, min(x.size, 40)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shape = data.draw(arrays.array_shapes(min_dims=0, max_dims=3, max_side=5))
    positions = np.asarray(rng.integers(0, x.size - size + 1, shape))
    check(data.draw, Gather(size), x, positions)


@given(st.data(), st.sampled_from(["sum", "prod", "max", "min"]))
def test_reduce(data, kind):
    shape = data.draw(SHAPES)
    axes = tuple(axis for axis in range(len(shape)) if data.draw(st.booleans()))
    x = values(data.draw, shape)
    x = np.sign(x) if kind == "prod" else x
    check(data.draw, Reduce(kind, axes), x, exact=kind != "sum")


@pytest.mark.parametrize(
    ("shape", "axes"), [((200_000,), (0,)), ((200_000, 3), (0,)), ((50_000, 3, 4), (0, 2))]
)
def test_long_sums_are_exact(shape, axes):
    """One after the other in float32 they would be off by a thousand times as much."""
    x = np.random.default_rng(0).random(shape, np.float32)
    operation = Reduce("sum", axes)
    (node,) = arguments(x)
    result = Compiled(Node(operation, (node,)))(x)
    np.testing.assert_allclose(result, x.astype(np.float64).sum(axes), rtol=1e-7)


@given(st.data(), st.sampled_from(["and", "or", "max", "min"]))
def test_reduce_bool(data, kind):
    shape = data.draw(SHAPES)
    axes = tuple(axis for axis in range(len(shape)) if data.draw(st.booleans()))
    check(data.draw, Reduce(kind, axes), values(data.draw, shape, np.dtype(np.bool_)))


@given(st.data(), st.sampled_from(["argmax", "argmin"]), st.sampled_from([np.float32, np.uint8]))
def test_place_of_the_extreme(data, kind, dtype):
    shape = data.draw(SHAPES.filter(len))
    axis = data.draw(st.integers(0, len(shape) - 1))
    x = values(data.draw, shape, np.dtype(dtype))
    x = np.round(x) if dtype == np.float32 else x  # with equals
    check(data.draw, Reduce(kind, (axis,), np.dtype(np.int32)), x)


@given(st.data(), st.sampled_from(["max", "min", "sum"]))
def test_pool(data, kind):
    two = st.tuples(*[st.integers(1, 3)] * 2)
    window, strides, dilation = (data.draw(two) for _ in range(3))
    padding = tuple((data.draw(st.integers(0, 2)), data.draw(st.integers(-1, 2))) for _ in range(2))
    channels = data.draw(st.sampled_from([1, 3, 16, 21]))
    x = values(data.draw, (2, data.draw(st.integers(5, 9)), data.draw(st.integers(5, 9)), channels))
    check(data.draw, Pool(kind, window, strides, padding, dilation), x, exact=kind != "sum")


@given(st.data())
def test_matmul(data):
    size = st.integers(1, 40)
    batch, m, k, n = data.draw(st.integers(1, 3)), *(data.draw(size) for _ in range(3))
    check(
        data.draw,
        MatMul(),
        values(data.draw, (batch, m, k)),
        values(data.draw, (batch, k, n)),
        exact=False,
    )


@pytest.mark.parametrize("shape", [(3, 10_000), (10_000,), (5000, 1, 3)])
def test_long_rows_are_several_work_items(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    kernel = Compiled(elementwise("exp", *arguments(x)))
    np.testing.assert_array_equal(kernel(x, pieces=7), kernel(x))
    np.testing.assert_allclose(kernel(x), np.exp(x), rtol=1e-6)


def test_one_kernel_serves_equal_nodes():
    code = Code(host())
    x, y = arguments(np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32))
    first = emit(code, elementwise("exp", x))
    assert emit(code, elementwise("exp", y)) is first
    assert emit(code, elementwise("log", x)) is not first


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm of the binutils")
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3"])
def test_kernels_call_nothing(cpu, tmp_path):
    """So that an object file needs no library, not even C's mathematics."""
    unary = "abs ceil cos erf erfc exp expm1 floor log log1p logistic round rsqrt sin sqrt tanh"
    x, y = arguments(*[np.zeros((3, 5, 5, 20), np.float32)] * 2)
    nodes = [elementwise(function, x) for function in unary.split()]
    nodes += [elementwise(function, x, y) for function in ("power", "remainder", "divide")]
    nodes += [elementwise("convert", x, dtype=dtype) for dtype in (np.uint8, np.int64, np.bool_)]
    nodes += [Node(Reduce("sum", (1, 2)), (x,)), Node(Transpose((3, 0, 1, 2)), (x,))]
    target = named("x86_64-linux-gnu", cpu)
    code = Code(target)
    for node in nodes:
        emit(code, node).linkage = "external"
    path = tmp_path / "kernels.o"
    path.write_bytes(assemble(code.module, target, jit=False))
    listing = subprocess.run(["nm", "-u", path], capture_output=True, text=True, check=True)
    assert listing.stdout.strip() == ""
