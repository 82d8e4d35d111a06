"""The one line: exact zeros and the pieces' dense weights, in everyone's loop and optimiser."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from feather_jax import Feather, summarize
from feather_jax.masks import prunable_leaves
from feather_jax.wrap import WrapState

SPARSITY, STEPS, END_STEP = 0.75, 12, 8


def by_sorting(params, sparsity, *, prunable, magnitude, axis_name):
    """A selection that is quick to compile, and an independent one."""
    assert axis_name is None
    leaves = [magnitude(leaf).ravel() for leaf in prunable_leaves(params, prunable)]
    magnitudes = jnp.sort(jnp.concatenate(leaves))
    rank = sparsity * (magnitudes.size - 1)
    below = jnp.int32(rank)
    lo, hi = magnitudes[below], magnitudes[below + 1]
    threshold = jnp.where(sparsity == 0, 0, lo + (hi - lo) * (rank - below))
    return threshold.astype(jnp.float32)


PRUNE = Feather(SPARSITY, end_step=END_STEP, theta=0.5, select=by_sorting)


def problem(dtype=np.float32):
    """A network 6-16-3 on 32 examples; 144 prunable weights."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6)).astype(dtype)
    y = np.tanh(x @ rng.normal(size=(6, 3))).astype(dtype)
    params = {
        "hidden": {"kernel": rng.normal(size=(6, 16)) / 2, "bias": rng.normal(size=16) / 10},
        "output": {"kernel": rng.normal(size=(16, 3)) / 4, "bias": rng.normal(size=3) / 10},
    }
    return x, y, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


X, Y, PARAMS = problem()
SIZE = 144
ZEROS = math.floor(SPARSITY * (SIZE - 1)) + 1


def network(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def loss_fn(params, x=X, y=Y):
    return jnp.mean((network(params, x) - y) ** 2)


def train(tx, params=PARAMS, steps=STEPS, loss_fn=loss_fn, extra_args=lambda loss, grads: {}):
    """Anyone's loop: nothing of Feather in it but `tx`. A scan, so the state is a good carry."""

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, **extra_args(loss, grads))
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.jit(
        lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps)
    )(params)
    return params, state, losses


def train_with_the_pieces(prune, tx, params=PARAMS, steps=STEPS):
    tx = optax.chain(prune.scale_gradients(), tx)

    @jax.jit
    def step(params, state, step):
        threshold = prune.threshold(params, step)
        grads = jax.grad(lambda w: loss_fn(prune.sparsify(w, threshold)))(params)
        updates, state = tx.update(grads, state, params, threshold=threshold)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, i)
    return params


def zeros(params):
    summary = summarize(params)
    return summary.prunable - summary.nonzero


def assert_close(actual, expected, **tolerances):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, **({"rtol": 1e-5, "atol": 1e-6} | tolerances)
        ),
        actual,
        expected,
    )


def assert_sparse(params, state, prune=PRUNE, count=ZEROS):
    """Exactly what `finalize` leaves of the dense weights, to a unit in the last place."""
    final = prune.finalize(optax.tree.get(state, "dense"))
    assert jax.tree.structure(params) == jax.tree.structure(final)

    def check(weight, expected):
        weight, expected = np.asarray(weight, np.float64), np.asarray(expected, np.float64)
        np.testing.assert_array_equal(weight == 0, expected == 0)
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=2e-7)

    jax.tree.map(check, params, final)
    assert zeros(params) == count


def test_one_update_by_hand():
    params = {"kernel": np.float32([[0.5, -2.0, 1.0, 0.25, 3.0]]), "bias": np.float32([1.0])}
    grads = {"kernel": np.full((1, 5), 0.5, np.float32), "bias": np.float32([0.5])}
    tx = Feather(0.5, end_step=2, p=1.0, theta=0.5).wrap(optax.sgd(0.5))
    state = tx.init(params)
    assert isinstance(state, WrapState)
    assert (state.step, state.threshold) == (0, 0)
    assert_close(state.dense, params, rtol=0, atol=0)

    # No weight is pruned in the first update, whose sparsity is 0; then 0.5 (1 - 1/8) of them is:
    # the rank is 1.75 and the threshold three quarters of the way from 0.25 to 0.75.
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(state.dense["kernel"], [[0.25, -2.25, 0.75, 0, 2.75]])
    assert state.threshold == np.float32(0.625)
    np.testing.assert_array_equal(params["kernel"], [[0, -1.625, 0.125, 0, 2.125]])
    np.testing.assert_array_equal(params["bias"], [0.75])

    # The gradients of the two that are pruned are halved; the rank is 2.
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(state.dense["kernel"], [[0.125, -2.5, 0.5, -0.125, 2.5]])
    assert (state.step, state.threshold) == (2, 0.5)
    np.testing.assert_array_equal(params["kernel"], [[0, -2, 0, 0, 2]])


def test_is_the_pieces_in_one_line():
    prune, inner = Feather(SPARSITY, end_step=END_STEP, theta=0.5), optax.adamw(0.03)
    params, state, losses = train(prune.wrap(inner))
    assert_close(state.dense, train_with_the_pieces(prune, inner))
    assert_sparse(params, state, prune)
    assert losses[-1] < 0.5 * losses[0]
    assert state.step == STEPS
    assert state.threshold == prune.threshold(state.dense, END_STEP)
    assert_close(train(PRUNE.wrap(inner))[0], params, rtol=1e-4)


def test_dense_twin():
    params, state, _ = train(Feather(0.0, end_step=0).wrap(optax.adam(0.03)))
    expected, _, _ = train(optax.adam(0.03))
    assert_close(params, expected)
    assert_close(state.dense, expected)
    assert zeros(params) == 0


# ---- what it is put into, and what is put into it ----

SGD = optax.sgd(0.3, momentum=0.9)
LOSS = lambda loss, grads: {"value": loss}  # noqa: E731


def partitioned(make):
    """Each layer an optimiser of its own."""
    return optax.partition(
        {"hidden": make(), "output": make()}, {"hidden": "hidden", "output": "output"}
    )


INSIDE = {
    "chain": (optax.chain(optax.clip_by_global_norm(0.5), SGD), {}),
    "named_chain": (optax.named_chain(("clip", optax.clip(0.1)), ("sgd", SGD)), {}),
    "apply_if_finite": (optax.apply_if_finite(SGD, 3), {}),
    "inject_hyperparams": (optax.inject_hyperparams(optax.adam)(lambda count: 0.03), {}),
    "masked": (
        optax.chain(SGD, optax.masked(optax.scale(0.5), {"hidden": True, "output": False})),
        {},
    ),
    "partition": (partitioned(lambda: optax.adam(0.03)), {}),
    "reduce_on_plateau": (
        optax.chain(SGD, optax.contrib.reduce_on_plateau(patience=2, cooldown=1)),
        {"extra_args": LOSS},
    ),
    "schedule_free": (optax.contrib.schedule_free_adamw(0.1), {}),
    "flatten": (optax.flatten(optax.adam(0.03)), {}),
    "ema of the updates": (optax.chain(SGD, optax.ema(0.9)), {}),
}


@pytest.mark.parametrize("name", INSIDE)
def test_around(name):
    inner, options = INSIDE[name]
    params, state, losses = train(PRUNE.wrap(inner), **options)
    assert_sparse(params, state)
    assert losses[-1] < losses[0]


OUTSIDE = {
    "named_chain": optax.named_chain(("clip", optax.clip(0.1)), ("wrap", PRUNE.wrap(SGD))),
    "apply_if_finite": optax.apply_if_finite(PRUNE.wrap(SGD), 3),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda learning_rate: PRUNE.wrap(optax.adam(learning_rate))
    )(lambda count: 0.03),
    "with_extra_args_support": optax.with_extra_args_support(PRUNE.wrap(SGD)),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_inside(name):
    params, state, losses = train(OUTSIDE[name])
    assert_sparse(params, state)
    assert losses[-1] < losses[0]


def test_inside_multi_steps_a_step_is_an_update():
    k, inner = 4, optax.adam(0.03)
    tx = optax.MultiSteps(PRUNE.wrap(inner), k).gradient_transformation()
    params, state, _ = train(tx, steps=k * STEPS)
    assert optax.tree.get(state, "step") == STEPS
    assert_sparse(params, state)
    expected, _, _ = train(PRUNE.wrap(inner))  # the small batches are all the same
    assert_close(params, expected, rtol=1e-4, atol=1e-5)


def test_around_multi_steps_is_refused():
    for inner in (
        optax.MultiSteps(SGD, 2),
        optax.MultiSteps(SGD, 2).gradient_transformation(),
        optax.chain(optax.MultiSteps(SGD, 2).gradient_transformation()),
    ):
        with pytest.raises(ValueError, match=r"count every small batch .*optax.MultiSteps\(prune"):
            PRUNE.wrap(inner).init(PARAMS)


def test_inside_apply_if_finite_a_bad_gradient_changes_nothing():
    tx = optax.apply_if_finite(PRUNE.wrap(SGD), 3)
    params, state, _ = train(tx)
    grads = jax.tree.map(lambda leaf: leaf * np.nan, params)
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert_close(optax.apply_updates(params, updates), params, rtol=0, atol=0)
    assert_close(after.inner_state, state.inner_state, rtol=0, atol=0)


def test_inside_masked_the_rest_is_the_rest():
    """The masked part of the parameters is as Optax leaves it: the gradients go through."""
    tx = optax.chain(
        optax.masked(PRUNE.wrap(SGD), {"hidden": True, "output": False}),
        optax.masked(optax.scale(-0.01), {"hidden": False, "output": True}),
    )
    params, state, _ = train(tx)
    assert zeros({"hidden": params["hidden"]}) == math.floor(SPARSITY * 95) + 1
    assert zeros({"output": params["output"]}) == 0
    assert isinstance(optax.tree.get(state, "dense")["output"], optax.MaskedNode)


def test_inside_partition_every_label_has_its_own_threshold():
    params, state, _ = train(partitioned(lambda: PRUNE.wrap(optax.adam(0.03))))
    assert zeros({"hidden": params["hidden"]}) == math.floor(SPARSITY * 95) + 1
    assert zeros({"output": params["output"]}) == math.floor(SPARSITY * 47) + 1
    thresholds = optax.tree.get_all_with_path(state, "threshold")
    assert len({float(value) for _, value in thresholds}) == 2


def test_a_label_without_kernels_is_not_pruned():
    labels = jax.tree.map(lambda leaf: "kernels" if leaf.ndim > 1 else "biases", PARAMS)
    tx = optax.partition(dict.fromkeys(("kernels", "biases"), PRUNE.wrap(SGD)), labels)
    with pytest.raises(ValueError, match="no prunable weight"):
        tx.init(PARAMS)
    tx = optax.partition({"kernels": PRUNE.wrap(SGD), "biases": optax.sgd(0.1)}, labels)
    assert zeros(train(tx)[0]) == ZEROS


PLATEAU = optax.contrib.reduce_on_plateau(patience=1, rtol=1.0, factor=0.5)


@pytest.mark.parametrize("after", [optax.scale(0.5), optax.add_decayed_weights(-1e-3), PLATEAU])
def test_what_comes_after_it_undoes_the_zeros(after):
    """Documented: it comes last. Inside, the same parts are right."""
    lost, _, _ = train(optax.chain(PRUNE.wrap(SGD), after), extra_args=LOSS)
    assert zeros(lost) < ZEROS / 2
    params, state, _ = train(PRUNE.wrap(optax.chain(SGD, after)), extra_args=LOSS)
    assert_sparse(params, state)


def test_schedule_free_around_it_undoes_the_zeros_and_inside_is_right():
    lost, _, _ = train(optax.contrib.schedule_free(PRUNE.wrap(optax.sgd(0.3)), 0.3))
    assert zeros(lost) < ZEROS
    inner = optax.contrib.schedule_free(optax.sgd(0.3), 0.3)
    params, state, _ = train(PRUNE.wrap(inner))
    assert_sparse(params, state)
    average = optax.contrib.schedule_free_eval_params(state.inner, state.dense)
    assert zeros(PRUNE.finalize(average)) == ZEROS


def test_lookahead_around_it_undoes_the_zeros_of_its_slow_weights_alone():
    tx = optax.lookahead(PRUNE.wrap(SGD), sync_period=5, slow_step_size=0.5)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss_fn)(params.fast)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    assert zeros(params.slow) < ZEROS
    assert zeros(params.fast) == ZEROS  # two updates after they were synchronised
    assert zeros(PRUNE.finalize(params.slow)) == ZEROS
    with pytest.raises(ValueError, match="prune its fast and its slow weights together"):
        PRUNE.wrap(optax.lookahead(SGD, 5, 0.5)).init(params)


def sam(optimizer, **options):
    adversarial = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optimizer, adversarial, **options)


def test_sam_both_ways():
    inside, state, losses = train(PRUNE.wrap(sam(SGD)), steps=2 * STEPS)
    assert_sparse(inside, state)
    assert losses[-1] < losses[0]
    around, state, losses = train(sam(PRUNE.wrap(SGD)), steps=2 * STEPS)
    assert_sparse(around, state)
    assert losses[-1] < losses[0]


def test_opaque_sam_calls_its_gradient_at_sparse_weights():
    seen = []

    def grad_fn(params, _):
        jax.debug.callback(
            lambda *kernels: seen.append(sum((k == 0).sum() for k in kernels)),
            *(params[name]["kernel"] for name in params),
        )
        return jax.grad(loss_fn)(params)

    tx = PRUNE.wrap(sam(SGD, sync_period=2, opaque_mode=True))
    params, state, losses = train(tx, extra_args=lambda loss, grads: {"grad_fn": grad_fn})
    assert_sparse(params, state)
    assert losses[-1] < losses[0]
    assert int(seen[-1]) == pytest.approx(ZEROS, abs=10)  # the threshold is of the weights before


def test_around_lbfgs_the_line_search_sees_sparse_weights():
    params, state, losses = train(
        PRUNE.wrap(optax.lbfgs()),
        steps=20,
        extra_args=lambda loss, grads: {"value": loss, "grad": grads, "value_fn": loss_fn},
    )
    assert_sparse(params, state)
    assert losses[-1] < 0.2 * losses[0]
    dense = optax.tree.get(state, "dense")
    # What the line search has found is the loss of sparse weights, at the threshold of its step.
    assert abs(optax.tree.get(state.inner, "value") - loss_fn(params)) < 0.1
    assert abs(optax.tree.get(state.inner, "value") - loss_fn(dense)) > 0.1


# ---- numbers ----


@pytest.mark.parametrize("dense_dtype", [None, jnp.float32])
def test_bfloat16_parameters(dense_dtype):
    """Updates of a 400th of a weight are lost in its 8 bits; the ones in float32 add up."""
    rng = np.random.default_rng(1)
    params = {"kernel": jnp.asarray(rng.uniform(1, 2, size=(8, 32)), jnp.bfloat16)}
    grads = {"kernel": jnp.ones((8, 32), jnp.bfloat16)}
    prune = Feather(0.75, end_step=0, p=jnp.inf, select=by_sorting)
    tx = prune.wrap(optax.sgd(1e-3), dense_dtype=dense_dtype)
    after, state = params, tx.init(params)
    assert state.dense["kernel"].dtype == (dense_dtype or jnp.bfloat16)
    for _ in range(100):
        updates, state = tx.update(grads, state, after)
        assert updates["kernel"].dtype == jnp.bfloat16
        after = optax.apply_updates(after, updates)
    moved = np.asarray(params["kernel"], np.float32) - np.asarray(state.dense["kernel"], np.float32)
    np.testing.assert_allclose(moved, 0 if dense_dtype is None else 0.1, atol=1e-5)
    assert after["kernel"].dtype == jnp.bfloat16
    final = prune.finalize(state.dense)["kernel"]
    np.testing.assert_array_equal(after["kernel"] == 0, final == 0)
    if dense_dtype is not None:
        assert int(jnp.sum(after["kernel"] == 0)) == pytest.approx(192, abs=3)  # few ties are left
    np.testing.assert_allclose(
        np.asarray(after["kernel"], np.float32), np.asarray(final, np.float32), rtol=2**-7
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_difference_never_makes_a_zero_nor_loses_one(dtype):
    """Of any parameters from outside: large ones, beside which what they become is nothing."""
    rng = np.random.default_rng(2)
    dense = np.exp(rng.uniform(-8, 0, size=(64, 64))) * rng.choice([-1, 1], (64, 64))
    dense = {"kernel": jnp.asarray(dense, dtype)}
    outside = {"kernel": jnp.asarray(rng.normal(size=(64, 64)) * 100, dtype)}
    prune = Feather(0.5, end_step=0, p=1.0)
    tx = prune.wrap(optax.set_to_zero())
    updates, state = tx.update(dense, tx.init(dense), outside)
    params = optax.apply_updates(outside, updates)["kernel"]
    final = prune.finalize(dense)["kernel"]
    np.testing.assert_array_equal(params == 0, final == 0)
    # The next update, from there, is as near as the smaller numbers allow.
    updates, _ = tx.update(dense, state, {"kernel": params})
    again = optax.apply_updates({"kernel": params}, updates)["kernel"]
    np.testing.assert_array_equal(again == 0, final == 0)
    for before, after in ((outside["kernel"], params), (params, again)):
        before, after, exact = (np.abs(np.asarray(x, float)) for x in (before, after, final))
        unit = float(jnp.finfo(dtype).eps) * np.maximum(before, exact)
        assert np.all(np.abs(after - exact) <= 2 * unit)


def test_finalising_what_is_sparse_changes_nothing():
    """The threshold is 0 where the weights at its rank are: nothing is left to prune."""
    prune = Feather(SPARSITY, end_step=END_STEP)
    params, state, _ = train(prune.wrap(SGD))
    for sparse in (params, prune.finalize(state.dense)):
        assert prune.threshold(sparse, END_STEP) == 0
        assert_close(prune.finalize(sparse), sparse, rtol=0, atol=0)


def test_parameters_from_outside_are_overwritten():
    tx = PRUNE.wrap(SGD)
    params, state, _ = train(tx)
    grads = jax.grad(loss_fn)(params)
    expected = optax.apply_updates(params, tx.update(grads, state, params)[0])
    outside = jax.tree.map(lambda leaf: leaf + 0.25, params)
    updates, _ = tx.update(grads, state, outside)
    assert_close(optax.apply_updates(outside, updates), expected)


def test_where_sparsity_begins_above_zero_the_first_parameters_are_dense():
    prune = Feather(0.75, end_step=0, select=by_sorting)
    tx = prune.wrap(optax.set_to_zero())
    state = tx.init(PARAMS)
    assert state.threshold > 0
    assert zeros(PARAMS) == 0
    updates, state = tx.update(PARAMS, state, PARAMS)
    assert zeros(optax.apply_updates(PARAMS, updates)) == ZEROS
    # Whoever wants them sparse from the start has what it takes.
    assert zeros(prune.sparsify(PARAMS, state.threshold)) == ZEROS


def test_a_state_and_parameters_resume_a_run():
    tx = PRUNE.wrap(optax.adam(0.03))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        params, state = step(params, state)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]
    template = jax.eval_shape(lambda: (PARAMS, tx.init(PARAMS)))
    restored = jax.tree.unflatten(jax.tree.structure(template), leaves)
    for _ in range(5):
        (params, state), restored = step(params, state), step(*restored)
    assert_close(restored, (params, state), rtol=0, atol=0)


def test_strict_promotion_nan_checks_and_leak_checks():
    tx = Feather(SPARSITY, end_step=END_STEP).wrap(
        optax.sgd(0.03, momentum=0.9), dense_dtype=jnp.float32
    )
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.checking_leaks(),
    ):
        for start in (PARAMS, half):
            grads = jax.tree.map(jnp.ones_like, start)
            state = jax.jit(tx.init)(start)
            updates, state = jax.jit(tx.update)(grads, state, start)
            updates, state = jax.jit(tx.update)(grads, state, start)
            assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {
                start["output"]["bias"].dtype
            }


def test_errors():
    tx = PRUNE.wrap(SGD)
    with pytest.raises(ValueError, match=r"pass them, as in tx.update\(grads, state, params\)"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"no prunable weight among the parameters \(w\)"):
        tx.init({"w": jnp.ones((3, 3))})
    for dtype in (jnp.int32, jnp.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"in at least 16 bits; dense_dtype is (int|float8)"):
            PRUNE.wrap(SGD, dense_dtype=dtype)
    with pytest.raises(ValueError, match=r"\(one without a name\).*path_mask"):
        optax.flatten(PRUNE.wrap(SGD)).init(PARAMS)
