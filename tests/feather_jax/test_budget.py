"""Budgets of cost are met to one weight, as by removing weights one by one in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import feather_jax as feather
from feather_jax import budget_thresholds
from tests.feather_jax.test_sharding import communicated


def scores(magnitudes, scale):
    """The least float32 scores whose product with the scale reaches the magnitudes."""
    score = magnitudes / scale
    for _ in range(3):
        lower = np.nextafter(score, np.float32(0))
        score = np.where(lower * scale >= magnitudes, lower, score)
    for _ in range(3):
        higher = np.nextafter(score, np.float32(np.inf))
        score = np.where(score * scale >= magnitudes, score, higher)
    return score


def removed(arrays, costs, sparsity=None, exponent=0.0, bounds=None, *, required=None):
    """How many weights of each array go, the least score first, equal ones together."""
    most = max(costs)
    if required is None:
        required = math.ceil(sparsity * sum(c * a.size for c, a in zip(costs, arrays, strict=True)))
    queue = []
    for i, (array, cost) in enumerate(zip(arrays, costs, strict=True)):
        magnitudes = np.sort(np.abs(array).ravel())
        cap = array.size if bounds is None else math.floor(bounds[i] * array.size)
        each = scores(magnitudes, np.float32((cost / most) ** exponent))[:cap]
        queue += [(score, i, m) for score, m in zip(each, magnitudes, strict=False)]
    counts, saved, before = [0] * len(arrays), 0, None
    for item in sorted(queue):
        if saved >= required and item != before:
            break
        counts[item[1]] += 1
        saved += costs[item[1]]
        before = item
    return counts


def pruned(arrays, thresholds):
    return [
        int(np.count_nonzero(np.abs(a) <= t)) if t > 0 else 0
        for a, t in zip(arrays, map(np.float32, thresholds), strict=True)
    ]


def arrays_of(seed, shapes=((40, 30), (3, 3, 8, 16), (7, 5), (200,)), spread=1.0):
    rng = np.random.default_rng(seed)
    scales = np.exp(spread * rng.standard_normal(len(shapes)))
    return [
        (rng.standard_normal(shape) * scale).astype(np.float32)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


COSTS = [1024, 12_544, 1, 49]
BOUNDS = [0.6, 0.97, 0.0, 1.0]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_removes_the_fewest_that_save_enough(exponent, bounds):
    select = jax.jit(
        lambda arrays, s: budget_thresholds(
            arrays, s, cost=COSTS, exponent=exponent, max_sparsity=bounds, prunable=True
        )
    )
    for seed in range(4):
        arrays = arrays_of(seed)
        for sparsity in (0.0, 2**-12, 0.25, 0.5, 0.75, 0.875):
            found = pruned(arrays, select(arrays, np.float32(sparsity)))
            assert found == removed(arrays, COSTS, sparsity, exponent, bounds), (seed, sparsity)


def test_number_and_array_agree_where_they_are_the_same():
    arrays = arrays_of(9)
    for sparsity in (0.5, 0.875):
        for cost in (COSTS, [c * 1e-3 for c in COSTS], [c * 2.0**30 for c in COSTS]):
            found = budget_thresholds(arrays, sparsity, cost=cost, exponent=1.0, prunable=True)
            assert pruned(arrays, found) == removed(arrays, COSTS, sparsity, 1.0)


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, np.inf]), min_size=6, max_size=6),
    st.lists(st.floats(0, 2, width=32), min_size=6, max_size=6),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_ties_within_a_leaf_go_together(first, second, sparsity):
    arrays = [np.array(first, np.float32), np.array(second, np.float32)]
    arrays = [np.where(a < np.finfo(np.float32).tiny, 0, a).astype(np.float32) for a in arrays]
    counts = pruned(arrays, tied(arrays, np.float32(sparsity)))
    zeros = [np.count_nonzero(a == 0) for a in arrays]  # no threshold is needed for those
    expected = removed(arrays, [3, 5], float(np.float32(sparsity)))
    assert list(map(max, counts, zeros)) == list(map(max, expected, zeros))


@jax.jit
def tied(arrays, sparsity):
    return budget_thresholds(arrays, sparsity, cost=[3, 5], prunable=True)


def test_costs_beyond_32_bits_are_added_exactly():
    arrays = arrays_of(3, ((256, 64), (300, 50)), spread=0.1)
    costs = [2**31 - 1, 3]
    for sparsity in (0.3, 0.9):
        found = budget_thresholds(arrays, sparsity, cost=costs, prunable=True)
        assert pruned(arrays, found) == removed(arrays, costs, sparsity)


def test_equal_costs_without_exponent_are_the_global_order():
    arrays = arrays_of(4)
    thresholds = budget_thresholds(arrays, 0.8, cost=2.5, prunable=True)
    assert len({float(t) for t in thresholds}) == 1
    size = sum(a.size for a in arrays)
    assert sum(pruned(arrays, thresholds)) == math.ceil(0.8 * size)


@pytest.mark.parametrize("bound", [0.3, 0.35, 0.4])
def test_bound_holds_with_ties(bound):
    arrays = [np.round(8 * a) / 8 for a in arrays_of(5, ((64, 64), (64, 32)), spread=0.0)]
    thresholds = budget_thresholds(
        arrays, 0.5, cost=[1, 2], max_sparsity=[bound, 1.0], prunable=True
    )
    first, _ = pruned(arrays, thresholds)
    assert (bound - 0.1) * 64 * 64 < first <= bound * 64 * 64


def test_global_threshold_with_bounds_prunes_as_many_in_all():
    arrays = arrays_of(6)
    size = sum(a.size for a in arrays)
    for sparsity in (0.25, 0.5, 0.75):
        for each in (sparsity, jnp.float32(sparsity)):
            thresholds = feather.global_threshold(
                arrays, each, max_sparsity=[0.8, 0.9, 0.0, 1.0], prunable=True
            )
            counts = pruned(arrays, thresholds)
            wanted = int(sparsity * (size - 1)) + 1
            assert sum(counts) == wanted
            expected = removed(arrays, [1] * 4, bounds=[0.8, 0.9, 0.0, 1.0], required=wanted)
            assert counts == expected


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_weights(kind):
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(kind,) * 2)
    arrays = arrays_of(7, ((64, 32), (3, 3, 8, 16)))
    specs = [P("d", "t"), P(None, None, "t", "d")]
    params = [
        jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)
    ]

    def select(params):
        return budget_thresholds(
            params, 0.7, cost=[5, 9], exponent=1.0, max_sparsity=[0.65, 1.0], prunable=True
        )

    expected = removed(arrays, [5, 9], 0.7, 1.0, [0.65, 1.0])
    assert pruned(arrays, select(params)) == expected
    compiled = jax.jit(select).lower(params).compile()
    assert pruned(arrays, compiled(params)) == expected
    assert communicated(compiled) < 1e5


def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    arrays = arrays_of(8, ((64, 32), (30, 20)))

    def select(arrays):
        return budget_thresholds(
            arrays, 0.7, cost=[5, 9], max_sparsity=0.8, prunable=True, axis_name="x"
        )

    mapped = jax.shard_map(select, mesh=mesh, in_specs=([P("x"), P()],), out_specs=P())
    found = pruned(arrays, jax.jit(mapped)(arrays))
    assert found == removed(arrays, [5, 9], 0.7, 0.0, [0.8, 0.8])


def test_not_a_number():
    arrays = arrays_of(1)
    assert np.isnan(budget_thresholds(arrays, jnp.float32(np.nan), cost=1, prunable=True)).all()
    arrays[2][0, 0] = np.nan
    assert np.isnan(budget_thresholds(arrays, 0.5, cost=COSTS, prunable=True)).all()


def test_costs_of_macs_and_what_is_not_prunable():
    params = {"conv": {"kernel": np.ones((3, 3, 2, 4), np.float32)}, "scale": np.ones(4)}
    params["dense"] = {"kernel": arrays_of(0, ((4, 6),))[0]}

    def fn(params, x):
        y = jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (y * params["scale"]).mean((1, 2)) @ params["dense"]["kernel"]

    macs = feather.count_macs(fn, params, np.ones((1, 5, 5, 2), np.float32))
    cost = macs.cost_per_weight(params)
    assert cost == {"conv": {"kernel": 25.0}, "scale": 0.0, "dense": {"kernel": 1.0}}
    thresholds = budget_thresholds(params, 0.9, cost=cost)
    assert thresholds["scale"] == 0
    assert thresholds["conv"]["kernel"] == 1
    inner = feather.count_macs(
        lambda v, x: fn(v["params"], x), {"params": params}, np.ones((1, 5, 5, 2))
    )
    assert inner.cost_per_weight(params) == cost
    with pytest.raises(ValueError, match="conv/kernel, dense/kernel"):
        macs.cost_per_weight({"kernel": np.ones((2, 2))})


def test_errors_name_the_value_and_the_remedy():
    arrays = arrays_of(0)
    for cost in (0, -1, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"positive number, and one is .*{cost}"):
            budget_thresholds(arrays, 0.5, cost=cost, prunable=True)
    with pytest.raises(ValueError, match=r"exponent.*-1"):
        budget_thresholds(arrays, 0.5, cost=1, exponent=-1, prunable=True)
    with pytest.raises(ValueError, match=r"in \[0, 1\], and it is 1.5"):
        budget_thresholds(arrays, 0.5, cost=1, max_sparsity=1.5, prunable=True)
    with pytest.raises(ValueError, match=r"sparsity of 0.8 cannot.*max_sparsity"):
        budget_thresholds(arrays, 0.8, cost=COSTS, max_sparsity=0.7, prunable=True)
    with pytest.raises(ValueError, match=r"sparsity of 0.8 cannot.*max_sparsity"):
        feather.global_threshold(arrays, 0.8, max_sparsity=0.7, prunable=True)
    with pytest.raises(ValueError, match="cost must be one for all layers or a pytree prefix"):
        budget_thresholds(arrays, 0.5, cost=[1, 2], prunable=True)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        budget_thresholds(arrays, 1.5, cost=1, prunable=True)


def test_strict_promotion_and_leak_checking():
    arrays = [a.astype(d) for a, d in zip(arrays_of(2), [np.float16, np.float32] * 2, strict=True)]

    def select(arrays, sparsity):
        return (
            feather.global_threshold(arrays, sparsity, prunable=True),
            feather.layer_thresholds(arrays, sparsity, final=0.9, prunable=True),
            budget_thresholds(
                arrays, sparsity, cost=COSTS, exponent=0.5, max_sparsity=0.9, prunable=True
            ),
        )

    expected = jax.jit(select)(arrays, jnp.float32(0.5))
    jax.clear_caches()
    with jax.numpy_dtype_promotion("strict"), jax.checking_leaks(), jax.debug_nans(True):
        assert jax.jit(select)(arrays, jnp.float32(0.5)) == expected
