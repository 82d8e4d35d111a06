"""N:M patterns against sorting each group with NumPy."""

import warnings
from functools import partial

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from feather_jax import Feather, block_magnitude, n_m_thresholds, sparsify

PATTERNS = [(2, 4), (1, 4), (4, 8), (3, 4), (1, 2), (2, 5), (1, 16)]


def group_thresholds(magnitudes, n, m, axis=-2):
    """The (m - n)-th smallest of every group, for each of its weights."""
    moved = np.moveaxis(np.asarray(magnitudes), axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, m)
    chosen = np.sort(groups, axis=-1)[..., m - n - 1]
    return np.moveaxis(np.repeat(chosen, m, axis=-1), -1, axis)


def network(seed=0):
    rng = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "Conv_0": {"kernel": array(3, 3, 8, 6), "bias": array(6)},
        "Dense_0": {"kernel": array(16, 5), "bias": array(5)},
    }


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_n_largest_of_every_m_stay(n, m):
    rng = np.random.default_rng(1)
    params = {
        "Conv_0": {"kernel": rng.normal(size=(3, 3, 2 * m, 6)).astype(np.float32)},
        "Dense_0": {"kernel": rng.normal(size=(3 * m, 5)).astype(np.float32)},
    }
    thresholds = jax.jit(partial(n_m_thresholds, n=n, m=m))(params)
    sparse = sparsify(params, thresholds, p=jnp.inf)
    for name, layer in params.items():
        w = layer["kernel"]
        np.testing.assert_array_equal(thresholds[name]["kernel"], group_thresholds(np.abs(w), n, m))
        kept = np.moveaxis(np.asarray(sparse[name]["kernel"]) != 0, -2, -1).reshape(-1, m).sum(1)
        np.testing.assert_array_equal(kept, n)


def test_what_is_not_prunable_has_the_threshold_zero():
    params = network()
    thresholds = n_m_thresholds(params, n=2, m=4)
    assert jax.tree.structure(thresholds) == jax.tree.structure(params)
    assert thresholds["Conv_0"]["bias"] == 0
    mask = {"Conv_0": False, "Dense_0": {"kernel": True, "bias": False}}
    assert n_m_thresholds(params, n=2, m=4, prunable=mask)["Conv_0"]["kernel"].shape == ()


@given(
    hnp.arrays(np.float32, (8, 3), elements=st.sampled_from([0, -0.0, 1, -1, 2, 1e-30, np.inf])),
    st.sampled_from([(2, 4), (1, 8), (4, 8), (3, 4)]),
)
@settings(max_examples=60)
def test_ties_are_pruned_together(w, pattern):
    n, m = pattern
    thresholds = n_m_thresholds({"kernel": w}, n=n, m=m)["kernel"]
    np.testing.assert_array_equal(thresholds, group_thresholds(np.abs(w), n, m))


# ---- while the sparsity grows ----


def pruned_by_hand(params, sparsity, n, m):
    """Which of the weights that the pattern would prune are the smallest, by sorting all."""
    kernels = [np.asarray(layer["kernel"]) for layer in params.values()]
    candidates = [np.abs(w) <= group_thresholds(np.abs(w), n, m) for w in kernels]
    smallest = np.sort(
        np.concatenate([np.abs(w)[c] for w, c in zip(kernels, candidates, strict=True)])
    )
    size = sum(w.size for w in kernels)
    count = int(np.floor(np.float64(sparsity) * (size - 1))) + 1 if sparsity else 0
    bound = np.inf if count >= len(smallest) else (smallest[count - 1] if count else -1)
    return [c & (np.abs(w) <= bound) for w, c in zip(kernels, candidates, strict=True)]


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.2, 0.37, 0.499, 0.5])
@pytest.mark.parametrize("traced", [False, True])
def test_the_smallest_that_the_pattern_would_prune_go_first(sparsity, traced):
    params = network()
    number = jnp.float32(sparsity) if traced else sparsity
    thresholds = (
        jax.jit(partial(n_m_thresholds, n=2, m=4))(params, number)
        if traced
        else (n_m_thresholds(params, number, n=2, m=4))
    )
    sparse = sparsify(params, thresholds)
    expected = pruned_by_hand(params, float(np.float32(sparsity)) if traced else sparsity, 2, 4)
    for layer, pruned in zip(sparse.values(), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(layer["kernel"]) == 0, pruned)


def test_feather_grows_into_the_pattern_and_finalises_it_once():
    params = network()
    prune = Feather(0.5, end_step=10, select=partial(n_m_thresholds, n=2, m=4))
    zeros = []
    for step in range(12):
        sparse = prune.sparsify(params, prune.threshold(params, step))
        zeros.append(sum(int((layer["kernel"] == 0).sum()) for layer in sparse.values()))
    assert zeros == sorted(zeros)
    assert zeros[0] == 0
    assert zeros[10] == zeros[11] == (3 * 3 * 8 * 6 + 16 * 5) // 2
    final = prune.finalize(params)
    whole = sparsify(params, n_m_thresholds(params, n=2, m=4))
    jax.tree.map(np.testing.assert_array_equal, final, whole)
    jax.tree.map(np.testing.assert_array_equal, prune.finalize(final), final)


def test_the_last_sparsity_is_the_whole_pattern_without_a_search():
    params = {"kernel": jnp.asarray(np.random.default_rng(3).integers(0, 5, (24, 6)), jnp.float32)}
    whole = n_m_thresholds(params, n=3, m=8)
    jax.tree.map(np.testing.assert_array_equal, n_m_thresholds(params, 1 - 3 / 8, n=3, m=8), whole)
    jaxpr = jax.make_jaxpr(lambda params: n_m_thresholds(params, 1 - 3 / 8, n=3, m=8))(params)
    assert "while" not in str(jaxpr)


def test_wrap_ends_in_the_pattern():
    params = network()
    prune = Feather(0.5, end_step=3, select=partial(n_m_thresholds, n=2, m=4))
    tx = prune.wrap(optax.adam(0.1))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for seed in range(1, 5):
        updates, state = update(network(seed), state, params)
        params = optax.apply_updates(params, updates)
    for layer in params.values():
        kept = np.moveaxis(np.asarray(layer["kernel"]) != 0, -2, -1).reshape(-1, 4).sum(1)
        np.testing.assert_array_equal(kept, 2)
    assert state.threshold["Dense_0"]["kernel"].shape == (16, 5)


def test_a_nan_is_seen():
    params = {"kernel": jnp.asarray(np.arange(1.0, 33.0).reshape(16, 2)).at[3, 1].set(jnp.nan)}
    assert np.isnan(n_m_thresholds(params, 0.3, n=2, m=4)["kernel"]).all()
    sparse = sparsify(params, n_m_thresholds(params, n=2, m=4))["kernel"]
    np.testing.assert_array_equal(np.isnan(sparse), np.isnan(params["kernel"]))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_float64_and_bfloat16(n, m):
    with jax.enable_x64(True):
        w = np.random.default_rng(2).normal(size=(8, 3))
        thresholds = n_m_thresholds({"kernel": w}, 0.5, n=n, m=m)["kernel"]
        assert thresholds.dtype == np.float64
        np.testing.assert_array_equal(thresholds, group_thresholds(np.abs(w), n, m))
    w = jnp.asarray(w, jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True), jax.checking_leaks():
        thresholds = n_m_thresholds({"kernel": w}, n=n, m=m)["kernel"]
    assert thresholds.dtype == np.float32
    np.testing.assert_array_equal(thresholds, group_thresholds(np.abs(np.float32(w)), n, m))


def test_blocks_of_outputs_in_groups_of_inputs():
    w = np.random.default_rng(3).normal(size=(8, 6)).astype(np.float32)
    magnitude = block_magnitude((1, 2))
    thresholds = n_m_thresholds({"kernel": w}, n=2, m=4, magnitude=magnitude)
    np.testing.assert_array_equal(thresholds["kernel"], group_thresholds(magnitude(w), 2, 4))
    sparse = sparsify({"kernel": w}, thresholds, magnitude=magnitude)["kernel"]
    pairs = np.asarray(sparse != 0).reshape(2, 4, 3, 2)
    np.testing.assert_array_equal(pairs.all(-1), pairs.any(-1))
    np.testing.assert_array_equal(pairs.all(-1).sum(1), 2)


# ---- axes ----


def test_leaves_that_do_not_divide_stay_dense_and_are_named():
    params = {**network(), "Conv_1": {"kernel": jnp.ones((3, 3, 3, 8))}}
    with pytest.warns(UserWarning, match=r"dense, as 4 does not divide them: Conv_1/kernel \(3 al"):
        thresholds = n_m_thresholds(params, 0.5, n=2, m=4)
    assert thresholds["Conv_1"]["kernel"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = n_m_thresholds(network(), 0.5, n=2, m=4)
    np.testing.assert_array_equal(thresholds["Dense_0"]["kernel"], expected["Dense_0"]["kernel"])
    with pytest.raises(ValueError, match=r"No leaf takes groups of 4: kernel \(3 along axis -2\)"):
        n_m_thresholds({"kernel": jnp.ones((3, 8))}, n=2, m=4)


def test_the_input_axis_of_attention_is_said():
    rng = np.random.default_rng(4)
    params = {
        "query": {"kernel": rng.normal(size=(8, 4, 4)).astype(np.float32)},  # embed, heads, head
        "Dense_0": {"kernel": rng.normal(size=(8, 4)).astype(np.float32)},
    }
    with pytest.raises(ValueError, match=r"'query/kernel', of shape \(8, 4, 4\), may lie along ot"):
        n_m_thresholds(params, n=2, m=4)
    axis = {"query": 0, "Dense_0": -2}
    thresholds = n_m_thresholds(params, n=2, m=4, axis=axis)
    for name, along in axis.items():
        expected = group_thresholds(np.abs(params[name]["kernel"]), 2, 4, along)
        np.testing.assert_array_equal(thresholds[name]["kernel"], expected)
    with pytest.raises(ValueError, match=r"'Dense_0/kernel' has the shape .* no axis 2"):
        n_m_thresholds(params, n=2, m=4, axis=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 4, "m": 4}, ValueError, "1 <= n < m, and n is 4 and m is 4"),
        ({"n": 5, "m": 4}, ValueError, "n is 5"),
        ({"n": 0, "m": 4}, ValueError, "n is 0"),
        ({"n": 2.0, "m": 4}, TypeError, "float"),
        ({"n": 2, "m": 4, "sparsity": 0.9}, ValueError, r"2:4 is in \[0, 0.5\], .* it is 0.9"),
        ({"n": 2, "m": 4, "sparsity": -0.1}, ValueError, "it is -0.1"),
        ({"n": 2, "m": 4, "sparsity": np.nan}, ValueError, "it is nan"),
        ({"n": 2, "m": 4, "prunable": False}, ValueError, "no prunable weight"),
        ({"n": 2, "m": 4, "axis": {"other": 0}}, ValueError, "or a pytree prefix"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        n_m_thresholds(network(), **arguments)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [P(None, None, "a", "b"), P(None, None, None, ("a", "b"))])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_sharded_weights_have_thresholds_sharded_alike(axis_type, spec, n, m):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    w = np.random.default_rng(5).normal(size=(3, 3, 32, 16)).astype(np.float32)
    params = {"kernel": jax.device_put(w, NamedSharding(mesh, spec))}
    for function in (n_m_thresholds, jax.jit(n_m_thresholds, static_argnames=("n", "m"))):
        thresholds = function(params, n=n, m=m)["kernel"]
        np.testing.assert_array_equal(thresholds, group_thresholds(np.abs(w), n, m))
        assert thresholds.sharding.is_equivalent_to(params["kernel"].sharding, 4)


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_weights_that_vary_over_a_manual_axis(sparsity):
    mesh = jax.make_mesh((8,), ("devices",))
    w = np.random.default_rng(6).normal(size=(64, 16)).astype(np.float32)
    select = partial(n_m_thresholds, sparsity=sparsity, n=2, m=4)
    here = jax.shard_map(
        partial(select, axis_name="devices"),
        mesh=mesh,
        in_specs=P("devices"),
        out_specs=P("devices"),
    )
    sharded = {"kernel": jax.device_put(w, NamedSharding(mesh, P("devices")))}
    found = jax.jit(here)(sharded)["kernel"]
    np.testing.assert_array_equal(found, select({"kernel": w})["kernel"])
