"""Planned and generated code against the graph's interpreter."""

import dataclasses
import platform

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_jax.cpu.convolution import SparseConvolution
from feather_jax.cpu.graph import (
    FLOAT32,
    RELU,
    Concatenate,
    Convolution,
    Elementwise,
    Graph,
    Input,
    Literal,
    Node,
    Pool,
    Reduce,
    Reshape,
    Step,
    constant,
)
from feather_jax.cpu.interpret import interpret
from feather_jax.cpu.layouts import Halo, Retile, ToRows, ToTiles
from feather_jax.cpu.planner import make_plan
from feather_jax.cpu.target import host, named
from feather_jax.cpu.transpose import RowsToTiles, TilesToRows

SAME = ((1, 1), (1, 1))
rng = np.random.default_rng(0)


def argument(*shape: int, index: int = 0) -> Node:
    return Node(Input(index, shape, FLOAT32))


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def sparse(*shape: int, density: float = 0.3) -> np.ndarray:
    return random(*shape) * (rng.random(shape) < density)


def conv(x: Node, features: int, size: int = 3, residual=(), **options) -> Node:
    options = {"padding": ((size // 2,) * 2,) * 2, **options}
    inputs = x.shape[3] // options.get("groups", 1)
    operation = Convolution(sparse(size, size, inputs, features), random(features), **options)
    return Node(operation, (x, *residual), f"conv{features}")


def check(build, *outputs: Node, threads: int = 1, target=None):
    """Compares a program's results with the interpreter's; returns the program."""
    nodes = Graph((), outputs).nodes
    inputs = sorted(
        (node for node in nodes if isinstance(node.operation, Input)),
        key=lambda node: node.operation.index,
    )
    graph = Graph(tuple(inputs), outputs)
    arrays = [random(*node.shape) for node in inputs]
    program = build(graph, threads, target)
    for result, expected in zip(program(*arrays), interpret(graph, *arrays), strict=True):
        scale = max(np.abs(expected).max(initial=0), 1e-30)
        np.testing.assert_allclose(result / scale, expected / scale, atol=1e-5)
    return program


@st.composite
def convolutions(draw):
    size = st.integers(1, 3)
    window = draw(st.tuples(size, size))
    groups, features = draw(st.sampled_from([(1, 5), (1, 16), (2, 4), (6, 6), (6, 12)]))
    pad = st.tuples(st.integers(-1, 2), st.integers(-1, 3))
    weights = sparse(*window, 6 // groups, features, density=draw(st.sampled_from([0.0, 0.3, 1])))
    return Convolution(
        weights,
        draw(st.sampled_from([None, random(features)])),
        strides=draw(st.tuples(size, size)),
        padding=draw(st.tuples(pad, pad)),
        dilation=draw(st.sampled_from([(1, 1), (2, 1)])),
        groups=groups,
        activation=draw(st.sampled_from([(), RELU])),
    )


@settings(max_examples=25, deadline=None)
@given(
    convolutions(),
    st.integers(1, 4),
    st.integers(3, 20),
    st.integers(3, 20),
    st.sampled_from([4, 8, 16]),
)
def test_convolutions(build, operation, batch, height, width, lanes):
    """One behind another, so that the first one's tiles are read by the second."""
    x = argument(batch, height, width, 6)
    y = Node(operation, (x,))
    target = dataclasses.replace(host(), lanes=lanes)
    check(build, conv(y, 7) if y.shape[1] * y.shape[2] else y, y, target=target)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_residual_block(build, threads):
    x = argument(1, 14, 14, 8)
    a = conv(x, 16, activation=RELU)
    b = conv(a, 16, activation=RELU)
    c = conv(b, 16, residual=(a,), activation=RELU)
    d = conv(c, 16, residual=(c,))
    e = conv(d, 24, strides=(2, 2), residual=(conv(d, 24, 1, strides=(2, 2)),))
    check(build, Node(Reduce("sum", (1, 2)), (e,)), d, threads=threads)


def test_threads_compute_the_same_bits(build):
    x = argument(1, 20, 20, 8)
    y = conv(conv(x, 32, activation=RELU), 32, strides=(2, 2))
    image = random(1, 20, 20, 8)
    one, two, three = (build(Graph((x,), (y,)), threads)(image)[0] for threads in (1, 2, 3))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("kind", ["max", "min", "sum"])
@pytest.mark.parametrize("activation", [(), RELU])
@pytest.mark.parametrize("batch", [1, 4])
def test_pools(build, kind, activation, batch):
    x = conv(argument(batch, 13, 11, 3), 9, activation=activation)
    a = Node(Pool(kind, (3, 3), (2, 2), SAME), (x,))
    b = Node(Pool(kind, (2, 2), (2, 2), ((0, 1), (0, 1))), (a,))
    c = Node(Pool(kind, (2, 3), (1, 1)), (x,))
    check(build, a, b, c, Node(Reduce(kind, (1, 2)), (x,)), conv(b, 4))


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_concatenation_and_scaling(build, batch):
    x = conv(argument(batch, 9, 9, 4), 8)
    scale, shift = constant(random(12)), constant(random(1, 1, 1, 12))
    steps = (
        Step("multiply", (0, 1)),
        Step("add", (3, 2)),
        Step("maximum", (4, Literal(np.float32(0)))),
    )
    for _ in range(3):
        x = Node(Concatenate(3), (x, conv(x, 4)))
        if x.shape[3] == 12:
            x = Node(Elementwise(steps), (x, scale, shift))
    check(build, conv(x, 5), x)


def test_concatenation_lies_where_its_parts_are_written():
    x = conv(argument(1, 8, 8, 4), 8)
    y = Node(Concatenate(3), (x, conv(x, 4)))
    z = Node(Concatenate(3), (y, conv(y, 4)))
    out = conv(z, 4)
    plan, _ = make_plan(Graph((Graph((), (out,)).nodes[0],), (out,)), host())
    moves = [step.kernel for step in plan.steps if not isinstance(step.kernel, SparseConvolution)]
    assert {type(kernel) for kernel in moves} <= {Halo, ToTiles, ToRows, RowsToTiles, TilesToRows}


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_squeeze_and_excitation(build, batch):
    x = conv(argument(batch, 10, 10, 4), 24, activation=RELU)
    mean = Node(Reshape((batch, 1, 1, 24)), (Node(Reduce("sum", (1, 2)), (x,)),))
    gate = conv(conv(mean, 6, 1, activation=RELU), 24, 1)
    check(build, conv(Node(Elementwise((Step("multiply", (0, 1)),)), (x, gate)), 4))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("density", [0.1, 0.5, 1])
def test_dense_layers(build, tokens, density):
    x = argument(1, tokens, 1, 40)
    first = Convolution(sparse(1, 1, 40, 21, density=density), random(21), activation=RELU)
    y = Node(first, (x,))
    second = Convolution(sparse(1, 1, 21, 21, density=density))
    check(build, Node(second, (y, y)), y)


def test_tiles_that_do_not_fit_are_moved(build):
    x = argument(1, 13, 13, 3)
    y = conv(conv(x, 8), 8, strides=(2, 2))
    program = check(build, y)
    assert any(isinstance(step.kernel, Retile) for step in program.plan.steps)


@pytest.mark.parametrize("batch", [2, 8, 16, 20])
def test_images_share_vectors(build, batch):
    x = argument(batch, 7, 7, 3)
    program = check(build, Node(Reduce("max", (1, 2)), (conv(conv(x, 16), 16, strides=(2, 2)),)))
    (first, *_) = (
        step.kernel for step in program.plan.steps if isinstance(step.kernel, SparseConvolution)
    )
    assert first.y.grid[0] == np.gcd(batch, host().lanes)


def test_zeros_multiply_nothing(build):
    """Infinities and NaN reach the outputs that have a weight for them, and no others."""
    weights = np.zeros((3, 3, 2, 2), np.float32)
    weights[1, 1, 0, 0] = weights[0, 0, 1, 1] = 1
    x = argument(1, 6, 6, 2)
    y = Node(Convolution(weights, padding=SAME, activation=RELU), (x,))
    image = random(1, 6, 6, 2)
    image[0, 2, 3, 0], image[0, 1, 1, 1], image[0, 5, 5, 1] = np.nan, np.inf, np.nan
    graph = Graph((x,), (y,))
    (result,) = build(graph)(image)
    np.testing.assert_array_equal(result, interpret(graph, image)[0])
    assert np.isnan(result[0, 2, 3, 0])
    assert np.isnan(result).sum() == 1  # the other NaN is at no tap but beyond the edge
    assert np.isposinf(result).sum() == 1


def test_subnormal_weights_are_weights(build):
    weights = np.full((1, 1, 2, 3), 1e-42, np.float32)
    x = argument(1, 4, 4, 2)
    y = Node(Convolution(weights), (x,))
    image = np.full((1, 4, 4, 2), 1e38, np.float32)
    (result,) = build(Graph((x,), (y,)))(image)
    np.testing.assert_allclose(result, 2e-4, rtol=1e-3)


def test_inputs_and_constants_as_results(build):
    x = argument(1, 2, 2, 1)
    check(build, x, x, constant(random(3)), Node(Reshape((4,)), (x,)))


def test_plan_prints():
    x = argument(1, 8, 8, 3)
    y = conv(x, 4)
    plan, weights = make_plan(Graph((x,), (y,)), host())
    text = str(plan)
    nonzeros = int(np.count_nonzero(y.operation.weights))
    assert "conv4" in text
    assert f"{nonzeros * 64:,}" in text
    assert plan.macs == nonzeros * 64
    assert weights.nbytes >= 8 * nonzeros


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86-64")
@pytest.mark.parametrize(("cpu", "lanes"), [("x86-64-v2", 4), ("x86-64-v3", 8), ("x86-64-v4", 16)])
def test_widths_of_x86(build, cpu, lanes):
    """Code for lesser processors runs on greater ones; for greater ones it is only generated."""
    target = named(cpu=cpu)
    assert target.lanes == lanes
    x = argument(1, 11, 9, 5)
    y = conv(conv(x, 16, activation=RELU), 12, strides=(2, 2))
    z = Node(Pool("max", (3, 3), (2, 2), SAME), (conv(y, 7),))
    mean = Node(Reshape((1, 1, 1, 7)), (Node(Reduce("sum", (1, 2)), (z,)),))
    outputs = (conv(mean, 5, 1), Node(Convolution(random(1, 1, 7, 9)), (mean,)), z)
    if lanes <= host().lanes:
        check(build, *outputs, target=target)
    else:
        make_plan(Graph((x,), outputs), target)
