"""Masks as Optax has them, and the default one for the trees that Flax users hold."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from feather_jax import global_threshold, prunable_weights, scale_pruned_gradients, sparsify
from feather_jax.masks import map_prefix, path_name, prunable_leaves, resolve_mask


def network():
    return {
        "Conv_0": {"kernel": np.ones((3, 3, 1, 2), np.float32), "bias": np.ones(2, np.float32)},
        "Dense_0": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)},
        "count": np.ones((2, 2), np.int32),
    }


NOTHING = {
    "Conv_0": {"kernel": False, "bias": False},
    "Dense_0": {"kernel": False, "bias": False},
    "count": False,
}
CONV_KERNEL = {**NOTHING, "Conv_0": {"kernel": True, "bias": False}}
BOTH_KERNELS = {**CONV_KERNEL, "Dense_0": {"kernel": True, "bias": False}}
CONV = {**NOTHING, "Conv_0": {"kernel": True, "bias": True}}


def test_the_default_is_the_kernels():
    assert prunable_weights(network()) == BOTH_KERNELS
    assert resolve_mask(network()) == BOTH_KERNELS


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_every_floating_dtype_of_training_is_prunable(dtype):
    assert prunable_weights({"kernel": jnp.ones((2, 2), dtype)}) == {"kernel": True}


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn])
def test_floats_for_storage_are_left_alone(dtype):
    """JAX promotes them with nothing, and nobody trains them."""
    stored = jnp.ones((2, 2), dtype)
    params = {"a": {"kernel": stored}, "b": {"kernel": jnp.array([[1.0, 2.0]])}}
    assert prunable_weights(params) == {"a": {"kernel": False}, "b": {"kernel": True}}
    threshold = global_threshold(params, 0.5)
    assert threshold == 1.5
    assert sparsify(params, threshold)["a"]["kernel"] is stored
    tx = scale_pruned_gradients(0.0)
    updates, _ = tx.update(params, tx.init(params), params, threshold=threshold)
    assert updates["a"]["kernel"] is stored
    with pytest.raises(TypeError, match=r"'a/kernel' for pruning.*of at least 16 bits"):
        resolve_mask(params, True)


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"kernel": np.ones(3, np.float32)}, "one dimension"),
        ({"kernel": np.float32(3)}, "no dimension"),
        ({"kernel": np.ones((3, 3), np.int8)}, "quantised"),
        ({"kernel": np.ones((3, 3), bool)}, "bool"),
        ({"kernel": np.ones((3, 3), np.complex64)}, "complex"),
        ({"bias": np.ones((3, 3), np.float32)}, "an attention's bias"),
        ({"embedding": np.ones((3, 3), np.float32)}, "an embedding"),
        ({"kernel": {"scale": np.ones((3, 3), np.float32)}}, "not the last key"),
        ({"my_kernel": np.ones((3, 3), np.float32)}, "another name"),
        ([np.ones((3, 3), np.float32)], "no name"),
        (np.ones((3, 3), np.float32), "no tree"),
    ],
)
def test_what_the_default_leaves_alone(params, why):
    assert jax.tree.leaves(prunable_weights(params)) == [False], why


class Boxed(NamedTuple):
    value: np.ndarray


def test_what_lies_around_the_last_dict_key_does_not_matter():
    kernel = np.ones((3, 3), np.float32)
    params = {"layers": [{"kernel": Boxed(kernel)}, ({"kernel": kernel}, {"bias": kernel})]}
    assert prunable_weights(params) == {
        "layers": [{"kernel": Boxed(True)}, ({"kernel": True}, {"bias": False})]
    }
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert paths == ["layers/0/kernel", "layers/1/0/kernel", "layers/1/1/bias"]
    assert path_name(jax.tree_util.tree_leaves_with_path([kernel])[0][0]) == "0"
    assert path_name(()) == ""


def test_shapes_alone_are_enough():
    shapes = jax.eval_shape(network)
    assert prunable_weights(shapes) == BOTH_KERNELS
    assert resolve_mask(shapes, CONV_KERNEL) == CONV_KERNEL


@pytest.mark.parametrize(
    ("prunable", "expected"),
    [
        (CONV_KERNEL, CONV_KERNEL),
        ({"Conv_0": True, "Dense_0": False, "count": False}, CONV),
        ({"Conv_0": np.True_, "Dense_0": np.bool_(False), "count": False}, CONV),
        (False, NOTHING),
        (lambda params: CONV_KERNEL, CONV_KERNEL),
        (lambda params: jax.tree.map(lambda leaf: leaf.ndim == 4, params), CONV_KERNEL),
        (lambda params: False, NOTHING),
    ],
)
def test_trees_prefixes_and_functions(prunable, expected):
    mask = resolve_mask(network(), prunable)
    assert mask == expected
    assert all(type(selected) is bool for selected in jax.tree.leaves(mask))


@pytest.mark.parametrize(
    ("bad", "shown"),
    [(1, "1"), (0.0, "0.0"), ("kernel", "'kernel'"), (np.ones(2, bool), "array"), (len, "len")],
)
def test_a_mask_holds_bools(bad, shown):
    mask = {**CONV_KERNEL, "Conv_0": {"kernel": bad, "bias": False}}
    with pytest.raises(TypeError, match=r"holds bools, and this one holds .* 'Conv_0/kernel'") as e:
        resolve_mask(network(), mask)
    assert shown in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("mask", [True, {**CONV_KERNEL, "count": True}])
def test_a_mask_selects_floating_point_weights(mask):
    with pytest.raises(TypeError, match="selects 'count' for pruning, whose dtype is int32"):
        resolve_mask(network(), mask)


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"Conv_0": True},
        {**CONV_KERNEL, "Other": True},
        {**CONV_KERNEL, "Conv_0": {"kernel": True}},
        {**CONV_KERNEL, "Conv_0": [True, False]},
        {**CONV_KERNEL, "Conv_0": {"kernel": [True], "bias": False}},
        {**CONV_KERNEL, "Conv_0": None},
        [True, True, True],
        lambda params: [True],
    ],
)
def test_a_mask_has_the_structure_of_the_parameters(mask):
    with pytest.raises(
        ValueError, match="must have the structure of the parameters or be a prefix"
    ):
        resolve_mask(network(), mask)


def test_an_error_inside_a_function_is_its_own():
    def broken(params):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=re.compile("^mine$")):
        resolve_mask(network(), broken)


def test_none_is_no_leaf():
    params = {"a": {"kernel": np.ones((2, 2), np.float32)}, "b": None}
    assert prunable_weights(params) == {"a": {"kernel": True}, "b": None}
    assert resolve_mask(params, {"a": True, "b": True}) == {"a": {"kernel": True}, "b": None}
    assert resolve_mask(params, True) == {"a": {"kernel": True}, "b": None}


def test_masked_nodes_are_passed_over():
    node = optax.MaskedNode()
    params = {**network(), "Conv_0": node, "count": {"a": node, "b": node}}
    expected = {**params, "Dense_0": {"kernel": True, "bias": False}}
    assert prunable_weights(params) == expected
    # The mask, made for all parameters, may be deeper or less deep than what Optax has masked.
    assert resolve_mask(params, {**BOTH_KERNELS, "count": True}) == expected
    assert resolve_mask(params, lambda params: {**BOTH_KERNELS, "count": True}) == expected
    assert resolve_mask(params, {**BOTH_KERNELS, "count": {"a": True, "b": [1, 2]}}) == expected
    with pytest.raises(ValueError, match="must have the structure"):
        resolve_mask(params, {"Conv_0": True, "Dense_0": {"kernel": True}, "count": True})


def test_map_prefix_gives_paths_values_and_subtrees():
    seen = map_prefix(
        lambda path, value, subtree: (path_name(path), value, subtree),
        {"a": 1, "b": {"c": 2, "d": 3}},
        {"a": [10, 20], "b": {"c": 30, "d": optax.MaskedNode()}},
    )
    assert seen == {
        "a": ("a", 1, [10, 20]),
        "b": {"c": ("b/c", 2, 30), "d": optax.MaskedNode()},
    }


def test_prunable_leaves_come_in_the_order_of_the_tree():
    params = network()
    conv, dense = params["Conv_0"]["kernel"], params["Dense_0"]["kernel"]
    assert [id(leaf) for leaf in prunable_leaves(params)] == [id(conv), id(dense)]
    assert prunable_leaves(params, False) == []
