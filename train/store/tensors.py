"""The tensors in other programs' files: PyTorch's state dicts, and safetensors.

PyTorch is not needed, and nothing that a file names is imported or called.
"""

import contextlib
import io
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" through it
import numpy as np
import safetensors

from train.errors import UserError
from train.store import torch_pickle
from train.store.torch_pickle import Malformed, Refused, Storage, Tensor

# PyTorch's magic number before 1.6, which is in a pickle of its own.
_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_LARGEST_PICKLE = 2**26

_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The tensors of a file by their names; None if it is neither PyTorch's nor of safetensors.

    A file is known by its content. Of PyTorch's, those that `torch.save` writes and wrote before
    1.6 are known; a state dict may lie under "state_dict" or "model", and may be of a network
    inside `DataParallel`.

    Raises:
      UserError: the file is damaged, or holds something else than tensors.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(32)
        if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 100_000_000:
            return _safetensors(path)
        file.seek(0)
        try:
            if _MAGIC in head:
                return _state_dict(path, *_before_1_6(file))
            with _unzipping():
                found = _archive(file) if zipfile.is_zipfile(file) else None
            if found is not None:
                return _state_dict(path, *found)
        except Refused as error:
            raise UserError(
                f"{path} holds {error}, and only tensors are read; save the state dict alone, with "
                "torch.save(model.state_dict(), ...)."
            ) from error
        except Malformed as error:
            raise _damaged(path, error) from error
    if head[:1] == b"\x80" or path.suffix in (".pth", ".pt", ".safetensors"):
        raise UserError(
            f"{path} is no file of torch.save or of safetensors; give a state dict, saved with "
            "torch.save(model.state_dict(), ...)."
        )
    return None


def _damaged(path: pathlib.Path, why: object) -> UserError:
    return UserError(f"{path} is damaged ({why}); bring back a copy.")


def _safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    tensors = {}
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise _damaged(path, error) from error
    for name, entry in entries:
        dtype = _SAFETENSORS.get(entry["dtype"])
        if dtype is None:
            raise UserError(
                f"{path} holds {name} in {entry['dtype']}, which is not known here; save it in "
                "float32."
            )
        tensors[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    return tensors


@contextlib.contextmanager
def _unzipping() -> Iterator[None]:
    """Turns all that `zipfile` says of a damaged archive into `Malformed`."""
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError) as error:
        raise Malformed(str(error) or "it is cut off") from error


def _archive(file: BinaryIO) -> tuple[Any, Callable[[Storage], bytes]] | None:
    """The pickle of a file of PyTorch 1.6 and later, and what reads its storages."""
    archive = zipfile.ZipFile(file)
    entries = {entry.filename: entry for entry in archive.infolist()}
    found = next((name for name in entries if name.endswith("/data.pkl")), None)
    if found is None:
        return None
    folder = found.removesuffix("data.pkl")

    def content(name: str) -> bytes:
        entry = entries.get(folder + name)
        if entry is None:
            raise Malformed(f"it has no {name}")
        # PyTorch compresses nothing, and what is not compressed is no larger than the file.
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise Malformed(f"{name} in it is compressed or encrypted")
        with _unzipping():
            return archive.read(entry)

    if folder + "byteorder" in entries and content("byteorder") != b"little":
        raise Malformed("its numbers are big-endian, which is not known here")
    if entries[found].file_size > _LARGEST_PICKLE:
        raise Malformed("its pickle is far larger than a state dict's")
    return torch_pickle.load(io.BytesIO(content("data.pkl"))), lambda of: content(f"data/{of.key}")


def _before_1_6(file: BinaryIO) -> tuple[Any, Callable[[Storage], bytes]]:
    """The same of an older file: pickles one after the other, then storages, each with its size."""
    for _ in ("magic number", "version"):
        torch_pickle.load(file)
    system = torch_pickle.load(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Malformed("its numbers are big-endian, which is not known here")
    tree, keys = torch_pickle.load(file), torch_pickle.load(file)
    sizes = {tensor.storage.key: tensor.storage for tensor in _tensors(tree)}
    storages: dict[str, bytes] = {}
    for key in keys if isinstance(keys, list) else ():
        if key not in sizes:  # its elements' size is not known, so that the next one is lost
            raise Malformed(f"nothing in it uses the storage {key!r}")
        count = int.from_bytes(file.read(8), "little")
        if count != sizes[key].size:
            raise Malformed(f"the storage {key!r} in it is of another size than its tensors say")
        storages[key] = file.read(count * np.dtype(sizes[key].dtype).itemsize)

    def content(storage: Storage) -> bytes:
        if storage.key not in storages:
            raise Malformed(f"it has no storage {storage.key!r}")
        return storages[storage.key]

    return tree, content


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors in dicts, lists and tuples, each of which is visited once."""
    found, pending, seen = [], [tree], set()
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(item.values() if isinstance(item, dict) else item)
    return found


def _state_dict(
    path: pathlib.Path, tree: Any, content: Callable[[Storage], bytes]
) -> dict[str, np.ndarray]:
    """The arrays of a state dict; what in it is no tensor is passed over."""
    if isinstance(tree, dict):
        for name in ("state_dict", "model"):
            if isinstance(tree.get(name), dict):
                tree = tree[name]
                break
    if not isinstance(tree, dict) or not any(isinstance(item, Tensor) for item in tree.values()):
        raise UserError(
            f"{path} holds no state dict; save one with torch.save(model.state_dict(), ...)."
        )
    named = {str(name): item for name, item in tree.items() if isinstance(item, Tensor)}
    if all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): item for name, item in named.items()}
    return _arrays(named, content)


def _arrays(
    tensors: Mapping[str, Tensor], content: Callable[[Storage], bytes]
) -> dict[str, np.ndarray]:
    flat: dict[Storage, np.ndarray] = {}
    arrays = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        if storage not in flat:
            try:
                flat[storage] = np.frombuffer(content(storage), storage.dtype)
            except ValueError as error:
                raise Malformed(f"{name} in it is cut off") from error
        arrays[name] = _view(name, tensor, flat[storage])
    return arrays


def _view(name: str, tensor: Tensor, flat: np.ndarray) -> np.ndarray:
    """The tensor's elements, once it is sure that all of them lie in its storage."""
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    numbers = (shape, strides, (offset,))
    if not all(
        isinstance(each, tuple) and all(type(number) is int and number >= 0 for number in each)
        for each in numbers
    ) or len(shape) != len(strides):
        raise Malformed(f"{name} in it has no proper shape")
    size = math.prod(shape)
    steps = zip(shape, strides, strict=True)
    last = offset + sum((count - 1) * stride for count, stride in steps) if size else 0
    # More elements than the storage has, by strides of 0, would be memory out of nothing.
    if len(shape) > 16 or size > flat.size or (size and last >= flat.size):
        raise Malformed(f"{name} in it is larger than what is stored of it")
    if not size:
        return np.zeros(shape, flat.dtype)
    return np.lib.stride_tricks.as_strided(
        flat[offset:], shape, [stride * flat.itemsize for stride in strides], writeable=False
    )
