"""The vision transformer: its keys, its positions, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from feather_jax import prunable_weights
from feather_jax.masks import path_name
from train import models
from train.errors import UserError
from train.models.vit import resize_positions

SMALL = {"name": "vit_tiny", "patch": 4, "width": 12, "depth": 3}


def built(images, **options):
    model = models.build(SMALL | options, num_classes=5)
    key = jax.random.key(0, impl="rbg")  # compiles in a fraction of the default's time
    return model, jax.jit(functools.partial(model.init, train=False))(key, images)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (6, 8, 8, 3))


def test_prunable_are_plain_matrices_and_the_patch_embedding(images):
    _, variables = built(images)
    mask = jax.tree.leaves(prunable_weights(variables["params"]))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    shapes = {
        path_name(path): leaf.shape
        for (path, leaf), chosen in zip(leaves, mask, strict=True)
        if chosen
    }
    assert shapes.pop("patch_embedding/kernel") == (4, 4, 3, 12)
    assert shapes.pop("head/kernel") == (12, 5)
    expected = {f"attention/{name}": (12, 12) for name in ("query", "key", "value", "out")}
    expected |= {"mlp1": (12, 48), "mlp2": (48, 12)}
    assert shapes == {
        f"block{number}/{name}/kernel": shape
        for number in (1, 2, 3)
        for name, shape in expected.items()
    }


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"stochastic_depth": 0.6}])
def test_an_example_is_dropped_by_its_key_wherever_it_is_computed(images, options):
    model, variables = built(images, **options)
    keys = jax.random.split(jax.random.key(2), 6)
    apply = jax.jit(functools.partial(model.apply, train=True))
    together = apply(variables, images, keys=keys)
    parts = [apply(variables, images[i : i + 2], keys=keys[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose(together, jnp.concatenate(parts), atol=1e-6)
    assert np.ptp(together - apply(variables, images)) > 1e-4
    assert np.ptp(together - apply(variables, images, keys=keys[::-1])) > 1e-4


def test_stochastic_depth_grows_from_zero_at_the_first_block_to_its_rate_at_the_last(images):
    # With (almost) the rate 1 an example passes by the last block, and the middle one by half.
    model, variables = built(images, stochastic_depth=0.999999)
    keys = jax.random.split(jax.random.key(2), 6)

    def change(block):
        """Which examples' logits change where this block adds something else."""
        other = jax.tree.map(lambda leaf: leaf, variables)
        for name in ("attention", "mlp2"):
            layer = other["params"][f"block{block}"][name]
            layer = layer["out"] if name == "attention" else layer
            layer["bias"] = jnp.linspace(-1, 1, 12)
        both = [model.apply(each, images, train=True, keys=keys) for each in (variables, other)]
        return np.abs(both[0] - both[1]).max(axis=1) > 0

    assert change(1).all()
    assert not change(3).any()


def test_positions_of_a_linear_field_stay_linear_between_the_borders():
    # A bicubic kernel reproduces linear functions of the position, away from the edges.
    old, new = 12, 24
    grid = np.linspace(0, 1, old, dtype=np.float32)
    field = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1)
    token = np.full((1, 1, 2), 7.0, np.float32)
    positions = np.concatenate([token, field.reshape(1, -1, 2)], axis=1)
    resized = np.asarray(resize_positions(positions, 1 + new**2))
    np.testing.assert_array_equal(resized[:, :1], token)
    centres = ((np.arange(new) + 0.5) * old / new - 0.5) / (old - 1)
    expected = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1)
    inside = (slice(4, -4), slice(4, -4))
    np.testing.assert_allclose(
        resized[:, 1:].reshape(new, new, 2)[inside], expected[inside], atol=1e-6
    )


@pytest.mark.parametrize(("old", "tokens"), [(17, 36), (16, 37), (18, 50), (12, 16)])
def test_positions_that_are_no_square_or_lack_the_class_token_are_refused(old, tokens):
    with pytest.raises(ValueError, match=f"{old} positions cannot become {tokens}"):
        resize_positions(np.zeros((1, old, 2)), tokens)


def test_images_that_are_no_multiple_of_the_patch_are_one_sentence():
    with pytest.raises(UserError, match=r"4x4 pixels, and these are 8x10; choose an image size"):
        built(jnp.zeros((1, 8, 10, 3)))
    with pytest.raises(UserError, match=r"width is 13, which config\.model\.heads = 3"):
        built(jnp.zeros((1, 8, 8, 3)), width=13)
