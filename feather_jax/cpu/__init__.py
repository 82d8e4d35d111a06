"""Sparse networks that run fast on CPUs: a compiler from a traced function to machine code.

Import it as `from feather_jax import cpu`. It needs llvmlite, which the extra `feather-jax[cpu]`
brings.
"""

try:
    import llvmlite  # noqa: F401
except ImportError as error:
    raise ImportError(
        "feather_jax.cpu generates code with llvmlite; install it with pip install "
        "'feather-jax[cpu]'."
    ) from error

from feather_jax.cpu.objects import write_object
from feather_jax.cpu.program import Program, compile, load

__all__ = ["Program", "compile", "load", "write_object"]
