"""The one line in the loops of Flax, Equinox, Haiku and JAX itself, on one device and on many."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

from feather_jax import Feather, path_mask
from feather_jax.masks import path_name, prunable_leaves

STEPS = 8
PRUNE = Feather(0.75, end_step=4)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 8)).astype(np.float32)
Y = RNG.integers(0, 3, 32)


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def assert_finalized(params, opt_state, prune=PRUNE):
    """The parameters are what `finalize` leaves of the dense weights."""
    sparse, final = (
        jnp.concatenate([jnp.ravel(leaf) for leaf in prunable_leaves(tree, prune.prunable)])
        for tree in (params, prune.finalize(optax.tree.get(opt_state, "dense")))
    )
    np.testing.assert_array_equal(sparse == 0, final == 0)
    np.testing.assert_allclose(sparse, final, rtol=1e-5, atol=2e-7)
    zeros = int(prune.sparsity * (sparse.size - 1)) + 1
    assert jnp.sum(sparse == 0) == zeros


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x)


def test_linen_train_state():
    class State(TrainState):
        batch_stats: object

    model = Network()
    variables = model.init(jax.random.key(0), X, train=False)
    state = State.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=PRUNE.wrap(optax.adam(0.01)),
    )

    def train_step(state):
        def loss_fn(params):
            logits, changed = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                X,
                rngs={"dropout": jax.random.fold_in(jax.random.key(1), state.step)},
                mutable=["batch_stats"],
            )
            return cross_entropy(logits), changed["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss

    train_step = jax.jit(train_step, donate_argnums=0)
    losses = []
    for _ in range(STEPS):
        state, loss = train_step(state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert state.step == optax.tree.get(state.opt_state, "step") == STEPS
    assert_finalized(state.params, state.opt_state)
    logits = state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, X, False)
    assert np.isfinite(cross_entropy(logits))


class Stack(nnx.Module):
    """Batch statistics, dropout's keys, and two layers stacked and scanned over."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return nnx.Linear(16, 16, rngs=rngs)

        self.layers = layers(rngs)
        self.last = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.first(x))))

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return nnx.relu(layer(x))

        return self.last(forward(self.layers, x))


def test_nnx_optimizer_of_a_stateful_model():
    model = Stack(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, PRUNE.wrap(optax.adam(0.01)), wrt=nnx.Param)
    mean, count = model.norm.mean[...].copy(), model.dropout.rngs.count[...].copy()

    @nnx.jit
    def train_step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(X)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(train_step(model, optimizer)) for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    assert optimizer.opt_state.step[...] == STEPS
    assert_finalized(nnx.state(model, nnx.Param), nnx.as_pure(optimizer.opt_state))
    assert not jnp.array_equal(model.norm.mean[...], mean)
    assert model.dropout.rngs.count[...] > count
    model.eval()
    assert np.isfinite(cross_entropy(model(X)))


def test_nnx_with_a_mask_that_is_a_state():
    model = nnx.Sequential(
        nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 3, rngs=nnx.Rngs(1))
    )
    params = nnx.state(model, nnx.Param)
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path) == "layers/0/kernel", params
    )
    prune = Feather(0.75, end_step=0, prunable=mask)
    optimizer = nnx.Optimizer(model, prune.wrap(optax.sgd(0.1)), wrt=nnx.Param)
    grads = nnx.grad(lambda model: cross_entropy(model(X)))(model)
    optimizer.update(model, grads)
    assert jnp.sum(model.layers[0].kernel[...] == 0) == 96
    assert jnp.all(model.layers[2].kernel[...] != 0)


def test_equinox():
    model = eqx.nn.MLP(8, 3, 16, depth=2, key=jax.random.key(0))
    prune = Feather(0.75, end_step=4, prunable=path_mask(include=["layers/.*/weight"]))
    tx = prune.wrap(optax.adam(0.01))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all")
    def train_step(model, opt_state):
        loss, grads = eqx.filter_value_and_grad(lambda model: cross_entropy(jax.vmap(model)(X)))(
            model
        )
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), opt_state, loss

    losses = []
    for _ in range(STEPS):
        model, opt_state, loss = train_step(model, opt_state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert_finalized(model, opt_state, prune)


def test_equinox_of_a_whole_model_and_of_a_frozen_half():
    """Parameters with functions in them, and with None for a frozen half."""
    model = eqx.nn.MLP(8, 3, 16, depth=1, key=jax.random.key(0))
    prune = Feather(0.75, end_step=0, prunable=path_mask(include=["layers/.*/weight"]))
    tx = prune.wrap(optax.sgd(0.1))
    grads = eqx.filter_grad(lambda model: cross_entropy(jax.vmap(model)(X)))(model)
    updates, opt_state = tx.update(grads, tx.init(eqx.filter(model, eqx.is_inexact_array)), model)
    assert_finalized(eqx.apply_updates(model, updates), opt_state, prune)

    where = eqx.tree_at(lambda m: m.layers[0].weight, jax.tree.map(lambda _: False, model), True)
    trained, _ = eqx.partition(model, where)
    updates, opt_state = tx.update(eqx.filter(grads, where), tx.init(trained), trained)
    after = eqx.apply_updates(model, updates)
    assert jnp.sum(after.layers[0].weight == 0) == int(0.75 * 127) + 1
    assert after.layers[1].weight is model.layers[1].weight


def test_haiku():
    network = hk.without_apply_rng(
        hk.transform(lambda x: hk.Sequential([hk.Linear(16), jax.nn.relu, hk.Linear(3)])(x))
    )
    params = network.init(jax.random.key(0), X)
    prune = Feather(0.75, end_step=4, prunable=path_mask(include=[".*/w"]))
    tx = prune.wrap(optax.adam(0.01))

    @jax.jit
    def train_step(params, opt_state):
        loss, grads = jax.value_and_grad(lambda params: cross_entropy(network.apply(params, X)))(
            params
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    for _ in range(STEPS):
        params, opt_state, _ = train_step(params, opt_state)
    assert_finalized(params, opt_state, prune)
