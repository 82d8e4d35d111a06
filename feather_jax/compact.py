"""A sparse model in a small file: zeros cost almost nothing, and NumPy alone reads it.

The file is a zip archive (an `.npz` to `np.load`) of two members. `index.json` lists every leaf
and holds the metadata; `data` holds the bytes of the leaves, one after the other. A leaf is
`dense`, all its values, or `gaps`: its non-zero values, and how many zeros stand before each of
them (`gaps.py`). `docs/model-file.md` specifies the format and reads it with NumPy alone.
"""

import contextlib
import itertools
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, PyTree, Shaped, UInt8
from numpy.typing import DTypeLike

from feather_jax.archive import write_archive
from feather_jax.gaps import decode_gaps, encode_gaps
from feather_jax.variables import DTYPES, EXTENDED, Path, insert, leaves_of, name_of, rebuild

FORMAT = "feather_jax.compact"
VERSION = 1

# Deflate can expand a thousandfold, so the index needs a bound; 80,000 leaves fit.
MAX_INDEX_BYTES = 2**24

# What zipfile, json and a look into a foreign index may raise.
_DAMAGE = (
    *(ValueError, LookupError, TypeError, AttributeError, OverflowError, EOFError, OSError),
    *(RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error, struct.error),
)


def save(
    path: str | os.PathLike[str],
    variables: PyTree,
    metadata: dict[str, Any] | None = None,
    *,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes `variables` to one compact file.

    The file is written beside `path` and then takes its place: whenever the process is killed,
    `path` is the old file or the new one. Equal input gives equal bytes. Of several processes,
    let one save.

    Args:
      path: where to; nothing is appended to the name.
      variables: a pytree of arrays of any shape and of any number type of NumPy or JAX: nested
        dicts with keys of strings or integers, lists, dataclasses, an `nnx.State`, modules of NNX
        and Equinox. Functions in it are passed over, and so are numbers and strings that are
        attributes of a module; an NNX variable or a partitioning box counts as the array in it.
      metadata: what to keep beside the weights, as JSON; tuples become lists.
      dtype: bfloat16 or float16, to which float32 leaves are rounded (to nearest, ties to even;
        NaN stays NaN, and what underflows becomes zero). Without it the round trip is exact to
        the bit.

    Raises:
      TypeError: a key, a leaf (as PRNG keys are) or the metadata is of a kind that the file cannot
        hold.
      ValueError: the metadata holds NaN or infinity, a value overflows `dtype`, `dtype` is
        another one, or there are so many leaves that the index is larger than 16 MiB.
      OSError: the file cannot be written.

    Example:
      >>> import numpy as np
      >>> save("model.npz", {"params": {"kernel": np.eye(3)}}, {"step": 100})  # doctest: +SKIP
    """
    target = None if dtype is None else np.dtype(dtype)
    if target is not None and target.name not in ("bfloat16", "float16"):
        raise ValueError(f"dtype is {target.name}; give bfloat16 or float16, or leave it out.")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict):
        raise TypeError(f"metadata is a {type(metadata).__name__}; give a dict.")
    _check_json(metadata, "metadata")
    index: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "metadata": metadata,
        "leaves": [],
        "empty": [],
    }
    data = []
    for key_path, array in leaves_of(variables):
        if array is None:
            index["empty"].append(key_path)
            continue
        if target is not None and array.dtype == np.float32:
            array = _round(array, target, key_path)
        leaf, parts = _encode(array)
        index["leaves"].append({"path": key_path, **leaf})
        data += parts
    text = json.dumps(index, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_INDEX_BYTES:
        raise ValueError(
            f"The index of {len(index['leaves'])} leaves and the metadata take {len(text)} bytes "
            f"and may take {MAX_INDEX_BYTES}; stack layers, or keep less metadata."
        )
    write_archive(
        path,
        [("index.json", zipfile.ZIP_DEFLATED, [text]), ("data", zipfile.ZIP_STORED, data)],
    )


def load(path: str | os.PathLike[str], like: PyTree | None = None) -> Any:
    """Reads the variables that `save` wrote.

    Every leaf is compared with its checksum, nothing is unpickled, and no leaf is allocated
    before its size has been found in the data.

    Args:
      path: a file of `save`.
      like: the pytree that is wanted, with arrays or `jax.ShapeDtypeStruct`s as its leaves.

    Returns:
      Nested dicts of NumPy arrays, whose keys are also the fields and the positions of what was
      saved. The types that NumPy lacks are those of `ml_dtypes`, as in JAX. With `like`, a pytree
      of its structure and dtypes, with arrays on the devices on which it has them; what is no
      array in it stays.

    Raises:
      TypeError: `like` holds what `save` refuses.
      ValueError: the file is damaged, `save` has not written it, or what it holds does not fit into
        memory; or its leaves are not those of `like`, one for one and shape for shape.
      OSError: there is no such file, or it cannot be read.

    Example:
      >>> variables = load("model.npz")  # doctest: +SKIP
      >>> logits = model.apply(variables, images)  # doctest: +SKIP
      >>> model = load("model.npz", like=model)  # an Equinox or NNX module  # doctest: +SKIP
    """
    with _opened(path) as archive:
        index = _read_index(archive)
        data = _read_member(archive, "data", zipfile.ZIP_STORED, os.path.getsize(path))
        leaves = _cut(index["leaves"], np.frombuffer(data, np.uint8))
        variables: dict[str | int, Any] = {}
        for leaf, parts in leaves:
            insert(variables, leaf["path"], _decode(leaf, parts))
        for key_path in index["empty"]:
            insert(variables, key_path, {})
    return variables if like is None else rebuild(like, variables, os.fspath(path))


def load_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the metadata that was given to `save`, and no weights.

    Args:
      path: a file of `save`.

    Returns:
      The metadata as JSON has it; an empty dict if none was given.

    Raises:
      ValueError: the file is damaged, or `save` has not written it.
      OSError: there is no such file, or it cannot be read.
    """
    with _opened(path) as archive:
        return _read_index(archive)["metadata"]


# Leaves.


def _stored_dtype(dtype: np.dtype) -> np.dtype:
    """`dtype` in little-endian order, or unsigned integers where NumPy has no name for it."""
    return np.dtype(f"<u{dtype.itemsize}" if dtype.name in EXTENDED else dtype.newbyteorder("<"))


def _encode(array: Shaped[np.ndarray, "..."]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The leaf's entry in the index and its parts of the data, in the smaller encoding."""
    stored = _stored_dtype(array.dtype)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    flat = np.ascontiguousarray(little).reshape(-1).view(stored)
    encoding: dict[str, Any] = {"encoding": "dense"}
    parts = [flat]
    nonzero = _has_bits(flat)
    count = np.count_nonzero(nonzero)
    # No gap takes less than one bit: most dense leaves need not be coded to know that they are.
    if count * stored.itemsize + count / 8 < flat.nbytes:
        k, low, high = encode_gaps(nonzero)
        if count * stored.itemsize + low.nbytes + high.nbytes < flat.nbytes:
            encoding = {"encoding": "gaps", "low_bits": k}
            parts = [flat[nonzero], low, high]
    return {
        "dtype": array.dtype.name,
        "stored": stored.str,
        "shape": array.shape,
        "crc32": zlib.crc32(flat),
        "bytes": [part.nbytes for part in parts],
        **encoding,
    }, parts


def _has_bits(flat: Shaped[np.ndarray, " size"]) -> Bool[np.ndarray, " size"]:
    """Which values have any bit set, as -0.0 has: the others need not be stored."""
    if flat.itemsize > 8:
        return (flat.view(np.uint64).reshape(flat.size, flat.itemsize // 8) != 0).any(axis=1)
    return flat.view(f"u{flat.itemsize}") != 0


def _decode(leaf: dict[str, Any], parts: list[UInt8[np.ndarray, " bytes"]]) -> np.ndarray:
    """The leaf's array, checked: inverts `_encode`."""
    if leaf["dtype"] not in DTYPES:
        raise ValueError(f"the dtype {leaf['dtype']} is unknown")
    dtype, shape = DTYPES[leaf["dtype"]], leaf["shape"]
    stored = _stored_dtype(dtype)
    if leaf["stored"] != stored.str or not _are_sizes(shape):
        raise ValueError("a leaf's type or shape is wrong")
    if leaf["encoding"] == "dense":
        (values,) = parts
        flat = values.view(stored).copy()
    elif leaf["encoding"] == "gaps":
        values, low, high = parts
        flat = _spread(values.view(stored), decode_gaps(leaf["low_bits"], low, high), shape)
    else:
        raise ValueError(f"the encoding {leaf['encoding']} is unknown")
    if zlib.crc32(flat) != leaf["crc32"]:
        raise ValueError("a leaf differs from its checksum")
    return flat.astype(stored.newbyteorder("="), copy=False).view(dtype).reshape(shape)


def _spread(
    values: Shaped[np.ndarray, " count"], ends: Int[np.ndarray, " count+1"], shape: list[int]
) -> Shaped[np.ndarray, " size"]:
    """`values` at their places among zeros, if they fill `shape` exactly."""
    if ends.size != values.size + 1 or ends[-1] != math.prod(shape):
        raise ValueError("a leaf's values and gaps do not fill its shape")
    flat = np.zeros(ends[-1], values.dtype)
    flat[ends[:-1]] = values
    return flat


def _round(array: np.ndarray, dtype: np.dtype, key_path: Path) -> np.ndarray:
    """`array` in the narrower `dtype`, if every finite value stays finite."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = array.astype(dtype)
    overflown = np.isfinite(array) & ~np.isfinite(rounded)
    if overflown.any():
        raise ValueError(
            f"{name_of(key_path)} holds {array[overflown][0]}, which overflows {dtype.name}; "
            "choose another dtype or leave it out."
        )
    return rounded


# Metadata.


def _check_json(value: Any, name: str) -> None:
    """Raises unless JSON gives `value` back, but for tuples."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r}; in JSON keys are strings.")
            _check_json(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _check_json(item, f"{name}[{position}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{name} is {value}, which JSON lacks; leave it out or save it as a string."
        )
    elif value is not None and not isinstance(value, str | int | float):
        raise TypeError(
            f"{name} is a {type(value).__name__}; metadata holds numbers, strings, booleans, None, "
            "lists and dicts."
        )


# Files.


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """Opens the archive; whatever is wrong with its content becomes one ValueError."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a directory; give the file that feather_jax.save wrote.")
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is damaged or was not written by feather_jax.save ({str(error)[:200]}); "
                "copy or save it again."
            ) from error


def _read_member(archive: zipfile.ZipFile, name: str, compression: int, limit: int) -> bytes:
    """The member's content, if it is stored as `save` does it and no larger than `limit`."""
    info = archive.getinfo(name)
    if info.compress_type != compression or max(info.file_size, info.compress_size) > limit:
        raise ValueError(f"{name} is compressed otherwise or too large")
    with archive.open(info) as member:
        return member.read(info.file_size)  # whatever it would expand to


def _read_index(archive: zipfile.ZipFile) -> dict[str, Any]:
    if sorted(archive.namelist()) != ["data", "index.json"]:
        raise ValueError("its members are not index.json and data")
    text = _read_member(archive, "index.json", zipfile.ZIP_DEFLATED, MAX_INDEX_BYTES)
    index = json.loads(text)
    if index["format"] != FORMAT:
        raise ValueError(f"its format is {index['format']!r}")
    if index["version"] != VERSION:
        raise ValueError(f"its format version is {index['version']!r} and {VERSION} is known")
    if not isinstance(index["metadata"], dict):
        raise ValueError("its metadata is not a dict")
    return index


def _cut(
    leaves: list[dict[str, Any]], data: UInt8[np.ndarray, " bytes"]
) -> Iterator[tuple[dict[str, Any], list[UInt8[np.ndarray, " part"]]]]:
    """Every leaf with its parts of the data."""
    sizes = [size for leaf in leaves for size in leaf["bytes"]]
    if not _are_sizes(sizes) or sum(sizes) != data.size:
        raise ValueError("its leaves do not fill its data")
    start = 0
    for leaf in leaves:
        bounds = start + np.cumsum([0, *leaf["bytes"]])
        yield leaf, [data[a:b] for a, b in itertools.pairwise(bounds)]
        start = bounds[-1]


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
