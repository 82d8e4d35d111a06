"""Moves between layouts against indexing in NumPy."""

import dataclasses

import numpy as np
import pytest

from feather_jax.cpu.layouts import Halo, Retile, ToRows, ToTiles, pixels, places
from feather_jax.cpu.tiles import Tiles, choose_tiles

SHAPES = [(1, 8, 8, 3), (1, 7, 5, 18), (2, 13, 9, 5), (3, 1, 33, 17), (1, 2, 2, 1)]
HALOS = [((0, 0), (0, 0)), ((1, 1), (1, 1)), ((3, 0), (1, 2))]


def tiled(array: np.ndarray, tiles: Tiles) -> np.ndarray:
    """What an array's planes hold, [groups, channels, rows, columns, lanes], halos included."""
    image, row, column = np.broadcast_arrays(*tiles.coordinates())
    inside = tiles.inside()
    result = np.full((tiles.groups, tiles.channels, *inside.shape), tiles.fill, np.float32)
    for group in range(tiles.groups):
        exists = inside & (image + group * tiles.grid[0] < tiles.batch)
        values = array[image[exists] + group * tiles.grid[0], row[exists], column[exists]]
        result[group][:, exists] = values.T
    return result


def memory(array: np.ndarray, tiles: Tiles) -> np.ndarray:
    """The same as it lies in memory, the gaps between planes zero."""
    planes = array.reshape(tiles.groups, tiles.channels, -1)
    gap = tiles.plane // 4 - planes.shape[-1]
    return np.pad(planes, ((0, 0), (0, 0), (0, gap))).astype(np.float32)


def planes(raw: np.ndarray, tiles: Tiles) -> np.ndarray:
    """Back from memory."""
    size = tiles.rows * tiles.columns * tiles.lanes
    whole = raw.view(np.float32).reshape(tiles.groups, tiles.channels, -1)[..., :size]
    return whole.reshape(tiles.groups, tiles.channels, tiles.rows, tiles.columns, tiles.lanes)


def with_halo(shape, lanes, halo, fill=0.0) -> Tiles:
    own = choose_tiles(shape, lanes, 2 if shape[0] > 1 else 1)
    return dataclasses.replace(own, halo=halo, fill=fill)


def random(shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("halo", HALOS)
def test_to_tiles(run_kernel, shape, halo):
    tiles, x = with_halo(shape, 16, halo, fill=-np.inf), random(shape)
    empty = np.zeros(tiles.nbytes, np.uint8)
    raw = run_kernel(ToTiles(tiles), empty, x, places(tiles))
    np.testing.assert_array_equal(planes(raw, tiles), tiled(x, tiles))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lanes", [4, 16])
def test_to_rows(run_kernel, shape, lanes):
    tiles, x = with_halo(shape, lanes, HALOS[2]), random(shape)
    source = memory(tiled(x, tiles), tiles)
    raw = run_kernel(ToRows(tiles), np.zeros_like(x), source, pixels(tiles))
    np.testing.assert_array_equal(raw.view(np.float32).reshape(shape), x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("halo", HALOS)
def test_halo(run_kernel, shape, halo):
    """Halos that reach further than a tile too."""
    tiles, x = with_halo(shape, 8, halo, fill=-np.inf), random(shape)
    expected = tiled(x, tiles)
    (top, _), (left, _) = halo
    inner = np.full_like(expected, 7)
    part = (..., slice(top, top + tiles.tile[0]), slice(left, left + tiles.tile[1]), slice(None))
    inner[part] = expected[part]
    raw = run_kernel(Halo(tiles), memory(inner, tiles))
    np.testing.assert_array_equal(planes(raw, tiles), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_retile(run_kernel, shape):
    old, x = with_halo(shape, 16, HALOS[1]), random(shape)
    images, down, across = old.grid
    high, wide = (-(-shape[1] // across) + 1, -(-shape[2] // down))
    new = Tiles(*shape, (images, across, down), (high, wide), HALOS[2], fill=-np.inf)
    empty = np.zeros(new.nbytes, np.uint8)
    raw = run_kernel(Retile(old, new), empty, memory(tiled(x, old), old))
    expected = tiled(x, new)
    exists = np.isfinite(expected)
    np.testing.assert_array_equal(planes(raw, new)[exists], expected[exists])
    if shape[0] % images == 0:
        np.testing.assert_array_equal(planes(raw, new), expected)
