"""Primitives about indices, by the interpreter and compiled, against JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from feather_jax import cpu
from feather_jax.cpu.interpret import interpret
from feather_jax.cpu.lower import lower

TABLE = np.random.default_rng(0).standard_normal((5, 6, 7)).astype(np.float32)


def check(fn, *arguments):
    """Exactly JAX's results, of the same shapes and dtypes."""
    expected = jax.jit(lambda *each: fn(*each))(*arguments)
    graph = lower(fn, *arguments).graph
    results = interpret(graph, *map(np.asarray, jax.tree.leaves(arguments)))
    for compiled, interpreted, want in zip(
        jax.tree.leaves(cpu.compile(fn, *arguments)(*arguments)),
        results,
        jax.tree.leaves(expected),
        strict=True,
    ):
        assert compiled.dtype == want.dtype
        np.testing.assert_array_equal(compiled, want)
        np.testing.assert_array_equal(interpreted, want)


@pytest.mark.parametrize(
    ("fn", "indices"),
    [
        (lambda x, i: x[i], np.int32([[0, 4], [-1, -5]])),
        (lambda x, i: x[i], np.uint8([3, 200])),
        (lambda x, i: x[i], np.int32(2)),
        (lambda x, i: x[1, i], np.int32([0, 5, 5])),
        (lambda x, i: x[i, :, i], np.int32([0, 4, 2])),
        (lambda x, i: x[:, i], np.int32([[1, 0, 3]])),
        (lambda x, i: jnp.take(x, i, axis=-1), np.int32([6, 7, -8, -7])),
        (lambda x, i: jnp.take(x, i, axis=0, mode="clip"), np.int32([9, -9, 3])),
        (lambda x, i: jnp.take(x > 0, i, axis=0), np.int32([9, 1])),
        (lambda x, i: jnp.take((9 * x).astype(int), i, axis=0), np.int32([9, 1])),
        (lambda x, i: jnp.take_along_axis(x, i, 1), np.int32([[[1]], [[0]], [[5]], [[3]], [[-1]]])),
        (lambda x, i: jax.vmap(lambda x, i: x[i])(x, i), np.int32([1, 5, 0, 0, 2])),
        (lambda x, i: lax.dynamic_slice(x, (i, 3, 0), (2, 3, 7)), np.int32(9)),
        (lambda x, i: lax.dynamic_index_in_dim(x, i, 1, keepdims=False), np.int32(4)),
        (lambda x, i: jax.nn.one_hot(i, 5) @ x[:, 0], np.int32([3, 1])),
    ],
)
def test_reads_at_indices_that_are_arguments(fn, indices):
    check(fn, TABLE, indices)
    check(lambda i: fn(jnp.asarray(TABLE), i), indices)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[jnp.array([3, 0]), :, jnp.array([[1], [2]])],
        lambda x: jnp.take(x, jnp.array([0, 9]), axis=1),
        lambda x: x.at[1].set(0.0),
        lambda x: x.at[:, 2].add(x[:, 0]),
        lambda x: x.at[::2, -1].mul(2),
        lambda x: x.at[0, :, jnp.array([4, 9])].max(0.0),
        lambda x: x.at[jnp.array([0, 3])].min(x[1] - 1),
        lambda x: lax.dynamic_update_slice(x, x[:2, :2], (4, 1, 0)),
    ],
)
def test_known_indices(fn):
    check(fn, TABLE)


def test_adding_twice_to_the_same_place_is_explained():
    with pytest.raises(NotImplementedError, match=r"scatter.*several are the same"):
        lower(lambda x: x.at[jnp.array([1, 1])].add(1.0), TABLE)


@pytest.mark.parametrize(
    "values",
    [
        TABLE,
        np.float32([[1, -np.inf, 2, -np.inf, -np.inf], [np.nan, 3, np.nan, 3, np.inf]]),
        np.full((2, 4), -np.inf, np.float32),
        np.int8([[1, -5, -128, 7, 7], [-128] * 5]),
    ],
)
def test_top_k(values):
    check(lambda x: lax.top_k(x, 3), values)


def test_too_many_of_the_largest_are_explained():
    with pytest.raises(NotImplementedError, match=r"top_k.*up to 64"):
        lower(lambda x: lax.top_k(x, 65), np.zeros(99, np.float32))
