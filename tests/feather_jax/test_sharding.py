"""One threshold from weights that are spread over devices, and little said between these."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import feather_jax as feather
from tests.feather_jax.sorting import sorted_threshold

SPARSITY = 0.9
prune = feather.Feather(sparsity=SPARSITY, end_step=10)


def mesh_of(shape, kind):
    names = ("x",) if len(shape) == 1 else ("d", "t")
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def weights(*shape, seed=0):
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.standard_normal(shape[-1]))
    return (rng.standard_normal(shape) * scales).astype(np.float32)


# One axis or several, sharded over one axis of the mesh or both; stacked layers, convolutions.
LAYOUTS = {
    "first": ((8,), (64, 32), P("x", None)),
    "last": ((8,), (64, 32), P(None, "x")),
    "neither": ((8,), (64, 32), P()),
    "both": ((4, 2), (64, 32), P("d", "t")),
    "one over two": ((4, 2), (64, 32), P(("d", "t"), None)),
    "stacked": ((8,), (3, 64, 32), P(None, "x", None)),
    "stacked by layer": ((4, 2), (4, 64, 32), P("d", None, "t")),
    "convolution": ((8,), (3, 3, 16, 32), P(None, None, None, "x")),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threshold_and_finalize_of_sharded_weights(kind, layout):
    shape, sizes, spec = LAYOUTS[layout]
    mesh = mesh_of(shape, kind)
    w, bias = weights(*sizes), np.ones(32, np.float32)
    sharding = NamedSharding(mesh, spec)
    params = {
        "kernel": jax.device_put(w, sharding),
        "bias": jax.device_put(bias, NamedSharding(mesh, P())),
    }
    expected = sorted_threshold([w], SPARSITY)
    for wrapped in (jax.jit, lambda f: f):
        assert wrapped(lambda p: prune.threshold(p, 10))(params) == expected
        sparse = wrapped(prune.finalize)(params)
        assert sparse["kernel"].sharding.is_equivalent_to(sharding, len(sizes))
        np.testing.assert_array_equal(np.asarray(sparse["kernel"]) != 0, np.abs(w) > expected)


def test_inside_set_mesh():
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of((4, 2), kind)
        w = weights(64, 32)
        with jax.set_mesh(mesh):
            params = {
                "a": {"kernel": jax.device_put(w, P("d", "t"))},
                "b": {"kernel": jnp.asarray(w[:4])},
            }
            for wrapped in (jax.jit, lambda f: f):
                threshold = wrapped(lambda p: prune.threshold(p, 10))(params)
                assert threshold == sorted_threshold([w, w[:4]], SPARSITY)
                sparse = wrapped(prune.finalize)(params)["a"]["kernel"]
                np.testing.assert_array_equal(np.asarray(sparse) != 0, np.abs(w) > threshold)


def communicated(compiled):
    """The bytes of what the collectives of a program give, each counted once."""
    collectives = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    total = 0
    for line in re.findall(rf"= (.*?) (?:{collectives})(?:-start)?\(", compiled.as_text()):
        for sizes in re.findall(r"[a-z]+\d+\[([\d,]*)\]", line):
            total += 4 * int(np.prod([int(size) for size in sizes.split(",") if size]))
    return total


LARGE = {
    "dense, first axis": ((8,), (1024, 512), P("x", None)),
    "dense, last axis": ((8,), (1024, 512), P(None, "x")),
    "dense, both axes": ((4, 2), (1024, 512), P("d", "t")),
    "dense, transposed": ((4, 2), (1024, 512), P("t", "d")),
    "no power of two": ((8,), (1000, 600), P("x", None)),
    "stacked, FSDP": ((8,), (6, 256, 512), P(None, "x", None)),
    "stacked, both": ((4, 2), (6, 256, 512), P(None, "d", "t")),
    "stacked, by layer": ((8,), (8, 256, 512), P("x", None, None)),
    "convolution, outputs": ((8,), (3, 3, 256, 256), P(None, None, None, "x")),
    "convolution, inputs": ((8,), (3, 3, 256, 256), P(None, None, "x", None)),
    "small": ((8,), (256, 128), P(None, "x")),
    "attention, heads": ((8,), (512, 8, 64), P(None, "x", None)),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", LARGE)
def test_weights_are_not_gathered(kind, layout):
    shape, sizes, spec = LARGE[layout]
    sharding = NamedSharding(mesh_of(shape, kind), spec)
    leaf = jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding)
    params = {f"l{i}": {"kernel": leaf} for i in range(4)}
    compiled = jax.jit(lambda p: prune.threshold(p, 10)).lower(params).compile()
    weights = 16 * np.prod(sizes)
    assert 1000 < communicated(compiled) < min(2e5, weights / 4)
    assert compiled.memory_analysis().temp_size_in_bytes < min(3e5, weights / 4)


def test_nothing_is_gathered_where_shardings_are_given_to_jit():
    sharding = NamedSharding(mesh_of((8,), AxisType.Auto), P(None, "x"))
    params = {f"l{i}": {"kernel": jax.ShapeDtypeStruct((512, 256), jnp.float32)} for i in range(8)}
    threshold = jax.jit(lambda p: prune.threshold(p, 10), in_shardings=sharding)
    assert communicated(threshold.lower(params).compile()) < 2e5


def test_fewer_values_drawn_along_a_sharded_axis_than_devices():
    # A transformer's kernels under FSDP; what is drawn of the attention's is (2, 8, 8) of the axes.
    block = {
        "query": ((128, 8, 16), P("x", None, None)),
        "key": ((128, 8, 16), P("x", None, None)),
        "value": ((128, 8, 16), P("x", None, None)),
        "out": ((8, 16, 128), P(None, None, "x")),
        "up": ((128, 512), P("x", None)),
        "down": ((512, 128), P("x", None)),
    }
    mesh = mesh_of((8,), AxisType.Auto)
    params, arrays = {}, []
    for i, (name, (sizes, spec)) in enumerate([*block.items()] * 2):
        arrays.append(weights(*sizes, seed=i))
        kernel = jax.device_put(arrays[-1], NamedSharding(mesh, spec))
        params[f"{name}{i}"] = {"kernel": kernel}
    compiled = jax.jit(lambda p: prune.threshold(p, 10)).lower(params).compile()
    assert compiled(params) == sorted_threshold(arrays, SPARSITY)
    assert communicated(compiled) < 1e5
    # By which XLA would move what a device has too much, warning of a "full rematerialization".
    assert "collective-permute" not in compiled.as_text()


def mapped(select, mesh, specs, *, check_vma=True):
    """`select` inside shard_map, its result of every device."""

    def one(params):
        return select(params)[None]

    names = mesh.axis_names
    if check_vma:
        # What is the same on all devices is made to vary, to be looked at on each.
        one = lambda params: lax.pcast(select(params)[None], names, to="varying")  # noqa: E731
    return jax.jit(
        jax.shard_map(one, mesh=mesh, in_specs=(specs,), out_specs=P(names), check_vma=check_vma)
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_one_threshold_is_selected_from_all_devices(check_vma):
    mesh = mesh_of((8,), AxisType.Auto)
    params = {"a": {"kernel": weights(64, 32)}, "b": {"kernel": weights(3, 3, 8, 16, seed=1)}}
    specs = {"a": {"kernel": P("x")}, "b": {"kernel": P(None, None, None, "x")}}

    def select(params):
        return feather.global_threshold(params, SPARSITY, axis_name="x")

    found = mapped(select, mesh, specs, check_vma=check_vma)(params)
    arrays = [leaf["kernel"] for leaf in params.values()]
    np.testing.assert_array_equal(found, sorted_threshold(arrays, SPARSITY))


def test_what_does_not_vary_is_counted_once():
    mesh = mesh_of((4, 2), AxisType.Auto)
    params = {name: {"kernel": weights(16, 8 + 8 * i, seed=i)} for i, name in enumerate("abcd")}
    each = {"a": P("d", "t"), "b": P(None, "t"), "c": P(), "d": P("d")}
    specs = {name: {"kernel": spec} for name, spec in each.items()}

    def select(params):
        return feather.global_threshold(params, SPARSITY, axis_name=("d", "t"))

    found = mapped(select, mesh, specs)(params)
    arrays = [leaf["kernel"] for leaf in params.values()]
    np.testing.assert_array_equal(found, sorted_threshold(arrays, SPARSITY))


def test_weights_that_vary_over_an_axis_that_is_not_named_are_refused():
    mesh = mesh_of((4, 2), AxisType.Auto)
    params = {"kernel": weights(16, 8)}
    for axis_name in (None, "d"):
        select = lambda p, name=axis_name: feather.global_threshold(p, SPARSITY, axis_name=name)  # noqa: E731
        with pytest.raises(ValueError, match=r"varies over the manual axes .*'t'.*axis_name="):
            mapped(select, mesh, {"kernel": P("d", "t")})(params)


def test_manual_over_one_axis_and_sharded_over_another():
    mesh = mesh_of((4, 2), AxisType.Auto)
    w = weights(64, 32)

    def select(params):
        return feather.global_threshold(params, SPARSITY, axis_name="d")

    mapped = jax.shard_map(select, mesh=mesh, in_specs=P("d"), out_specs=P(), axis_names={"d"})
    params = {"kernel": jax.device_put(w, NamedSharding(mesh, P("d", "t")))}
    assert jax.jit(mapped)(params) == sorted_threshold([w], SPARSITY)


def test_over_the_axis_of_pmap_and_of_vmap():
    w = weights(8, 16, 32)

    def select(params):
        return feather.global_threshold(params, SPARSITY, axis_name="x")

    for mapped in (jax.pmap(select, axis_name="x"), jax.vmap(select, axis_name="x")):
        np.testing.assert_array_equal(mapped({"kernel": w}), sorted_threshold([w], SPARSITY))
