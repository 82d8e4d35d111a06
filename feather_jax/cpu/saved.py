"""A compiled program as a file: plan, weights and code, so that a service starts without tracing.

The file is a zip archive of `index.json` (the plan, the machine, the signature), `code` (an object
file for that machine) and `weights`. Each has a checksum, which is compared when it is read. On
another machine the code is generated again from the plan.
"""

import json
import os
import struct
import zipfile
import zlib
from typing import Any

import jax
import numpy as np

from feather_jax.archive import write_archive
from feather_jax.cpu.codec import decode, decode_tree, encode, encode_tree
from feather_jax.cpu.plan import Plan
from feather_jax.cpu.signature import Signature
from feather_jax.cpu.target import Target

FORMAT = "feather_jax.cpu.program"
VERSION = 1

# What zipfile, json and a look into a foreign index may raise.
_DAMAGE = (
    *(ValueError, LookupError, TypeError, AttributeError, OverflowError, EOFError, RuntimeError),
    *(NotImplementedError, zipfile.BadZipFile, zlib.error, struct.error),
)


def write_program(
    path: str | os.PathLike[str],
    plan: Plan,
    weights: np.ndarray,
    code: bytes,
    target: Target,
    signature: Signature,
) -> None:
    """Writes a program's parts; see `feather_jax.cpu.program.Program.save`."""
    index = {
        "format": FORMAT,
        "version": VERSION,
        "target": encode(target),
        "plan": encode(plan),
        "signature": {
            "arguments": _encode_leaves(signature.arguments),
            "results": _encode_leaves(signature.results),
            "argument_tree": _tree(signature.argument_tree, "takes"),
            "result_tree": _tree(signature.result_tree, "gives"),
        },
    }
    text = json.dumps(index, separators=(",", ":"), allow_nan=False).encode()
    write_archive(
        path,
        [
            ("index.json", zipfile.ZIP_DEFLATED, [text]),
            ("code", zipfile.ZIP_DEFLATED, [code]),
            ("weights", zipfile.ZIP_STORED, [weights]),
        ],
    )


def read_program(
    path: str | os.PathLike[str],
) -> tuple[Plan, np.ndarray, bytes, Target, Signature]:
    """The parts that `write_program` was given; see `feather_jax.cpu.program.load`."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            index = json.loads(archive.read("index.json"))
            _check(index)
            code, weights = archive.read("code"), archive.read("weights")
        own = index["signature"]
        signature = Signature(
            decode_tree(own["argument_tree"]),
            decode_tree(own["result_tree"]),
            _decode_leaves(own["arguments"]),
            _decode_leaves(own["results"]),
        )
        plan, target = decode(index["plan"]), decode(index["target"])
        if not isinstance(plan, Plan) or not isinstance(target, Target):
            raise ValueError("it has no plan")
    except OSError:
        raise
    except _DAMAGE as error:
        raise ValueError(
            f"{os.fspath(path)} is no compiled program, or a damaged one ({error}); compile and "
            "save it again."
        ) from error
    return plan, np.frombuffer(weights, np.uint8), code, target, signature


def _check(index: Any) -> None:
    if index["format"] != FORMAT:
        raise ValueError(f"its format is {index['format']!r}")
    if index["version"] > VERSION:
        raise ValueError(f"it is of version {index['version']}, which a later feather_jax wrote")


def _tree(tree: Any, what: str) -> Any:
    try:
        return encode_tree(tree)
    except TypeError as error:
        raise TypeError(
            f"The compiled function {what} a pytree with a {error} in it, and a file can hold "
            "dicts, lists and tuples alone; wrap the function so that it does not."
        ) from error


def _encode_leaves(leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    return [[list(leaf.shape), np.dtype(leaf.dtype).name] for leaf in leaves]


def _decode_leaves(leaves: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for shape, dtype in leaves)
