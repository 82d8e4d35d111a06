"""What the compiled training step costs beyond its dense twin: no communication, little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.hlo import collective_bytes
from benchmarks.program import Case, make, prunable_bytes
from train import parallel

WIDTHS = (8, 16, 32)
CASE = Case({"name": "resnet8", "widths": WIDTHS}, (16, 16, 3), 10, 16, crop_padding=2)


@pytest.fixture(scope="module")
def programs():
    """The sparse and the dense step for all of the 8 virtual devices."""
    return [make(CASE, sparsity) for sparsity in (0.9, 0.0)]


@pytest.fixture(scope="module")
def compiled(programs):
    return [program.lower().compile() for program in programs]


def test_collectives_are_counted_in_bytes():
    """A known program: one all-reduce of 24 float32 numbers and one of 5 bytes."""

    def sums(a, b):
        return jax.lax.psum(a, "batch"), jax.lax.pmax(b, "batch")

    mapped = jax.pmap(sums, axis_name="batch", out_axes=None)
    a, b = jnp.zeros((8, 4, 6), jnp.float32), jnp.zeros((8, 5), jnp.uint8)
    assert collective_bytes(mapped.lower(a, b).compile()) == {"all-reduce": 24 * 4 + 5}


def test_feather_adds_no_communication(compiled):
    sparse, dense = (collective_bytes(each) for each in compiled)
    assert sparse == dense


def test_data_parallelism_reduces_the_gradient_once(programs, compiled):
    """And the statistics of normalisation, forward and backward, and two metrics."""
    state = programs[1].state
    gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    statistics = sum(leaf.nbytes for leaf in jax.tree.leaves(state.batch_stats))
    reduced = collective_bytes(compiled[0])
    assert set(reduced) == {"all-reduce"}
    assert gradient < reduced["all-reduce"] <= gradient + 2 * statistics + 8


def test_extra_memory_is_at_most_one_copy_of_the_prunable_weights(programs, compiled):
    sparse, dense = (each.memory_analysis().temp_size_in_bytes for each in compiled)
    assert sparse - dense <= prunable_bytes(programs[1].state.params)


def test_no_step_but_the_first_compiles():
    """A program of its own, as `compiled` is known to JAX already."""
    program, compilations = make(CASE, 0.9), []

    def count(name, seconds, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            compilations.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        state, metrics = program.step(program.state, program.batch)
        jax.block_until_ready(metrics)
        first = len(compilations)
        for seed in range(3):
            noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 16, 3), np.uint8)
            batch = program.batch | parallel.shard({"image": noise}, parallel.device_mesh())
            state, metrics = program.step(state, batch)
            jax.device_get(metrics)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert first > 0
    assert len(compilations) == first
