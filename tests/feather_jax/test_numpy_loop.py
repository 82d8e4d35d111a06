"""Forty steps of sparse training against a training loop written in NumPy, derivatives by hand."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from feather_jax import Feather, prunable_weights

STEPS, END_STEP = 40, 20
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, MAX_NORM = 0.1, 0.9, 5e-3, 3.0
HIDDEN, OUTPUT = "hidden", "output"


def data(seed=0):
    """32 examples of 4 classes with 12 features, and a network 12-24-4, in float64."""
    rng = np.random.default_rng(seed)
    x, y = 3 * rng.normal(size=(32, 12)), rng.integers(0, 4, 32)
    params = {
        HIDDEN: {"kernel": 2 * rng.normal(size=(12, 24)), "bias": 0.1 * rng.normal(size=24)},
        OUTPUT: {"kernel": 2 * rng.normal(size=(24, 4)), "bias": 0.1 * rng.normal(size=4)},
    }
    return x, y, params


# ---- by hand ----


def sparsity_at(step, final):
    return final * (1 - (1 - step / END_STEP) ** 3) if step < END_STEP else final


def quantile(params, sparsity):
    """The interpolated order statistic of all kernels' magnitudes, by sorting them."""
    kernels = [layer["kernel"].ravel() for layer in params.values()]
    a = np.sort(np.abs(np.concatenate(kernels)))
    if sparsity == 0:
        return 0.0
    rank = sparsity * (len(a) - 1)
    below = math.floor(rank)
    return a[below] + (a[below + 1] - a[below]) * (rank - below)


def sparse(kernel, threshold):
    kept = np.abs(kernel) > threshold
    return np.where(kept, np.sign(kernel) * np.cbrt(np.abs(kernel) ** 3 - threshold**3), 0)


def gradients(params, threshold, x, y):
    """Loss and gradients of tanh layer, linear layer and cross-entropy, straight through."""
    hidden_kernel, output_kernel = (sparse(p["kernel"], threshold) for p in params.values())
    hidden = np.tanh(x @ hidden_kernel + params[HIDDEN]["bias"])
    logits = hidden @ output_kernel + params[OUTPUT]["bias"]
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    loss = -np.mean(np.log(probabilities[np.arange(len(y)), y]))

    by_logits = (probabilities - np.eye(4)[y]) / len(y)
    by_hidden = (by_logits @ output_kernel.T) * (1 - hidden**2)
    return loss, {
        HIDDEN: {"kernel": x.T @ by_hidden, "bias": by_hidden.sum(0)},
        OUTPUT: {"kernel": hidden.T @ by_logits, "bias": by_logits.sum(0)},
    }


class Step(NamedTuple):
    loss: float
    threshold: float
    clipped: bool
    params: dict


def train_by_hand(params, x, y, sparsity, theta):
    params = {name: dict(layer) for name, layer in params.items()}
    velocity = {
        name: {k: np.zeros_like(v) for k, v in layer.items()} for name, layer in params.items()
    }
    steps = []
    for step in range(STEPS):
        threshold = quantile(params, sparsity_at(step, sparsity))
        loss, grads = gradients(params, threshold, x, y)
        for name in params:
            if threshold > 0:
                pruned = np.abs(params[name]["kernel"]) <= threshold
                grads[name]["kernel"][pruned] *= theta
        norm = math.sqrt(sum(np.sum(g**2) for layer in grads.values() for g in layer.values()))
        for name in params:
            for leaf in params[name]:
                g = grads[name][leaf] * min(1, MAX_NORM / norm)
                if leaf == "kernel":
                    g = g + WEIGHT_DECAY * params[name][leaf]
                velocity[name][leaf] = MOMENTUM * velocity[name][leaf] + g
                params[name][leaf] = params[name][leaf] - LEARNING_RATE * velocity[name][leaf]
        snapshot = {name: dict(layer) for name, layer in params.items()}
        steps.append(Step(loss, threshold, norm > MAX_NORM, snapshot))
    return steps


# ---- with the library ----


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params[HIDDEN]["kernel"] + params[HIDDEN]["bias"])
    logits = hidden @ params[OUTPUT]["kernel"] + params[OUTPUT]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def make_train_step(prune, x, y):
    tx = optax.chain(
        prune.scale_gradients(),
        optax.clip_by_global_norm(MAX_NORM),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=prunable_weights),
        optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
    )

    @jax.jit
    def train_step(params, opt_state, step):
        threshold = prune.threshold(params, step)
        loss, grads = jax.value_and_grad(lambda w: loss_fn(prune.sparsify(w, threshold), x, y))(
            params
        )
        updates, opt_state = tx.update(grads, opt_state, params, threshold=threshold)
        return optax.apply_updates(params, updates), opt_state, loss, threshold

    return tx, train_step


def make_wrapped_step(prune, x, y):
    """The same recipe in one line: the loop itself knows nothing of Feather."""
    tx = prune.wrap(
        optax.chain(
            optax.clip_by_global_norm(MAX_NORM),
            optax.add_decayed_weights(WEIGHT_DECAY, mask=prunable_weights),
            optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
        )
    )

    @jax.jit
    def train_step(params, opt_state):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return tx, train_step


def distance(params, expected):
    differences = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), params, expected)
    return max(jax.tree.leaves(differences))


@pytest.mark.parametrize(("sparsity", "theta"), [(0.9, 1.0), (0.98, 0.5)])
def test_forty_steps_follow_the_loop_by_hand(sparsity, theta):
    x, y, params = data()
    expected = train_by_hand(params, x, y, sparsity, theta)
    # The recipe's parts all have their say.
    assert {step.clipped for step in expected} == {True, False}
    for other in ((0.85, theta), (sparsity, theta / 2)):
        assert distance(train_by_hand(params, x, y, *other)[-1].params, expected[-1].params) > 1e-3

    prune = Feather(sparsity, end_step=END_STEP)
    with jax.enable_x64(True):
        tx, train_step = make_train_step(prune, x, y)
        actual, opt_state = params, tx.init(params)
        for step in range(STEPS):
            actual, opt_state, loss, threshold = train_step(actual, opt_state, step)
            assert abs(loss - expected[step].loss) < 1e-9
            assert abs(threshold - expected[step].threshold) < 1e-9
            assert distance(actual, expected[step].params) < 1e-9
        final = prune.finalize(actual)

    kernels = np.concatenate([final[name]["kernel"].ravel() for name in final])
    assert np.sum(kernels == 0) == math.floor(sparsity * (kernels.size - 1)) + 1
    last = expected[-1].params
    threshold = quantile(last, sparsity)
    by_hand = {
        name: {"kernel": sparse(layer["kernel"], threshold), "bias": layer["bias"]}
        for name, layer in last.items()
    }
    # The cube root is steep at the threshold: 1e-15 in a weight there is 1e-5 in the result.
    assert distance(final, by_hand) < 1e-4


@pytest.mark.parametrize(("sparsity", "theta"), [(0.9, 1.0), (0.98, 0.5)])
def test_forty_wrapped_steps_follow_the_loop_by_hand(sparsity, theta):
    """The dense weights in the state; the parameters are sparse, and at the end finalised."""
    x, y, params = data()
    expected = train_by_hand(params, x, y, sparsity, theta)
    prune = Feather(sparsity, end_step=END_STEP)
    with jax.enable_x64(True):
        tx, train_step = make_wrapped_step(prune, x, y)
        actual, state = params, tx.init(params)
        for step in range(STEPS):
            assert abs(state.threshold - expected[step].threshold) < 1e-9
            actual, state, loss = train_step(actual, state)
            assert abs(loss - expected[step].loss) < 1e-9
            assert distance(state.dense, expected[step].params) < 1e-9
        final = jax.tree.map(np.asarray, prune.finalize(state.dense))

    for name in (HIDDEN, OUTPUT):
        kernel = np.asarray(actual[name]["kernel"])
        np.testing.assert_array_equal(kernel == 0, final[name]["kernel"] == 0)
    assert distance(actual, final) < 1e-15
    threshold = quantile(expected[-1].params, sparsity)
    by_hand = {
        name: {"kernel": sparse(layer["kernel"], threshold), "bias": layer["bias"]}
        for name, layer in expected[-1].params.items()
    }
    assert distance(actual, by_hand) < 1e-4
