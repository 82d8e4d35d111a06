"""JAX's cache of compiled programs, in the user's cache directory."""

import pathlib
import re
import tempfile
import warnings
from collections.abc import Callable

import jax

from train.store.files import user_cache

_UNREADABLE = r"Error reading persistent compilation cache entry for '(?P<program>[^']+)'"


def use_compilation_cache() -> None:
    """Keeps compiled programs, the small ones too, for the next start.

    They are in `jax_compilation_cache_dir` where the user has set it (as with the environment's
    JAX_COMPILATION_CACHE_DIR), in the user's cache directory otherwise. A folder that cannot be
    written is no error: every start compiles then.
    """
    if _directory() is None:
        folder = user_cache() / "feather_jax" / "xla"
        if not _can_write(folder):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    warnings.filterwarnings("always", message=_UNREADABLE)
    warnings.showwarning = _deleting_unreadable(warnings.showwarning)


def _can_write(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _deleting_unreadable(show: Callable[..., None]) -> Callable[..., None]:
    """`warnings.showwarning` that deletes what JAX warns that it could not read.

    JAX compiles such a program anew but keeps a file that is there, so that a truncated one would
    cost every start a compilation. The warning comes before JAX writes, and files are named after
    the program.
    """

    def show_or_delete(message: Warning | str, *args: object, **kwargs: object) -> None:
        found = re.match(_UNREADABLE, str(message))
        if not (found and _delete_entries(found["program"])):
            show(message, *args, **kwargs)

    return show_or_delete


def _delete_entries(program: str) -> bool:
    """Deletes what is kept of programs of this name; whether there was any and it is gone."""
    entries = list(pathlib.Path(_directory() or "").glob(f"{program}-*-cache"))
    try:
        for entry in entries:
            entry.unlink(missing_ok=True)
    except OSError:
        return False
    return bool(entries)


def _directory() -> str | None:
    return jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
