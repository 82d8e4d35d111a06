"""Leaves by the names that everything else goes by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import feather_jax as feather


def test_names_are_those_of_the_summary_the_macs_and_the_masks():
    network = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
    variables = network.init(jax.random.key(0), jnp.ones((1, 4)))
    named = feather.named_leaves(variables["params"])
    assert list(named.values()) == jax.tree.leaves(variables["params"])
    assert list(named) == [layer.name for layer in feather.summarize(variables["params"]).layers]
    macs = feather.count_macs(network.apply, variables, jnp.ones((1, 4)))
    kernels = [name for name in named if name.endswith("kernel")]
    assert [layer.name for layer in macs.layers] == kernels
    only = feather.path_mask(include=kernels[0])(variables["params"])
    assert jax.tree.leaves(only) == [name == kernels[0] for name in named]


def test_the_boxes_of_an_nnx_state_are_no_part_of_a_name():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert list(feather.named_leaves(state)) == ["bias", "kernel"]


def test_a_bare_array_has_no_name():
    assert list(feather.named_leaves(np.ones(2))) == [""]


def test_two_leaves_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="Two leaves are named 'a/b'"):
        feather.named_leaves({"a/b": 1, "a": {"b": 2}})
