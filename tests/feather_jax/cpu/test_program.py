"""Compiled functions against JAX: what a user calls."""

import concurrent.futures
import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from feather_jax.cpu.program import _busy as BUSY
from feather_jax.cpu.program import compile as compile_program
from train.models import build as build_model

rng = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def thin(model: nn.Module, density: float, images: np.ndarray, **options):
    """Random weights of which `density` is left, and statistics that are not 0 and 1."""

    def leaf(path, like):
        if path[-1].key == "kernel":
            kept = rng.random(like.shape) < density
            fan_in = density * np.prod(like.shape[:-1])
            return jnp.asarray(random(*like.shape) * kept / np.sqrt(fan_in).astype(np.float32))
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(1 + 0.2 * rng.random(like.shape).astype(np.float32))
        return jnp.asarray(0.1 * random(*like.shape))

    shapes = jax.eval_shape(functools.partial(model.init, **options), jax.random.key(0), images)
    return jax.tree_util.tree_map_with_path(leaf, shapes)


def agree(result, expected) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(result) / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet300", (2, 28, 28, 1)),
        ("lenet5", (1, 28, 28, 1)),
        ("resnet8", (1, 32, 32, 3)),
        ("resnet8", (16, 32, 32, 3)),
        pytest.param("resnet50", (1, 65, 64, 3), marks=pytest.mark.slow),
        pytest.param("mobilenet", (3, 32, 32, 3), marks=pytest.mark.slow),
        pytest.param("imagenet_mobilenet", (1, 64, 64, 3), marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", (1, 64, 64, 3), marks=pytest.mark.slow),
        pytest.param("densenet40", (2, 32, 32, 3), marks=pytest.mark.slow),
        pytest.param("vit_tiny", (1, 64, 64, 3), marks=pytest.mark.slow),
    ],
)
def test_models(name, shape):
    model = build_model({"name": name}, num_classes=10)
    images = random(*shape)
    variables = thin(model, 0.2, images, train=False)

    def classify(images):
        return model.apply(variables, images, train=False)

    agree(compile_program(classify, images)(images), jax.jit(classify)(images))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3), strides=2)(x)))
        y = y + nn.Conv(8, (3, 3))(y)
        y = nn.avg_pool(y, (2, 2), (2, 2), "SAME")
        return nn.log_softmax(nn.Dense(5)(y.mean((1, 2))))


class SqueezeExcitation(nn.Module):
    """Preprocessing of bytes, asymmetric strides, activations of several kinds, dilation."""

    @nn.compact
    def __call__(self, images):
        x = (images.astype(jnp.float32) / 255 - jnp.array([0.5, 0.4, 0.3])) / 0.25
        x = nn.leaky_relu(nn.Conv(24, (3, 3), strides=2)(x))
        y = nn.relu6(nn.Conv(24, (5, 3), kernel_dilation=(1, 2), feature_group_count=24)(x))
        gate = nn.sigmoid(
            nn.Conv(24, (1, 1))(nn.silu(nn.Conv(6, (1, 1))(y.mean((1, 2), keepdims=True))))
        )
        x = x + nn.hard_swish(y * gate)
        x = jnp.concatenate(
            [nn.max_pool(x, (3, 3), (2, 2), "SAME"), nn.avg_pool(x, (2, 2), (2, 2), "SAME")], -1
        )
        x = nn.gelu(nn.Conv(12, (2, 2), padding="VALID", feature_group_count=2)(x))
        logits = nn.Dense(7)(x.reshape(x.shape[0], -1))
        return nn.softmax(logits), logits.argmax(-1)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_layers_of_many_kinds(batch):
    model = SqueezeExcitation()
    images = rng.integers(0, 256, (batch, 21, 18, 3), np.uint8)
    variables = thin(model, 0.4, images)
    expected = jax.jit(model.apply)(variables, images)
    result = compile_program(lambda images: model.apply(variables, images), images)(images)
    agree(result[0], expected[0])
    np.testing.assert_array_equal(result[1], expected[1])


@pytest.fixture(scope="module")
def residual():
    model, images = Residual(), random(2, 15, 13, 3)
    variables = thin(model, 0.5, images)
    return jax.jit(lambda images: model.apply(variables, images)), images


def test_shapes_suffice(residual):
    function, images = residual
    program = compile_program(function, jax.ShapeDtypeStruct(images.shape, images.dtype))
    agree(program(images), function(images))
    agree(program(jnp.asarray(images)), function(images))
    agree(program(images[:, ::-1]), function(images[:, ::-1]))


def test_pytrees():
    def function(inputs, scale):
        return {"sum": inputs["a"] * scale + inputs["b"], "both": (inputs["a"], scale)}

    inputs = {"a": random(3, 4), "b": random(4)}
    program = compile_program(function, inputs, 2.0)
    result, expected = program(inputs, 3.0), function(inputs, np.float32(3))
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for own, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(own, other)


def test_results_are_the_callers():
    """A call neither changes an earlier call's results nor returns the arguments themselves."""
    program = compile_program(lambda x: (x, x + 1), np.zeros(3, np.float32))
    x = np.ones(3, np.float32)
    first, _ = program(x)
    second, _ = program(2 * x)
    np.testing.assert_array_equal(first, x)
    np.testing.assert_array_equal(second, 2 * x)
    assert not np.shares_memory(first, x)


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_from_several_threads(residual, threads, monkeypatch):
    monkeypatch.setattr("feather_jax.cpu.program.WORTH_THREADS", 0)
    function, images = residual
    program = compile_program(function, images, threads=threads)
    batches = [random(*images.shape) for _ in range(20)]
    expected = [program(each) for each in batches]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result, other in zip(pool.map(program, batches), expected, strict=True):
            np.testing.assert_array_equal(result, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((1, 15, 13, 3), np.float32),), r"float32\[1, 15, 13, 3\].*\[2, 15, 13, 3\]"),
        ((np.zeros((2, 15, 13, 3), np.float64),), r"float64.*must be float32"),
        ((), "structure"),
        (([np.zeros((2, 15, 13, 3), np.float32)],), "structure"),
    ],
)
def test_other_arguments_are_refused(residual, arguments, message):
    function, images = residual
    program = compile_program(function, images)
    with pytest.raises(ValueError, match=message):
        program(*arguments)


def test_the_examples_themselves_are_taken():
    """Arrays of 64 bits, which JAX narrows."""
    x, index = rng.standard_normal((3, 4)), np.array([2, 0])
    program = compile_program(lambda x, index: 2 * x[index], x, index)
    result = program(x, index)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, 2 * x[index], rtol=1e-6)


def test_no_threads_are_refused():
    with pytest.raises(ValueError, match="threads is 0"):
        compile_program(lambda x: x, np.zeros(1, np.float32), threads=0)


def test_prints_plan_and_profile(residual):
    function, images = residual
    program = compile_program(function, images)
    assert "Conv_0" in str(program)
    profile = program.profile(images)
    assert len(profile.seconds) == len(program.plan.steps)
    assert profile.total > 0
    assert profile.peak > 1e8
    assert "of peak" in str(profile)
    assert "Conv_1" in str(profile)


def test_small_functions_keep_to_one_thread():
    kernel = random(64, 64)
    program = compile_program(lambda x: x @ kernel, random(4, 64), threads=2)
    assert program.plan.threads == 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sets of cores")
def test_a_process_of_one_core_is_busy_with_one_thread(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    for cores, threads, busy in ((1, 2, True), (2, 2, False), (2, 3, True), (4, 8, False)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        assert BUSY(threads) == busy


def test_a_busy_machine_gets_no_helpers(residual, monkeypatch):
    monkeypatch.setattr("feather_jax.cpu.program.WORTH_THREADS", 0)
    function, images = residual
    program = compile_program(function, images, threads=2)
    expected = program(images)
    monkeypatch.setattr("feather_jax.cpu.program._busy", lambda threads: True)
    monkeypatch.setattr(program, "_pool", None)  # calling it would fail
    np.testing.assert_array_equal(program(images), expected)
