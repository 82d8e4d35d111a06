"""A threshold a layer is the one that sorting the layer gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import feather_jax as feather
from feather_jax import layer_thresholds, selection, survey
from tests.feather_jax.sorting import ADVERSARIAL, sorted_threshold
from tests.feather_jax.test_sharding import communicated


def layers(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 8, 16), "dense": (64, 10), "one": (1, 1), "wide": (2, 900)}
    scales = np.exp(2 * rng.standard_normal(len(shapes)))
    return {
        name: {"kernel": (rng.standard_normal(shape) * scale).astype(np.float32)}
        for (name, shape), scale in zip(shapes.items(), scales, strict=True)
    }


@pytest.fixture(params=[False, True])
def put_together(request, monkeypatch):
    """As if leaves might be spread over devices, or small ones were put together."""
    monkeypatch.setattr(survey, "_is_whole", lambda leaf: request.param)
    selection._quantiles.clear_cache()
    yield
    selection._quantiles.clear_cache()


def test_one_sparsity_for_all_layers(put_together):
    params = layers() | {"norm": {"scale": np.ones(3, np.float32)}}
    for sparsity in (0.0, 0.3, 0.9, 0.999):
        for each in (sparsity, jnp.float32(sparsity)):
            exact = isinstance(each, jax.Array)
            thresholds = layer_thresholds(params, each)
            assert thresholds.pop("norm") == {"scale": 0}
            for name, threshold in thresholds.items():
                number = np.float32(sparsity) if exact else sparsity
                expected = sorted_threshold([params[name]["kernel"]], number, exact=exact)
                assert threshold["kernel"] == expected, (name, each)


def test_a_sparsity_for_each_layer(put_together):
    params = layers(1)
    sparsities = {"conv": 0.5, "dense": jnp.float32(0.7), "one": 0.2, "wide": {"kernel": 0.0}}
    thresholds = layer_thresholds(params, sparsities)
    for name, exact in (("conv", False), ("dense", True), ("one", False), ("wide", False)):
        number = np.float32(0.7) if exact else jax.tree.leaves(sparsities[name])[0]
        expected = sorted_threshold([params[name]["kernel"]], number, exact=exact)
        assert thresholds[name]["kernel"] == expected


@jax.jit
def traced(arrays, sparsities):
    return layer_thresholds(arrays, sparsities, prunable=True)


@pytest.mark.parametrize("sparsity", [0.1, 0.9])
def test_equals_sorting_for_adversarial_layers(sparsity):
    arrays = [array[: 30_000 + i] for i, array in enumerate(ADVERSARIAL.values())]
    found = traced(arrays, [jnp.float32(sparsity)] * len(arrays))
    expected = [sorted_threshold([a], np.float32(sparsity), exact=True) for a in arrays]
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=100)
@given(
    hnp.arrays(np.float32, 9, elements=st.floats(width=32)),
    hnp.arrays(np.float32, (2, 3), elements=st.sampled_from([0.0, -0.5, 0.5, 1.0, np.inf])),
    st.floats(0, 1, exclude_max=True, width=32),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_equals_sorting_for_all_floats(first, second, one, other):
    tiny = np.finfo(np.float32).tiny
    one, other = (np.float32(0 if s < tiny else s) for s in (one, other))
    found = traced([first, second], [one, other])
    expected = [sorted_threshold([a], s, exact=True) for a, s in ((first, one), (second, other))]
    np.testing.assert_array_equal(found, expected)


def test_final_sparsities_grow_in_proportion():
    params = layers(2)
    final = {"conv": 0.9, "dense": 0.5, "one": 0.0, "wide": 0.95}
    sizes = {name: layer["kernel"].size for name, layer in params.items()}
    mean = sum(final[name] * sizes[name] for name in sizes) / sum(sizes.values())
    for share in (0.25, 1.0):
        found = layer_thresholds(params, share * mean, final=final)
        expected = layer_thresholds(params, {name: share * s for name, s in final.items()})
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, found, expected))
    half = layer_thresholds(params, jnp.float32(mean / 2), final=lambda _: final)
    for name, layer in params.items():
        pruned = np.mean(np.abs(layer["kernel"]) <= half[name]["kernel"])
        assert pruned == pytest.approx(final[name] / 2, abs=2 / sizes[name]) or sizes[name] == 1


def test_in_feather_with_the_final_sparsities_of_erdos_renyi():
    params = layers(3)
    final = feather.erdos_renyi_kernel(params, 0.9)
    prune = feather.Feather(
        0.9, end_step=10, select=partial(layer_thresholds, final=final), p=jnp.inf
    )
    step = jax.jit(prune.threshold)
    assert jax.tree.leaves(step(params, 0)) == [0] * 4
    for name, layer in prune.finalize(params).items():
        size = layer["kernel"].size
        zeros = int(final[name]["kernel"] * (size - 1)) + 1 if final[name]["kernel"] else 0
        assert np.count_nonzero(layer["kernel"] == 0) == zeros
    last = step(params, 10)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, last, layer_thresholds(params, final)))


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.93])
def test_small_leaves_may_fill_several_lines(sparsity):
    rng = np.random.default_rng(8)
    arrays = [rng.standard_normal(n, np.float32) for n in (9000, 5, survey._LINE, 4, 12_289)]
    arrays.append(np.zeros(2 * survey._LINE + 1, np.float32))
    found = layer_thresholds(arrays, jnp.float32(sparsity), prunable=True)
    assert found == [sorted_threshold([array], np.float32(sparsity)) for array in arrays]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_layers(kind):
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(kind,) * 2)
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal(s, np.float32) for s in ((256, 64), (3, 3, 32, 16), (64, 256))]
    specs = [P("d", "t"), P(None, None, "t", "d"), P(None, ("d", "t"))]
    params = [
        jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)
    ]
    expected = [sorted_threshold([array], 0.8) for array in arrays]

    def select(params):
        return layer_thresholds(params, 0.8, prunable=True)

    assert select(params) == expected
    compiled = jax.jit(select).lower(params).compile()
    assert compiled(params) == expected
    assert communicated(compiled) < 1e5


def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(5)
    arrays = [rng.standard_normal((64, 32), np.float32), rng.standard_normal((30, 20), np.float32)]

    def select(arrays):
        return layer_thresholds(arrays, 0.8, prunable=True, axis_name="x")

    mapped = jax.shard_map(select, mesh=mesh, in_specs=([P("x"), P()],), out_specs=P())
    assert jax.jit(mapped)(arrays) == [sorted_threshold([array], 0.8) for array in arrays]


def filter_magnitude(w):
    """One value for all weights of an output channel."""
    return jnp.max(jnp.abs(w), axis=tuple(range(w.ndim - 1)), keepdims=True)


@pytest.mark.parametrize(
    "magnitude",
    [feather.block_magnitude((3, 1)), feather.block_magnitude((4, 1)), filter_magnitude],
)
def test_blocks_count_by_their_weights(magnitude):
    rng = np.random.default_rng(6)
    arrays = [rng.standard_normal(s, np.float32) for s in ((16, 10), (3, 3, 5, 8))]
    sizes = [np.broadcast_to(np.asarray(magnitude(jnp.asarray(w))), w.shape) for w in arrays]
    for sparsity in (0.3, 0.77, 0.95):
        found = feather.global_threshold(arrays, sparsity, prunable=True, magnitude=magnitude)
        assert found == sorted_threshold(sizes, sparsity)
        each = layer_thresholds(arrays, sparsity, prunable=True, magnitude=magnitude)
        assert each == [sorted_threshold([size], sparsity) for size in sizes]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_blocks_may_lie_across_devices(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    rng, magnitude = np.random.default_rng(7), feather.block_magnitude((4, 1))
    arrays = [rng.standard_normal(shape, np.float32) for shape in ((24, 16), (64, 8))]
    sizes = [np.asarray(magnitude(jnp.asarray(w))) for w in arrays]
    sharded = jax.device_put(arrays, NamedSharding(mesh, P("x")))
    found = feather.global_threshold(sharded, 0.6, prunable=True, magnitude=magnitude)
    assert found == sorted_threshold(sizes, 0.6)
    each = layer_thresholds(sharded, 0.6, prunable=True, magnitude=magnitude)
    assert each == [sorted_threshold([size], 0.6) for size in sizes]


def test_errors_name_the_value_and_the_remedy():
    params = layers()
    with pytest.raises(ValueError, match=r"in \[0, 1\).*1.5"):
        layer_thresholds(params, {"conv": 1.5, "dense": 0.5, "one": 0.0, "wide": 0.0})
    with pytest.raises(ValueError, match="sparsity must be one for all layers or a pytree prefix"):
        layer_thresholds(params, {"conv": 0.5})
    with pytest.raises(ValueError, match="final sparsity above 0"):
        layer_thresholds(params, 0.5, final=0.0)
    with pytest.raises(ValueError, match="no prunable weight"):
        layer_thresholds({"bias": np.ones(3, np.float32)}, 0.5)
