"""Programs on disk: what comes back is what was saved, and damage is a sentence."""

import dataclasses
import json
import subprocess
import sys
import typing
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feather_jax import cpu
from feather_jax.cpu import codec, graph, plan, program
from feather_jax.cpu.target import host

rng = np.random.default_rng(0)
KERNEL = (rng.standard_normal((3, 3, 4, 8)) * (rng.random((3, 3, 4, 8)) < 0.3)).astype(np.float32)
HEAD = rng.standard_normal((8, 5)).astype(np.float32)


def network(batch):
    from jax import lax, nn

    x = batch["image"].astype(jnp.float32) / 255
    x = lax.conv_general_dilated(
        x, KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    logits = nn.gelu(x).mean((1, 2)) @ HEAD
    return {"logits": logits, "class": [jnp.argmax(logits, -1), nn.softmax(logits)]}


IMAGES = {"image": rng.integers(0, 256, (2, 9, 11, 4), np.uint8)}


@pytest.fixture(scope="module")
def compiled():
    return cpu.compile(network, IMAGES)


@pytest.fixture
def path(compiled, tmp_path):
    compiled.save(tmp_path / "network.program")
    return tmp_path / "network.program"


def same(result, expected):
    np.testing.assert_array_equal(result["logits"], expected["logits"])
    for one, other in zip(result["class"], expected["class"], strict=True):
        np.testing.assert_array_equal(one, other)


def test_round_trip(compiled, path):
    loaded = cpu.load(path)
    assert loaded.plan == compiled.plan
    assert str(loaded) == str(compiled)
    same(loaded(IMAGES), compiled(IMAGES))
    with pytest.raises(ValueError, match=r"uint8\[2, 9, 11, 4\]"):
        loaded({"image": IMAGES["image"][:1]})


def test_another_process_loads_without_tracing(compiled, path, tmp_path):
    np.save(tmp_path / "images.npy", IMAGES["image"])
    script = """
import sys, numpy as np, jax
from feather_jax import cpu
from feather_jax.cpu import program
def refuse(*args, **options):
    raise AssertionError("traced or generated")
jax.make_jaxpr = jax.jit = program.lower = program.assemble = program.emit_program = refuse
result = cpu.load(sys.argv[1])({"image": np.load(sys.argv[2])})
np.save(sys.argv[3], result["logits"])
"""
    command = [sys.executable, "-c", script, path, tmp_path / "images.npy", tmp_path / "y.npy"]
    subprocess.run(list(map(str, command)), check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), compiled(IMAGES)["logits"])


def test_another_machine_generates_the_code_again(compiled, path, monkeypatch):
    """An object file for another processor is never run."""
    plainer = dataclasses.replace(host(), cpu="x86-64" if host().x86 else "generic", features="")
    monkeypatch.setattr(program, "host", lambda: plainer)
    loaded = cpu.load(path)
    assert loaded.target.cpu == plainer.cpu
    assert loaded.target.lanes == compiled.target.lanes
    assert loaded.code != compiled.code
    expected = compiled(IMAGES)["logits"]
    np.testing.assert_allclose(loaded(IMAGES)["logits"], expected, rtol=1e-5, atol=1e-6)


def test_equal_programs_are_equal_bytes(compiled, path, tmp_path):
    compiled.save(tmp_path / "again.program")
    assert (tmp_path / "again.program").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("member", ["index.json", "code", "weights"])
def test_flipped_bits_are_noticed(path, member):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    content[info.header_offset + 30 + len(member) + info.compress_size // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no compiled program, or a damaged one"):
        cpu.load(path)


def test_what_is_no_program(path, tmp_path):
    path.write_bytes(path.read_bytes()[:-100])
    other = tmp_path / "other.npz"
    np.savez(other, x=np.zeros(3))
    for each in (path, other):
        with pytest.raises(ValueError, match=rf"{each.name} is no compiled program"):
            cpu.load(each)
    with pytest.raises(FileNotFoundError):
        cpu.load(tmp_path / "missing")


def test_a_later_version_says_so(path):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    index = json.loads(members["index.json"]) | {"version": 99}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members | {"index.json": json.dumps(index)}).items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="version 99, which a later feather_jax wrote"):
        cpu.load(path)


def test_other_containers_are_refused(tmp_path):
    from flax.core import freeze

    compiled = cpu.compile(lambda x: freeze({"y": 2 * x}), np.ones((2, 3), np.float32))
    with pytest.raises(TypeError, match="gives a pytree with a FrozenDict in it"):
        compiled.save(tmp_path / "x.program")
    assert not list(tmp_path.iterdir())


def test_a_file_makes_only_what_is_listed():
    with pytest.raises(KeyError):
        codec.decode({codec.KIND: "os.system", "command": "true"})


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3)
)


@given(st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple)))
def test_values_round_trip(value):
    assert codec.decode(json.loads(json.dumps(codec.encode(value), allow_nan=False))) == value


def test_scalars_keep_their_bits():
    for value in (np.float32(-0.0), np.float32("nan"), np.int32(-7), np.uint8(200), np.bool_(True)):
        back = codec.decode(codec.encode(value))
        assert back.dtype == value.dtype
        assert back.tobytes() == value.tobytes()
    assert codec.decode(codec.encode(np.dtype(np.int32))) == np.int32
    with pytest.raises(TypeError, match="no object"):
        codec.encode(object())


def test_arrays_keep_their_bits():
    value = rng.standard_normal((2, 3)).astype(np.float32)
    back = codec.decode(json.loads(json.dumps(codec.encode(value))))
    np.testing.assert_array_equal(back, value)
    assert back.dtype == value.dtype


def test_known_indices_are_kept(tmp_path):
    indices = np.array([3, 1, 1])
    compiled = cpu.compile(lambda x: 2 * x[indices], np.arange(5, dtype=np.float32))
    compiled.save(tmp_path / "x.program")
    loaded = cpu.load(tmp_path / "x.program")
    np.testing.assert_array_equal(loaded(np.arange(5, dtype=np.float32)), [6, 2, 2])


def test_every_kernel_and_operation_can_be_kept():
    known = set(codec.CLASSES.values())
    weights_only = {graph.Input, graph.Constant, graph.Convolution}  # a plan holds none of these
    assert set(typing.get_args(plan.Kernel)) <= known
    assert set(typing.get_args(graph.Operation)) - weights_only <= known
