"""Every example of a docstring gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import feather_jax

MODULES = sorted(module.name for module in pkgutil.iter_modules(feather_jax.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"feather_jax.{name}")
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=options).failed == 0


@pytest.mark.parametrize("name", feather_jax.__all__)
def test_every_public_name_has_a_docstring(name):
    public = getattr(feather_jax, name)
    assert "Args:" in public.__doc__ or "Attributes:" in public.__doc__
