"""Learned thresholds in the program: their gradients, their part of the optimiser, a run."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import feather_jax as feather
from tests.train.run.test_loop import Crash, crash_at
from train import config as config_lib
from train import main
from train.asl import Asl
from train.optimizer import learning_rate, make_optimizer
from train.store import checkpoint


@pytest.fixture
def config(tiny):
    """config(**changes): of a run with thresholds that are learned."""
    backbone = {"name": "asl", "learning_rate": 0.1}
    return functools.partial(
        tiny,
        model={"name": "lenet300", "hidden": [16]},
        epochs=2.0,
        sparsity=0.8,
        backbone=backbone,
        log_every_steps=11,
    )


def network():
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"body": {"kernel": array(6, 5), "bias": array(5)}, "head": {"kernel": array(5, 3)}}


def asl(theta=1.0):
    return Asl(0.8, 3.0, theta, feather.prunable_weights(network()))


def task(sparse):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(sparse))


def test_the_transformation_gives_the_gradient_of_both_losses():
    prune = asl()
    params = prune.with_r(network())
    params["asl"]["head"]["kernel"] += 0.3

    def loss(params):
        weights, r = {name: params[name] for name in network()}, params["asl"]
        sparse = feather.asl_sparsify(weights, r)
        return task(sparse) + feather.asl_loss(weights, r, 0.8)

    threshold = prune.threshold(params, 0)
    sparse = prune.sparsify(params, threshold)
    assert set(sparse) == {"body", "head"}
    updates, _ = prune.scale_gradients().update(
        jax.grad(task)(sparse), optax.EmptyState(), params, threshold=threshold
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, jax.grad(loss)(params)
    )
    scaled, _ = (
        asl(0.5)
        .scale_gradients()
        .update(jax.grad(task)(sparse), optax.EmptyState(), params, threshold=threshold)
    )
    np.testing.assert_allclose(
        scaled["head"]["kernel"],
        updates["head"]["kernel"] * np.where(sparse["head"]["kernel"] == 0, 0.5, 1),
    )
    np.testing.assert_array_equal(scaled["asl"]["head"]["kernel"], updates["asl"]["head"]["kernel"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_r_has_its_own_rate_no_decay_and_no_part_in_the_clipping(config, optimizer):
    prune = asl()
    chosen = config(clip_norm=1e-3, momentum=0.0, weight_decay=0.1, optimizer=optimizer)
    tx = make_optimizer(chosen, learning_rate(chosen, config_lib.steps(chosen, 1437)), prune)
    params = prune.with_r(network())
    threshold = prune.threshold(params, 0)
    gradient = jax.grad(task)(prune.sparsify(params, threshold))
    by_r = prune.scale_gradients().update(
        gradient, optax.EmptyState(), params, threshold=threshold
    )[0]["asl"]
    updates, _ = tx.update(gradient, tx.init(params), params, threshold=threshold)
    rate = 0.1 * 0.1
    for name in ("body", "head"):
        r = by_r[name]["kernel"]
        expected = -rate * (r if optimizer == "sgd" else jnp.sign(r))
        np.testing.assert_allclose(updates["asl"][name]["kernel"], expected, rtol=1e-4)
    assert updates["asl"]["body"]["bias"] == 0
    if optimizer == "sgd":
        moved = jax.tree.map(
            lambda u, w: u + 0.1 * 0.1 * w, updates["head"]["kernel"], params["head"]["kernel"]
        )
        assert 0 < np.linalg.norm(moved) < 1.001e-4


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, config):
    """Thresholds that are learned, and what the optimiser keeps of them, are restored."""
    config = config(checkpoint_every_steps=15)
    main.run(config, tmp_path / "whole", say=lambda line: None)
    crash_at(18, monkeypatch)
    with pytest.raises(Crash):
        main.run(config, tmp_path / "stopped", say=lambda line: None)
    monkeypatch.undo()
    said = []
    main.run(config, tmp_path / "stopped", said.append)
    assert "Going on after step 15" in said[0]

    states = [
        checkpoint.newest(tmp_path / name / "checkpoints").leaves for name in ("whole", "stopped")
    ]
    learned = [name for name in states[0] if "asl" in name]
    assert any("opt_state" in name for name in learned)
    assert len(learned) > sum("opt_state" in name for name in learned)
    assert states[0].keys() == states[1].keys()
    for name, leaf in states[0].items():
        np.testing.assert_array_equal(leaf, states[1][name], err_msg=name)
    models = [feather.load(tmp_path / name / "model.npz") for name in ("whole", "stopped")]
    jax.tree.map(np.testing.assert_array_equal, *models)


def test_a_run_trains_r_and_leaves_a_network_without_it(tmp_path, config):
    summary = main.run(config(), tmp_path, say=lambda line: None)
    variables = feather.load(tmp_path / "model.npz")
    assert "asl" not in variables["params"]
    counts = feather.summarize(variables["params"])
    assert summary["nonzero"] == counts.nonzero
    assert 0.4 < summary["sparsity"] < 0.9
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([record["sparsity"] for record in records], 0.8, rtol=1e-6)
    thresholds = [record["threshold"] for record in records]
    assert len(set(thresholds)) > 1
    assert min(thresholds) > 0
    assert "threshold" in (tmp_path / "report.html").read_text()
