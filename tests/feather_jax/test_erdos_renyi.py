"""Erdos-Renyi-Kernel densities against their definition, with eps found by bisection."""

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from feather_jax import erdos_renyi_kernel


def by_bisection(shapes, sparsity):
    """Sparsities 1 - min(1, eps sum / product) whose mean over all weights is the one given."""
    sizes = np.array([np.prod(shape, dtype=float) for shape in shapes])
    raw = np.array([sum(shape) for shape in shapes]) / sizes

    low, high = 0.0, 2 / raw.min()
    for _ in range(200):
        eps = (low + high) / 2
        kept = np.sum(sizes * np.minimum(1, eps * raw))
        low, high = (eps, high) if kept < (1 - sparsity) * sizes.sum() else (low, eps)
    return 1 - np.minimum(1, low * raw)


@given(
    st.lists(
        st.lists(st.sampled_from([1, 3, 10, 64, 300]), min_size=2, max_size=4),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([0.0, 0.3, 0.8, 0.95, 0.999]),
)
@settings(max_examples=100)
def test_the_densities_are_those_of_the_definition(shapes, sparsity):
    params = [{"kernel": jax.ShapeDtypeStruct(tuple(shape), np.float32)} for shape in shapes]
    found = [layer["kernel"] for layer in erdos_renyi_kernel(params, sparsity)]
    np.testing.assert_allclose(found, by_bisection(shapes, sparsity), atol=1e-9)
    assert all(isinstance(s, float) and 0 <= s < 1 for s in found)
    sizes = [np.prod(shape, dtype=float) for shape in shapes]
    np.testing.assert_allclose(np.average(found, weights=sizes), sparsity, atol=1e-12)


def test_only_prunable_leaves_count():
    params = {
        "Conv_0": {"kernel": np.ones((3, 3, 16, 32)), "bias": np.ones(32)},
        "Dense_0": {"kernel": np.ones((32, 10)), "bias": np.ones(10)},
    }
    found = erdos_renyi_kernel(params, 0.9)
    assert found["Conv_0"]["bias"] == found["Dense_0"]["bias"] == 0
    expected = by_bisection([(3, 3, 16, 32), (32, 10)], 0.9)
    np.testing.assert_allclose(
        [found["Conv_0"]["kernel"], found["Dense_0"]["kernel"]], expected, atol=1e-9
    )
    mask = {"Conv_0": {"kernel": True, "bias": False}, "Dense_0": False}
    assert erdos_renyi_kernel(params, 0.9, prunable=mask) == {
        "Conv_0": {"kernel": pytest.approx(0.9), "bias": 0.0},
        "Dense_0": {"kernel": 0.0, "bias": 0.0},
    }


@pytest.mark.parametrize("sparsity", [1.0, -0.1, np.nan])
def test_a_sparsity_out_of_range_is_an_error(sparsity):
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        erdos_renyi_kernel({"kernel": np.ones((4, 4))}, sparsity)


def test_nothing_prunable_is_an_error():
    with pytest.raises(ValueError, match="no prunable weight"):
        erdos_renyi_kernel({"bias": np.ones(4)}, 0.5)
