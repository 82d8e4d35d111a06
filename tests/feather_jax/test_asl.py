"""The adaptive sparsity loss: its derivatives by hand, and forty steps next to NumPy's."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from feather_jax import (
    asl_init,
    asl_loss,
    asl_sparsify,
    asl_thresholds,
    prunable_weights,
    scale_pruned_gradients,
    summarize,
    threshold_operator,
)


def operator_by_hand(w, threshold, p):
    magnitude = np.abs(w)
    kept = magnitude > threshold
    if np.isinf(p):
        return np.where(kept, w, 0)
    powers = np.where(kept, magnitude**p - threshold**p, 0)
    return np.sign(w) * powers ** (1 / p)


def layers(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "Conv_0": {
            "kernel": rng.normal(size=(3, 3, 4, 8)).astype(dtype),
            "bias": np.ones(8, dtype),
        },
        "Dense_0": {"kernel": (0.1 * rng.normal(size=(32, 5))).astype(dtype)},
    }


R = {"Conv_0": {"kernel": 1.2, "bias": 7.0}, "Dense_0": {"kernel": 0.8}}


def test_thresholds_are_deviations():
    params = layers()
    thresholds = jax.jit(asl_thresholds)(params, R)
    for name in params:
        expected = R[name]["kernel"] * np.std(params[name]["kernel"].astype(float))
        np.testing.assert_allclose(thresholds[name]["kernel"], expected, rtol=1e-6)
    assert thresholds["Conv_0"]["bias"] == 0
    shared = asl_thresholds(params, jnp.float32(0.8))
    np.testing.assert_array_equal(shared["Dense_0"]["kernel"], thresholds["Dense_0"]["kernel"])


@pytest.mark.parametrize(("r", "clipped"), [(-1.0, 0.0), (0.0, 0.0), (4.9, 4.9), (6.0, 5.0)])
def test_r_is_clipped(r, clipped):
    w = layers()["Dense_0"]["kernel"]
    threshold = asl_thresholds({"kernel": w}, r)["kernel"]
    np.testing.assert_allclose(threshold, clipped * np.std(w), rtol=1e-6)
    sparse = asl_sparsify({"kernel": w}, r)["kernel"]
    np.testing.assert_array_equal(sparse, threshold_operator(w, threshold))


@pytest.mark.parametrize("p", [1.0, 2.5, 3.0, np.inf])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_operator_has_straight_through_derivatives(p, dtype):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), layers())
    rng = np.random.default_rng(1)
    cotangent = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), params)
    r = jax.tree.map(jnp.float32, R)
    sparse, vjp = jax.vjp(jax.jit(partial(asl_sparsify, p=p)), params, r)
    by_weights, by_r = vjp(cotangent)
    thresholds = asl_thresholds(params, r)
    for name, layer in params.items():
        w, threshold = layer["kernel"], thresholds[name]["kernel"]
        np.testing.assert_array_equal(sparse[name]["kernel"], threshold_operator(w, threshold, p))
        # The deviation is not differentiated: nothing but the cotangent itself.
        np.testing.assert_array_equal(by_weights[name]["kernel"], cotangent[name]["kernel"])
        assert by_weights[name]["kernel"].dtype == dtype
        w, g, t = (np.asarray(x, float) for x in (w, cotangent[name]["kernel"], threshold))
        by_threshold = np.sum(g * (operator_by_hand(w, t, p) - w)) / t
        deviation = np.std(w)
        tolerance = 1e-4 if dtype == jnp.float32 else 0.05
        np.testing.assert_allclose(
            by_r[name]["kernel"], by_threshold * deviation, rtol=tolerance, atol=tolerance
        )
    np.testing.assert_array_equal(by_weights["Conv_0"]["bias"], cotangent["Conv_0"]["bias"])
    assert by_r["Conv_0"]["bias"] == 0


def test_of_hard_thresholding_pruned_weights_alone_move_the_threshold():
    w = jnp.asarray([[-3.0, 0.5, 0.2, 2.5]])
    by_r = jax.grad(lambda r: jnp.sum(asl_sparsify({"kernel": w}, r, p=jnp.inf)["kernel"] * 2.0))
    r = jnp.float32(0.6)
    threshold = asl_thresholds({"kernel": w}, r)["kernel"]
    assert 0.5 < threshold < 2.5
    np.testing.assert_allclose(by_r(r), 2 * -(0.5 + 0.2) / r, rtol=1e-5)


def test_where_the_threshold_is_zero_nothing_moves_it():
    with jax.debug_nans(True):
        w = {"kernel": jnp.asarray([[1.0, -2.0, 0.0]])}
        gradient = jax.jit(jax.grad(lambda r: asl_sparsify(w, r)["kernel"].sum()))
        assert gradient(jnp.float32(0.0)) == 0
        constant = {"kernel": jnp.ones((1, 3))}  # its deviation is zero
        assert jax.grad(lambda r: asl_sparsify(constant, r)["kernel"].sum())(1.0) == 0


def test_the_loss_is_the_papers():
    params = layers()
    sizes = {name: layer["kernel"].size for name, layer in params.items()}
    kept = sum(n * (1 - math.erf(R[name]["kernel"] / math.sqrt(2))) for name, n in sizes.items())
    expected = (kept / sum(sizes.values()) - (1 - 0.9)) ** 2
    for sparsity in (0.9, jnp.float32(0.9)):
        loss = jax.jit(asl_loss, static_argnames="weight")
        np.testing.assert_allclose(asl_loss(params, R, sparsity), 10 * expected, rtol=1e-5)
        np.testing.assert_allclose(
            loss(params, R, jnp.float32(0.9), weight=3.0), 3 * expected, 1e-5
        )
    # Where the threshold is clipped and does not move with r, the loss still leads back.
    gradient = jax.grad(lambda r: asl_loss(params, r, 0.9))
    assert gradient(-0.5) < 0
    assert gradient(5.1) > 0


def test_r_starts_at_six_tenths_of_the_sparsity():
    params = layers()
    r = asl_init(params, 0.9)
    for name in params:
        assert math.erf(r[name]["kernel"] / math.sqrt(2)) == pytest.approx(0.54, abs=1e-6)
        assert r[name]["kernel"].dtype == np.float32
    assert r["Conv_0"]["bias"] == 0
    sparse = asl_sparsify(params, r)
    assert summarize(sparse).sparsity == pytest.approx(0.54, abs=0.06)


def test_where_jax_is_strict():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), layers())

    def loss(params, r):
        sparse = asl_sparsify(params, r)["Dense_0"]["kernel"]
        return sparse.sum(dtype=jnp.float32) + asl_loss(params, r, 0.9)

    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True), jax.checking_leaks():
        by_params, by_r = jax.grad(loss, argnums=(0, 1))(params, asl_init(params, 0.9))
    np.testing.assert_array_equal(by_params["Dense_0"]["kernel"], 1)
    assert by_r["Dense_0"]["kernel"] != 0


def test_errors():
    params = layers()
    for function in (asl_init, partial(asl_loss, params)):
        with pytest.raises(ValueError, match=r"in \[0, 1\)"):
            function(R, 1.0)
    with pytest.raises(ValueError, match="no prunable weight"):
        asl_loss({"bias": np.ones(3)}, 1.0, 0.9)
    with pytest.raises(ValueError, match="prefix of the parameters"):
        asl_thresholds(params, {"Conv_0": 1.0})


# ---- forty steps ----

STEPS, LEARNING_RATE, MOMENTUM, DECAY, SPARSITY, THETA = 40, 0.2, 0.9, 5e-3, 0.8, 0.5


def problem():
    """32 examples of 4 classes with 12 features, and a network 12-24-4 without biases."""
    rng = np.random.default_rng(0)
    x, y = 3 * rng.normal(size=(32, 12)), rng.integers(0, 4, 32)
    return (
        x,
        y,
        {"a": {"kernel": rng.normal(size=(12, 24))}, "b": {"kernel": rng.normal(size=(24, 4))}},
    )


def train_by_hand(x, y, params, p):
    """Weights, r and sparsities after each step, derivatives by hand, in float64."""
    w = {name: layer["kernel"].copy() for name, layer in params.items()}
    with jax.enable_x64(True):
        start = math.sqrt(2) * float(jax.scipy.special.erfinv(jnp.float64(0.6 * SPARSITY)))
    r = dict.fromkeys(w, start)
    velocity = {name: np.zeros_like(leaf) for name, leaf in w.items()}
    r_velocity = dict.fromkeys(w, 0.0)
    total = sum(leaf.size for leaf in w.values())
    steps = []
    for _ in range(STEPS):
        deviation = {name: np.sqrt(np.mean((w[name] - w[name].mean()) ** 2)) for name in w}
        t = {name: min(max(r[name], 0), 5) * deviation[name] for name in w}
        sparse = {name: operator_by_hand(w[name], t[name], p) for name in w}

        hidden = np.tanh(x @ sparse["a"])
        logits = hidden @ sparse["b"]
        e = np.exp(logits - logits.max(1, keepdims=True))
        by_logits = (e / e.sum(1, keepdims=True) - np.eye(4)[y]) / len(y)
        by_hidden = by_logits @ sparse["b"].T * (1 - hidden**2)
        g = {"a": x.T @ by_hidden, "b": hidden.T @ by_logits}

        density = sum(w[n].size * (1 - math.erf(r[n] / math.sqrt(2))) for n in w) / total
        for name in w:
            by_r = np.sum(g[name] * (sparse[name] - w[name])) / t[name] * deviation[name]
            bell = math.sqrt(2 / math.pi) * math.exp(-(r[name] ** 2) / 2)
            by_r += 20 * (density - (1 - SPARSITY)) * -w[name].size / total * bell
            r_velocity[name] = MOMENTUM * r_velocity[name] + by_r
            r[name] -= LEARNING_RATE / 100 * r_velocity[name]

            scaled = np.where(np.abs(w[name]) <= t[name], THETA * g[name], g[name])
            velocity[name] = MOMENTUM * velocity[name] + scaled + DECAY * w[name]
            w[name] = w[name] - LEARNING_RATE * velocity[name]
        steps.append(({n: leaf.copy() for n, leaf in w.items()}, dict(r)))
    return steps


@pytest.mark.parametrize("p", [3.0, np.inf])
def test_forty_steps_follow_the_loop_by_hand(p):
    x, y, params = problem()
    expected = train_by_hand(x, y, params, p)
    with jax.enable_x64(True):
        tx = optax.partition(
            {
                "weights": optax.chain(
                    scale_pruned_gradients(THETA),
                    optax.add_decayed_weights(DECAY, mask=prunable_weights),
                    optax.sgd(LEARNING_RATE, MOMENTUM),
                ),
                "r": optax.sgd(LEARNING_RATE / 100, MOMENTUM),
            },
            ("weights", "r"),
        )

        def loss_fn(weights):
            sparse = asl_sparsify(*weights, p=p)
            logits = jnp.tanh(x @ sparse["a"]["kernel"]) @ sparse["b"]["kernel"]
            task = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return task + asl_loss(*weights, SPARSITY)

        @jax.jit
        def train_step(weights, state):
            grads = jax.grad(loss_fn)(weights)
            thresholds = asl_thresholds(*weights)
            updates, state = tx.update(grads, state, weights, threshold=(thresholds, 0.0))
            return optax.apply_updates(weights, updates), state

        weights = (params, asl_init(params, SPARSITY))
        state = tx.init(weights)
        for w, r in expected:
            weights, state = train_step(weights, state)
            for name in w:
                np.testing.assert_allclose(weights[0][name]["kernel"], w[name], atol=1e-9)
                np.testing.assert_allclose(weights[1][name]["kernel"], r[name], atol=1e-9)
    assert abs(expected[-1][1]["a"] - expected[0][1]["a"]) > 0.1
