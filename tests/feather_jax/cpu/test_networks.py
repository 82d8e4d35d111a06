"""The whole compiler on random networks, against XLA."""

import jax
import numpy as np
from hypothesis import given, settings

from feather_jax import cpu
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
