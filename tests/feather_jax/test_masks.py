"""Masks as Optax has them, and the default one for the trees that Flax users hold."""

import pickle
import re
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

from feather_jax import (
    global_threshold,
    path_mask,
    prunable_weights,
    scale_pruned_gradients,
    sparsify,
)
from feather_jax.masks import map_prefix, path_name, prunable_leaves, pruning_mask, resolve_mask


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
        ({"kernel": [np.ones((3, 3), np.float32)]}, "below the key"),
        ({"kernel": nnx.Dict(scale=jnp.ones((3, 3)))}, "an attribute below the key"),
        ({"kernel": jax.nn.relu}, "a function"),
        ({"kernel": jax.random.split(jax.random.key(0), (2, 2))}, "keys"),
        ({"my_kernel": np.ones((3, 3), np.float32)}, "another name"),
        ([np.ones((3, 3), np.float32)], "no name"),
        (np.ones((3, 3), np.float32), "no tree"),
    ],
)
def test_what_the_default_leaves_alone(params, why):
    assert jax.tree.leaves(prunable_weights(params)) == [False], why


class Boxed(NamedTuple):
    value: np.ndarray


class Quantised(NamedTuple):
    values: np.ndarray
    scale: np.ndarray


@struct.dataclass
class Layer:
    kernel: object
    bias: object


def test_boxes_and_attributes_are_names():
    kernel = np.ones((3, 3), np.float32)
    params = {
        "layers": [{"kernel": Boxed(kernel)}, ({"kernel": kernel}, {"bias": kernel})],
        "own": Layer(kernel, kernel),
        "stored": {"kernel": Quantised(np.ones((3, 3), np.int8), kernel)},
    }
    assert prunable_weights(params) == {
        "layers": [{"kernel": Boxed(True)}, ({"kernel": True}, {"bias": False})],
        "own": Layer(True, False),
        "stored": {"kernel": Quantised(False, False)},
    }
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert paths == [
        "layers/0/kernel",
        "layers/1/0/kernel",
        "layers/1/1/bias",
        "own/kernel",
        "own/bias",
        "stored/kernel/values",
        "stored/kernel/scale",
    ]
    assert path_name(jax.tree_util.tree_leaves_with_path(Boxed(kernel))[0][0]) == "value"
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


def test_a_module_is_a_tree_and_not_a_function():
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    assert callable(module)
    for params in (module, nnx.state(module), nnx.state(module, nnx.Param)):
        mask = prunable_weights(params)
        names = jax.tree_util.tree_leaves_with_path(mask)
        assert {path_name(path) for path, selected in names if selected} == {"kernel"}
        for prunable in (mask, lambda params, mask=mask: mask):
            zeroed = sparsify(params, 1e9, prunable=prunable)
            np.testing.assert_array_equal(
                zeroed["kernel"][...] if params is not module else zeroed.kernel[...], 0
            )
    network = eqx.nn.MLP(2, 1, 3, depth=1, key=jax.random.key(0))  # callable, with functions in it
    mask = eqx.tree_at(
        lambda tree: tree.layers[0].weight, jax.tree.map(lambda _: False, network), True
    )
    zeroed = sparsify(network, 1e9, prunable=mask)
    assert jnp.all(zeroed.layers[0].weight == 0)
    assert zeroed.layers[1].weight is network.layers[1].weight
    with pytest.raises(
        TypeError, match="selects 'activation' for pruning, whose type is custom_jvp"
    ):
        sparsify(network, 1e9, prunable=True)


def test_a_mask_may_have_boxes_where_the_parameters_have_none():
    """`nnx.Optimizer` makes its state from variables and updates it with bare arrays."""
    boxed = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    bare = nnx.as_pure(boxed)
    for mask in (prunable_weights(boxed), prunable_weights(bare)):
        for params in (boxed, bare):
            resolved = resolve_mask(params, mask)
            assert jax.tree.structure(resolved) == jax.tree.structure(params)
            assert jax.tree.leaves(resolved) == [False, True]


def by_name(params, include=(), exclude=()):
    mask = jax.tree_util.tree_leaves_with_path(path_mask(include, exclude)(params))
    return {path_name(path) for path, selected in mask if selected}


def test_path_mask():
    params = network()
    kernels = {"Conv_0/kernel", "Dense_0/kernel"}
    assert path_mask()(params) == BOTH_KERNELS
    assert path_mask(exclude=["Dense.*"])(params) == CONV_KERNEL
    assert by_name(params, [".*/kernel"]) == kernels
    assert by_name(params, ["Conv_0/.*"]) == {"Conv_0/kernel", "Conv_0/bias"}
    assert by_name(params, [".*"]) == kernels | {"Conv_0/bias", "Dense_0/bias"}  # no counts
    assert by_name(params, ".*", ".*/bias") == kernels
    assert by_name(params, [".*"], [".*/bias", "Conv.*"]) == {"Dense_0/kernel"}
    # The whole path, and not a part of it.
    layer = {"kernel": np.ones((2, 2)), "kernel_scale": np.ones((2, 2)), "a_kernel": np.ones(2)}
    assert by_name(layer, ["kernel"]) == {"kernel"}
    for include in ("kernel", "Dense_0", "ense_0/kernel", "Dense_0/kerne"):
        with pytest.raises(ValueError, match=f"include holds '{include}', which matches no"):
            path_mask([include])(params)


def test_path_mask_is_a_mask():
    params = network()
    prunable = path_mask(exclude=["Conv.*"])
    assert resolve_mask(params, prunable) == {**BOTH_KERNELS, "Conv_0": NOTHING["Conv_0"]}
    assert resolve_mask(jax.eval_shape(network), prunable) == resolve_mask(params, prunable)
    copy = pickle.loads(pickle.dumps(prunable))  # to another process
    assert copy(params) == prunable(params)
    hidden = {**params, "Conv_0": optax.MaskedNode()}  # by optax.partition
    assert resolve_mask(hidden, prunable)["Dense_0"] == {"kernel": True, "bias": False}


def test_path_mask_of_equinox_and_haiku():
    network = eqx.nn.MLP(2, 1, 3, depth=1, key=jax.random.key(0))
    assert by_name(network, ["layers/.*/weight"]) == {"layers/0/weight", "layers/1/weight"}
    params = {"mlp/~/linear_0": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}}
    assert by_name(params, [".*/w"]) == {"mlp/~/linear_0/w"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"include": ["count"]}, "include holds 'count', which matches no .* Conv_0/bias"),
        ({"exclude": ["Dense_0/bias"]}, "exclude holds 'Dense_0/bias', .* prunable ones are Conv"),
        ({"include": ["Conv.*"], "exclude": ["Dense.*"]}, "exclude holds 'Dense.*'"),
        ({"exclude": ["Dense_0/kernel", "Dense"]}, "exclude holds 'Dense', which"),
        ({"include": ["*"]}, r"takes regular expressions, and '\*' is none: nothing to repeat"),
        ({"exclude": [3]}, "takes regular expressions, and 3 is none"),
    ],
)
def test_path_mask_says_what_matches_nothing(given, message):
    with pytest.raises(ValueError, match=message) as error:
        path_mask(**given)(network())
    assert "\n" not in str(error.value)


def test_that_nothing_is_prunable_is_an_error_but_not_where_a_part_is_hidden():
    bias = {"bias": np.ones((3, 3), np.float32)}
    assert resolve_mask(bias) == {"bias": False}
    with pytest.raises(ValueError, match=r"no prunable weight among the parameters \(bias\)"):
        pruning_mask(bias)
    with pytest.raises(ValueError, match=r"\(one without a name\)"):
        pruning_mask(bias["bias"])
    with pytest.raises(ValueError, match=r"\(a0, a1, a10, a11, a2, a3, a4, a5, 4 more\)"):
        pruning_mask({f"a{i}": np.ones(1) for i in range(12)})
    hidden = {**bias, "kernel": optax.MaskedNode()}
    assert pruning_mask(hidden) == {"bias": False, "kernel": optax.MaskedNode()}


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
