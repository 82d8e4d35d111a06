"""`thresholded` modules against the plain module on sparsified parameters."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from feather_jax import prunable_weights, sparsify
from feather_jax.linen import thresholded

RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
T = 0.3


def assert_trees_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def inputs():
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 6)), jnp.float32)


class Block(nn.Module):
    """Batch statistics, dropout, and `layer` for each layer with kernels."""

    layer: object = staticmethod(lambda module: module)

    @nn.compact
    def __call__(self, x):
        x = self.layer(nn.Dense)(6)(x)
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(x)
        x = nn.Dropout(0.5, deterministic=False)(nn.relu(x))
        x = self.layer(nn.DenseGeneral)((2, 3))(x).reshape(x.shape)
        return self.layer(nn.Dense)(6)(x)


def wrapped_blocks():
    """The same, once thresholded as a whole and once layer by layer."""
    return thresholded(Block, T)(), Block(layer=lambda module: thresholded(module, T))


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Block().init)(RNGS, inputs())


def test_initialises_the_dense_parameters_under_the_same_names(variables):
    names = {"BatchNorm_0", "Dense_0", "DenseGeneral_0", "Dense_1"}
    for initialised in jax.jit(
        lambda: [model.init(RNGS, inputs()) for model in wrapped_blocks()]
    )():
        assert set(initialised["params"]) == names
        assert_trees_equal(initialised, variables)


def test_applies_with_sparse_parameters(variables):
    @jax.jit
    def apply_all(variables):
        sparse = {**variables, "params": sparsify(variables["params"], T)}
        pairs = [(Block(), variables), (Block(), sparse)]
        pairs += [(model, variables) for model in wrapped_blocks()]
        rngs = {"dropout": jax.random.key(2)}
        return [model.apply(v, inputs(), rngs=rngs, mutable=["batch_stats"]) for model, v in pairs]

    (dense, _), (expected, expected_state), *outputs = apply_all(variables)
    assert np.abs(expected - dense).max() > 0.01
    for value, state in outputs:
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), state, expected_state)


def test_the_gradient_is_straight_through():
    model, x = nn.Dense(3), inputs()[0]
    params = model.init(RNGS, x)
    weights = jnp.arange(24.0).reshape(8, 3)

    def loss(model, params):
        return jnp.sum(weights * jnp.sin(model.apply(params, x)))

    @jax.jit
    def gradients(params):
        sparse = {"params": sparsify(params["params"], T)}
        by_dense = jax.grad(partial(loss, thresholded(nn.Dense, T)(3)))(params)
        return by_dense, jax.grad(partial(loss, model))(sparse)

    gradient, expected = gradients(params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), gradient, expected)
    assert np.all(gradient["params"]["kernel"] != 0)


def test_thresholds_masks_and_exponents_are_for_the_modules_own_parameters():
    x = inputs()[0]
    kernel = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    params = {"kernel": kernel, "bias": np.float32([0.1, -0.5, 0.6])}
    for options in (
        {"threshold": {"kernel": jnp.asarray([0.0, 0.3, 0.5]), "bias": 0.0}},
        {"threshold": T, "p": jnp.inf, "prunable": {"kernel": False, "bias": True}},
        {"threshold": T, "p": 1.0, "prunable": lambda params: prunable_weights(params)},
    ):
        value = jax.jit(thresholded(nn.Dense, **options)(3).apply)({"params": params}, x)
        sparse = sparsify(params, **options)
        np.testing.assert_allclose(value, x @ sparse["kernel"] + sparse["bias"], rtol=1e-5)


def test_a_mutable_collection_of_parameters_stays_dense():
    x = inputs()[0]
    variables = nn.Dense(3).init(RNGS, x)
    _, mutated = thresholded(nn.Dense, T)(3).apply(variables, x, mutable=["params"])
    assert_trees_equal(mutated, variables)


def test_modules_with_setup_and_shared_modules():
    class Twice(nn.Module):
        layer: object

        def setup(self):
            self.dense = self.layer(nn.Dense)(6)

        def __call__(self, x):
            return self.dense(nn.relu(self.dense(x)))

    x = inputs()[0]
    plain = Twice(lambda module: module)
    wrapped = Twice(lambda module: thresholded(module, T))
    variables, initialised = jax.jit(lambda: [model.init(RNGS, x) for model in (plain, wrapped)])()
    assert_trees_equal(initialised, variables)
    whole = thresholded(Twice, T)(lambda module: module)

    @jax.jit
    def apply_all(variables):
        sparse = {"params": sparsify(variables["params"], T)}
        return plain.apply(sparse, x), wrapped.apply(variables, x), whole.apply(variables, x)

    expected, *outputs = apply_all(variables)
    for value in outputs:
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_under_scan_and_remat():
    class Layer(nn.Module):
        layer: object

        @nn.compact
        def __call__(self, x, threshold):
            return nn.tanh(self.layer(nn.Dense, threshold)(6)(x)), None

    class Stack(nn.Module):
        layer: object

        @nn.compact
        def __call__(self, x, thresholds):
            layers = nn.scan(
                nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers(self.layer, name="layers")(x, thresholds)[0]

    x, thresholds = inputs()[0], jnp.asarray([0.0, 0.2, 0.4])
    plain, wrapped = Stack(lambda module, threshold: module), Stack(thresholded)
    variables, initialised = jax.jit(
        lambda: [model.init(RNGS, x, thresholds) for model in (plain, wrapped)]
    )()
    assert_trees_equal(initialised, variables)
    assert variables["params"]["layers"]["Dense_0"]["kernel"].shape == (3, 6, 6)
    sparse = {"params": sparsify(variables["params"], thresholds[:, None, None])}

    def loss(model, variables):
        return jnp.sum(model.apply(variables, x, thresholds) ** 2)

    actual, expected = jax.jit(
        lambda: (
            jax.value_and_grad(partial(loss, wrapped))(variables),
            jax.value_and_grad(partial(loss, plain))(sparse),
        )
    )()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), actual, expected)


class Autoencoder(nn.Module):
    """A module of many methods, each of which may call another, a private one and a plain one."""

    scale: float = 1.0
    activation: object = staticmethod(nn.relu)

    def setup(self):
        self.encoder, self.decoder = nn.Dense(5), nn.Dense(6)

    def encode(self, x):
        return self.activation(self._encoded(x))

    def _encoded(self, x):
        return self.encoder(x)

    def decode(self, code, *, scale=1.0):
        return scale * self.decoder(code)

    def __call__(self, x):
        return self.decode(self.encode(x), scale=self.scale)

    @nn.nowrap
    def name_of(self):
        return "autoencoder"


class Parted(Autoencoder):
    """Inherits its methods, and adds one."""

    def ends(self, x):
        return self(x), self.encode(x)


@pytest.mark.parametrize("module", [Autoencoder, Parted])
def test_every_method_is_sparse_and_sparsified_once(module):
    x, code = inputs()[0], inputs()[0, :, :5]
    variables = module().init(RNGS, x)
    sparse = {"params": sparsify(variables["params"], T)}
    assert_trees_equal(
        thresholded(module, T)().init(RNGS, x, method="encode"),
        module().init(RNGS, x, method="encode"),
    )
    calls = [("__call__", (x,), {}), ("encode", (x,), {}), ("decode", (code,), {"scale": 2.0})]
    if module is Parted:
        calls.append(("ends", (x,), {}))
    for method, args, kwargs in calls:
        value = thresholded(module, T)().apply(variables, *args, method=method, **kwargs)
        expected = module().apply(sparse, *args, method=method, **kwargs)
        dense = module().apply(variables, *args, method=method, **kwargs)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), value, expected)
        assert not np.allclose(jax.tree.leaves(value)[0], jax.tree.leaves(dense)[0], atol=0.01)
    bound = thresholded(module, T)(scale=3.0).bind(variables)
    expected = module(scale=3.0).apply(sparse, x)
    np.testing.assert_allclose(bound(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        bound.decode(bound.encode(x), scale=3.0), expected, rtol=1e-5, atol=1e-6
    )
    assert bound.name_of() == "autoencoder"


def test_the_methods_of_a_submodule_are_sparse():
    class Inside(nn.Module):
        layer: object

        def setup(self):
            self.auto = self.layer(Autoencoder)()

        def __call__(self, x):
            return self.auto.decode(self.auto.encode(x))

    x = inputs()[0]
    plain, wrapped = Inside(lambda module: module), Inside(lambda module: thresholded(module, T))
    variables = plain.init(RNGS, x)
    assert_trees_equal(wrapped.init(RNGS, x), variables)
    expected = plain.apply({"params": sparsify(variables["params"], T)}, x)
    np.testing.assert_allclose(wrapped.apply(variables, x), expected, rtol=1e-5, atol=1e-6)


def test_a_module_without_a_kernel_is_an_error():
    class Custom(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.lecun_normal(), (6, 4))

    x = inputs()[0]
    for module, argument in ((Custom(), x), (nn.Embed(5, 4), jnp.arange(3)), (nn.LayerNorm(), x)):
        variables = module.init(RNGS, argument)
        fields = {"num_embeddings": 5, "features": 4} if isinstance(module, nn.Embed) else {}
        with pytest.raises(ValueError, match="no prunable weight"):
            thresholded(type(module), T)(**fields).apply(variables, argument)
    with pytest.raises(ValueError, match="no prunable weight"):
        thresholded(nn.Dropout, T)(0.5, deterministic=True).apply({}, x)
    everything = thresholded(Custom, 1e9, prunable=lambda params: {"w": True})()
    assert jnp.all(everything.apply(Custom().init(RNGS, x), x) == 0)
