"""The whole compiler on random networks, against XLA and against the interpreter."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_jax import cpu
from feather_jax.cpu.interpret import interpret
from feather_jax.cpu.lower import lower
from feather_jax.cpu.simplify import simplify
from tests.feather_jax.cpu.networks import assert_close, networks


@given(networks())
@settings(max_examples=8, deadline=None)
def test_random_networks(network):
    """One thread is as XLA, and two have the same bits."""
    program = cpu.compile(network, network.images)
    results = program(network.images)
    assert_close(results, jax.jit(lambda x: network(x))(network.images), message=str(network))
    two = cpu.compile(network, network.images, threads=2)(network.images)
    jax.tree.map(np.testing.assert_array_equal, two, results)


@given(networks(floats=True), st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_what_is_no_number(network, seed):
    """NaN and infinities in the images come out where the interpreter has them."""
    rng = np.random.default_rng(seed)
    images = network.images.copy()
    poison = np.float32([np.nan, np.inf, -np.inf])
    images.flat[rng.integers(0, images.size, 2)] = poison[rng.integers(0, 3, 2)]
    expected = interpret(simplify(lower(network, images).graph), images)
    assert_close(cpu.compile(network, images)(images), expected, message=str(network))
