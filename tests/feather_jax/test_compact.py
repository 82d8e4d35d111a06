"""The compact file gives back every bit, is as small as it says and notices all damage."""

import json
import math
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feather_jax.compact import DTYPES, load, load_metadata, save
from feather_jax.gaps import MAX_LOW_BITS, decode_gaps, encode_gaps

ROOT = pathlib.Path(__file__).parents[2]


def assert_same(actual, expected):
    """The same nested dicts, and the same types, shapes and bits in them."""
    if isinstance(expected, dict):
        assert type(actual) is dict
        assert {(type(key), key) for key in actual} == {(type(key), key) for key in expected}
        for key in expected:
            assert_same(actual[key], expected[key])
    else:
        expected = np.asarray(expected)
        assert isinstance(actual, np.ndarray)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.tobytes() == expected.tobytes()


def read_as_documented(path):
    """Runs the reader in docs/model-file.md, which knows nothing of this library."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/model-file.md").read_text(), re.S)
    (reader,) = [
        block for block in blocks if "import zipfile" in block or "zipfile.ZipFile" in block
    ]
    assert "feather_jax" not in reader
    names: dict = {}
    exec(reader.replace('"model.npz"', repr(str(path))), names)
    return names["arrays"], names["index"]


def random_array(dtype, shape, sparsity, seed=0):
    """Random bits, NaN and -0.0 among them, of which a part is set to the zero of all bits 0."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (math.prod(shape), dtype.itemsize), np.uint8)
    if dtype.kind == "b":
        raw %= 2
    raw[rng.random(len(raw)) < sparsity] = 0
    return raw.reshape(-1).view(dtype).reshape(shape)


def entropy(p):
    return 0.0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def bound(arrays):
    """The entropy of each array's zero pattern and its non-zero values, in bytes."""
    total = 0.0
    for array in arrays:
        nonzero = np.count_nonzero(array)
        total += array.size * entropy(nonzero / array.size) / 8 + nonzero * array.itemsize
    return total


# What comes back.

keys = st.one_of(st.text(max_size=5), st.integers())
arrays = st.builds(
    random_array,
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    st.integers(0, 2**32 - 1),
)
trees = st.recursive(arrays, lambda node: st.dictionaries(keys, node, max_size=4), max_leaves=8)
json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda node: st.one_of(st.lists(node), st.dictionaries(st.text(), node)),
    max_leaves=8,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(keys, trees, max_size=4), st.dictionaries(st.text(), json_values))
def test_everything_comes_back(tmp_path, variables, metadata):
    path = tmp_path / "model.npz"
    save(path, variables, metadata)
    assert_same(load(path), variables)
    assert load_metadata(path) == metadata

    arrays, _ = read_as_documented(path)
    for key_path, array in arrays.items():
        leaf = variables
        for key in key_path:
            leaf = leaf[key]
        assert array.shape == leaf.shape
        assert array.tobytes() == leaf.tobytes()
    assert len(arrays) == len(list(leaves_of(variables)))


def leaves_of(tree):
    for node in tree.values():
        if isinstance(node, dict):
            yield from leaves_of(node)
        else:
            yield node


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7, 11), (2, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_and_shape_come_back(tmp_path, dtype, shape):
    path = tmp_path / "model.npz"
    for sparsity in (0, 0.5, 0.97, 1):
        variables = {"w": random_array(dtype, shape, sparsity)}
        save(path, variables)
        assert_same(load(path), variables)
        assert load(path)["w"].flags.writeable
        assert load(path)["w"].flags.aligned


def test_jax_has_no_number_type_that_is_missing():
    names = [name for name in dir(jnp) if re.fullmatch(r"(bfloat|float|u?int|complex)\d+\w*", name)]
    assert {"bfloat16", "float8_e4m3fn", "int4", "uint8", "float64", "complex128"} <= set(names)
    assert set(names) | {"bool"} <= set(DTYPES)


def test_negative_zero_and_nan_payloads_are_values(tmp_path):
    path = tmp_path / "model.npz"
    bits = np.zeros(1000, np.uint32)
    bits[[3, 500, 999]] = 0x80000000, 0x7FC12345, 0xFFA00001
    save(path, {"w": bits.view(np.float32)})
    loaded = load(path)["w"]
    np.testing.assert_array_equal(loaded.view(np.uint32), bits)
    assert np.signbit(loaded[3])
    assert path.stat().st_size < 600


def test_layouts_of_numpy_and_arrays_of_jax_come_back_as_plain_arrays(tmp_path):
    path = tmp_path / "model.npz"
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    variables = {
        "fortran": np.asfortranarray(array),
        "big endian": array.astype(">f4"),
        "strided": array[::-2, 1::3],
        "scalar": np.float32(3),
        "jax": jnp.asarray(array, jnp.bfloat16),
        "int4": jnp.arange(-8, 8, dtype=jnp.int4),
    }
    save(path, variables)
    loaded = load(path)
    assert loaded["big endian"].dtype == np.float32
    assert loaded["jax"].dtype == ml_dtypes.bfloat16
    for name, expected in variables.items():
        np.testing.assert_array_equal(loaded[name], np.asarray(expected))


def test_flax_modules_come_back(tmp_path):
    path = tmp_path / "model.npz"
    module = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    images = jnp.ones((2, 5))
    variables = module.init(jax.random.key(0), images)
    save(path, nn.FrozenDict(variables) if hasattr(nn, "FrozenDict") else variables)
    assert_same(load(path), jax.tree.map(np.asarray, variables))
    np.testing.assert_array_equal(module.apply(load(path), images), module.apply(variables, images))


def test_an_nnx_state_comes_back_as_its_pure_dict(tmp_path):
    path = tmp_path / "model.npz"
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    save(path, state)
    loaded = load(path)
    assert list(loaded["layers"]) == [0, 1]
    assert_same(loaded, jax.tree.map(np.asarray, nnx.to_pure_dict(state)))

    other = nnx.state(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(1)), model.layers[1]))
    nnx.replace_by_pure_dict(other, loaded)
    assert_same(jax.tree.map(np.asarray, nnx.to_pure_dict(other)), loaded)


def test_keys_that_look_alike_stay_apart(tmp_path):
    path = tmp_path / "model.npz"
    variables = {"a/b": np.ones(1), "a": {"b": np.ones(2), "": {}}, 1: np.ones(3), "1": np.ones(4)}
    save(path, variables)
    assert_same(load(path), variables)
    save(path, {})
    assert load(path) == {}


# What is refused.


class Tensor:
    """An array of another library, whose dtype is none of NumPy's."""

    dtype, shape = "torch.float32", (2,)

    def __array__(self, dtype=None, copy=None):
        return np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("variables", "place", "reason"),
    [
        ({"a": [np.ones(2), 1.5]}, "variables['a'][1]", "float"),
        ({"a": {3: "x"}}, "variables['a'][3]", "str"),
        ({"a": 1.5}, "variables['a']", "float"),
        (np.ones(3), "variables", "ndarray"),
        ({"a": Tensor()}, "variables['a']", "Tensor"),
        ({"a": nn.Partitioned(jax.random.key(0), ("x",))}, "variables['a']", "PRNG keys"),
        ({"a": np.array([object()])}, "variables['a']", "object"),
        ({"a": np.array(["x"])}, "variables['a']", "str"),
        ({"a": np.array([0], "datetime64[s]")}, "variables['a']", "datetime64"),
        ({"a": np.longdouble(1)}, "variables['a']", "float128"),
        ({"a": {True: np.ones(1)}}, "variables['a']", "key True"),
        ({"a": {(1, 2): np.ones(1)}}, "variables['a']", "key (1, 2)"),
        ({"a": {None: np.ones(1)}}, "variables['a']", "key None"),
        ({"a": jax.random.key(0)}, "variables['a']", "jax.random.key_data"),
        (nnx.state(nnx.Dropout(0.1, rngs=nnx.Rngs(0))), "['key']", "jax.random.key_data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_tree_of_arrays_is_refused_by_its_place(tmp_path, variables, place, reason):
    path = tmp_path / "model.npz"
    with pytest.raises(TypeError) as error:
        save(path, variables)
    assert place in str(error.value)
    assert reason in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_metadata_is_given_back_as_json_has_it(tmp_path):
    path = tmp_path / "model.npz"
    save(path, {}, {"mean": (0.5, 0.25), "name": "ünïcode \ud800", "size": np.float64(0.1)})
    assert load_metadata(path) == {"mean": [0.5, 0.25], "name": "ünïcode \ud800", "size": 0.1}
    save(path, {})
    assert load_metadata(path) == {}


@pytest.mark.parametrize(
    ("metadata", "kind", "place"),
    [
        ({"a": {"b": [1, math.nan]}}, ValueError, "metadata['a']['b'][1] is nan"),
        ({"a": -math.inf}, ValueError, "metadata['a'] is -inf"),
        ({"a": np.ones(2)}, TypeError, "metadata['a'] is a ndarray"),
        ({"a": np.float32(1)}, TypeError, "metadata['a'] is a float32"),
        ({"a": {1: 2}}, TypeError, "metadata['a'] has the key 1"),
        ({"a": b"x"}, TypeError, "metadata['a'] is a bytes"),
        ([1], TypeError, "metadata is a list"),
    ],
    ids=str,
)
def test_metadata_that_is_not_json_is_refused_by_its_key(tmp_path, metadata, kind, place):
    with pytest.raises(kind, match=re.escape(place)):
        save(tmp_path / "model.npz", {}, metadata)
    assert list(tmp_path.iterdir()) == []


def test_an_index_too_large_to_be_loaded_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="16777216"):
        save(tmp_path / "model.npz", {}, {"a": "x" * 2**24})
    assert list(tmp_path.iterdir()) == []


# Narrower values.


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_float32_is_rounded_to_the_dtype_asked_for(tmp_path, name):
    path = tmp_path / "model.npz"
    w = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    w[:6] = 0, -0.0, np.nan, np.inf, 1e-40, -1e-40
    others = {"f64": np.ones(3), "i": np.arange(3), "bf16": np.ones(3, ml_dtypes.bfloat16)}
    save(path, {"w": w, **others}, dtype=name)
    with jax.numpy_dtype_promotion("standard"):
        expected = np.asarray(jax.lax.convert_element_type(w, name))
    loaded = load(path)
    nan = np.isnan(w)
    assert np.isnan(loaded["w"][nan].astype(np.float32)).all()
    assert_same({"w": loaded["w"][~nan]}, {"w": expected[~nan]})
    assert_same({key: loaded[key] for key in others}, others)
    stored, index = read_as_documented(path)
    leaf = next(leaf for leaf in index["leaves"] if leaf["path"] == ["w"])
    assert leaf["stored"] == {"bfloat16": "<u2", "float16": "<f2"}[name]
    assert stored["w",].tobytes() == loaded["w"].tobytes()


def test_a_value_that_overflows_the_dtype_is_refused(tmp_path):
    path = tmp_path / "model.npz"
    variables = {"a": {"w": np.array([1, 70_000], np.float32)}}
    with pytest.raises(ValueError, match=re.escape("variables['a']['w'] holds 70000.0")):
        save(path, variables, dtype=jnp.float16)
    save(path, variables, dtype=jnp.bfloat16)
    assert load(path)["a"]["w"].dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match="dtype is float64"):
        save(path, variables, dtype=np.float64)


# How small it is.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95, 0.98, 0.99])
def test_the_size_is_within_a_tenth_of_the_bound(tmp_path, sparsity, dtype):
    path = tmp_path / "model.npz"
    rng = np.random.default_rng(0)
    for shapes in ([(300, 334)], [(3, 3, 64, 174)], [(300, 300), (300, 100), (100, 10)]):
        layers = {f"layer{i}": rng.normal(size=shape) for i, shape in enumerate(shapes)}
        magnitudes = np.concatenate([np.abs(layer).ravel() for layer in layers.values()])
        threshold = np.quantile(magnitudes, sparsity)
        weights = {
            name: np.where(np.abs(layer) > threshold, layer, 0).astype(DTYPES[dtype])
            for name, layer in layers.items()
        }
        save(path, {"params": weights})
        # With two bytes a value, the 600 bytes around 1,000 of them are more than the tenth.
        allowance = 0 if dtype == "float32" or sparsity < 0.98 else 400
        assert path.stat().st_size <= 1.1 * bound(weights.values()) + allowance


@pytest.mark.parametrize("pattern", ["filters", "gradient", "clusters", "periodic"])
@pytest.mark.parametrize("sparsity", [0.8, 0.95, 0.99])
def test_no_pattern_breaks_the_bound(tmp_path, sparsity, pattern):
    path = tmp_path / "model.npz"
    rng = np.random.default_rng(0)
    count, size = 1000, 1152
    if pattern == "filters":  # the last axis is the output's: whole filters dead, others not at all
        keep = np.broadcast_to(rng.random(size) > sparsity, (count, size))
    elif pattern == "gradient":
        keep = rng.random((count, size)) < np.linspace(0, 2 * (1 - sparsity), count)[:, None]
    elif pattern == "clusters":
        keep = np.repeat(rng.random((count, size // 16)) > sparsity, 16, axis=1)
    else:
        keep = np.arange(count * size).reshape(count, size) % round(1 / (1 - sparsity)) == 0
    weights = np.where(keep, rng.normal(size=(count, size)), 0).astype(np.float32)
    save(path, {"w": weights})
    assert path.stat().st_size <= 1.03 * bound([weights])


def test_each_leaf_takes_the_smaller_encoding(tmp_path):
    path = tmp_path / "model.npz"
    rng = np.random.default_rng(0)
    weights = {
        kept: np.where(rng.random(100_000) < kept, rng.normal(size=100_000), 0).astype(np.float32)
        for kept in (1, 0.98, 0.95, 0.5, 0.01, 0)
    }
    save(path, {str(kept): array for kept, array in weights.items()})
    leaves = {leaf["path"][0]: leaf for leaf in read_as_documented(path)[1]["leaves"]}
    encodings = {kept: leaves[str(kept)]["encoding"] for kept in weights}
    # A value more in 32 is what a bitmap costs.
    assert encodings == {
        1: "dense",
        0.98: "dense",
        0.95: "gaps",
        0.5: "gaps",
        0.01: "gaps",
        0: "gaps",
    }
    assert sum(leaves["0"]["bytes"]) < 60


def rice_bits(nonzero, k):
    """The definition, bit by bit, in Python."""
    gaps, gap = [], 0
    for kept in [*nonzero, True]:
        gap = 0 if kept and gaps.append(gap) is None else gap + 1
    low = [gap >> bit & 1 for bit in range(k) for gap in gaps]
    high = [bit for gap in gaps for bit in [0] * (gap >> k) + [1]]
    return low, high


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 40))
def test_the_gap_code_is_the_shortest_rice_code(pattern, stretch):
    nonzero = np.zeros((len(pattern), stretch), bool)
    nonzero[:, -1] = pattern
    nonzero = nonzero.ravel()
    k, low, high = encode_gaps(nonzero)
    codes = [rice_bits(nonzero.tolist(), k) for k in range(MAX_LOW_BITS + 1)]
    assert sum(map(len, codes[k])) == min(len(low) + len(high) for low, high in codes)
    assert np.packbits(np.array(codes[k][0], bool)).tolist() == low.tolist()
    assert np.packbits(np.array(codes[k][1], bool)).tolist() == high.tolist()
    ends = decode_gaps(k, low, high)
    assert ends.tolist() == [*np.flatnonzero(nonzero), nonzero.size]


# How it is written.


def test_equal_input_gives_equal_bytes(tmp_path, monkeypatch):
    a, b, w = tmp_path / "a.npz", tmp_path / "b.npz", np.arange(9)
    save(a, {"x": {"p": w, 2: w}, "y": w}, {"s": 1, "t": {"u": 2, "v": 3}})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    save(
        b,
        {"y": jnp.asarray(w, w.dtype) if w.dtype == np.int32 else w, "x": {2: w, "p": w}},
        {"t": {"v": 3, "u": 2}, "s": 1},
    )
    assert a.read_bytes() == b.read_bytes()


def test_the_file_has_the_name_and_the_permissions_of_any_other(tmp_path):
    path, link = tmp_path / "model", tmp_path / "link"
    link.symlink_to(path)
    umask = os.umask(0o027)
    try:
        save(link, {"w": np.ones(3)})
    finally:
        os.umask(umask)
    assert sorted(tmp_path.iterdir()) == [link, path]
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640


def test_numpy_opens_the_file_without_pickle(tmp_path):
    path = tmp_path / "model.npz"
    save(path, {"w": np.arange(3, dtype=np.uint8)})
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == ["data", "index.json"]
        assert json.loads(file["index.json"])["leaves"][0]["path"] == ["w"]
        assert file["data"] == bytes([0, 1, 2])


def test_a_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    save(path, {"w": np.ones(3)})
    old = path.read_bytes()

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        save(path, {"w": np.zeros(3)})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save(tmp_path / "nowhere" / "model.npz", {})


@pytest.mark.slow
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "model.npz"
    writer = f"""
import itertools, numpy as np
from feather_jax.compact import save
for i in itertools.count():
    save({str(path)!r}, {{"w": np.full(200_000, i, np.int64)}}, {{"i": i}})
    if i == 0: print(flush=True)
"""
    rng = np.random.default_rng(0)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, cwd=ROOT)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        i = load_metadata(path)["i"]
        np.testing.assert_array_equal(load(path)["w"], np.full(200_000, i))


# What happens to damaged and foreign files.


@pytest.fixture
def small(tmp_path):
    """A small file with both encodings in it, and what it holds."""
    variables = {
        "params": {"kernel": random_array(np.dtype("float32"), (9, 9), 0.8), 1: np.arange(4)},
        "empty": {},
    }
    save(tmp_path / "small.npz", variables, {"step": 7})
    return tmp_path / "small.npz", variables


def exact_or_refused(path, variables):
    """Whether the damage went unnoticed, in which case nothing may be lost by it."""
    try:
        loaded = load(path)
        metadata = load_metadata(path)
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{path} is damaged or was not written by feather_jax.save (")
        assert message.endswith("copy or save it again.")
        assert "\n" not in message
        return False
    assert_same(loaded, variables)
    assert metadata == {"step": 7}
    return True


@pytest.mark.slow
def test_no_flipped_bit_goes_unnoticed(small):
    path, variables = small
    content = path.read_bytes()
    unnoticed = 0
    for position in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        unnoticed += exact_or_refused(path, variables)
    # Dates, permissions and the like may change: 30 bytes twice, in two headers a member.
    assert unnoticed < 8 * 120


def test_no_missing_end_goes_unnoticed(small):
    path, variables = small
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert not exact_or_refused(path, variables)


def test_no_random_damage_goes_unnoticed(small):
    path, variables = small
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(1000):
        damaged = bytearray(content)
        start, length = rng.integers(len(content)), rng.integers(1, 40)
        kind = rng.integers(3)
        if kind == 0:
            damaged[start : start + length] = rng.bytes(len(damaged[start : start + length]))
        elif kind == 1:
            del damaged[start : start + length]
        else:
            damaged[start:start] = rng.bytes(length)
        path.write_bytes(damaged)
        exact_or_refused(path, variables)


def test_a_file_that_is_not_there_and_a_directory(tmp_path):
    for read in (load, load_metadata):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing.npz")
        with pytest.raises(ValueError, match="is a directory"):
            read(tmp_path)


class Unpickled:
    """Makes a directory when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_foreign_files_are_refused_and_never_unpickled(tmp_path):
    path, trace = tmp_path / "foreign.npz", tmp_path / "trace"
    pickled = pickle.dumps(Unpickled(trace))
    pickle.loads(pickled)
    trace.rmdir()

    def npz(**arrays):
        np.savez(path, **arrays)
        return path.read_bytes()

    objects = np.array([Unpickled(trace)], object)
    contents = [
        *(b"", b"weights", pickled, os.urandom(1000)),
        *(npz(w=np.ones(3)), npz(data=objects), npz(**{"data": objects, "index.json": objects})),
    ]
    for content in contents:
        path.write_bytes(content)
        for read in (load, load_metadata):
            with pytest.raises(ValueError, match=r"was not written by feather_jax\.save"):
                read(path)
    assert not trace.exists()


def forge(path, index, data=b"", compression=(zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)):
    """An archive whose checksums are right and whose index need not be."""
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("index.json", text, compression[0])
        archive.writestr("data", data, compression[1])


def index_of(*leaves, **other):
    return {
        "format": "feather_jax.compact",
        "version": 1,
        "metadata": {},
        "empty": [],
        "leaves": list(leaves),
        **other,
    }


DENSE = {
    "path": ["w"],
    "dtype": "uint8",
    "stored": "|u1",
    "shape": [2],
    "crc32": 0x41D912FF,  # of two zero bytes
    "encoding": "dense",
    "bytes": [2],
}
GAPS = DENSE | {"encoding": "gaps", "low_bits": 0, "bytes": [0, 0, 1]}
TWO_ZEROS, GAP_OF_TWO = b"\0\0", bytes([0b00100000])


def test_the_forger_can_write_a_file_that_is_right(tmp_path):
    path = tmp_path / "forged.npz"
    for leaf, data in ((DENSE, TWO_ZEROS), (GAPS, GAP_OF_TWO)):
        forge(path, index_of(leaf), data)
        assert_same(load(path), {"w": np.zeros(2, np.uint8)})


HUGE = 10**12
LIES = {
    "no leaf list": ({"format": "feather_jax.compact", "version": 1, "metadata": {}}, b""),
    "a list": ([], b""),
    "deep": (b"[" * 100_000, b""),
    "not JSON": (b"{", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "format": (index_of(format="other"), b""),
    "version": (index_of(version=2), b""),
    "metadata": (index_of(metadata=[]), b""),
    "leaf": (index_of(5), b""),
    "leaf lacks a key": (index_of({"bytes": []}), b""),
    "dtype": (index_of(DENSE | {"dtype": "float42"}), TWO_ZEROS),
    "object": (index_of(DENSE | {"dtype": "object", "stored": "|O"}), TWO_ZEROS),
    "stored": (index_of(DENSE | {"stored": "<u2"}), TWO_ZEROS),
    "encoding": (index_of(DENSE | {"encoding": "pickle"}), TWO_ZEROS),
    "checksum": (index_of(DENSE | {"crc32": 1}), TWO_ZEROS),
    "gaps' checksum": (index_of(GAPS | {"crc32": 1}), GAP_OF_TWO),
    "dense shape": (index_of(DENSE | {"shape": [HUGE]}), TWO_ZEROS),
    "negative shape": (index_of(DENSE | {"shape": [-1]}), TWO_ZEROS),
    "fractional shape": (index_of(DENSE | {"shape": [2.0]}), TWO_ZEROS),
    "gaps' shape": (index_of(GAPS | {"shape": [HUGE]}), GAP_OF_TWO),
    "gaps' smaller shape": (index_of(GAPS | {"shape": [1]}), GAP_OF_TWO),
    "low_bits": (index_of(GAPS | {"low_bits": HUGE}), GAP_OF_TWO),
    "negative low_bits": (index_of(GAPS | {"low_bits": -1}), GAP_OF_TWO),
    "no low_bits": (index_of({k: v for k, v in GAPS.items() if k != "low_bits"}), GAP_OF_TWO),
    "missing low bits": (index_of(GAPS | {"low_bits": 8}), GAP_OF_TWO),
    "no gap": (index_of(GAPS), b"\0"),
    "gaps without a value": (index_of(GAPS), bytes([0b01100000])),
    "a part more": (index_of(DENSE | {"bytes": [1, 1]}), TWO_ZEROS),
    "a part less": (index_of(GAPS | {"bytes": [1]}), GAP_OF_TWO),
    "bytes": (index_of(DENSE | {"bytes": [HUGE]}), TWO_ZEROS),
    "negative bytes": (index_of(DENSE | {"bytes": [4, -2]}), TWO_ZEROS),
    "data left over": (index_of(DENSE), b"\0\0\0"),
    "same path": (index_of(DENSE, DENSE), 2 * TWO_ZEROS),
    "below a leaf": (index_of(DENSE, DENSE | {"path": ["w", "v"]}), 2 * TWO_ZEROS),
    "above a leaf": (index_of(DENSE | {"path": ["w", "v"]}, DENSE), 2 * TWO_ZEROS),
    "empty and a leaf": (index_of(DENSE, empty=[["w"]]), TWO_ZEROS),
    "empty and above a leaf": (index_of(DENSE | {"path": ["w", "v"]}, empty=[["w"]]), TWO_ZEROS),
    "no path": (index_of(DENSE | {"path": []}), TWO_ZEROS),
    "path is a string": (index_of(DENSE | {"path": "w"}), TWO_ZEROS),
    "long format": (index_of(format="x" * 5000), b""),
    "key is a bool": (index_of(DENSE | {"path": [True]}), TWO_ZEROS),
    "key is a list": (index_of(DENSE | {"path": [[]]}), TWO_ZEROS),
    "too many dimensions": (index_of(DENSE | {"shape": [2] + 99 * [1]}), TWO_ZEROS),
}


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_forged_index_is_refused_without_allocating_for_it(tmp_path, lie):
    path = tmp_path / "forged.npz"
    forge(path, *LIES[lie])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"was not written by feather_jax\.save") as error:
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("read", [load, load_metadata])
def test_the_version_is_named_if_it_is_another(tmp_path, read):
    forge(tmp_path / "forged.npz", index_of(version=2))
    with pytest.raises(ValueError, match="format version is 2 and 1 is known"):
        read(tmp_path / "forged.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_is_not_expanded(tmp_path, method):
    path = tmp_path / "forged.npz"
    bomb = bytes(2**25)
    if method == zipfile.ZIP_DEFLATED:
        forge(path, b" " * 2**25)
    else:
        forge(path, index_of(), b"", (method, zipfile.ZIP_STORED))
    bombs = [path.read_bytes()]
    forge(path, index_of(DENSE | {"shape": [len(bomb)]}), bomb, (zipfile.ZIP_DEFLATED, method))
    bombs.append(path.read_bytes())
    del bomb
    for content in bombs:
        path.write_bytes(content)
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="too large"):
                load(path)
            assert tracemalloc.get_traced_memory()[1] < 20e6
        finally:
            tracemalloc.stop()


def test_a_zip_bomb_that_declares_another_size_is_not_expanded(tmp_path):
    path = tmp_path / "forged.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("index.json", b" " * 2**25, zipfile.ZIP_DEFLATED)
        archive.writestr("data", b"")
        archive.infolist()[0].file_size = 100  # in the directory, which is what readers read
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"was not written by feather_jax\.save"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
def test_zeros_cannot_claim_more_than_the_documented_multiple(tmp_path, dtype):
    path = tmp_path / "model.npz"
    save(path, {"w": np.zeros(10_000_000, dtype)})
    loaded = load(path)["w"]
    assert loaded.size <= 2048 * path.stat().st_size
    assert loaded.nbytes <= 2**15 * path.stat().st_size


def test_more_zeros_than_there_is_memory_are_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    save(path, {"w": np.zeros(10_000, np.complex128)})

    def no_memory(*_):
        raise MemoryError("Unable to allocate 32.0 GiB")

    monkeypatch.setattr(np, "zeros", no_memory)
    with pytest.raises(ValueError, match=r"feather_jax\.save \(Unable to allocate 32\.0 GiB\)"):
        load(path)
