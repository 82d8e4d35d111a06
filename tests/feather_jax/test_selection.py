"""The threshold equals, bit by bit, the one that sorting gives."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feather_jax import selection, survey
from feather_jax.selection import global_threshold
from tests.feather_jax.sorting import ADVERSARIAL, flush, sorted_threshold


def assert_same_bits(actual, expected):
    actual = np.asarray(actual)
    assert (actual.dtype, actual.shape) == (expected.dtype, ())
    assert np.array_equal(actual, expected, equal_nan=True), (actual, expected)


@jax.jit
def traced_threshold(arrays, sparsity):
    return global_threshold(arrays, sparsity, prunable=True)


def check(arrays, sparsity):
    """Compares the threshold for a number and for a traced array, compiled, with sorting."""
    arrays = [np.asarray(array) for array in arrays]
    static = global_threshold(arrays, float(sparsity), prunable=True)
    assert_same_bits(static, sorted_threshold(arrays, float(sparsity)))
    sparsity = flush(np.float32(sparsity))
    traced = traced_threshold(arrays, sparsity)
    assert_same_bits(traced, sorted_threshold(arrays, sparsity, exact=True))


# Shared, so that an example's leaves are of one size and few combinations have to be compiled.
sizes = st.shared(st.sampled_from([1, 2, 3, 30]))
sparsities = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.5, 0.9, 0.99])


def weights(elements, dtype=np.float32):
    return sizes.flatmap(lambda size: hnp.arrays(dtype, size, elements=elements))


@settings(max_examples=200)
@given(weights(st.floats(width=32)), sparsities)
def test_equals_sorting_for_all_floats(array, sparsity):
    check([array], sparsity)


@settings(max_examples=200)
@given(weights(st.floats(width=32, allow_nan=False)), sparsities)
def test_equals_sorting_without_nan(array, sparsity):
    check([array], sparsity)


@settings(max_examples=100)
@given(weights(st.sampled_from([0.0, -0.0, 1e-45, -2e-38, 0.5, -0.5, 3.0, np.inf])), sparsities)
def test_equals_sorting_with_ties(array, sparsity):
    check([array], sparsity)


@settings(max_examples=100)
@given(
    weights(st.integers(0, 2**16 - 1), np.uint16),
    weights(st.integers(0, 2**16 - 1), np.uint16),
    weights(st.floats(-4, 4, width=32)),
    sparsities,
)
def test_equals_sorting_over_mixed_dtypes(half, brain, single, sparsity):
    half, brain = half.view(np.float16), brain.view(ml_dtypes.bfloat16)
    check([np.nan_to_num(half), np.where(np.isnan(brain), 1, brain), single], sparsity)
    check([half, brain, single], sparsity)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_equals_sorting_for_adversarial_weights(name):
    array = ADVERSARIAL[name]
    # The ranks at both ends and at the steps of the distribution, and ordinary ones.
    magnitudes = np.sort(np.abs(array))
    steps = np.flatnonzero(magnitudes[1:] != magnitudes[:-1])[
        :: 1 + np.unique(magnitudes).size // 4
    ][:4]
    ranks = (steps + np.array([[-0.5], [0], [0.5], [1]])).ravel() / (array.size - 1)
    for sparsity in [0, 1e-7, 0.3, 0.5, 0.8999, 0.95, 0.99, 1 - 2**-24, *ranks]:
        check([array], np.clip(sparsity, 0, 1 - 2**-24))


def test_thousand_sizes_and_sparsities_prune_the_promised_number():
    rng = np.random.default_rng(2)
    for size in [1, 2, 5, 17, 100, 999, 1000, 4097, 10_001, 65_536]:
        array = rng.permutation(size).astype(np.float32) + 1
        for sparsity in np.concatenate([rng.random(90), np.arange(1, 11) / 11]):
            threshold = float(global_threshold([array], sparsity, prunable=True))
            pruned = np.count_nonzero(np.abs(array) <= threshold)
            assert pruned == int(np.floor((size - 1) * sparsity)) + 1, (size, sparsity)


@pytest.fixture(params=[None, 0, 1000, 2**18])
def small_leaf(request, monkeypatch):
    """As if leaves might be spread over devices, or up to a size were put together."""
    if request.param is not None:
        monkeypatch.setattr(survey, "_is_whole", lambda leaf: True)
        monkeypatch.setattr(survey, "_SMALL_LEAF", request.param)
    selection._quantiles.clear_cache()
    yield
    selection._quantiles.clear_cache()


def test_order_and_division_into_leaves_do_not_matter(small_leaf):
    rng = np.random.default_rng(3)
    array = rng.standard_normal(6000, dtype=np.float32)
    for sparsity in (0.1, 0.77, 0.98):
        whole = global_threshold([array], sparsity, prunable=True)
        for _ in range(3):
            shuffled = rng.permutation(array) * rng.choice(np.array([-1, 1], np.float32), 6000)
            parts = [
                shuffled[:1].reshape(()),
                shuffled[1:1],
                shuffled[1:1001].reshape(10, 5, 4, 5),
                shuffled[1001:3000],
                shuffled[3000:].reshape(2, -1).T,
            ]
            assert_same_bits(global_threshold(parts, sparsity, prunable=True), np.asarray(whole))


def test_leaves_of_several_dtypes_are_one_set_of_weights(small_leaf):
    rng = np.random.default_rng(4)
    dtypes = [np.float16, ml_dtypes.bfloat16, np.float32, np.float32]
    arrays = [rng.standard_normal(900 + 90 * i).astype(each) for i, each in enumerate(dtypes)]
    for sparsity in (0.1, 0.77, 0.98):
        found = global_threshold(arrays, sparsity, prunable=True)
        assert_same_bits(found, sorted_threshold(arrays, sparsity))


@settings(max_examples=100)
@given(weights(st.floats(), np.float64), weights(st.floats(width=32)), sparsities)
@example(double=np.zeros(1), single=np.full(1, 2e-42, np.float32), sparsity=0.5)
def test_equals_sorting_in_float64(double, single, sparsity):
    with jax.enable_x64(True):
        check([double, single], sparsity)
        sparsity = flush(np.float64(sparsity))
        traced = traced_threshold([single], sparsity)
        assert_same_bits(traced, sorted_threshold([single], sparsity))


def test_search_ends_in_float64():
    array = np.random.default_rng(6).integers(0, 0x7FF << 52, 100_000, np.uint64).view(np.float64)
    with jax.enable_x64(True):
        for sparsity in (0.1, 0.9, 0.999):
            check([array], sparsity)


def test_sparsity_out_of_range_is_clipped_if_traced():
    array = np.arange(1, 101, dtype=np.float32)
    assert traced_threshold([array], np.float32(-0.5)) == 0
    assert traced_threshold([array], np.float32(1)) == 100
    assert traced_threshold([array], np.float32(7)) == 100
    assert np.isnan(traced_threshold([array], np.float32(np.nan)))


def test_sparsity_zero_prunes_nothing():
    array = np.array([0, 1, 2], np.float32)
    for sparsity in (0, 0.0, np.float32(0), jnp.zeros(()), jnp.int32(0)):
        assert global_threshold([array], sparsity, prunable=True) == 0
    assert np.isnan(global_threshold([array, np.float32([np.nan])], 0, prunable=True))


def test_infinite_upper_neighbour():
    array = np.array([1, np.inf, np.inf], np.float32)
    assert global_threshold([array], 0.25, prunable=True) == np.finfo(np.float32).max
    assert global_threshold([array], 0.5, prunable=True) == np.inf
    assert global_threshold([array[:2]], 1e-300, prunable=True) == 1


def test_default_mask_and_masked_nodes():
    kernel, bias = np.array([[1, 2], [3, 4]], np.float32), np.array([9, 9], np.float32)
    params = {"a": {"kernel": kernel, "bias": bias}, "b": {"kernel": optax.MaskedNode()}}
    assert global_threshold(params, 1 / 3) == 2
    mask = {"a": {"kernel": False, "bias": True}, "b": False}
    assert global_threshold(params, 1 / 3, prunable=mask) == 9


def test_errors_name_the_value_and_the_remedy():
    params = {"kernel": np.ones((2, 2), np.float32)}
    for sparsity in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"in \[0, 1\).*{sparsity}"):
            global_threshold(params, sparsity)
    for empty in ({}, {"bias": np.ones(3)}, {"kernel": np.ones((0, 2))}):
        with pytest.raises(ValueError, match=r"no prunable weight.*'kernel'.*prunable="):
            global_threshold(empty, 0.5)
    huge = {"kernel": jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)}
    with pytest.raises(ValueError, match=f"{2**32} are prunable"):
        jax.eval_shape(lambda params: global_threshold(params, 0.5), huge)


@pytest.fixture
def layers():
    rng = np.random.default_rng(7)
    shapes = {"conv": (3, 3, 8, 16), "dense": (64, 10)}
    return {k: {"kernel": rng.standard_normal(s, np.float32)} for k, s in shapes.items()}


def expected_threshold(params, sparsity):
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    return sorted_threshold(arrays, np.float32(sparsity), exact=True)


def test_inside_scan(layers):
    def step(params, sparsity):
        threshold = global_threshold(params, sparsity)
        return jax.tree.map(lambda w: 1.1 * w, params), (params, threshold)

    sparsities = np.linspace(0, 0.99, 5, dtype=np.float32)
    _, (params, thresholds) = jax.jit(lambda p: jax.lax.scan(step, p, sparsities))(layers)
    for i, sparsity in enumerate(sparsities):
        here = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        assert_same_bits(thresholds[i], expected_threshold(here, sparsity))


def test_under_vmap(layers):
    scales = np.array([1, 0.1, 7], np.float32)
    sparsities = np.array([0.2, 0.9, 0.99], np.float32)
    stacked = jax.tree.map(lambda w: np.stack([w * scale for scale in scales]), layers)
    for params_axis, params in ((0, stacked), (None, layers)):
        thresholds = jax.vmap(global_threshold, (params_axis, 0))(params, sparsities)
        for i, sparsity in enumerate(sparsities):
            here = jax.tree.map(lambda leaf, i=i: leaf[i], stacked) if params_axis == 0 else layers
            assert_same_bits(thresholds[i], expected_threshold(here, sparsity))


def test_same_on_one_and_on_all_devices(layers):
    sparsities = np.linspace(0.1, 0.9, jax.device_count(), dtype=np.float32)
    thresholds = jax.pmap(global_threshold, in_axes=(None, 0))(layers, sparsities)
    for threshold, sparsity in zip(thresholds, sparsities, strict=True):
        assert_same_bits(threshold, expected_threshold(layers, sparsity))
    mesh = jax.make_mesh((jax.device_count(),), ("batch",))
    replicated = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        global_threshold, mesh=mesh, in_specs=(replicated, replicated), out_specs=replicated
    )
    assert_same_bits(mapped(layers, sparsities[0]), expected_threshold(layers, sparsities[0]))


def test_derivative_is_zero(layers):
    def loss(params, sparsity):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return squares + 3 * global_threshold(params, sparsity)

    grads, grad = jax.jit(jax.grad(loss, argnums=(0, 1)))(layers, 0.9)
    jax.tree.map(lambda g, w: np.testing.assert_array_equal(g, 2 * w), grads, layers)
    assert grad == 0
    _, tangent = jax.jvp(lambda p: global_threshold(p, 0.9), (layers,), (layers,))
    assert tangent == 0


def test_weights_are_not_copied():
    leaves = [jax.ShapeDtypeStruct((512, 1024), jnp.float32)] * 4
    sparsity = jax.ShapeDtypeStruct((), jnp.float32)
    analysis = traced_threshold.lower(leaves, sparsity).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 0.1 * analysis.argument_size_in_bytes
