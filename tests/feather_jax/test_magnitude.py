"""Block magnitudes against extended precision, and their bits in one program and another."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from feather_jax import block_magnitude, threshold_operator
from feather_jax.magnitude import measure

# The kernel's shape, the block, and the axes that the block is along.
BLOCKS = [
    ((10, 7), (4, 1), None),
    ((3, 3, 6, 5), (4, 1), None),
    ((3, 3, 6, 5), (None, None, None, 1), None),
    ((3, 1, 6, 6), (2, 2), None),
    ((6, 9), (4,), None),
    ((64, 30), (None, 1), None),
    ((700, 4), (None, 1), None),
    ((9, 4, 5), (2, 3), (0, -1)),
    ((4, 5, 6), (4, 1), (-2, -1)),
    ((33, 40), (17, 1), None),
    ((8, 6), (1, 1), None),
]


def lengths(shape, block, axes):
    """The block's length along each axis."""
    full = [1] * len(shape)
    for axis, length in zip(axes or range(-len(block), 0), block, strict=True):
        full[axis] = length or shape[axis]
    return full


def reference(w, block, axes):
    """The root mean square of every weight's block, block by block, in extended precision."""
    length = lengths(w.shape, block, axes)
    result = np.empty(w.shape, np.longdouble)
    starts = [range(0, size, step) for size, step in zip(w.shape, length, strict=True)]
    for corner in itertools.product(*starts):
        cut = tuple(slice(i, i + step) for i, step in zip(corner, length, strict=True))
        result[cut] = np.sqrt(np.mean(w[cut].astype(np.longdouble) ** 2))
    return result


@pytest.mark.parametrize(("shape", "block", "axes"), BLOCKS)
def test_accuracy(shape, block, axes):
    rng = np.random.default_rng(0)
    w = rng.normal(size=shape) * 10 ** rng.uniform(-3, 3, shape)
    magnitude = block_magnitude(block, axes=axes)
    for scale, dtype in itertools.product((1, 1e-30, 1e34), (np.float32, np.float64)):
        with jax.enable_x64(dtype == np.float64):
            scaled = (w * scale).astype(dtype)
            value = np.asarray(measure(magnitude, scaled))
        assert value.dtype == dtype
        expected = reference(scaled, block, axes)
        unit = np.spacing(expected.astype(dtype))
        assert np.max(np.abs(value - expected) / unit) <= 3
    whole = [
        length >= size for length, size in zip(lengths(shape, block, axes), shape, strict=True)
    ]
    assert value.shape == tuple(1 if w else size for w, size in zip(whole, shape, strict=True))


def test_many_small_weights_next_to_a_large_one_count():
    w = np.full((2**15 + 1, 1), 2.0**-13, np.float32)
    w[7] = 1
    value = block_magnitude((None, 1))(w)
    expected = np.sqrt((1 + 2.0**15 * 2.0**-26) / w.size)
    np.testing.assert_allclose(value, [[expected]], rtol=2e-7)


@pytest.mark.parametrize(("shape", "block", "axes"), BLOCKS)
def test_a_threshold_that_is_a_blocks_magnitude_prunes_the_block_in_every_program(
    shape, block, axes
):
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    magnitude = block_magnitude(block, axes=axes)
    eager = np.broadcast_to(measure(magnitude, w), shape)

    @jax.jit
    def thresholded(w, threshold, x):
        sparse = threshold_operator(w, threshold, magnitude=magnitude)
        return sparse, x @ sparse.reshape(-1, shape[-1])

    @jax.jit
    def scanned(w, threshold):
        def layer(_, weight):
            return None, threshold_operator(weight, threshold, magnitude=magnitude)

        return jax.lax.scan(layer, None, jnp.stack([w, w]))[1][1]

    x = jnp.ones((2, w.size // shape[-1]))
    np.testing.assert_array_equal(jax.jit(magnitude)(w), measure(magnitude, w))
    for threshold in rng.choice(eager.ravel(), 3):
        for sparse in (thresholded(w, threshold, x)[0], scanned(w, threshold)):
            np.testing.assert_array_equal(np.asarray(sparse) == 0, eager <= threshold)


def test_a_block_of_one_is_the_absolute_value():
    w = np.random.default_rng(2).normal(size=(50, 7)).astype(np.float32)
    np.testing.assert_array_equal(block_magnitude((1, 1))(w), np.abs(w))
    equal = jnp.full((6, 3), -0.1)
    np.testing.assert_array_equal(block_magnitude((3, 1))(equal), np.abs(equal))


def test_what_is_not_finite_and_what_is_zero():
    inf, nan = np.inf, np.nan
    w = np.float32([1, -inf, 2, nan, inf, nan, 0, -0.0, 0, 4])[:, None]
    value = np.asarray(block_magnitude((2, 1))(w))[::2, 0]
    np.testing.assert_array_equal(value, np.float32([inf, nan, nan, 0, np.sqrt(8)]))
    with jax.debug_nans(True):
        block_magnitude((2, 1))(np.float32([[0], [0], [1e-45], [0], [inf], [1]]))
    assert block_magnitude((4, 1))(jnp.ones((0, 3))).shape == (0, 3)
    assert block_magnitude((4, 1))(jnp.ones((8, 0))).shape == (8, 0)


def test_the_gradient_is_straight_through_for_whole_blocks():
    w = jnp.asarray(np.random.default_rng(3).normal(size=(8, 4)), jnp.float32)
    magnitude = block_magnitude((4, 1))
    m = np.asarray(measure(magnitude, w))
    threshold = np.sort(m[::4].ravel())[3]

    def loss(w, theta):
        sparse = threshold_operator(w, threshold, theta=theta, magnitude=magnitude)
        return jnp.sum(jnp.exp(sparse))

    sparse = np.asarray(threshold_operator(w, threshold, magnitude=magnitude))
    np.testing.assert_array_equal(sparse == 0, m <= threshold)
    assert (sparse == 0).sum() == 16
    np.testing.assert_allclose(jax.grad(loss)(w, 1.0), np.exp(sparse), rtol=1e-6)
    expected = np.exp(sparse) * np.where(m <= threshold, 0.25, 1)
    np.testing.assert_allclose(jax.jit(jax.grad(loss), static_argnums=1)(w, 0.25), expected, 1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [P(None, None, "a", "b"), P(None, None, ("a", "b"), None)])
def test_sharded_weights(axis_type, spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    w = np.random.default_rng(6).normal(size=(3, 3, 16, 8)).astype(np.float32)
    sharded = jax.device_put(w, NamedSharding(mesh, spec))
    # Blocks of 3 divide neither the axis nor what a device holds of it.
    for magnitude in map(block_magnitude, [(4, 1), (3, 1), (None, 2), (None, None, None, 1)]):
        expected = magnitude(w)
        for function in (magnitude, jax.jit(magnitude)):
            np.testing.assert_array_equal(function(sharded), expected)

        @jax.jit
        @jax.grad
        def gradient(w, magnitude=magnitude):
            return threshold_operator(w, 0.9, theta=0.5, magnitude=magnitude).sum()

        by_w = gradient(sharded)
        np.testing.assert_array_equal(by_w, np.where(expected <= 0.9, 0.5, np.ones_like(w)))
        if axis_type == AxisType.Explicit:
            assert by_w.sharding.is_equivalent_to(sharded.sharding, 4)


def test_equal_blocks_are_equal():
    assert block_magnitude([4, 1]) == block_magnitude((4, 1))
    assert hash(block_magnitude([4, 1])) == hash(block_magnitude((4, 1)))
    assert block_magnitude((4, 1)) != block_magnitude((2, 1))

    traced = []

    @partial(jax.jit, static_argnums=1)
    def thresholded(w, magnitude):
        traced.append(magnitude)
        return threshold_operator(w, 0.5, magnitude=magnitude)

    for _ in range(3):
        thresholded(jnp.ones((8, 3)), block_magnitude([4, 1]))
    assert len(traced) == 1


def test_other_axes_are_another_magnitude():
    assert block_magnitude((4, 1)) != block_magnitude((4, 1), axes=(-2, -1))


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        ((4, 1), (16, 4, 8)),  # attention: embed, heads, head_dim
        ((4, 1), (2, 16, 4, 8)),  # a stack of it
        ((None, None, None, 1), (2, 16, 4, 8)),
        ((4, 1), (3, 4, 5, 16, 8)),
    ],
)
def test_nothing_is_grouped_across_heads_silently(block, shape):
    with pytest.raises(
        ValueError, match=r"may have others .* axes=\(.*-1\)\), or leave the kernel"
    ):
        block_magnitude(block)(jnp.ones(shape))
    said = block_magnitude(block, axes=range(-len(block), 0))
    assert said(jnp.ones(shape)).ndim == len(shape)


@pytest.mark.parametrize(
    "shape", [(5, 3), (3, 3, 5, 2), (1, 7, 5, 2), (3, 3, 3, 5, 2), (7, 1, 5, 2)]
)
def test_dense_and_convolution_kernels_have_one_input_axis(shape):
    assert block_magnitude((4, 1))(jnp.ones(shape)).shape == shape


def test_blocks_of_outputs_alone_are_taken_of_any_kernel():
    assert block_magnitude((2,))(jnp.ones((16, 4, 8))).shape == (16, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"block": (0, 1)},
            ValueError,
            r"a length of 1 or more for each axis, and this one is \(0",
        ),
        ({"block": ()}, ValueError, "a length of 1 or more"),
        ({"block": (2.0, 1)}, TypeError, r"integers or None .* is 2\.0"),
        ({"block": (True, 1)}, TypeError, "is True"),
        ({"block": 4}, TypeError, "sequence of lengths, and it is 4; give"),
        (
            {"block": (4, 1), "axes": (0,)},
            ValueError,
            r"one axis for each length, and axes is \(0,\)",
        ),
        ({"block": (4, 1), "axes": (0, 0)}, ValueError, "one axis for each length"),
    ],
)
def test_blocks_that_are_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        block_magnitude(**arguments)


@pytest.mark.parametrize(
    ("block", "axes", "shape"),
    [((None, None, None, 1), None, (5, 3)), ((4,), (2,), (5, 3)), ((4, 1), (-1, 1), (5, 3))],
)
def test_kernels_without_the_axes_are_errors(block, axes, shape):
    with pytest.raises(ValueError, match=r"one of shape \(5, 3\) has not; leave it out"):
        block_magnitude(block, axes=axes)(jnp.ones(shape))
