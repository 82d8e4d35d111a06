"""Everyone's own pytrees to a model file and back."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from feather_jax import Feather, load, path_mask, save


@struct.dataclass
class Pair:
    first: object
    second: object


class Point(NamedTuple):
    x: object
    y: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: object
    bias: object
    rate: float = dataclasses.field(metadata={"static": True}, default=0.5)


def array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def blank(tree):
    """The same tree with other numbers."""
    return jax.tree.map(lambda leaf: leaf * 0 - 1 if hasattr(leaf, "dtype") else leaf, tree)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        if hasattr(b, "dtype"):
            assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a is b


TREES = {
    "lists and tuples": {"layers": [{"w": array(2, 3)}, (array(2), array(1), {})]},
    "a dataclass of Flax": Pair(array(2), {"a": jnp.ones(3, jnp.bfloat16)}),
    "a dataclass": {"l": Layer(array(2, 2), None)},
    "a named tuple": Point(array(2), [array(3)]),
    "a frozen dict": nn.FrozenDict({"params": {"Dense_0": {"kernel": jnp.ones((2, 3))}}}),
    "boxes": {
        "a": nn.Partitioned(jnp.ones((2, 3)), ("in", "out")),
        "b": nn.LogicallyPartitioned(jnp.ones(3), ("out",)),
    },
    "an NNX state": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
    "keys that JAX cannot sort": {"a": array(1), 1: array(2), "1": {"": {}}},
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_as_it_was(tmp_path, name):
    tree = TREES[name]
    path = tmp_path / "model.npz"
    save(path, tree)
    if name == "keys that JAX cannot sort":
        assert load(path, like=tree).keys() == tree.keys()
        np.testing.assert_array_equal(load(path, like=tree)[1], tree[1])
        return
    assert_same(load(path, like=blank(tree)), tree)
    shapes = jax.eval_shape(lambda: tree)
    loaded = load(path, like=shapes)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)


def test_an_equinox_module_comes_back_and_computes_the_same(tmp_path):
    def model(seed):
        keys = jax.random.split(jax.random.key(seed), 2)
        return eqx.nn.Sequential(
            [
                eqx.nn.Linear(4, 8, use_bias=False, key=keys[0]),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Dropout(0.5, inference=True),
                eqx.nn.Linear(8, 2, key=keys[1]),
            ]
        )

    prune = Feather(0.5, end_step=0, prunable=path_mask(include=".*/weight"))
    sparse, path = prune.finalize(model(0)), tmp_path / "model.npz"
    save(path, sparse, {"framework": "equinox"})
    loaded = load(path, like=model(1))
    assert_same(loaded, sparse)
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(loaded(x), sparse(x))
    assert sorted(load(path)["layers"]) == [0, 3]
    assert list(load(path)["layers"][3]) == ["bias", "weight"]


def test_an_nnx_module_comes_back_and_its_file_is_that_of_its_state(tmp_path):
    def model(seed):
        rngs = nnx.Rngs(seed)
        layers = nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), jax.nn.relu
        return nnx.Sequential(*layers, nnx.Linear(8, 2, rngs=rngs))

    path, other = tmp_path / "model.npz", tmp_path / "state.npz"
    save(path, model(0))
    save(other, nnx.state(model(0)))
    assert path.read_bytes() == other.read_bytes()
    loaded = load(path, like=model(1))
    assert type(loaded) is nnx.Sequential
    x = jnp.ones((3, 4))
    np.testing.assert_array_equal(loaded(x), model(0)(x))
    assert not np.array_equal(loaded(x), model(1)(x))
    state = load(path, like=nnx.state(model(1)))
    nnx.update(target := model(2), state)
    np.testing.assert_array_equal(target(x), loaded(x))


def test_arrays_go_where_those_of_the_other_tree_are(tmp_path):
    path = tmp_path / "model.npz"
    save(path, {"kernel": array(8, 4), "bias": array(4)})
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x"))
    like = {"kernel": jax.device_put(jnp.zeros((8, 4)), sharding), "bias": np.zeros(4, np.float32)}
    loaded = load(path, like=like)
    assert loaded["kernel"].sharding == sharding
    assert type(loaded["bias"]) is np.ndarray
    shapes = {**like, "kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)}
    assert load(path, like=shapes)["kernel"].sharding == sharding


def test_a_float_may_be_wider_or_narrower_and_nothing_else(tmp_path):
    path = tmp_path / "model.npz"
    save(path, {"w": array(3)}, dtype="bfloat16")
    wide = load(path, like={"w": np.zeros(3, np.float32)})["w"]
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, array(3).astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"variables\['w'\] in bfloat16, and `like` in int32"):
        load(path, like={"w": np.zeros(3, np.int32)})


@pytest.mark.parametrize(
    ("like", "error", "message"),
    [
        ({"a": array(2)}, ValueError, r"has variables\['b'\]\[0\], which `like` has not"),
        ({"a": array(2), "b": [array(2)], "c": array(1)}, ValueError, r"no array .*\['c'\]"),
        ({"a": array(2), "b": array(2)}, ValueError, r"no array variables\['b'\], as"),
        ({"a": array(2), "b": {}}, ValueError, r"no empty variables\['b'\]"),
        ({"a": array(2), "b": [array(3)]}, ValueError, r"\['b'\]\[0\] of shape \(2,\), .* \(3,\)"),
        ({"a": array(2), "b": [jax.random.key(0)]}, TypeError, "PRNG keys; leave them out"),
        ({"a": array(2), "b": [3]}, TypeError, r"variables\['b'\]\[0\] is a int"),
        ({"a": array(2), "b": {(1,): array(2)}}, TypeError, r"has the key \(1,\), a tuple"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, like, error, message):
    path = tmp_path / "model.npz"
    save(path, {"a": array(2), "b": [array(2)]})
    with pytest.raises(error, match=message) as raised:
        load(path, like=like)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value) or error is TypeError


def test_a_key_below_a_module_is_named(tmp_path):
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(
        TypeError, match=r"variables\['layers'\]\[0\]\['rngs'\]\['key'\] holds PRNG"
    ):
        save(tmp_path / "model.npz", model)
