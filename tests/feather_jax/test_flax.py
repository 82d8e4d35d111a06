"""The library inside Linen and NNX as they are: masks by layer, states, boxes and optimisers."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from feather_jax import (
    Feather,
    global_threshold,
    prunable_weights,
    scale_pruned_gradients,
    sparsify,
    summarize,
    threshold_operator,
)
from feather_jax.masks import path_name


def prunable_paths(params):
    mask = prunable_weights(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {path_name(path) for path, selected in leaves if selected}


def magnitudes(params, names):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return np.concatenate(
        [np.abs(leaf).ravel() for path, leaf in leaves if path_name(path) in names]
    )


# ---- Linen ----


class LinenZoo(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        x = nn.LayerNorm()(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, normalize_qk=True)(x)
        x = nn.Conv(8, (3,))(x)
        x = nn.GroupNorm(num_groups=2)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.ConvTranspose(8, (3,))(x)
        x = nn.DenseGeneral((2, 4))(x).reshape(x.shape)
        x = nn.RNN(nn.GRUCell(4))(x)
        return nn.Dense(3, use_bias=False)(x)


LINEN_KERNELS = {
    "MultiHeadDotProductAttention_0/query/kernel",
    "MultiHeadDotProductAttention_0/key/kernel",
    "MultiHeadDotProductAttention_0/value/kernel",
    "MultiHeadDotProductAttention_0/out/kernel",
    "Conv_0/kernel",
    "ConvTranspose_0/kernel",
    "DenseGeneral_0/kernel",
    *(f"GRUCell_0/{gate}/kernel" for gate in ("hn", "hr", "hz", "in", "ir", "iz")),
    "Dense_0/kernel",
}


def shapes(model, *args):
    return jax.eval_shape(model.init, jax.random.key(0), *args)["params"]


def test_linen_kernels_are_prunable_and_nothing_else():
    params = shapes(LinenZoo(), jnp.zeros((2, 5), int))
    assert prunable_paths(params) == LINEN_KERNELS
    bias = params["MultiHeadDotProductAttention_0"]["query"]["bias"]
    assert bias.ndim == 2


def test_linen_partitioned_boxes():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            x = nn.Dense(6, kernel_init=init)(x)
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            scale = nn.with_partitioning(nn.initializers.ones, ("out",))
            return nn.LayerNorm(scale_init=scale)(nn.Dense(3, kernel_init=init)(x))

    params = jax.jit(Model().init)(jax.random.key(0), jnp.ones((2, 4)))["params"]
    assert isinstance(params["Dense_0"]["kernel"], nn.Partitioned)
    names = {"Dense_0/kernel", "Dense_1/kernel"}
    assert prunable_paths(params) == names

    @jax.jit
    def parts(params):
        threshold = global_threshold(params, 0.5)
        tx = scale_pruned_gradients(0.5)
        ones = jax.tree.map(jnp.ones_like, params)
        updates, _ = tx.update(ones, tx.init(params), params, threshold=threshold)
        return threshold, sparsify(params, threshold), updates

    threshold, sparse, updates = parts(params)
    np.testing.assert_allclose(threshold, np.quantile(magnitudes(params, names), 0.5), rtol=1e-6)
    assert jax.tree.structure(sparse) == jax.tree.structure(params)
    assert sparse["Dense_0"]["kernel"].names == ("in", "out")
    summary = summarize(sparse)
    assert [layer.name for layer in summary.layers if layer.prunable] == sorted(names)
    assert summary.prunable - summary.nonzero == 21  # floor(0.5 (42 - 1)) + 1
    expected = np.where(sparse["Dense_0"]["kernel"].value == 0, 0.5, 1)
    np.testing.assert_array_equal(updates["Dense_0"]["kernel"].value, expected)
    np.testing.assert_array_equal(updates["Dense_0"]["bias"], np.ones(6))


def test_linen_scanned_layers():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.LayerNorm()(nn.Dense(4)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers(name="layers")(x, None)[0]

    params = shapes(Stack(), jnp.ones((2, 4)))
    # The stacked biases and scales have two dimensions and stay.
    assert params["layers"]["LayerNorm_0"]["scale"].ndim == 2
    assert prunable_paths(params) == {"layers/Dense_0/kernel"}
    kernel = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
    params["layers"]["Dense_0"]["kernel"] = kernel
    sparse = sparsify(params, np.float32([0, 0.5, 1])[:, None, None], p=jnp.inf)
    expected = np.where(np.abs(kernel) > np.float32([0, 0.5, 1])[:, None, None], kernel, 0)
    np.testing.assert_array_equal(sparse["layers"]["Dense_0"]["kernel"], expected)


def classification():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    return x, np.argmax(x @ rng.normal(size=(8, 3)), axis=1)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_linen_train_state():
    x, y = classification()
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(3)])
    prune = Feather(sparsity=0.8, end_step=30)
    state = TrainState.create(
        apply_fn=model.apply,
        params=jax.jit(model.init)(jax.random.key(0), x)["params"],
        tx=optax.chain(prune.scale_gradients(), optax.sgd(0.5, momentum=0.9)),
    )

    @jax.jit
    def train_step(state):
        threshold = prune.threshold(state.params, state.step)

        def loss_fn(params):
            return cross_entropy(
                state.apply_fn({"params": prune.sparsify(params, threshold)}, x), y
            )

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = state.tx.update(
            grads, state.opt_state, state.params, threshold=threshold
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss

    first = None
    for _ in range(60):
        state, loss = train_step(state)
        first = loss if first is None else first
    final = jax.jit(prune.finalize)(state.params)
    assert cross_entropy(jax.jit(model.apply)({"params": final}, x), y) < 0.3 * first
    size = 8 * 32 + 32 * 3
    assert summarize(final).nonzero == size - (int(0.8 * (size - 1)) + 1)
    with pytest.raises(ValueError, match="apply_gradients does not forward it"):
        state.apply_gradients(grads=state.params)


def test_threshold_operator_on_one_kernel_of_a_linen_module():
    class Sparse(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x, threshold):
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
            return x @ threshold_operator(kernel, threshold, p=1.0)

    x, _ = classification()
    model = Sparse(5)
    variables = jax.jit(model.init)(jax.random.key(0), x, 0.2)
    kernel = np.asarray(variables["params"]["kernel"])
    soft = np.sign(kernel) * np.maximum(np.abs(kernel) - np.float32(0.2), 0)
    loss = jax.jit(jax.value_and_grad(lambda v: model.apply(v, x, 0.2).sum()))
    value, grads = loss(variables)
    np.testing.assert_allclose(value, (x @ soft).sum(), rtol=1e-4)
    expected = np.repeat(x.sum(0)[:, None], 5, 1)
    np.testing.assert_allclose(grads["params"]["kernel"], expected, rtol=1e-5, atol=1e-5)


# ---- NNX ----


class NnxZoo(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])


NNX_KERNELS = {
    *(f"attention/{name}/kernel" for name in ("query", "key", "value", "out")),
    "conv/kernel",
    "layers/0/kernel",
    "layers/1/kernel",
}


@pytest.fixture(scope="module")
def zoo():
    return nnx.jit(lambda: NnxZoo(nnx.Rngs(0)))()


def test_nnx_kernels_are_prunable_and_nothing_else(zoo):
    params = nnx.state(zoo, nnx.Param)
    assert prunable_paths(params) == NNX_KERNELS
    assert prunable_paths(nnx.to_pure_dict(params)) == NNX_KERNELS
    assert params["attention"]["query"]["bias"][...].ndim == 2
    # The whole state, with batch statistics, counters and PRNG keys in it.
    assert prunable_paths(nnx.state(zoo)) == NNX_KERNELS


def test_nnx_state_is_sparsified(zoo):
    state = nnx.state(zoo)
    threshold = jax.jit(global_threshold, static_argnums=1)(state, 0.75)
    expected = np.quantile(magnitudes(nnx.state(zoo, nnx.Param), NNX_KERNELS), 0.75)
    np.testing.assert_allclose(threshold, expected, rtol=1e-6)
    sparse = sparsify(state, threshold, p=jnp.inf)
    assert jax.tree.structure(sparse) == jax.tree.structure(state)

    def check(path, dense, sparse):
        if path_name(path) in NNX_KERNELS:
            kept = np.abs(dense) > threshold
            np.testing.assert_array_equal(sparse, np.where(kept, dense, 0))
        else:
            assert sparse is dense

    jax.tree_util.tree_map_with_path(check, state, sparse)
    summary = summarize(nnx.state(nnx.merge(nnx.graphdef(zoo), sparse), nnx.Param))
    assert {layer.name for layer in summary.layers if layer.prunable} == NNX_KERNELS
    assert summary.sparsity == pytest.approx(0.75, abs=2 / summary.prunable)


def test_a_mask_that_is_an_nnx_state(zoo):
    params = nnx.state(zoo, nnx.Param)
    mask = prunable_weights(params)
    assert isinstance(mask, nnx.State)
    mask["conv"]["kernel"] = jax.tree.map(lambda _: False, mask["conv"]["kernel"])
    sparse = sparsify(params, 10.0, prunable=mask)
    assert jnp.all(sparse["layers"][0]["kernel"][...] == 0)
    np.testing.assert_array_equal(sparse["conv"]["kernel"][...], params["conv"]["kernel"][...])

    def only_layers(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: path_name(path).startswith("layers") and leaf.ndim > 1, params
        )

    summary = summarize(params, prunable=only_layers)
    assert summary.prunable == 2 * 64


def test_nnx_optimizer():
    x, y = classification()
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(8, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 3, rngs=rngs))
    prune = Feather(sparsity=0.8, end_step=30)
    tx = optax.chain(prune.scale_gradients(), optax.sgd(0.5, momentum=0.9))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        threshold = prune.threshold(params, optimizer.step[...])

        def loss_fn(params):
            return cross_entropy(nnx.merge(graph, prune.sparsify(params, threshold), rest)(x), y)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        optimizer.update(model, grads, threshold=threshold)
        return loss

    losses = [float(train_step(model, optimizer)) for _ in range(60)]
    params = jax.jit(prune.finalize)(nnx.state(model, nnx.Param))
    nnx.update(model, params)
    assert cross_entropy(model(x), y) < 0.3 * losses[0]
    size = 8 * 32 + 32 * 3
    assert summarize(nnx.state(model, nnx.Param)).nonzero == size - (int(0.8 * (size - 1)) + 1)


def test_the_pieces_in_a_stateful_nnx_model():
    """README's way: a copy for the loss, and what it changed of its state handed out."""
    x, y = classification()
    rngs = nnx.Rngs(0)
    layers = nnx.Linear(8, 32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs), nnx.relu
    model = nnx.Sequential(*layers, nnx.Dropout(0.1, rngs=rngs), nnx.Linear(32, 3, rngs=rngs))
    prune = Feather(sparsity=0.8, end_step=10)
    tx = optax.chain(prune.scale_gradients(), optax.sgd(0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        threshold = prune.threshold(params, optimizer.step[...])

        def loss_fn(params):
            net = nnx.merge(graph, prune.sparsify(params, threshold), rest, copy=True)
            return cross_entropy(net(x), y), nnx.state(net, nnx.Not(nnx.Param))

        (loss, rest), grads = nnx.value_and_grad(loss_fn, has_aux=True)(params)
        nnx.update(model, rest)
        optimizer.update(model, grads, threshold=threshold)
        return loss

    means, counts = [model.layers[1].mean[...].copy()], [int(model.layers[3].rngs.count[...])]
    losses = []
    for _ in range(20):
        losses.append(float(train_step(model, optimizer)))
        means.append(model.layers[1].mean[...].copy())
        counts.append(int(model.layers[3].rngs.count[...]))
    assert losses[-1] < losses[0]
    assert counts == list(range(21))
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(means))


def test_threshold_operator_on_one_kernel_of_an_nnx_module():
    class Sparse(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Param(jax.random.normal(rngs.params(), (8, 5)))

        def __call__(self, x):
            return x @ threshold_operator(self.kernel[...], 0.7)

    x, _ = classification()
    model = Sparse(nnx.Rngs(0))
    kernel = np.asarray(model.kernel[...])
    kept = np.abs(kernel) > np.float32(0.7)
    cubes = np.where(kept, np.abs(kernel.astype(float)) ** 3 - 0.7**3, 0)
    np.testing.assert_allclose(
        model(x), x @ (np.sign(kernel) * np.cbrt(cubes)), rtol=1e-4, atol=1e-5
    )
    grads = nnx.jit(nnx.grad(lambda model: model(x).sum()))(model)
    expected = np.repeat(x.sum(0)[:, None], 5, 1)
    np.testing.assert_allclose(grads["kernel"][...], expected, rtol=1e-5, atol=1e-5)
