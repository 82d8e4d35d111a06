"""Feather as a whole: its hyperparameters, its threshold, and what it leaves at the end."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from feather_jax import (
    Feather,
    block_magnitude,
    global_threshold,
    sparsify,
    threshold_operator,
)


def weights(size, seed=0, scale=1.0):
    """One kernel of `size` weights without ties or zeros."""
    rng = np.random.default_rng(seed)
    magnitudes = rng.permutation(np.arange(1, size + 1)) * np.float32(scale)
    return {"kernel": np.float32(magnitudes * rng.choice([-1, 1], size))[None]}


def network():
    rng = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "Conv_0": {"kernel": array(3, 3, 2, 4), "bias": array(4)},
        "Dense_0": {"kernel": array(4, 5), "bias": array(5)},
    }


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sparsity": 1.0}, "in [0, 1), and it is 1.0"),
        ({"sparsity": -0.1}, "in [0, 1), and it is -0.1"),
        ({"sparsity": 95}, "in [0, 1), and it is 95.0"),
        ({"sparsity": np.nan}, "in [0, 1), and it is nan"),
        ({"end_step": -1}, "end_step is -1"),
        ({"begin_step": 11}, "end_step is 10, and begin_step is 11"),
        ({"begin_step": -1}, "begin_step counts updates from 0, and it is -1"),
        ({"p": 0.5}, "in [1, inf], and it is 0.5"),
        ({"p": np.nan}, "in [1, inf], and it is nan"),
        ({"theta": -0.1}, "at least 0; it is -0.1"),
        ({"theta": np.inf}, "at least 0; it is inf"),
        ({"theta": np.nan}, "at least 0; it is nan"),
    ],
)
def test_a_bad_hyperparameter_is_one_sentence_at_construction(bad, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Feather(**{"sparsity": 0.9, "end_step": 10, **bad})
    text = str(error.value)
    assert message in text
    assert "\n" not in text
    assert ". " not in text.rstrip(".")


def test_hyperparameters_go_by_name():
    with pytest.raises(TypeError, match="positional"):
        Feather(0.9, 500, 100)
    prune = Feather(0.9, end_step=1e4, begin_step=np.ceil(99.5))
    assert prune == Feather(0.9, end_step=10_000, begin_step=100)
    assert type(prune.end_step) is type(prune.begin_step) is int
    with pytest.raises(ValueError, match="end_step counts updates and must be a whole number"):
        Feather(0.9, end_step=9.5)


def test_a_sparsity_of_zero_is_the_identity():
    """The dense twin in the same program, at no cost."""
    prune = Feather(0.0, end_step=10)
    for params in (network(), {"bias": jnp.ones(3)}):
        for step in (0, 5, 10):
            assert prune.threshold(params, step) == 0
        assert prune.sparsify(params, 0.5) is params
        assert prune.finalize(params) is params
        tx = optax.chain(prune.scale_gradients(), optax.sgd(1.0))
        updates, _ = tx.update(params, tx.init(params), params, threshold=0.5)
        jax.tree.map(lambda u, p: np.testing.assert_array_equal(u, -p), updates, params)
        tx = prune.wrap(optax.sgd(1.0))
        updates, state = tx.update(params, tx.init(params), params)
        assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(state.dense))
        jax.tree.map(lambda u, p: np.testing.assert_array_equal(u, -p), updates, params)
    assert "while" not in jax.jit(prune.finalize).lower(network()).as_text()


def test_a_selection_is_chosen_and_sees_a_number_at_the_end():
    """One threshold a layer, by a user's own function, exact from `end_step` on."""
    seen = []

    def by_layer(params, sparsity, *, prunable, magnitude, axis_name):
        assert (prunable, magnitude, axis_name) == (mask, jnp.abs, None)
        seen.append(sparsity)
        return {
            name: {"kernel": jnp.quantile(jnp.abs(layer["kernel"]), sparsity), "bias": 0.0}
            for name, layer in params.items()
        }

    params = network()
    mask = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    prune = Feather(0.75, end_step=4, prunable=mask, select=by_layer, p=jnp.inf)
    for step in (2, 4):
        seen.clear()
        threshold = jax.jit(prune.threshold)(params, step)
        assert {type(sparsity) for sparsity in seen} > {float}
        for name, layer in params.items():
            kernel = np.abs(layer["kernel"])
            expected = np.quantile(kernel, 0.75 * (1 - (1 - step / 4) ** 3))
            np.testing.assert_allclose(threshold[name]["kernel"], expected, rtol=1e-5)
            eager = prune.threshold(params, step)[name]["kernel"]
            np.testing.assert_allclose(eager, expected, rtol=1e-5)
    final = prune.finalize(params)
    for name, layer in params.items():
        kept = np.abs(layer["kernel"]) > np.quantile(np.abs(layer["kernel"]), 0.75)
        np.testing.assert_array_equal(final[name]["kernel"], np.where(kept, layer["kernel"], 0))


def test_a_traced_exponent_is_an_error_at_construction():
    with pytest.raises(ValueError, match="exponent p is static"):
        jax.jit(lambda p: Feather(0.9, end_step=10, p=p).sparsify(network(), 1.0))(3.0)


def test_is_plain_frozen_data():
    prune = Feather(sparsity=0.9, end_step=10)
    assert prune == Feather(0.9, end_step=10, begin_step=0, p=3.0, theta=None, prunable=None)
    assert hash(prune) == hash(Feather(0.9, end_step=10))
    with pytest.raises(dataclasses.FrozenInstanceError):
        prune.sparsity = 0.5


def test_each_method_is_the_function_with_its_hyperparameters():
    params = network()
    mask = {"Conv_0": False, "Dense_0": {"kernel": True, "bias": False}}
    prune = Feather(0.5, end_step=10, begin_step=2, p=1.0, theta=0.25, prunable=mask)
    assert prune.sparsity_at(1) == 0
    np.testing.assert_allclose(prune.sparsity_at(6), 0.5 * (1 - 0.5**3), rtol=1e-6)
    assert prune.sparsity_at(10) == 0.5

    @jax.jit
    def parts(params):
        threshold = prune.threshold(params, 10)
        tx = prune.scale_gradients()
        ones = jax.tree.map(jnp.ones_like, params)
        updates, _ = tx.update(ones, tx.init(params), params, threshold=threshold)
        return threshold, prune.sparsify(params, threshold), updates

    threshold, sparse, updates = parts(params)
    kernel = np.asarray(params["Dense_0"]["kernel"])
    np.testing.assert_allclose(threshold, np.quantile(np.abs(kernel), 0.5), rtol=1e-6)
    soft = np.sign(kernel) * np.maximum(np.abs(kernel) - threshold, 0)
    np.testing.assert_allclose(sparse["Dense_0"]["kernel"], soft, rtol=1e-6)
    expected = np.where(np.abs(kernel) <= threshold, 0.25, 1)
    np.testing.assert_array_equal(updates["Dense_0"]["kernel"], expected)
    for leaf, update in zip(
        *map(jax.tree.leaves, (sparse["Conv_0"], updates["Conv_0"])), strict=True
    ):
        assert np.all(update == 1)
        assert np.all(leaf != 0)


@pytest.mark.parametrize(("sparsity", "theta"), [(0.9, 1.0), (0.95, 1.0), (0.98, 0.5)])
def test_theta_follows_the_final_sparsity(sparsity, theta):
    params = weights(10)
    tx = Feather(sparsity, end_step=10).scale_gradients()
    ones = jax.tree.map(np.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params, threshold=100.0)
    np.testing.assert_array_equal(updates["kernel"], np.full((1, 10), theta, np.float32))


def test_the_threshold_under_jit_is_the_eager_one():
    params = network()
    prune = Feather(0.9, end_step=10, begin_step=3)
    threshold = jax.jit(prune.threshold)
    for step in (0, 3, 10, 11, 2**30):
        np.testing.assert_array_equal(threshold(params, step), prune.threshold(params, step))
    for step in (4, 7, 9):  # the schedule's cube need not be rounded alike
        np.testing.assert_allclose(threshold(params, step), prune.threshold(params, step), 1e-6)
    assert threshold(params, 3) == 0
    assert 0 < threshold(params, 4) < threshold(params, 7) < threshold(params, 10)


def test_the_threshold_is_the_quantile_of_the_schedule():
    params = network()
    magnitudes = np.abs(np.concatenate([params[k]["kernel"].ravel() for k in params]))
    threshold = jax.jit(Feather(0.9, end_step=10).threshold)
    for step in range(1, 12):
        sparsity = 0.9 * (1 - (1 - min(step, 10) / 10) ** 3)
        expected = np.quantile(magnitudes.astype(float), sparsity)
        np.testing.assert_allclose(threshold(params, step), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32])
def test_the_step_may_be_of_any_integer_dtype(dtype):
    params, prune = network(), Feather(0.9, end_step=1000)
    threshold = prune.threshold(params, 100)
    np.testing.assert_array_equal(prune.threshold(params, dtype(100)), threshold)
    np.testing.assert_array_equal(prune.threshold(params, jnp.asarray(dtype(100))), threshold)


def float32_misses_the_rank(size, sparsity):
    """Whether float32(sparsity) (size - 1) lies in another interval between ranks."""
    rank = sparsity * (size - 1)
    rounded = float(np.float32(sparsity)) * (size - 1)
    return math.floor(rounded) != math.floor(rank)


@pytest.mark.parametrize(("size", "sparsity"), [(101, 0.94), (2**21 + 9, 0.9)])
def test_from_end_step_on_the_threshold_is_the_final_one(size, sparsity):
    assert float32_misses_the_rank(size, sparsity)
    params = weights(size, scale=0.37)
    prune = Feather(sparsity, end_step=10)
    final = np.asarray(global_threshold(params, sparsity))
    zeros = np.count_nonzero(prune.finalize(params)["kernel"] == 0)
    assert zeros == math.floor(sparsity * (size - 1)) + 1
    threshold = jax.jit(prune.threshold)
    values = [threshold(params, step) for step in (10, 11, 2**30)] + [prune.threshold(params, 10)]
    for value in values:
        np.testing.assert_array_equal(np.asarray(value).view(np.uint32), final.view(np.uint32))
    sparse = prune.sparsify(params, threshold(params, 10))
    np.testing.assert_array_equal(sparse["kernel"] == 0, prune.finalize(params)["kernel"] == 0)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98, 0.999])
def test_finalize_leaves_the_final_sparsity(sparsity):
    params = {**weights(1001), "bias": np.float32([0.5, -1e-9, 0])}
    final = Feather(sparsity, end_step=10).finalize(params)
    zeros = np.count_nonzero(np.asarray(final["kernel"]) == 0)
    assert zeros == (math.floor(sparsity * 1000) + 1 if sparsity else 0)
    assert final["bias"] is params["bias"]

    threshold = np.asarray(global_threshold(params, sparsity))
    expected = threshold_operator(params["kernel"], threshold)
    np.testing.assert_array_equal(final["kernel"], expected)
    if sparsity == 0:
        np.testing.assert_array_equal(final["kernel"], params["kernel"])


def test_finalize_under_jit_and_in_16_bits():
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), weights(129))
    prune = Feather(0.75, end_step=10)
    final = np.asarray(jax.jit(prune.finalize)(params)["kernel"])
    assert final.dtype == jnp.bfloat16
    np.testing.assert_array_equal(final == 0, np.abs(params["kernel"]) <= 97)


def test_the_number_of_zeros_at_a_thousand_sizes_and_sparsities():
    rng = np.random.default_rng(2)
    # In float64, as the rank of a Python number is, so that one program does for every sparsity.
    with jax.enable_x64(True):
        for size in [2, 137, 1024, 1999]:
            params = weights(size, seed=size)
            ranks = rng.integers(0, size, 98) / max(size - 1, 1)
            sparsities = np.concatenate([rng.uniform(0, 1, 150), ranks, [1e-9, 1 - 1e-9]])
            sparsities = np.where((sparsities > 0) & (sparsities < 1), sparsities, 0.5)

            @jax.jit
            @jax.vmap
            def zeros(sparsity, params=params):
                sparse = sparsify(params, global_threshold(params, sparsity))
                return jnp.sum(sparse["kernel"] == 0)

            expected = np.floor((size - 1) * sparsities) + 1
            np.testing.assert_array_equal(zeros(sparsities), expected)


def test_a_single_weight():
    params = {"kernel": np.float32([[2.0]])}
    assert Feather(0.5, end_step=10).finalize(params)["kernel"] == 0
    assert Feather(0.0, end_step=10).finalize(params)["kernel"] == 2


def test_ties_are_pruned_together():
    params = {"kernel": np.float32([[1, -1, 1, 2, -2, 2, 3, 3, 3, 3]])}
    final = Feather(0.5, end_step=10, p=jnp.inf).finalize(params)["kernel"]
    np.testing.assert_array_equal(final, [[0, 0, 0, 0, 0, 0, 3, 3, 3, 3]])


def test_another_magnitude_prunes_whole_blocks():
    """In every part: the selection, the operator, the scaled gradients, and the one line."""
    params = {"kernel": np.random.default_rng(4).normal(size=(16, 6)).astype(np.float32)}
    prune = Feather(0.5, end_step=0, theta=0.5, magnitude=block_magnitude((4, 1)))
    squares = np.mean(np.square(params["kernel"].astype(float)).reshape(4, 4, 6), axis=1)
    pruned = np.repeat(squares <= np.sort(squares.ravel())[11], 4, axis=0)  # 12 of 24 blocks
    final = prune.finalize(params)["kernel"]
    np.testing.assert_array_equal(final == 0, pruned)
    tx = prune.scale_gradients()
    ones = {"kernel": np.ones((16, 6), np.float32)}
    threshold = prune.threshold(params, 0)
    scaled, _ = tx.update(ones, tx.init(params), params, threshold=threshold)
    np.testing.assert_array_equal(scaled["kernel"], np.where(pruned, 0.5, 1))
    tx = prune.wrap(optax.set_to_zero())
    updates, _ = tx.update(ones, tx.init(params), params)
    wrapped = optax.apply_updates(params, updates)["kernel"]
    np.testing.assert_array_equal(wrapped == 0, pruned)


def test_no_prunable_weight_is_an_error():
    prune = Feather(0.9, end_step=10)
    ones = {"w": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    for call in (
        prune.finalize,
        lambda params: prune.threshold(params, 0),
        lambda params: jax.jit(prune.threshold)(params, 0),
        lambda params: prune.sparsify(params, 0.5),
        lambda params: prune.scale_gradients().update(params, (), params, threshold=0.5),
    ):
        with pytest.raises(
            ValueError, match=r"no prunable weight among the .*\(bias, w\).*path_mask"
        ):
            call(ones)
        for nothing in ({}, {"kernel": jnp.ones(3)}):
            with pytest.raises(ValueError, match="no prunable weight"):
                call(nothing)


def test_trains_on_every_device_as_on_one():
    devices = jax.local_device_count()
    assert devices > 1
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(devices * 4, 6)), rng.normal(size=(devices * 4, 5))
    params = {"kernel": rng.normal(size=(6, 5)), "bias": rng.normal(size=5)}
    prune = Feather(0.8, end_step=4, theta=0.5)
    tx = optax.chain(prune.scale_gradients(), optax.sgd(0.2, momentum=0.9))

    def train_step(params, opt_state, step, x, y, *, axis_name):
        threshold = prune.threshold(params, step)

        def loss(params):
            sparse = prune.sparsify(params, threshold)
            return jnp.mean((jnp.tanh(x @ sparse["kernel"]) + sparse["bias"] - y) ** 2)

        grads = jax.grad(loss)(params)
        if axis_name:
            grads = jax.lax.pmean(grads, axis_name)
        updates, opt_state = tx.update(grads, opt_state, params, threshold=threshold)
        return optax.apply_updates(params, updates), opt_state, threshold

    with jax.enable_x64(True):
        one = jax.jit(lambda *args: train_step(*args, axis_name=None))
        many = jax.pmap(
            lambda *args: train_step(*args, axis_name="batch"),
            axis_name="batch",
            in_axes=(None, None, None, 0, 0),
            out_axes=None,
        )
        a, b = (params, tx.init(params)), (params, tx.init(params))
        shards = [batch.reshape(devices, 4, -1) for batch in (x, y)]
        for step in range(8):
            *a, one_threshold = one(*a, step, x, y)
            *b, threshold = many(*b, step, *shards)
            np.testing.assert_allclose(threshold, one_threshold, rtol=1e-10)
        jax.tree.map(lambda m, o: np.testing.assert_allclose(m, o, rtol=1e-10), b[0], a[0])
