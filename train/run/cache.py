"""JAX's cache of compiled programs, in the user's cache directory."""

import pathlib
import tempfile

import jax

from train.files import user_cache


def use_compilation_cache() -> None:
    """Keeps compiled programs, the small ones too, for the next start.

    They are in `jax_compilation_cache_dir` where the user has set it (as with the environment's
    JAX_COMPILATION_CACHE_DIR), in the user's cache directory otherwise. A folder that cannot be
    written is no error: every start compiles then.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = user_cache() / "feather_jax" / "xla"
        if not _can_write(folder):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _can_write(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
