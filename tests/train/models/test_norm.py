"""Batch normalisation against PyTorch's, against float64, and on eight devices against one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path

from train import models
from train.models.norm import BatchNorm


def test_initialising_leaves_the_running_statistics_alone():
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)) + 5
    model = models.build({"name": "resnet8", "widths": (4,)}, num_classes=10)
    init = jax.jit(functools.partial(model.init, train=True))
    stats = init(jax.random.key(0, impl="rbg"), images)
    for path, leaf in tree_leaves_with_path(stats["batch_stats"]):
        assert np.all(leaf == (1 if keystr(path).endswith("['var']") else 0))


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_and_its_gradients_are_pytorchs(train):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    images, targets = rng.normal(2, 3, size=(2, 4, 5, 6, 3))
    scale, bias, mean = rng.normal(size=(3, 3))
    var = rng.uniform(0.5, 2, 3)

    theirs = torch.nn.BatchNorm2d(3, dtype=torch.float64).train(train)
    with torch.no_grad():
        for name, value in zip(
            ("weight", "bias", "running_mean", "running_var"), (scale, bias, mean, var), strict=True
        ):
            getattr(theirs, name).copy_(torch.from_numpy(value))
    x = torch.from_numpy(images).permute(0, 3, 1, 2).requires_grad_()
    expected = theirs(x).permute(0, 2, 3, 1)
    (expected * torch.from_numpy(targets)).sum().backward()

    with jax.enable_x64(True):
        ours = BatchNorm(jnp.float64)

        def loss_fn(params, images):
            variables = {"params": params, "batch_stats": {"mean": mean, "var": var}}
            outputs, changed = ours.apply(variables, images, train=train, mutable=["batch_stats"])
            return jnp.sum(outputs * targets), (outputs, changed["batch_stats"])

        params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
        grad_fn = jax.jit(jax.grad(loss_fn, argnums=(0, 1), has_aux=True))
        (grads, image_grads), (outputs, stats) = grad_fn(params, images)

    for mine, other in (
        (outputs, expected.detach()),
        (image_grads, x.grad.permute(0, 2, 3, 1)),
        (grads["scale"], theirs.weight.grad),
        (grads["bias"], theirs.bias.grad),
        (stats["mean"], theirs.running_mean),
        (stats["var"], theirs.running_var),
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4, -1e4])
def test_variance_keeps_its_digits_under_a_large_mean(mean):
    images = (np.random.default_rng(0).normal(size=(32, 16, 16, 4)) + mean).astype(np.float32)
    model = BatchNorm()
    variables = model.init(jax.random.key(0), images, train=False)
    fn = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    normalised, changed = fn(variables, images)

    exact = images.astype(np.float64)
    moving = 0.9 + 0.1 * exact.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(changed["batch_stats"]["var"], moving, rtol=1e-5)
    np.testing.assert_allclose(normalised.std((0, 1, 2)), 1, rtol=1e-4)
    np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=2e-3)


def test_one_example_has_no_unbiased_variance_and_keeps_the_biased_one():
    model = BatchNorm()
    variables = model.init(jax.random.key(0), jnp.ones((1, 3)), train=False)
    _, changed = model.apply(variables, jnp.ones((1, 3)), train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(changed["batch_stats"]["var"], 0.9, rtol=1e-6)


class Normalised(nn.Module):
    """Batch normalisation whose output depends on the order of everything."""

    dtype: jnp.dtype = jnp.float64

    @nn.compact
    def __call__(self, x, *, train, axis_name=None):
        x = BatchNorm(self.dtype, name="norm")(x, train=train, axis_name=axis_name)
        return jnp.sin(2 * x + jnp.arange(x.shape[-1])).sum((1, 2))


@pytest.mark.parametrize("which", ["norm", pytest.param("resnet8", marks=pytest.mark.slow)])
def test_eight_devices_normalise_as_one(which):
    devices = jax.device_count()
    assert devices > 1
    with jax.enable_x64(True):
        model = (
            Normalised()
            if which == "norm"
            else models.build(
                {"name": "resnet8", "widths": (4, 8, 8)}, num_classes=3, dtype=jnp.float64
            )
        )
        images = 3 + jax.random.normal(jax.random.key(1), (2 * devices, 8, 8, 2), jnp.float64)
        targets = jax.random.normal(jax.random.key(2), (2 * devices, 1), jnp.float64)
        init = jax.jit(functools.partial(model.init, train=False))
        variables = init(jax.random.key(0, impl="rbg"), images)

        def step(variables, images, targets, axis_name=None):
            def loss_fn(params, images):
                outputs, changed = model.apply(
                    {**variables, "params": params},
                    images,
                    train=True,
                    axis_name=axis_name,
                    mutable=["batch_stats"],
                )
                return jnp.mean((outputs - targets) ** 2), (outputs, changed)

            grads, aux = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(
                variables["params"], images
            )
            if axis_name is not None:
                grads = (jax.lax.pmean(grads[0], axis_name), grads[1] / devices)
            return grads, aux

        ((grads, image_grads), (outputs, changed)) = jax.jit(step)(variables, images, targets)
        split = [x.reshape(devices, 2, *x.shape[1:]) for x in (images, targets)]
        mapped = jax.pmap(
            functools.partial(step, axis_name="batch"),
            axis_name="batch",
            in_axes=(None, 0, 0),
            out_axes=((None, 0), (0, None)),
        )
        ((grads8, image_grads8), (outputs8, changed8)) = mapped(variables, *split)

        def assert_same(one, many):
            assert one.dtype == jnp.float64
            many = np.asarray(many).reshape(one.shape)
            np.testing.assert_allclose(many, one, rtol=0, atol=1e-12 * max(1, np.abs(one).max()))

        assert_same(outputs, outputs8)
        assert_same(image_grads, image_grads8)
        jax.tree.map(assert_same, changed, changed8)
        jax.tree.map(assert_same, grads, grads8)
