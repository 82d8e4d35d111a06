"""Squares transposed against indexing in NumPy."""

import dataclasses
import math

import numpy as np
import pytest

from feather_jax.cpu.tiles import Tiles, choose_tiles
from feather_jax.cpu.transpose import RowsToTiles, TilesToRows, has_squares, tile_rows

# Channels that are a fraction, a multiple and neither of a vector's lanes; tiles beyond the last
# row; several groups of images.
CASES = [
    ((1, 8, 8, 3), 4, 1),
    ((1, 32, 32, 3), 16, 1),
    ((1, 5, 16, 5), 8, 1),
    ((1, 37, 1, 32), 16, 1),
    ((1, 37, 1, 20), 16, 1),
    ((3, 4, 4, 16), 8, 2),
    ((8, 7, 7, 16), 16, 8),
]


def offsets(tiles: Tiles) -> np.ndarray:
    """Where each element of the array lies in the tiles' floats, by its indices."""
    images, down, across = tiles.grid
    high, wide = tiles.tile
    result = np.empty((tiles.batch, tiles.height, tiles.width, tiles.channels), int)
    for n, y, x, c in np.ndindex(result.shape):
        lane = (n % images * down + y // high) * across + x // wide
        byte = n // images * tiles.group + c * tiles.plane + tiles.at(y % high, x % wide)
        result[n, y, x, c] = byte // 4 + lane
    return result


def layout(shape, lanes, images, **more) -> Tiles:
    tiles = dataclasses.replace(choose_tiles(shape, lanes, images), **more)
    assert has_squares(tiles)
    return tiles


@pytest.mark.parametrize(("shape", "lanes", "images"), CASES)
def test_rows_to_tiles(run_kernel, shape, lanes, images):
    tiles = layout(shape, lanes, images, halo=((1, 0), (2, 1)), fill=-np.inf)
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    empty = np.full(tiles.nbytes // 4, 7, np.float32)
    raw = run_kernel(RowsToTiles(tiles), empty, x, tile_rows(tiles)).view(np.float32)
    places = offsets(tiles)
    np.testing.assert_array_equal(raw[places], x)
    others = np.delete(raw, places.ravel())
    assert np.all((others == 7) | (others == -np.inf))


@pytest.mark.parametrize(("shape", "lanes", "images"), CASES)
def test_tiles_to_rows(run_kernel, shape, lanes, images):
    tiles = layout(shape, lanes, images, pitch=shape[3] + 2, halo=((1, 0), (2, 1)))
    source = np.arange(tiles.nbytes // 4, dtype=np.float32)
    raw = run_kernel(TilesToRows(tiles), np.zeros(shape, np.float32), source, tile_rows(tiles))
    np.testing.assert_array_equal(raw.view(np.float32).reshape(shape), source[offsets(tiles)])


def test_tiles_that_end_beyond_a_row_have_no_squares():
    assert not has_squares(choose_tiles((1, 7, 7, 64), 16))
    assert not has_squares(choose_tiles((1, 16, 16, 1), 16))
    assert not has_squares(choose_tiles((1, 64, 64, 100), 16))
