"""The training step: the same on any number of devices, with or without Feather."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import feather_jax as feather
from tests.train.stepping import assert_close, on_devices
from train import config as config_lib
from train import experiment, parallel
from train.data import DataSet
from train.experiment import TrainState
from train.optimizer import make_optimizer
from train.step import (
    accumulate,
    example_keys,
    make_eval_step,
    make_train_step,
    ranks,
    smoothed,
)

BATCH, CLASSES = 16, 5


class Network(nn.Module):
    """A convolution, batch normalisation over all devices, and a dense layer."""

    norm: bool = True

    @nn.compact
    def __call__(self, images, *, train, axis_name=None):
        x = nn.Conv(6, (3, 3), dtype=images.dtype, param_dtype=images.dtype)(images)
        if self.norm:
            x = nn.BatchNorm(
                use_running_average=not train,
                axis_name=axis_name if train else None,
                dtype=images.dtype,
                param_dtype=images.dtype,
            )(x)
        x = nn.relu(x).mean((1, 2))
        return nn.Dense(CLASSES, dtype=images.dtype, param_dtype=images.dtype)(x)


def noise_and_scale(images, keys):
    """An augmentation that shows if an example gets another key."""
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], float))(keys)
    return images.astype(float) / 255 + 0.1 * noise


def global_batch(step):
    rng = np.random.default_rng(step)
    return {
        "image": rng.integers(0, 256, (BATCH, 6, 6, 1), np.uint8),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        "index": np.arange(BATCH, dtype=np.int32),
    }


def noise():
    """A data set whose augmentation shows if an example gets another key."""
    return DataSet(
        name="noise",
        image_shape=(6, 6, 1),
        num_classes=CLASSES,
        num_train=1000 * BATCH,
        num_eval=BATCH,
        train_batches=lambda step: map(global_batch, itertools.count(step)),
        eval_batches=lambda: iter(()),
        train_preprocess=noise_and_scale,
        eval_preprocess=lambda images: images / 255,
        mean=(0.0,),
        std=(1.0,),
        eval_image=lambda number: global_batch(0)["image"][number],
        eval_name=str,
    )


def setup(prune, *, norm=True, learning_rate=0.1, **options):
    """The step of a small network, and its first state."""
    values = {"data": {"name": "noise"}, "model": {"name": "lenet300"}, "batch_size": BATCH}
    values |= {"epochs": 1.0, "learning_rate": learning_rate, "sparsity": prune.sparsity, "seed": 1}
    config = config_lib.parse(values | options)
    schedule = optax.constant_schedule(learning_rate)
    built = dataclasses.replace(
        experiment.build(config, noise()),
        model=Network(norm),
        prune=prune,
        learning_rate=schedule,
        tx=make_optimizer(config, schedule, prune),
    )
    variables = built.model.init(jax.random.key(0), jnp.zeros((1, 6, 6, 1), float), train=False)
    params = variables["params"]
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=jax.tree.map(lambda leaf: leaf.astype(float), variables.get("batch_stats", {})),
        opt_state=built.tx.init(params),
    )
    return make_train_step(built), state


def feather_for(sparsity):
    return feather.Feather(sparsity=sparsity, end_step=20, theta=0.5)


DENSE = feather.Feather(sparsity=0.0, end_step=0)


def train_on(devices, steps, prune, **options):
    step, state = setup(prune, **options)
    parallel_step, mesh = on_devices(step, devices)
    state = parallel.replicate(state, mesh)
    for number in range(steps):
        state, metrics = parallel_step(state, parallel.shard(global_batch(number), mesh))
    return jax.device_get((state, metrics))


@pytest.fixture(scope="module")
def forty_steps_without_an_axis():
    with jax.enable_x64(True):
        step, state = setup(feather_for(0.9))
        jitted = jax.jit(step)
        for number in range(40):
            state, metrics = jitted(state, global_batch(number))
        return jax.device_get((state, metrics))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_number_of_devices_changes_nothing(devices, forty_steps_without_an_axis):
    """Batch statistics, gradients, thresholds and augmentation are those of the global batch."""
    with jax.enable_x64(True):
        many = train_on(devices, 40, feather_for(0.9))
    assert many[0].params["Conv_0"]["kernel"].dtype == np.float64
    assert_close(many, forty_steps_without_an_axis, 1e-9)


def test_accumulated_parts_are_the_same_on_any_number_of_devices():
    """Batch normalisation sees the parts, so they have to be the same examples."""
    with jax.enable_x64(True):
        one, *others = (
            train_on(number, 10, feather_for(0.9), accumulate_steps=2) for number in (1, 2, 8)
        )
    for many in others:
        assert_close(many, one, 1e-10)


def test_dense_twin_has_nothing_of_feather():
    step, state = setup(DENSE)
    new_state, metrics = jax.jit(step)(state, global_batch(0))
    assert set(metrics) == {"train/loss", "train/accuracy", "learning_rate"}
    jaxpr = str(jax.make_jaxpr(step)(state, global_batch(0)))
    assert "while" not in jaxpr, "the threshold's search"
    assert "custom_vjp" not in jaxpr.replace("custom_jvp_call[name=relu", "")
    assert int(new_state.step) == 1


def test_sparsity_0_in_feather_equals_the_dense_twin():
    """Feather with nothing to prune yet follows the dense step to the last bit."""
    begins_later = feather.Feather(sparsity=0.9, begin_step=100, end_step=200)
    results = []
    for prune in (DENSE, begins_later):
        step, state = setup(prune)
        for number in range(3):
            state, _ = jax.jit(step)(state, global_batch(number))
        results.append(jax.device_get(state.params))
    assert_close(*results, 1e-6)


def test_accumulated_parts_equal_one_batch():
    """Without batch normalisation the parts of a batch give the gradient of the whole."""
    with jax.enable_x64(True):
        results = []
        for accumulate_steps in (1, 2, 4):
            step, state = setup(feather_for(0.8), norm=False, accumulate_steps=accumulate_steps)
            jitted = jax.jit(step)
            for number in range(10):
                state, metrics = jitted(state, global_batch(number))
            results.append(jax.device_get((state, metrics)))
        whole, *in_parts = results
        for found in in_parts:
            assert_close(found, whole, 1e-12)


def test_accumulation_passes_statistics_from_part_to_part():
    def loss_fn(weights, statistics, batch):
        images, labels = batch
        return jnp.sum(weights * images), (statistics + jnp.sum(labels), {"loss": jnp.sum(images)})

    batch = jnp.arange(6.0), jnp.arange(6)
    grads, statistics, metrics = accumulate(loss_fn, jnp.ones(()), jnp.zeros(()), batch, 3)
    assert (grads, statistics, metrics["loss"]) == (5.0, 15, 5.0)


def test_the_gradient_is_the_one_through_the_operator():
    """An update of two parts against the derivative of the loss by the dense weights."""
    prune = feather.Feather(sparsity=0.6, end_step=0, theta=1.0)
    batch = global_batch(0)
    with jax.enable_x64(True):
        step, state = setup(prune, norm=False, accumulate_steps=2)
        new_state, metrics = jax.jit(step)(state, batch)
        keys = example_keys(1, state.step, batch["index"])
        images = noise_and_scale(jnp.asarray(batch["image"]), keys)

        def loss(params):
            weights = prune.sparsify(params, prune.threshold(params, 0))
            logits = Network(norm=False).apply({"params": weights}, images, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
        expected = jax.tree.map(
            lambda w, g: w - 0.1 * g * min(1.0, 3.0 / norm), state.params, grads
        )
        assert_close((new_state.params, metrics["train/loss"]), (expected, value), 1e-10)


@pytest.fixture
def three_steps(tiny):
    """three_steps(**changes): the experiment, the states before and after each step, the losses.

    Of the program's own step on real digits.
    """
    lenet = {"name": "lenet300", "hidden": [16]}
    config = functools.partial(tiny, model=lenet, learning_rate=0.01, prune_end=0.1)

    def train(**changes):
        built = experiment.build(config(**changes))
        step, state = jax.jit(make_train_step(built)), experiment.initial_state(built)
        states, losses = [state], []
        for _, batch in zip(range(3), built.data.train_batches(0), strict=False):
            state, metrics = step(state, batch)
            states.append(state)
            losses.append(float(metrics["train/loss"]))
        return built, jax.device_get(states), losses

    return train


def test_the_whole_step_in_bfloat16(three_steps):
    """Products are of bfloat16, weights stay float32, the loss is float32's to its precision."""
    built, states, losses = three_steps(compute_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(states[-1].params)} == {np.dtype(np.float32)}
    batch = next(built.data.train_batches(0))
    jaxpr = str(jax.make_jaxpr(make_train_step(built))(states[0], batch))
    assert re.search(r"bf16\[64,16\] = dot_general", jaxpr)
    _, _, expected = three_steps()
    np.testing.assert_allclose(losses, expected, rtol=0.03)
    assert losses != expected


def test_the_whole_step_with_adamw(three_steps):
    """Adam's first update is the learning rate in the gradient's direction, whatever its size."""
    _, states, losses = three_steps(optimizer="adamw", weight_decay=0.1, clip_norm=0.0)
    before, after = states[0].params["head"], states[1].params["head"]
    np.testing.assert_allclose(np.abs(after["bias"] - before["bias"]), 0.01, rtol=1e-3)
    moved = np.abs(after["kernel"] - before["kernel"] * (1 - 0.01 * 0.1))
    assert np.median(moved) == pytest.approx(0.01, rel=1e-3)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_metrics_are_those_used_in_the_update():
    prune = feather_for(0.9)
    step, state = setup(prune)
    state = state.replace(step=jnp.asarray(7, jnp.int32))
    _, metrics = jax.jit(step)(state, global_batch(0))
    np.testing.assert_allclose(metrics["sparsity"], 0.9 * (1 - (1 - 7 / 20) ** 3), rtol=1e-6)
    kernels = [state.params["Conv_0"]["kernel"], state.params["Dense_0"]["kernel"]]
    magnitudes = np.concatenate([np.abs(kernel).ravel() for kernel in kernels])
    expected = np.quantile(magnitudes, float(metrics["sparsity"]))
    np.testing.assert_allclose(metrics["threshold"], expected, rtol=1e-5)


def test_pruned_weights_move_by_theta_times_as_much():
    """One plain step on the same batch, with theta 1 and 0.5: kept weights move alike."""
    moves = []
    for theta in (1.0, 0.5):
        prune = feather.Feather(sparsity=0.5, end_step=0, theta=theta)
        step, state = setup(prune, learning_rate=1e-3)
        new_state, _ = jax.jit(step)(state, global_batch(0))
        kernel = np.asarray(state.params["Conv_0"]["kernel"])
        moves.append(np.asarray(new_state.params["Conv_0"]["kernel"]) - kernel)
    pruned = np.abs(kernel) <= np.asarray(prune.threshold(state.params, 0))
    assert 0 < pruned.sum() < pruned.size
    np.testing.assert_allclose(moves[1][~pruned], moves[0][~pruned], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(moves[1][pruned], moves[0][pruned] / 2, rtol=1e-3, atol=1e-7)


def test_example_keys_depend_on_seed_step_and_index_alone():
    whole = jax.random.key_data(example_keys(3, jnp.int32(5), jnp.arange(8)))
    part = jax.random.key_data(example_keys(3, jnp.int32(5), jnp.arange(4, 8)))
    np.testing.assert_array_equal(whole[4:], part)
    other_step = jax.random.key_data(example_keys(3, jnp.int32(6), jnp.arange(8)))
    other_seed = jax.random.key_data(example_keys(4, jnp.int32(5), jnp.arange(8)))
    assert len(np.unique(np.concatenate([whole, other_step, other_seed]), axis=0)) == 24


def test_targets_are_labels_drawn_towards_the_uniform():
    labels = np.array([0, 1, 2, 3, 0, 1])
    for smoothing in (0.0, 0.1):
        expected = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
        np.testing.assert_allclose(smoothed(labels, 4, smoothing), expected, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_against_smoothed_labels(smoothing):
    with jax.enable_x64(True):
        step, state = setup(DENSE, norm=False, label_smoothing=smoothing)
        batch = global_batch(0)
        _, metrics = jax.jit(step)(state, batch)
        images = noise_and_scale(batch["image"], example_keys(1, state.step, batch["index"]))
        logits = np.asarray(Network(norm=False).apply({"params": state.params}, images, train=True))
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = (1 - smoothing) * np.eye(CLASSES)[batch["label"]] + smoothing / CLASSES
        expected = -(targets * log_probabilities).sum(-1).mean()
        np.testing.assert_allclose(metrics["train/loss"], expected, rtol=1e-6)
        right = (logits.argmax(-1) == batch["label"]).mean()
        np.testing.assert_allclose(metrics["train/accuracy"], right)


def test_mixing_is_the_same_on_any_number_of_devices():
    """In parts, too; and it does change the step."""
    options = {"mixup": 0.5, "cutmix": 1.0, "accumulate_steps": 2}
    with jax.enable_x64(True):
        one, *others = (train_on(number, 5, feather_for(0.9), **options) for number in (1, 2, 8))
        plain = train_on(1, 5, feather_for(0.9), accumulate_steps=2)
    for many in others:
        assert_close(many, one, 1e-10)
    assert abs(plain[1]["train/loss"] - one[1]["train/loss"]) > 1e-3


def test_ranks_count_the_classes_before():
    logits = np.random.default_rng(0).integers(0, 4, (50, 6)).astype(np.float32)  # many are equal
    for label in range(6):
        expected = [
            sorted(range(6), key=lambda k, row=row: (-row[k], k)).index(label) for row in logits
        ]
        labels = jnp.full(50, label, jnp.int32)
        assert ranks(jnp.asarray(logits), labels).tolist() == expected


def test_what_is_not_a_number_is_not_right():
    logits = jnp.array([[jnp.nan, 1.0, 2.0], [jnp.nan, jnp.nan, jnp.nan], [0.0, jnp.nan, 1.0]])
    found = ranks(logits, jnp.array([2, 1, 2]))
    assert (found > 0).all()


@pytest.mark.parametrize("devices", [1, 4])
def test_evaluation_gives_every_example_in_order_on_every_device(devices):
    network = Network(norm=False)
    variables = network.init(jax.random.key(0), jnp.zeros((1, 6, 6, 1)), train=False)
    batch = global_batch(0)
    del batch["index"]
    batch["mask"] = np.arange(BATCH) % 3 > 0
    step = make_eval_step(network, lambda images: images / 255)
    chosen = jax.devices()[:devices]
    mesh = jax.sharding.Mesh(np.array(chosen), (parallel.AXIS,))
    on_devices = jax.pmap(
        lambda variables, batch: step(variables, batch, axis_name=parallel.AXIS),
        axis_name=parallel.AXIS,
        in_axes=(None, 0),
        out_axes=None,
        devices=chosen,
    )
    found = on_devices(parallel.replicate(variables, mesh), parallel.shard(batch, mesh))
    logits = np.asarray(network.apply(variables, batch["image"] / 255, train=False), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(BATCH), batch["label"]]
    np.testing.assert_array_equal(found["mask"], batch["mask"])
    np.testing.assert_array_equal(found["label"], batch["label"])
    np.testing.assert_array_equal(found["prediction"], logits.argmax(-1))
    np.testing.assert_allclose(found["loss"], losses, rtol=1e-5)
    np.testing.assert_array_equal(
        found["rank"], (logits > logits[np.arange(BATCH), batch["label"], None]).sum(-1)
    )
