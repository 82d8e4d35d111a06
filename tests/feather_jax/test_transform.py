"""Gradient scaling inside every Optax construction that a training script may put it in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feather_jax import (
    Feather,
    block_magnitude,
    keep_zeros,
    prunable_weights,
    scale_pruned_gradients,
    sparsify,
    threshold_operator,
)

PARAMS = {
    "body": {"kernel": np.float32([[0.1, -0.5, 2.0]]), "bias": np.float32([0.1, 0.1, 0.1])},
    "head": {"kernel": np.float32([[-0.1], [0.0], [3.0]])},
}
GRADS = {
    "body": {"kernel": np.float32([[1, 2, 3]]), "bias": np.float32([4, 5, 6])},
    "head": {"kernel": np.float32([[7], [8], [9]])},
}
# With theta = 0.25 at a threshold of 0.5, which prunes 0.5 itself.
SCALED = {
    "body": {"kernel": np.float32([[0.25, 0.5, 3]]), "bias": np.float32([4, 5, 6])},
    "head": {"kernel": np.float32([[1.75], [2], [9]])},
}
BODY_SCALED = {**SCALED, "head": GRADS["head"]}


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def updated(tx, params=PARAMS, grads=GRADS, **extra_args):
    """The first updates that `tx` gives, under jit."""
    return jax.jit(tx.update)(grads, tx.init(params), params, **extra_args)[0]


def test_scales_the_updates_of_pruned_prunable_weights():
    tx = scale_pruned_gradients(0.25)
    assert tx.init(PARAMS) == optax.EmptyState()
    assert_trees_equal(updated(tx, threshold=0.5), SCALED)
    assert_trees_equal(tx.update(GRADS, tx.init(PARAMS), PARAMS, threshold=0.5)[0], SCALED)
    assert_trees_equal(updated(scale_pruned_gradients(1.0), threshold=0.5), GRADS)
    zeroed = updated(scale_pruned_gradients(0), threshold=0.5)
    assert_trees_equal(zeroed["head"]["kernel"], [[0], [0], [9]])


def test_flattened_weights_have_no_names_which_is_an_error():
    with pytest.raises(ValueError, match=r"no prunable weight among .*\(one without a name\)"):
        updated(optax.flatten(scale_pruned_gradients(0.25)), threshold=0.5)
    named = optax.flatten(scale_pruned_gradients(0.25, prunable=True))
    scaled = updated(named, threshold=0.5)  # biases too: in one vector there is no other way
    assert_trees_equal(scaled["head"]["kernel"], SCALED["head"]["kernel"])


def test_what_is_scaled_is_what_is_pruned():
    @settings(max_examples=100)
    @given(
        hnp.arrays(np.float32, (2, 8), elements=st.sampled_from([0, 0.1, -0.5, 0.6, 1e-20, 3e38])),
        st.sampled_from([0.0, 1e-20, 0.1, 0.5, 0.55, 3e38, np.inf]),
    )
    def check(w, threshold):
        params = {"kernel": w}
        tx = scale_pruned_gradients(0.5)
        updates = tx.update(
            {"kernel": np.ones_like(w)}, optax.EmptyState(), params, threshold=threshold
        )
        if threshold == 0:  # nothing is pruned at 0
            expected = np.ones_like(w)
        else:
            expected = np.where(threshold_operator(w, threshold, np.inf) == 0, 0.5, 1)
        np.testing.assert_array_equal(updates[0]["kernel"], expected)

    check()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_of_16_bits_are_compared_as_the_operator_does(dtype):
    w = jnp.asarray(np.linspace(0.09, 0.11, 64), dtype)[None]
    ones = {"kernel": jnp.ones((1, 64))}
    for threshold in (0.1, np.float32(0.1), jnp.float32(0.1001), float(w[0, 20])):
        (updates, _) = scale_pruned_gradients(0.5).update(
            ones, optax.EmptyState(), {"kernel": w}, threshold=threshold
        )
        pruned = threshold_operator(w, threshold, jnp.inf) == 0
        assert 0 < pruned.sum() < 64
        np.testing.assert_array_equal(updates["kernel"], np.where(pruned, 0.5, 1))


def test_what_is_scaled_is_what_is_pruned_by_another_magnitude():
    magnitude = block_magnitude((3, 1))
    w = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    threshold = float(np.sort(magnitude(w).ravel())[20])
    sparse = threshold_operator(w, threshold, np.inf, magnitude=magnitude)
    tx = scale_pruned_gradients(0.25, magnitude=magnitude)
    ones = np.ones_like(w)
    updates = updated(tx, {"kernel": w}, {"kernel": ones}, threshold=threshold)
    np.testing.assert_array_equal(updates["kernel"], np.where(sparse == 0, 0.25, 1))
    assert (sparse == 0).sum() == 21
    per_weight = np.where(np.arange(9)[:, None] < 3, np.inf, 0) * ones
    updates = updated(tx, {"kernel": w}, {"kernel": ones}, threshold={"kernel": per_weight})
    np.testing.assert_array_equal(updates["kernel"][:, 0], [0.25] * 3 + [1] * 6)


def test_nan_weights_and_nan_thresholds_scale_nothing():
    params = {"kernel": np.float32([[np.nan, 0, np.inf]])}
    grads = {"kernel": np.float32([[1, 1, 1]])}
    tx = scale_pruned_gradients(0.5)
    assert_trees_equal(updated(tx, params, grads, threshold=1.0)["kernel"], [[1, 0.5, 1]])
    assert_trees_equal(updated(tx, params, grads, threshold=np.inf)["kernel"], [[1, 0.5, 0.5]])
    assert_trees_equal(updated(tx, params, grads, threshold=np.nan)["kernel"], [[1, 1, 1]])


def test_updates_keep_their_dtype():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        grads = jax.tree.map(lambda g, dtype=dtype: jnp.asarray(g, dtype), GRADS)
        for theta in (0.25, jnp.float32(0.25), np.float64(0.25)):
            updates = updated(
                scale_pruned_gradients(theta), grads=grads, threshold=jnp.float32(0.5)
            )
            assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
            assert_trees_equal(updates, SCALED)
    with jax.enable_x64(True):
        updates = updated(scale_pruned_gradients(0.25), threshold=np.float64(0.5))
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


def test_updates_keep_their_dtype_next_to_an_array_of_theta():
    inject = optax.inject_hyperparams(scale_pruned_gradients)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        grads = jax.tree.map(lambda g, dtype=dtype: jnp.asarray(g, dtype), GRADS)
        tx = inject(theta=lambda step: jnp.float32(0.3))
        with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True), jax.checking_leaks():
            updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS, threshold=0.5)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        kernel = np.float32([[0.3, 0.6, 3]]).astype(dtype)  # multiplied in float32, rounded once
        np.testing.assert_array_equal(updates["body"]["kernel"], kernel)


def test_one_threshold_a_layer():
    thresholds = {"body": {"kernel": np.float32([0.05, 0.6, 5]), "bias": 9.0}, "head": 0.05}
    updates = updated(scale_pruned_gradients(0.25), threshold=thresholds)
    assert_trees_equal(updates["body"]["kernel"], [[1, 0.5, 0.75]])
    assert_trees_equal(updates["head"]["kernel"], [[7], [2], [9]])
    with pytest.raises(ValueError, match="must be a scalar or a pytree prefix of the parameters"):
        updated(scale_pruned_gradients(0.25), threshold={"body": 0.5})


def test_masks_choose_what_is_scaled():
    for prunable in (
        {"body": {"kernel": True, "bias": False}, "head": False},
        lambda params: {"body": prunable_weights(params["body"]), "head": False},
    ):
        tx = scale_pruned_gradients(0.25, prunable=prunable)
        assert_trees_equal(updated(tx, threshold=0.5), BODY_SCALED)


def test_none_leaves_are_passed_over():
    tx = scale_pruned_gradients(0.25)
    params, grads = {**PARAMS, "frozen": None}, {**GRADS, "frozen": None}
    assert_trees_equal(updated(tx, params, grads, threshold=0.5), {**SCALED, "frozen": None})
    # No gradient where there are weights, as Optax's own transformations allow it.
    grads = {"body": GRADS["body"], "head": {"kernel": None}}
    expected = {"body": SCALED["body"], "head": {"kernel": None}}
    updates = updated(tx, PARAMS, grads, threshold=0.5)
    assert jax.tree.structure(updates) == jax.tree.structure(expected)
    assert_trees_equal(updates, expected)
    assert updated(tx, PARAMS, {**GRADS, "head": None}, threshold=0.5)["head"] is None


def test_forgetting_an_argument_says_what_to_pass():
    tx = optax.chain(scale_pruned_gradients(0.25), optax.sgd(0.1))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"needs the threshold .* threshold=threshold\)") as error:
        tx.update(GRADS, state, PARAMS)
    assert "apply_gradients does not forward it" in str(error.value)
    with pytest.raises(ValueError, match=r"pass the parameters, as in tx.update\(grads, state, p"):
        tx.update(GRADS, state, threshold=0.5)


@pytest.mark.parametrize("theta", [-0.5, jnp.float32(-0.5), np.float64(-1), np.nan, jnp.inf])
def test_a_bad_theta_is_an_error_at_construction(theta):
    with pytest.raises(ValueError, match="must be finite and at least 0; it is"):
        scale_pruned_gradients(theta)


# ---- Optax's constructions ----


def test_chain_with_others_that_take_extra_arguments():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    tx = optax.chain(scale_pruned_gradients(0.25), plateau, optax.scale(-1.0))
    state, plateau_state = tx.init(PARAMS), plateau.init(PARAMS)
    update = jax.jit(tx.update)
    for _ in range(5):  # the loss does not improve
        updates, state = update(GRADS, state, PARAMS, threshold=0.5, value=1.0)
        expected, plateau_state = plateau.update(SCALED, plateau_state, value=1.0)
        assert_trees_equal(updates, jax.tree.map(jnp.negative, expected))
    assert plateau_state.scale < 1


def test_chain_clips_what_has_been_scaled():
    tx = optax.chain(scale_pruned_gradients(0.25), optax.clip_by_global_norm(3.0))
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(SCALED)))
    expected = jax.tree.map(lambda g: g * 3 / norm, SCALED)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        updated(tx, threshold=0.5),
        expected,
    )


MASKS = {
    "whole": {"body": {"kernel": True, "bias": True}, "head": {"kernel": False}},
    "prefix": {"body": True, "head": False},
    "function": lambda params: {"body": True, "head": False},
}
PRUNABLE = {
    "default": None,
    "whole": {"body": {"kernel": True, "bias": False}, "head": {"kernel": True}},
    "prefix": {"body": {"kernel": True, "bias": False}, "head": True},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("prunable", PRUNABLE.values(), ids=PRUNABLE.keys())
def test_masked(mask, prunable):
    tx = optax.masked(scale_pruned_gradients(0.25, prunable=prunable), mask)
    assert_trees_equal(updated(tx, threshold=0.5), BODY_SCALED)
    per_layer = {"body": {"kernel": 0.5, "bias": 0.5}, "head": {"kernel": 0.5}}
    assert_trees_equal(updated(tx, threshold=per_layer), BODY_SCALED)


@pytest.mark.parametrize(
    "labels",
    [
        {"body": {"kernel": "sparse", "bias": "sparse"}, "head": {"kernel": "dense"}},
        {"body": "sparse", "head": "dense"},
    ],
    ids=["whole", "prefix"],
)
@pytest.mark.parametrize("prunable", PRUNABLE.values(), ids=PRUNABLE.keys())
def test_partition(labels, prunable):
    sparse = optax.chain(scale_pruned_gradients(0.25, prunable=prunable), optax.sgd(1.0))
    tx = optax.partition({"sparse": sparse, "dense": optax.sgd(10.0)}, labels)
    updates = updated(tx, threshold=0.5)
    assert_trees_equal(updates["body"], jax.tree.map(np.negative, SCALED["body"]))
    assert_trees_equal(updates["head"], jax.tree.map(lambda g: -10 * g, GRADS["head"]))


def test_inject_hyperparams():
    def schedule(step):
        return jnp.where(step == 0, 0.25, 1.0)

    for theta in (0.25, schedule):
        inject = optax.inject_hyperparams(scale_pruned_gradients, static_args="prunable")
        tx = inject(theta=theta, prunable=prunable_weights)
        for update in (tx.update, jax.jit(tx.update)):
            state = tx.init(PARAMS)
            assert state.hyperparams["theta"] == 0.25
            updates, state = update(GRADS, state, PARAMS, threshold=0.5)
            assert_trees_equal(updates, SCALED)
            updates, state = update(GRADS, state, PARAMS, threshold=0.5)
            assert_trees_equal(updates, SCALED if theta == 0.25 else GRADS)
    tx = optax.inject_hyperparams(scale_pruned_gradients)(theta=0.25)
    state = tx.init(PARAMS)
    state.hyperparams["theta"] = jnp.float32(0)
    updates, _ = tx.update(GRADS, state, PARAMS, threshold=0.5)
    assert_trees_equal(updates["head"]["kernel"], [[0], [0], [9]])


def regression():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 5)), rng.normal(size=(24, 3))
    params = {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)}
    return x, y, params


def test_multi_steps_of_small_batches_equal_one_large_batch():
    x, y, params = regression()
    prune, k = Feather(sparsity=0.8, end_step=4), 4

    def loss(params, threshold, x, y):
        sparse = sparsify(params, threshold)
        return jnp.mean((jnp.tanh(x @ sparse["kernel"]) + sparse["bias"] - y) ** 2)

    with jax.enable_x64(True):
        tx = optax.chain(
            scale_pruned_gradients(0.5),
            optax.clip_by_global_norm(0.5),
            optax.add_decayed_weights(1e-2, prunable_weights),
            optax.sgd(0.3, momentum=0.9),
        )
        every_k = optax.MultiSteps(tx, k, accumulator_dtype=jnp.float64)
        every_k = every_k.gradient_transformation()

        @jax.jit
        def large(params, state, step, x, y):
            threshold = prune.threshold(params, step)
            grads = jax.grad(loss)(params, threshold, x, y)
            updates, state = tx.update(grads, state, params, threshold=threshold)
            return optax.apply_updates(params, updates), state

        @jax.jit
        def small(params, state, x, y):
            threshold = prune.threshold(params, state.gradient_step)
            grads = jax.grad(loss)(params, threshold, x, y)
            updates, state = every_k.update(grads, state, params, threshold=threshold)
            return optax.apply_updates(params, updates), state

        at_once, in_parts = params, params
        state, parts_state = tx.init(params), every_k.init(params)
        for step in range(5):
            at_once, state = large(at_once, state, step, x, y)
            for part in range(k):
                before = in_parts
                batch = slice(6 * part, 6 * part + 6)
                in_parts, parts_state = small(in_parts, parts_state, x[batch], y[batch])
                if part < k - 1:
                    assert_trees_equal(in_parts, before)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), in_parts, at_once
            )
        assert np.abs(at_once["kernel"] - params["kernel"]).max() > 0.1


# ---- keep_zeros ----

SPARSE = {
    "body": {"kernel": np.float32([[0.0, -0.5, -0.0]]), "bias": np.float32([0, 0.1, 0])},
    "head": {"kernel": np.float32([[-0.1], [0.0], [3.0]])},
}


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.adamw(1e-1, weight_decay=0.1),
        optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
        optax.chain(optax.centralize(), optax.lion(1e-2)),
    ],
)
def test_zeros_stay_where_they_are(optimizer):
    tx = optax.chain(optimizer, keep_zeros())

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = SPARSE, tx.init(SPARSE)
    for i in range(5):
        grads = jax.tree.map(lambda g, i=i: (-1) ** i * g, GRADS)
        grads["head"]["kernel"] = jnp.asarray(grads["head"]["kernel"]).at[1].set(jnp.nan)
        params, state = step(params, state, grads)
    for name, layer in SPARSE.items():
        np.testing.assert_array_equal(params[name]["kernel"] == 0, layer["kernel"] == 0)
        assert np.all((params[name]["kernel"] != layer["kernel"])[layer["kernel"] != 0])
    assert np.all(params["body"]["bias"] != SPARSE["body"]["bias"])  # not prunable: they learn


def test_zeros_of_the_gradient_first_in_the_chain_count_in_no_norm():
    tx = optax.chain(keep_zeros(), optax.clip_by_global_norm(1.0))
    updates = updated(tx, SPARSE, GRADS)
    kept = [2, 4, 5, 6, 7, 9]
    expected = GRADS["head"]["kernel"][:, 0] * [1, 0, 1] / np.sqrt(np.sum(np.square(kept)))
    np.testing.assert_allclose(updates["head"]["kernel"][:, 0], expected, rtol=1e-6)


def test_keep_zeros_with_masks_and_missing_updates():
    mask = {"body": {"kernel": True, "bias": True}, "head": False}
    updates = updated(keep_zeros(prunable=mask), SPARSE, GRADS)
    assert_trees_equal(updates["body"], {"kernel": [[0, 2, 0]], "bias": [0, 5, 0]})
    assert_trees_equal(updates["head"], GRADS["head"])
    bfloat16 = jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), GRADS)
    assert updated(keep_zeros(), SPARSE, bfloat16)["body"]["kernel"].dtype == jnp.bfloat16
    grads = {"body": GRADS["body"], "head": {"kernel": None}}
    assert updated(keep_zeros(), SPARSE, grads)["head"]["kernel"] is None
    inside = optax.masked(keep_zeros(), {"body": True, "head": False})
    assert_trees_equal(updated(inside, SPARSE, GRADS)["head"], GRADS["head"])
    assert_trees_equal(updated(inside, SPARSE, GRADS)["body"]["kernel"], [[0, 2, 0]])


def test_keep_zeros_says_what_it_misses():
    with pytest.raises(ValueError, match=r"pass the parameters, as in tx.update\(grads, state, pa"):
        keep_zeros().update(GRADS, optax.EmptyState())
    with pytest.raises(ValueError, match="no prunable weight"):
        keep_zeros().update({"bias": 1.0}, optax.EmptyState(), {"bias": 1.0})
