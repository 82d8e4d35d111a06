"""The optimiser against the order of Feather's released code, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import feather_jax as feather
from train import config as config_lib
from train.optimizer import learning_rate, make_optimizer

BASE = {
    "data": {"name": "digits"},
    "model": {"name": "resnet8"},
    "batch_size": 10,
    "epochs": 4.0,
    "learning_rate": 0.1,
    "sparsity": 0.98,
    "weight_decay": 0.01,
}


DENSE = feather.Feather(sparsity=0.0, end_step=0)


def build(prune=DENSE, **changes):
    config = config_lib.parse(BASE | changes)
    schedule = learning_rate(config, config_lib.steps(config, num_train=250))
    return make_optimizer(config, schedule, prune), schedule


def params_and_grads(seed=0):
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(4, 5)), "bias": rng.normal(size=(5,))}
    grads = {"kernel": 3 * rng.normal(size=(4, 5)), "bias": 3 * rng.normal(size=(5,))}
    return params, grads


def as_float32(tree):
    return {name: jnp.asarray(leaf, jnp.float32) for name, leaf in tree.items()}


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_scales_then_clips_then_decays_then_has_momentum(nesterov):
    prune = feather.Feather(sparsity=0.98, end_step=0)
    tx, schedule = build(prune, nesterov=nesterov)
    params, _ = params_and_grads()
    state, trace = tx.init(as_float32(params)), dict.fromkeys(params, 0.0)
    jax_params = as_float32(params)
    for step in range(5):
        _, grads = params_and_grads(step)
        updates, state = tx.update(as_float32(grads), state, jax_params, threshold=0.7)
        jax_params = optax.apply_updates(jax_params, updates)

        pruned = np.abs(params["kernel"]) <= 0.7
        grads["kernel"] = np.where(pruned, 0.5 * grads["kernel"], grads["kernel"])
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in grads.values()))
        grads = {name: leaf * min(1, 3.0 / norm) for name, leaf in grads.items()}
        grads["kernel"] = grads["kernel"] + 0.01 * params["kernel"]
        trace = {name: 0.9 * trace[name] + leaf for name, leaf in grads.items()}
        moves = {n: grads[n] + 0.9 * trace[n] if nesterov else trace[n] for n in grads}
        rate = 0.05 * (1 + np.cos(np.pi * step / 100))
        params = {name: leaf - rate * moves[name] for name, leaf in params.items()}
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-5)
    for name, leaf in params.items():
        np.testing.assert_allclose(jax_params[name], leaf, rtol=1e-4, atol=1e-5)


def test_adamw_decays_kernels_alone():
    tx, _ = build(optimizer="adamw", sparsity=0.0, clip_norm=0.0)
    params = as_float32(params_and_grads()[0])
    zeros = {name: jnp.zeros_like(leaf) for name, leaf in params.items()}
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.01 * params["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_warm_up_rises_in_a_line_then_the_cosine_falls_to_zero():
    _, schedule = build(warmup_epochs=1.0)
    assert [float(schedule(step)) for step in (0, 5, 25)] == pytest.approx([0.0, 0.02, 0.1])
    assert float(schedule(100)) == pytest.approx(0.0, abs=1e-8)


def test_clipping_can_be_turned_off():
    tx, _ = build(clip_norm=0.0, weight_decay=0.0, momentum=0.0, sparsity=0.0)
    params, grads = (as_float32(tree) for tree in params_and_grads())
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["bias"], -0.1 * grads["bias"], rtol=1e-6)


def test_frozen_parameters_neither_move_nor_count_in_the_norm_that_is_clipped():
    tx, _ = build(freeze=("body/.*",), clip_norm=1.0)
    params, grads = params_and_grads()
    params = {"body": as_float32(params), "head": as_float32(params)}
    grads = {"body": as_float32(grads), "head": as_float32(grads)}
    alone, _ = build(clip_norm=1.0)
    state, alone_state = tx.init(params), alone.init(params["head"])
    assert not any("body" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state, params)
        expected, alone_state = jax.jit(alone.update)(grads["head"], alone_state, params["head"])
        assert not any(np.any(leaf) for leaf in updates["body"].values())
        jax.tree.map(np.testing.assert_array_equal, updates["head"], expected)


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw"}, {"freeze": ("body/bias",)}])
def test_the_head_has_its_learning_rate_weight_decay_included(changes):
    params, grads = params_and_grads()
    params = {"body": as_float32(params), "head": as_float32(params)}
    grads = {"body": as_float32(grads), "head": as_float32(grads)}
    found = []
    for factor in (1.0, 5.0):
        tx, _ = build(head_learning_rate=factor, **changes)
        found.append(tx.update(grads, tx.init(params), params)[0])
    plain, scaled = found
    jax.tree.map(np.testing.assert_array_equal, scaled["body"], plain["body"])
    for name, leaf in plain["head"].items():
        assert np.any(leaf)
        np.testing.assert_allclose(scaled["head"][name], 5 * leaf, rtol=1e-6)
