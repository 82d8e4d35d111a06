"""The one line in the loops of Flax, Equinox, Haiku and JAX itself, on one device and on many."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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


# ---- JAX's own ways to run a step ----

PLAIN = {"kernel": RNG.normal(size=(8, 24)).astype(np.float32), "bias": np.zeros(24, np.float32)}
TARGET = RNG.normal(size=(32, 24)).astype(np.float32)


def mean_squared(params, x=X, y=TARGET):
    return jnp.mean((jnp.tanh(x @ params["kernel"] + params["bias"]) - y) ** 2)


def plain_step(tx, axis_name=None):
    def step(params, opt_state, x=X, y=TARGET):
        grads = jax.grad(mean_squared)(params, x, y)
        if axis_name:
            grads = jax.lax.pmean(grads, axis_name)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


@pytest.fixture(scope="module")
def expected():
    """Eight steps on one device, in float32."""
    tx = PRUNE.wrap(optax.adam(0.01))
    step = jax.jit(plain_step(tx))
    params, opt_state = PLAIN, tx.init(PLAIN)
    for _ in range(STEPS):
        params, opt_state = step(params, opt_state)
    assert_finalized(params, opt_state)
    return params


def assert_same(params, expected):
    for name in expected:
        actual = np.asarray(jax.device_get(params[name]))
        np.testing.assert_array_equal(actual == 0, np.asarray(expected[name]) == 0)
        np.testing.assert_allclose(actual, expected[name], rtol=1e-4, atol=1e-5)


def test_donation_of_parameters_and_state(expected):
    """The state holds no buffer of the parameters, whether `init` is compiled or not."""
    tx = PRUNE.wrap(optax.adam(0.01))
    step = jax.jit(plain_step(tx), donate_argnums=(0, 1))
    for init in (tx.init, jax.jit(tx.init)):
        params = jax.tree.map(jnp.array, PLAIN)
        opt_state = init(params)
        for _ in range(STEPS):
            params, opt_state = step(params, opt_state)
        assert_same(params, expected)


def test_pmap(expected):
    tx = PRUNE.wrap(optax.adam(0.01))
    step = jax.pmap(
        plain_step(tx, "batch"), axis_name="batch", in_axes=(None, None, 0, 0), out_axes=None
    )
    params, opt_state = PLAIN, tx.init(PLAIN)
    for _ in range(STEPS):
        shards = [batch.reshape(8, 4, -1) for batch in (X, TARGET)]
        params, opt_state = step(params, opt_state, *shards)
    assert_same(params, expected)


def test_vmap_over_an_ensemble(expected):
    tx = PRUNE.wrap(optax.adam(0.01))
    scales = jnp.array([1.0, 0.5])[:, None, None]
    params = {"kernel": PLAIN["kernel"] * scales, "bias": jnp.zeros((2, 24))}
    opt_state = jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(plain_step(tx)))
    for _ in range(STEPS):
        params, opt_state = step(params, opt_state)
    assert_same(jax.tree.map(lambda leaf: leaf[0], params), expected)
    np.testing.assert_array_equal(jnp.sum(params["kernel"] == 0, axis=(1, 2)), [144, 144])


@pytest.mark.parametrize(
    ("axis_type", "spec"),
    [
        (AxisType.Auto, P(None, "y")),
        (AxisType.Explicit, P(None, "y")),
        (AxisType.Explicit, P("x", "y")),
    ],
)
def test_sharded_weights(expected, axis_type, spec):
    """The dense weights, and what the inner optimiser keeps of them, lie as the parameters do."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    shardings = {"kernel": NamedSharding(mesh, spec), "bias": NamedSharding(mesh, P())}
    params = jax.device_put(PLAIN, shardings)
    x, y = (jax.device_put(batch, NamedSharding(mesh, P())) for batch in (X, TARGET))
    tx = PRUNE.wrap(optax.adam(0.01))

    def loss_fn(params, x, y):
        if axis_type == AxisType.Explicit:  # where a product says itself how it is sharded
            params = jax.sharding.reshard(params, NamedSharding(mesh, P()))
        return mean_squared(params, x, y)

    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for init in (tx.init, jax.jit(tx.init)):
        opt_state = init(params)
        after = params
        for _ in range(STEPS):
            after, opt_state = step(after, opt_state, x, y)
        assert_same(after, expected)
        for tree in (after, opt_state.dense, optax.tree.get(opt_state, "mu")):
            assert tree["kernel"].sharding.is_equivalent_to(shardings["kernel"], 2)


def test_tree_map_params_finds_the_dense_weights():
    """How shardings of an optimiser's state are derived from those of the parameters."""
    tx = optax.chain(optax.clip(1.0), PRUNE.wrap(optax.adam(0.01)))
    names = {"kernel": "of the kernel", "bias": "of the bias"}
    state = optax.tree.map_params(
        tx, lambda _, name: name, tx.init(PLAIN), names, transform_non_params=lambda _: "other"
    )
    assert optax.tree.get(state, "dense") == names
    assert optax.tree.get(state, "mu") == names
    assert (optax.tree.get(state, "step"), optax.tree.get(state, "threshold")) == ("other",) * 2


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_weights(check_vma):
    """Weights that vary over a manual axis have one threshold, if the axis is named."""
    target = RNG.normal(size=(8, 24)).astype(np.float32) * np.linspace(0.1, 3, 8)[:, None]
    prune = Feather(0.75, end_step=4)

    def train(kernel, target, axis_name=None):
        tx = prune.wrap(optax.sgd(0.3, momentum=0.9), axis_name=axis_name)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update({"kernel": params["kernel"] - target}, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"kernel": kernel}
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
        return params["kernel"], state.threshold

    expected, threshold = jax.jit(train)(PLAIN["kernel"], target)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        lambda *args: train(*args, axis_name="x"),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=(P("x"), P()),
        check_vma=check_vma,
    )
    kernel, sharded_threshold = jax.jit(sharded)(PLAIN["kernel"], target)
    assert sharded_threshold == threshold
    np.testing.assert_array_equal(kernel, expected)
    assert jnp.sum(kernel == 0) == 144
    if check_vma:
        unnamed = jax.shard_map(train, mesh=mesh, in_specs=P("x"), out_specs=(P("x"), P()))
        with pytest.raises(ValueError, match="axis_name"):
            jax.jit(unnamed)(PLAIN["kernel"], target)
