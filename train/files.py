"""Files: written whole or not at all, and where a user's cache is."""

import json
import os
import pathlib
from typing import Any


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a whole file so that, killed at any moment, the old one or the new one is there."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def user_cache() -> pathlib.Path:
    """XDG_CACHE_HOME, or ~/.cache without it.

    References:
      XDG Base Directory Specification, which has relative paths ignored.
    """
    given = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else pathlib.Path(os.path.expanduser("~")) / ".cache"
