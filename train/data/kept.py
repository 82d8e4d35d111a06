"""Arrays kept in the user's cache directory from start to start."""

import hashlib
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping

import numpy as np

from train.files import user_cache

_STALE_SECONDS = 3600  # no process takes as long to write its file


def place(name: str, made_of: str) -> pathlib.Path:
    """The file for what is made of something, called `name` for people."""
    digest = hashlib.sha256(made_of.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return user_cache() / "feather_jax" / "data" / f"{name}-{digest}.npz"


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays in a file; {} if it is not there or damaged (zip's CRC-32)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception:  # a damaged header makes NumPy and zipfile raise anything
        return {}


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file by another name and renames it, as processes may start at once.

    Raises:
      OSError: it can't be written; nothing of it is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for unfinished in path.parent.glob("*.tmp"):  # by a process that was killed
        if time.time() - unfinished.stat().st_mtime > _STALE_SECONDS:
            unfinished.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.close()
            os.replace(file.name, path)
        except BaseException:
            pathlib.Path(file.name).unlink(missing_ok=True)
            raise
