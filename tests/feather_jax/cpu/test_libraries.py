"""Networks as users of other libraries write them, compiled, against XLA."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from feather_jax import cpu
from tests.feather_jax.cpu.networks import assert_close

KEY = jax.random.key(0)


def images(*shape):
    return np.asarray(jax.random.normal(KEY, shape))


def filled(tree):
    """NumPy arrays of a pytree's shapes: a fifth of those with several axes is left, the others
    are around 1."""
    rng = np.random.default_rng(0)

    def leaf(x):
        if not hasattr(x, "shape"):
            return x
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return np.zeros(x.shape, x.dtype)
        noise = rng.standard_normal(x.shape).astype(np.float32)
        return noise * (np.abs(noise) > 1.3) if len(x.shape) > 1 else 1 + np.abs(noise) / 10

    return jax.tree.map(leaf, tree)


def initialised(init, *arguments):
    """Variables without the time that initialising them takes."""
    return filled(jax.eval_shape(init, KEY, *arguments))


def check(fn, *arguments):
    """Compiled, `fn` is what it is by XLA."""
    results = cpu.compile(fn, *arguments)(*arguments)
    assert_close(results, jax.jit(lambda *each: fn(*each))(*arguments))


class LinenResNet(nn.Module):
    """Of bottlenecks, with explicit padding in the stem and norms passed around as partials."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.float32)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )
        x = conv(8, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage in range(2):
            for block in range(2):
                strides = (2, 2) if stage and not block else (1, 1)
                residual = x
                y = nn.relu(norm()(conv(8 << stage, (1, 1))(x)))
                y = nn.relu(norm()(conv(8 << stage, (3, 3), strides)(y)))
                y = norm(scale_init=nn.initializers.zeros_init())(conv(32 << stage, (1, 1))(y))
                if residual.shape != y.shape:
                    residual = norm(name=f"norm_proj{stage}")(
                        conv(32 << stage, (1, 1), strides, name=f"conv_proj{stage}")(residual)
                    )
                x = nn.relu(residual + y)
        x = jnp.mean(x, axis=(1, 2))
        return jnp.asarray(nn.Dense(10)(x), jnp.float32)


class UNet(nn.Module):
    """Down and up again: a transposed convolution, an enlarged image, a channel attention."""

    @nn.compact
    def __call__(self, x):
        down = nn.silu(nn.GroupNorm(2)(nn.Conv(8, (3, 3), 2)(x)))
        up = nn.ConvTranspose(4, (3, 3), (2, 2))(down)
        larger = jax.image.resize(down, (*x.shape[:3], 8), "nearest")
        x = jnp.concatenate([x, up, larger], axis=-1)
        gate = nn.hard_sigmoid(nn.Dense(x.shape[-1])(x.mean((1, 2), keepdims=True)))
        return nn.Conv(3, (3, 3), padding="CIRCULAR")(nn.PReLU()(x * gate))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, tokens, mask):
        y = nn.LayerNorm()(tokens)
        attention = nn.MultiHeadDotProductAttention(num_heads=2, deterministic=True)
        x = tokens + attention(y, y, mask=mask)
        y = nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)), approximate=False))
        return nn.LayerNorm()(x + y)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.GRUCell(6))(x)[:, -1]


@pytest.mark.parametrize("model", [LinenResNet(), UNet()])
def test_linen(model):
    x = images(2, 18, 22, 3)
    variables = initialised(model.init, x)
    check(functools.partial(model.apply, variables), x)


def test_attention_with_a_mask():
    tokens, mask = images(2, 7, 8), nn.make_causal_mask(jnp.ones((2, 7)))
    variables = initialised(Encoder().init, tokens, mask)
    check(lambda x: Encoder().apply(variables, x, mask), tokens)


def test_a_loop_over_time():
    x = images(2, 5, 4)
    variables = initialised(Recurrent().init, x)
    check(lambda x: Recurrent().apply(variables, x), x)


def test_nnx_with_batch_norm():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)])
            self.norms = nnx.List([nnx.BatchNorm(16, rngs=rngs) for _ in range(2)])
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            for layer, norm in zip(self.layers, self.norms, strict=True):
                x = self.dropout(nnx.relu(norm(layer(x))))
            return nnx.log_softmax(self.head(x))

    net = Net(nnx.Rngs(0))
    nnx.update(net, filled(nnx.state(net, (nnx.Param, nnx.BatchStat))))
    net.eval()
    check(net, images(5, 6))


def test_equinox():
    class Net(eqx.Module):
        layers: list
        norm: eqx.nn.BatchNorm
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.layers = [
                eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]),
                eqx.nn.PReLU(0.2),
                eqx.nn.MaxPool2d(2, 2),
                eqx.nn.Conv2d(8, 8, 3, groups=8, dilation=2, key=keys[1]),
                eqx.nn.GroupNorm(4, 8),
                eqx.nn.AvgPool2d(2, 1),
            ]
            self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
            self.head = eqx.nn.Linear(8, 5, key=keys[3])

        def __call__(self, x, state):
            for layer in self.layers:
                x = layer(x)
            x, state = self.norm(x, state)
            return self.head(jax.nn.gelu(x).mean((1, 2)))

    net, state = filled(eqx.filter_eval_shape(eqx.nn.make_with_state(Net), KEY))
    net = eqx.nn.inference_mode(net)
    check(jax.vmap(lambda x: net(x, state), axis_name="batch"), images(2, 3, 14, 13))


def test_haiku():
    def forward(x, train):
        x = jax.nn.relu(hk.Conv2D(8, 3, stride=2)(x))
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=train)
        x = hk.avg_pool(x, (2, 2, 1), (2, 2, 1), "SAME")
        return hk.nets.MLP([16, 4])(hk.Flatten()(x))

    network = hk.without_apply_rng(hk.transform_with_state(forward))
    x = images(2, 9, 9, 3)
    params, state = initialised(functools.partial(network.init, train=True), x)
    check(lambda x: network.apply(params, state, x, train=False)[0], x)


def test_plain_functions_of_pytrees():
    weights = {"first": images(4, 8) * (images(4, 8) > 0.5), "second": images(8, 2)}

    def fn(batch, scale):
        hidden = jnp.sin(batch["x"] @ weights["first"]) ** 2
        logits = hidden @ weights["second"] * scale
        return {"logits": logits, "class": logits.argmax(-1), "best": (logits.max(-1),)}

    check(fn, {"x": images(3, 4)}, np.float32(2))
