"""Every test sees eight virtual CPU devices, to test data parallelism without an accelerator."""

import os
import pathlib
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

# The same examples in every run: a failure is one of the change under test.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """Programs that several tests compile are compiled once, in processes that they start too.

    Several pytest-xdist workers have one each: JAX writes an entry where it stays, and a test of
    another worker could read half of it.
    """
    import jax

    directory = tmp_path_factory.mktemp("xla")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    yield directory
    jax.config.update("jax_compilation_cache_dir", None)
