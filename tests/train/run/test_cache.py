"""The compilation cache: where it lives, and what cannot be read or written."""

import os
import pathlib
import subprocess
import sys

import pytest

from train.run import cache

PROGRAM = """
import jax, jax.numpy as jnp
from jax import monitoring
from train.run.cache import use_compilation_cache

counts = {"/jax/compilation_cache/cache_hits": 0, "/jax/compilation_cache/cache_misses": 0}
def count(name, **_):
    if name in counts:
        counts[name] += 1
monitoring.register_event_listener(count)
use_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

@jax.jit
def the_program(x):
    return jnp.sin(x) @ x

assert float(the_program(jnp.ones((3, 3))).sum()) > 22
print(*counts.values())
"""


def run(folder: pathlib.Path) -> tuple[int, int, str]:
    """Hits, misses and stderr of a program that compiles `the_program`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment |= {"XDG_CACHE_HOME": str(folder), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=environment,
    )
    hits, misses = map(int, done.stdout.split())
    return hits, misses, done.stderr


@pytest.mark.slow
def test_an_unreadable_entry_costs_a_compilation_and_no_more(tmp_path):
    run(tmp_path)
    entries = sorted((tmp_path / "feather_jax" / "xla").glob("jit_the_program-*-cache"))
    assert entries
    for entry in entries:
        entry.write_bytes(b"garbage")
    _, misses, stderr = run(tmp_path)
    assert misses == len(entries)
    assert "Error reading persistent compilation cache entry for 'jit_the_program'" in stderr


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == (0, 0, "")


def test_it_is_in_the_users_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert cache.user_cache() == tmp_path / "elsewhere"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.user_cache() == tmp_path / ".cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.user_cache() == tmp_path / ".cache"
