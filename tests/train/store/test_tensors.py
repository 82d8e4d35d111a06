"""Other programs' tensors: written by those programs where they are installed, or by hand."""

import collections
import io
import os
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from train.errors import UserError
from train.store import tensors, torch_pickle

# A state dict by hand: pickle's instructions, and values as pickle itself writes them.


def value(of) -> bytes:
    return pickle.dumps(of, 2)[2:-1]  # without the protocol and the end


def tensor(key="0", size=6, shape=(2, 3), strides=(3, 1), offset=0, kind="FloatStorage") -> bytes:
    storage = b"(" + value("storage") + b"ctorch\n" + kind.encode() + b"\n"
    storage += value(key) + value("cpu") + value(size) + b"tQ"
    view = value(offset) + value(shape) + value(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tR"


def state_dict(**entries: bytes) -> bytes:
    items = b"".join(value(name) + entry for name, entry in entries.items())
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u."


def archive(path: pathlib.Path, data: bytes, compression=zipfile.ZIP_STORED, **storages: bytes):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        for name, content in storages.items():
            file.writestr(f"archive/data/{name[1:]}", content)
    return path


SIX = np.arange(6, dtype=np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def test_a_state_dict_written_by_hand(path):
    archive(
        path,
        state_dict(
            a=tensor(),
            b=tensor(shape=(3, 2), strides=(1, 3)),
            c=tensor(offset=4, shape=(2,), strides=(1,)),
        ),
        _0=SIX.tobytes(),
    )
    found = tensors.read(path)
    np.testing.assert_array_equal(found["a"], SIX.reshape(2, 3))
    np.testing.assert_array_equal(found["b"], SIX.reshape(2, 3).T)
    np.testing.assert_array_equal(found["c"], SIX[4:])


@pytest.mark.parametrize("kind", sorted(torch_pickle.STORAGES))
def test_every_type_of_storage(path, kind):
    dtype = torch_pickle.STORAGES[kind]
    data = np.array([0, 1, 1], dtype)
    entry = tensor(size=3, shape=(3,), strides=(1,), kind=kind.removeprefix("torch."))
    found = tensors.read(archive(path, state_dict(a=entry), _0=data.tobytes()))["a"]
    assert found.dtype == data.dtype
    np.testing.assert_array_equal(found, data)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"shape": (2, 4)}, "larger than what is stored"),
        ({"offset": 1}, "larger than what is stored"),
        ({"strides": (3, 2)}, "larger than what is stored"),
        ({"shape": (10**9, 10**9), "strides": (0, 0)}, "larger than what is stored"),
        ({"shape": (1,) * 40, "strides": (1,) * 40}, "larger than what is stored"),
        ({"offset": -1}, "no proper shape"),
        ({"shape": (-2, 3)}, "no proper shape"),
        ({"strides": (-3, 1)}, "no proper shape"),
        ({"shape": (2, 3.0)}, "no proper shape"),
        ({"shape": [2, 3]}, "no proper shape"),
        ({"shape": (2, 3, 1)}, "no proper shape"),
        ({"offset": None}, "no proper shape"),
        ({"key": "1"}, "it has no data/1"),
        ({"key": 0}, "a storage in it is of a form"),
        ({"size": "six"}, "a storage in it is of a form"),
        ({"kind": "LongStorage", "shape": (6,), "strides": (1,)}, "larger than what is stored"),
    ],
)
def test_a_tensor_that_does_not_lie_in_its_storage(path, wrong, says):
    archive(path, state_dict(a=tensor(**wrong)), _0=SIX.tobytes())
    with pytest.raises(UserError, match=f"weights.pth is damaged .*{says}"):
        tensors.read(path)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile",)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_pickle_would_call_is_named_and_not_called(path, protocol, nested, monkeypatch):
    monkeypatch.chdir(path.parent)
    data = pickle.dumps({"a": [Hostile()]} if nested else Hostile(), protocol)
    archive(path, data)
    with pytest.raises(UserError, match=r"holds (posix|nt)\.system, and only tensors are read"):
        tensors.read(path)
    assert not (path.parent / "hostile").exists()


@pytest.mark.parametrize(
    ("instructions", "says"),
    [
        (b"cbuiltins\neval\n.", "holds builtins.eval"),
        (b"cargparse\nNamespace\n.", "holds argparse.Namespace"),
        (b"ctorch\nload\n.", "holds torch.load"),
        (b"ctorch.hub\nload_state_dict_from_url\n.", "holds torch.hub.load_state_dict_from_url"),
        (b"ctorch\nFloatStorage\n)R.", "it calls what is no function"),
        (value("a") + b")R.", "it calls what is no function"),
        (b"ccollections\nOrderedDict\n}b.", "sets attributes of something else"),
        (b"ccollections\nOrderedDict\n)\x81.", "it has the instruction NEWOBJ"),
        (b"(ios\nsystem\n.", "it has the instruction INST"),
        (b"\x82\x01.", "it has the instruction EXT1"),
        (b"R.", "takes more than there is"),
        (b"(R.", "takes more than there is"),
        (b"h\x05.", "damaged"),
        (b"}", "damaged"),
        (b"\xff.", "damaged"),
        (b"", "damaged"),
        (b").", "holds no state dict"),
        (b"}.", "holds no state dict"),
        (value({"a": 1}) + b".", "holds no state dict"),
    ],
)
def test_instructions_that_no_state_dict_has(path, instructions, says):
    archive(path, b"\x80\x02" + instructions)
    with pytest.raises(UserError, match=says):
        tensors.read(path)


def test_copies_of_one_list_do_not_fill_the_memory():
    pairs = value([(str(number), number) for number in range(1000)])
    copies = b"ccollections\nOrderedDict\nj\xff\xff\x00\x00\x85R" * 99
    data = b"\x80\x02(" + pairs + b"r\xff\xff\x00\x00" + copies + b"t."
    loaded = torch_pickle.load(io.BytesIO(data))
    assert [len(item) for item in loaded] == [0, 1000] + [0] * 98


def test_compressed_storages_are_refused(path):
    archive(path, state_dict(a=tensor()), zipfile.ZIP_DEFLATED, _0=SIX.tobytes())
    with pytest.raises(UserError, match="compressed or encrypted"):
        tensors.read(path)


def test_a_list_that_holds_itself_is_passed_over(path):
    """In a file of PyTorch before 1.6, whose tensors say how large its storages are."""
    before = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    state = state_dict(a=tensor(), loop=b"]q\x00h\x00a")
    content = [*(pickle.dumps(each, 2) for each in before), state, pickle.dumps(["0"], 2)]
    path.write_bytes(b"".join(content) + (6).to_bytes(8, "little") + SIX.tobytes())
    found = tensors.read(path)
    assert list(found) == ["a"]
    np.testing.assert_array_equal(found["a"], SIX.reshape(2, 3))


def test_wrappings_of_a_state_dict(path):
    inner = state_dict(**{"module.a": tensor(), "module.b": tensor()})[2:-1]
    for name in ("state_dict", "model"):
        data = b"\x80\x02}(" + value("epoch") + value(3) + value(name) + inner + b"u."
        found = tensors.read(archive(path, data, _0=SIX.tobytes()))
        assert list(found) == ["a", "b"]


@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_flipped_byte_is_a_sentence_or_nothing(tmp_path_factory, position, byte):
    path = tmp_path_factory.getbasetemp() / "flipped.pth"
    content = bytearray(archive(path, state_dict(a=tensor()), _0=SIX.tobytes()).read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content)
    try:
        found = tensors.read(path)
    except UserError:
        return
    assert found is None or all(isinstance(each, np.ndarray) for each in found.values())


@pytest.mark.parametrize("end", [0, 1, 12, 60, 200, -30])
def test_a_file_that_is_cut_off(path, end):
    content = archive(path, state_dict(a=tensor()), _0=SIX.tobytes()).read_bytes()
    path.write_bytes(content[:end])
    with pytest.raises(UserError, match=r"weights\.pth is (damaged|no file of torch\.save)"):
        tensors.read(path)


def test_other_files_are_none_of_ours(tmp_path):
    np.savez(tmp_path / "model.npz", a=SIX)
    (tmp_path / "notes.txt").write_text("nothing")
    assert tensors.read(tmp_path / "model.npz") is None
    assert tensors.read(tmp_path / "notes.txt") is None
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"no file of torch\.save"):
        tensors.read(tmp_path / "plain.pkl")


def test_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    written = {"a": SIX.reshape(2, 3), "b": np.arange(3), "c": np.array(0.5, np.float16)}
    safetensors.numpy.save_file(written, path)
    found = tensors.read(path)
    assert found.keys() == written.keys()
    for name, each in written.items():
        assert found[name].dtype == each.dtype
        np.testing.assert_array_equal(found[name], each)

    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        tensors.read(path)


def test_safetensors_in_bfloat16(tmp_path):
    path = tmp_path / "model.safetensors"
    header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    data = np.array([1.5, -2], ml_dtypes.bfloat16)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data.tobytes())
    np.testing.assert_array_equal(tensors.read(path)["a"], data)


# What PyTorch itself writes.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("archived", [True, False], ids=["archive", "before_1_6"])
def test_pytorchs_own_files(path, protocol, archived):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    written = collections.OrderedDict(
        whole=whole,
        transposed=whole.t(),
        part=whole[1:3, ::2],
        parameter=torch.nn.Parameter(torch.randn(3, 2)),
        scalar=torch.tensor(7),
        empty=torch.zeros(0, 3),
        half=torch.tensor([0.1, 0.2], dtype=torch.float16),
        flags=torch.tensor([True, False]),
    )
    written._metadata = collections.OrderedDict({"": {"version": 1}})
    torch.save(written, path, pickle_protocol=protocol, _use_new_zipfile_serialization=archived)
    found = tensors.read(path)
    assert list(found) == list(written)
    for name, each in written.items():
        expected = each.detach().numpy()
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


def test_bfloat16_of_pytorch(path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.tensor([1.5, 0.1], dtype=torch.bfloat16)}, path)
    found = tensors.read(path)["a"]
    np.testing.assert_array_equal(found, np.array([1.5, 0.1], ml_dtypes.bfloat16))


def test_a_whole_module_is_refused_by_its_name(path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match=r"holds torch\.nn\.modules\.linear\.Linear, and only"):
        tensors.read(path)
