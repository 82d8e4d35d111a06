"""The time of one image, as the end of a run measures it."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from train.run import timing
from train.store import model_file


def spin(seconds):
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        pass


def test_medians_of_cpu_time_taken_in_turn():
    order = []

    def call(name, seconds):
        order.append(name)
        spin(seconds)
        time.sleep(0.002)  # is no CPU time

    found = timing.in_turn({"a": lambda: call("a", 0.002), "b": lambda: call("b", 0.008)}, 0.15)
    assert 0.002 <= found["a"] < 0.006 < 0.008 <= found["b"]
    assert order[:6] == ["a", "b"] * 3


def test_a_median_of_many_is_not_made_of_more():
    calls = []
    timing.in_turn({"a": lambda: calls.append(0)}, seconds=3600)
    assert len(calls) == 1 + timing.MOST_TURNS


def test_both_are_measured(finished_run):
    model = model_file.load(finished_run / "model.npz")
    found = timing.time_one_image(model, seconds=0.05)
    assert found.keys() == {timing.COMPILED, timing.XLA}
    assert all(0 < seconds < 1 for seconds in found.values())


def test_xla_takes_the_cpu_wherever_else_jax_computes(finished_run):
    model = model_file.load(finished_run / "model.npz")
    images = np.random.default_rng(0).integers(0, 256, (3, *model.image_shape), np.uint8)
    with jax.default_device(jax.devices()[5]):
        logits = timing.compile_by_xla(model, images)(images)
        expected = model.logits(model.variables, images)
    assert logits.devices() == {jax.local_devices(backend="cpu")[0]}
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_cannot_be_compiled_has_no_time(finished_run, monkeypatch):
    class Sorting(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return jnp.sort(x.reshape(len(x), -1))[:, :10]

    model = model_file.load(finished_run / "model.npz")
    object.__setattr__(model, "network", Sorting())
    assert timing.time_one_image(model) == {}
    logits = model.logits({}, np.zeros((1, *model.image_shape), np.uint8))
    assert jax.tree.leaves(logits)[0].shape == (1, 10)
