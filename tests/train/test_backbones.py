"""Backbones and blocks, from the configuration to the zeros of the finished model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import feather_jax as feather
from train import backbones, main
from train import config as config_lib
from train.errors import UserError

N_M = {"name": "n_m", "n": 2, "m": 4}


def params():
    """The kernels of a dense layer and of a convolution, the first of which 3 divides."""
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "stem": {"kernel": array(3, 3, 3, 8), "bias": array(8)},
        "head": {"kernel": array(16, 10)},
    }


def macs():
    """Of the kernels of `params` as if the convolution were at 36 positions, the matrix at one."""

    def network(params, images, x):
        images = jax.lax.conv(
            images.transpose(0, 3, 1, 2), params["stem"]["kernel"].T, (1, 1), "VALID"
        )
        return images.sum() + (x @ params["head"]["kernel"]).sum()

    return feather.count_macs(network, params(), jnp.ones((1, 8, 8, 3)), jnp.ones((1, 16)))


@pytest.fixture
def config(tiny):
    """config(**changes): of a short run of a network of dense layers."""
    lenet = {"name": "lenet300", "hidden": [24, 16]}
    return functools.partial(tiny, model=lenet, sparsity=0.5, log_every_steps=11)


@pytest.fixture
def pruning(config):
    """pruning(**changes): what prunes `params` in a run of that configuration."""

    def build(**changes):
        chosen = config(**changes)
        steps = config_lib.steps(chosen, num_train=1437)
        mask = feather.prunable_weights(params())
        prune = backbones.pruning(chosen, steps, params(), mask, macs)
        backbones.check(prune, params())
        return prune

    return build


@pytest.fixture
def trained(tmp_path, config):
    """trained(**changes): the finished model's parameters of a short run."""

    def run(**changes):
        main.run(config(**changes), tmp_path, say=lambda line: None)
        return feather.load(tmp_path / "model.npz")["params"]

    return run


def test_the_default_is_one_threshold_for_all(pruning):
    prune = pruning()
    assert prune.select is feather.global_threshold
    assert prune.magnitude is jnp.abs
    assert prune.threshold(params(), 100).shape == ()


def test_uniform_is_the_sparsity_in_every_layer(pruning):
    final = pruning(backbone={"name": "uniform"}, sparsity=0.9).finalize(params())
    for layer in final.values():
        size = layer["kernel"].size
        assert (layer["kernel"] == 0).sum() == int(0.9 * (size - 1)) + 1


def test_erk_leaves_small_layers_denser(pruning):
    final = pruning(backbone={"name": "erk"}, sparsity=0.7).finalize(params())
    expected = feather.erdos_renyi_kernel(params(), 0.7)
    for name, layer in final.items():
        pruned = (layer["kernel"] == 0).mean()
        assert pruned == pytest.approx(expected[name]["kernel"], abs=1 / 160)


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_macs_is_a_budget_of_multiply_accumulates(pruning, exponent):
    prune = pruning(backbone={"name": "macs", "exponent": exponent}, sparsity=0.75)
    final = prune.finalize(params())
    left = 36 * (final["stem"]["kernel"] != 0).sum() + (final["head"]["kernel"] != 0).sum()
    whole = 36 * 216 + 160
    assert 0.25 * whole - 36 < left <= 0.25 * whole
    dense = (final["head"]["kernel"] != 0).mean()
    assert dense > 0.5 if exponent else dense < 0.5


def test_a_run_with_a_budget_counts_its_own_network(trained):
    kernels = trained(backbone={"name": "macs"}, sparsity=0.8)
    # Every weight of this network is used once an image: a budget of weights.
    left = sum(np.count_nonzero(layer["kernel"]) for layer in kernels.values())
    assert left == int(0.2 * (64 * 24 + 24 * 16 + 16 * 10))


def test_a_run_ends_in_an_n_m_pattern(trained):
    kernels = trained(backbone=N_M)
    for layer in kernels.values():
        kept = (layer["kernel"] != 0).T.reshape(-1, 4).sum(1)
        np.testing.assert_array_equal(kept, 2)


@pytest.mark.filterwarnings("error")
def test_a_run_says_once_what_stays_dense(tmp_path, config):
    said = []
    hidden = {"name": "lenet300", "hidden": [24, 18]}
    main.run(config(backbone=N_M, model=hidden, epochs=0.1), tmp_path, said.append)
    assert [line for line in said if "dense" in line] == [
        "Stay dense, as 4 does not divide them: head/kernel (18 along axis -2)."
    ]


def test_a_run_ends_in_whole_blocks(trained):
    kernels = trained(block=(4, 1), sparsity=0.8)
    kept = [layer["kernel"].T.reshape(-1, 4) != 0 for layer in kernels.values()]
    blocks = np.concatenate(kept)
    np.testing.assert_array_equal(blocks.all(1), blocks.any(1))
    assert blocks.any(1).mean() == pytest.approx(0.2, abs=0.01)


def test_blocks_and_patterns_go_together(pruning):
    prune = pruning(backbone=N_M, block=(1, 2))
    assert isinstance(prune.select, functools.partial)
    head = prune.finalize(params())["head"]["kernel"].reshape(4, 4, 5, 2) != 0
    np.testing.assert_array_equal(head.all(-1), head.any(-1))
    np.testing.assert_array_equal(head.all(-1).sum(1), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"name": "n:m"}}, r"config.backbone.name is 'n:m'; known are global, "),
        ({"backbone": {"name": "n_m", "n": 2}}, r"config.backbone lacks the field 'm'"),
        ({"backbone": N_M | {"k": 1}}, r"config.backbone.k is not a field of n_m"),
        ({"backbone": N_M | {"n": 0}}, r"config.backbone.n is 0, and it must be a whole number"),
        ({"backbone": N_M | {"n": 4}}, r"1 <= n < m, and n is 4 and m is 4"),
        ({"backbone": N_M, "sparsity": 0.9}, r"The sparsity of 2:4 is in \[0, 0.5\]"),
        ({"backbone": {"name": "global", "exponent": 1}}, r"is not a field of global"),
        ({"block": (None, None, None, 1)}, r"config.block: .* one of shape \(16, 10\) has not"),
        ({"backbone": {"name": "asl"}, "block": (4, 1)}, "leave config.block"),
        ({"backbone": {"name": "asl", "weight": 0}}, r"config.backbone.weight is 0"),
    ],
)
def test_mistakes_are_sentences(pruning, changes, message):
    with pytest.raises(UserError, match=message):
        pruning(**changes)


@pytest.mark.parametrize("block", [(), (0, 1), (4, "x"), 4, "4"])
def test_blocks_that_are_none(config, block):
    with pytest.raises(UserError, match=r"config.block is .* must be a tuple of lengths along"):
        config(block=block)


def test_the_threshold_of_a_log_is_the_mean_over_prunable_weights():
    weights, mask = params(), feather.prunable_weights(params())
    one = jnp.float32(0.3)
    assert backbones.mean_threshold(weights, one, mask) is one
    groups = np.random.default_rng(1).uniform(size=(16, 10)).astype(np.float32)
    for stem in (jnp.float32(0.5), {"kernel": jnp.float32(0.5), "bias": jnp.float32(9)}):
        found = backbones.mean_threshold(weights, {"stem": stem, "head": {"kernel": groups}}, mask)
        expected = (216 * 0.5 + groups.sum()) / (216 + 160)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    jitted = jax.jit(
        lambda weights: backbones.mean_threshold(weights, {"stem": 1.0 * one, "head": one}, mask)
    )
    np.testing.assert_allclose(jitted(weights), 0.3, rtol=1e-6)
