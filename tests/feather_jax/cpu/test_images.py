"""Batches taken image by image, against the whole batch."""

import numpy as np
import pytest

from feather_jax.cpu.graph import (
    FLOAT32,
    RELU,
    Broadcast,
    Concatenate,
    Convolution,
    Elementwise,
    Graph,
    Input,
    MatMul,
    Node,
    Pool,
    Reduce,
    Reshape,
    Step,
    Transpose,
    constant,
)
from feather_jax.cpu.images import is_by_image, one_image
from feather_jax.cpu.interpret import interpret

rng = np.random.default_rng(0)
SUM = (Step("add", (0, 1)),)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def argument(*shape: int, index: int = 0) -> Node:
    return Node(Input(index, shape, FLOAT32))


def network(batch: int) -> Graph:
    """A convolution, attention over its pixels with a token more, and a dense layer."""
    x = argument(batch, 6, 6, 3)
    y = Node(Convolution(random(3, 3, 3, batch), random(batch), activation=RELU), (x,))
    y = Node(Elementwise(SUM), (y, constant(random(batch))))  # a value a channel, not an image
    y = Node(Pool("max", (2, 2), (2, 2)), (y,))
    tokens = Node(Reshape((batch, 4, batch)), (y,))
    token = Node(Broadcast((batch, 1, batch)), (constant(random(1, 1, batch)),))
    same = constant(np.repeat(random(1, 1, batch), batch, 0))
    tokens = Node(Concatenate(1), (token, tokens, same))
    tokens = Node(Elementwise(SUM), (tokens, constant(random(6, batch))))
    other = Node(Transpose((0, 2, 1)), (tokens,))
    mixed = Node(MatMul(), (Node(MatMul(), (tokens, other)), tokens))
    return Graph((x,), (Node(Reduce("sum", (1,)), (mixed,)), mixed))


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_images_make_the_batch(batch):
    graph = network(batch)
    images = one_image(graph)
    assert images is not None
    part, count = images
    assert count == batch
    array = random(batch, 6, 6, 3)
    singles = [interpret(part, array[i : i + 1]) for i in range(batch)]
    for own, whole in zip(zip(*singles, strict=True), interpret(graph, array), strict=True):
        np.testing.assert_allclose(np.concatenate(own), whole, rtol=1e-5, atol=1e-5)


def rolled(x: Node) -> Node:
    return Node(Elementwise(SUM), (x, Node(Transpose((1, 0)), (x,))))


@pytest.mark.parametrize(
    "graph",
    [
        lambda x: Node(Reduce("sum", (0,)), (x,)),
        rolled,
        lambda x: Node(Elementwise(SUM), (x, constant(random(4, 4)))),
        lambda x: Node(Concatenate(0), (x, x)),
        lambda x: constant(random(4, 4)),
    ],
)
def test_images_that_depend_on_one_another_stay_together(graph):
    x = argument(4, 4)
    assert one_image(Graph((x,), (graph(x),))) is None


def test_inputs_of_other_batches_stay_together():
    x, y = argument(4, 4), argument(2, 4, index=1)
    assert one_image(Graph((x, y), (x, y))) is None
    assert one_image(Graph((argument(1, 4),), (x,))) is None


def test_large_arrays_go_image_by_image_unless_planes_are_small():
    def convolution(batch, size):
        x = argument(batch, size, size, 64)
        return Graph((x,), (Node(Convolution(random(1, 1, 64, 64)), (x,)),))

    assert is_by_image(convolution(16, 32), 16)
    assert not is_by_image(convolution(2, 16), 16)
    assert not is_by_image(convolution(1024, 2), 16)


def test_turns_of_a_program(build, monkeypatch):
    monkeypatch.setattr("feather_jax.cpu.images.LARGE", 0)
    monkeypatch.setattr("feather_jax.cpu.images.WASTE", 100)
    graph = network(3)
    array = random(3, 6, 6, 3)
    for threads in (1, 2):
        program = build(graph, threads)
        assert program.plan.turns == 3
        assert "3 turns" in str(program.plan)
        for own, whole in zip(program(array), interpret(graph, array), strict=True):
            np.testing.assert_allclose(own, whole, rtol=1e-4, atol=1e-4)
        profile = program.profile(array)
        assert len(profile.seconds) == len(program.plan.steps)
        assert min(profile.seconds) >= 0
