"""Counts against NumPy's, and the table as people see it."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from feather_jax import Feather, path_mask, summarize
from feather_jax.summary import format_table


def network():
    rng = np.random.default_rng(0)

    def array(*shape):
        values = rng.normal(size=shape)
        return np.float32(np.where(rng.uniform(size=shape) < 0.7, 0, values))

    return {
        "Conv_0": {"kernel": array(3, 3, 2, 8), "bias": array(8)},
        "Dense_0": {"kernel": jnp.asarray(array(8, 5), jnp.bfloat16), "bias": array(5)},
        "scale": np.float32(1),
    }


def test_counts_are_numpys():
    params = network()
    summary = summarize(params)
    names = ["Conv_0/bias", "Conv_0/kernel", "Dense_0/bias", "Dense_0/kernel", "scale"]
    assert [layer.name for layer in summary.layers] == names
    assert [layer.prunable for layer in summary.layers] == [False, True, False, True, False]
    for layer, leaf in zip(summary.layers, jax.tree.leaves(params), strict=True):
        values = np.asarray(leaf, np.float32)
        assert layer.shape == values.shape
        assert layer.weights == values.size
        assert layer.nonzero == np.sum(values != 0)
        assert layer.sparsity == pytest.approx(np.mean(values == 0))
    conv, dense = (params[name]["kernel"].astype(np.float32) for name in ("Conv_0", "Dense_0"))
    assert summary.parameters == 144 + 8 + 40 + 5 + 1
    assert summary.prunable == 144 + 40
    assert summary.nonzero == np.sum(conv != 0) + np.sum(dense != 0)
    zeros = np.sum(conv == 0) + np.sum(dense == 0)
    assert summary.sparsity == pytest.approx(zeros / 184)


def test_a_mask_chooses_what_is_prunable():
    params = network()
    summary = summarize(
        params, prunable=lambda params: {**dict.fromkeys(params, False), "Dense_0": True}
    )
    assert summary.prunable == 45
    assert [layer.prunable for layer in summary.layers] == [False, False, True, True, False]
    with pytest.raises(ValueError, match="must have the structure of the parameters"):
        summarize(params, prunable=[True])


def test_zeros_of_either_sign_and_nan():
    kernel = np.float32([[0.0, -0.0, np.nan, np.inf, 1e-45]])
    assert summarize({"kernel": kernel}).nonzero == 3


def test_prints_as_a_table():
    kernel = np.zeros((100, 200), np.float32)
    kernel[:, :10] = 1
    params = {"Dense_0": {"kernel": kernel, "bias": np.ones(200, np.float32)}, "steps": np.int32(3)}
    assert str(summarize(params)).splitlines() == [
        "layer             shape  weights  non-zero  sparsity",
        "----------------------------------------------------",
        "Dense_0/kernel  100x200   20,000     1,000    95.00%",
        "not prunable                 201",
        "all prunable              20,000     1,000    95.00%",
        "1 in 20.0 prunable weights is left.",
    ]


def test_edges_print_too():
    nothing_left = str(summarize({"kernel": np.zeros((2, 2), np.float32)}))
    assert nothing_left.splitlines()[-2].split() == ["all", "prunable", "4", "0", "100.00%"]
    nothing_prunable = summarize({"bias": np.ones(3, np.float32)})
    assert nothing_prunable.sparsity == 0
    assert str(nothing_prunable).splitlines()[-1].split() == ["all", "prunable", "0", "0", "0.00%"]
    empty = summarize({"kernel": np.ones((0, 3), np.float32)})
    assert (empty.layers[0].sparsity, empty.layers[0].weights) == (0, 0)
    assert summarize({}).layers == ()
    assert str(summarize({})).splitlines()[0].startswith("layer")
    scalar = summarize({"kernel": np.float32(2)}, prunable=True)
    assert "scalar" in str(scalar)


def test_is_plain_data():
    summary = summarize(network())
    data = json.loads(json.dumps(dataclasses.asdict(summary)))
    assert data["prunable"] == 184
    assert data["layers"][1]["name"] == "Conv_0/kernel"
    assert data["layers"][1]["shape"] == [3, 3, 2, 8]
    with pytest.raises(dataclasses.FrozenInstanceError):
        summary.nonzero = 0


def test_layers_that_are_nearly_gone_are_named():
    kernels = {name: np.zeros((30, 20), np.float32) for name in "abcd"}
    for name, left in {"a": 600, "b": 20, "c": 19}.items():
        kernels[name].flat[:left] = 1
    summary = summarize({name: {"kernel": kernel} for name, kernel in kernels.items()})
    assert summary.notes == (
        "Pruned whole: d/kernel.",
        "Pruned nearly whole: c/kernel (19 of 600 left).",
    )
    assert str(summary).splitlines()[-2:] == list(summary.notes)
    vector = summarize({"scale": np.float32([0, 0, 1])}, prunable=True)
    assert vector.notes == ()
    many = summarize({f"l{i}": {"kernel": np.zeros((2, 2), np.float32)} for i in range(8)})
    names = "l0/kernel, l1/kernel, l2/kernel, l3/kernel, l4/kernel and 3 more"
    assert many.notes == (f"Pruned whole: {names}.",)


def test_large_matrices_that_the_mask_leaves_out_are_named_with_their_share():
    ones = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
    params = {
        "kernel1": ones(3, 64),
        "kernel2": ones(64, 64),
        "Dense_0": {"kernel": np.eye(64, 4, dtype=np.float32), "bias": ones(4)},
        "pair": ones(2, 2),
        "bias": ones(500),
        "table": np.ones((64, 64), np.int32),
        "stored": {"kernel": np.ones((64, 64), jnp.float8_e4m3fn)},
    }
    assert summarize(params).notes == (
        "That is 98.4% of 1.9% of the parameters: not prunable are kernel1 (3x64, 1.4%), kernel2 "
        "(64x64, 30.9%); prunable=path_mask(...) chooses others.",
    )
    all_of_them = path_mask(["kernel.", ".*/kernel"], exclude="stored/kernel")
    with pytest.raises(ValueError, match="exclude holds 'stored/kernel'"):
        summarize(params, prunable=all_of_them)
    assert summarize(params, prunable=path_mask(["kernel.", "Dense_0/kernel"])).notes == ()


def test_ties_that_prune_more_than_was_asked_for_are_told():
    kernel = np.random.default_rng(0).uniform(1, 2, size=(1000, 100)).astype(jnp.bfloat16)
    prune = Feather(0.9, end_step=0)
    final = prune.finalize({"kernel": jnp.asarray(kernel)})
    zeros = int(jnp.sum(final["kernel"] == 0))
    assert zeros > 90_100
    assert summarize(final).notes == ()
    (note,) = summarize(final, sparsity=0.9).notes
    assert note.startswith(
        f"{zeros:,} prunable weights are zero where 90,000 were asked for: those"
    )
    exact = prune.finalize({"kernel": np.float32(np.arange(1, 100_001)).reshape(1000, 100)})
    assert summarize(exact, sparsity=0.9).notes == ()
    assert summarize({"kernel": np.eye(2)}, sparsity=0.0).notes[0].startswith("2 prunable weights")
    assert summarize({"bias": np.ones(3)}, sparsity=0.9).notes == ()


def test_keys_and_functions_are_passed_over():
    model = eqx.nn.MLP(2, 1, 3, depth=1, key=jax.random.key(0))
    summary = summarize(model, prunable=path_mask(["layers/.*/weight"]))
    assert [layer.name for layer in summary.layers if layer.prunable] == [
        "layers/0/weight",
        "layers/1/weight",
    ]
    assert summary.parameters == 6 + 3 + 3 + 1
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), dropout, jax.nn.relu)
    for tree in (model, nnx.state(model)):
        summary = summarize(tree)
        assert {layer.name for layer in summary.layers} == {
            "layers/0/bias",
            "layers/0/kernel",
            "layers/1/rngs/count",
        }
        assert (summary.prunable, summary.parameters) == (6, 10)


def test_agrees_with_finalize():
    rng = np.random.default_rng(1)
    params = {"kernel": rng.normal(size=(7, 143)).astype(np.float32)}
    summary = summarize(Feather(0.9, end_step=1).finalize(params))
    assert summary.prunable - summary.nonzero == 900 + 1
    assert summary.sparsity == pytest.approx(0.9, abs=1e-3)


def test_format_table_aligns():
    table = format_table(("a", "long header"), [("first cell", "1"), ("b", "22")])
    assert table == (
        "a           long header\n"
        "-----------------------\n"
        "first cell            1\n"
        "b                    22"
    )
