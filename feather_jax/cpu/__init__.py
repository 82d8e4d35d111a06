"""Sparse networks that run fast on CPUs: a compiler from a traced function to machine code.

Import it as `from feather_jax import cpu`. It needs llvmlite, which the extra `feather-jax[cpu]`
brings.
"""
