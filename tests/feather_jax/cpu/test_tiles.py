"""Lane tiles: every pixel has one place, and a shift by a pixel is a shift by a vector."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from feather_jax.cpu.tiles import LINE, Tiles, choose_tiles

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4))
LANES = st.sampled_from([4, 8, 16])


@given(SIZES, LANES)
def test_every_pixel_has_one_place(shape, lanes):
    tiles = choose_tiles(shape, lanes)
    image, row, column = np.broadcast_arrays(*tiles.coordinates())
    inside = tiles.inside()
    places = list(zip(image[inside], row[inside], column[inside], strict=True))
    assert len(set(places)) == len(places) == math.prod(shape[1:3])


@given(SIZES, LANES)
def test_as_few_vectors_as_any_grid_needs(shape, lanes):
    tiles = choose_tiles(shape, lanes)
    _, height, width, _ = shape
    fewest = min(
        -(-height // down) * -(-width // (lanes // down))
        for down in (1, 2, 4, 8, 16)
        if lanes % down == 0
    )
    assert math.prod(tiles.tile) == fewest
    assert tiles.grid[0] == 1


def test_images_share_vectors():
    tiles = choose_tiles((8, 7, 7, 3), 16, images=8)
    assert tiles.grid[0] == 8
    assert math.prod(tiles.grid) == 16
    assert tiles.groups == 1
    image, row, _ = np.broadcast_arrays(*tiles.coordinates())
    assert set(image[tiles.inside()]) == set(range(8))
    assert row[tiles.inside()].max() == 6


@given(SIZES, LANES, st.integers(0, 3), st.integers(0, 3))
def test_planes_are_an_odd_number_of_lines(shape, lanes, before, after):
    own = choose_tiles(shape, lanes)
    tiles = Tiles(*shape, own.grid, own.tile, ((before, after), (after, before)))
    assert tiles.plane // LINE % 2 == 1
    assert tiles.plane % LINE == 0
    last = tiles.at(own.tile[0] + after - 1, own.tile[1] + before - 1)
    assert last + tiles.vector <= tiles.plane
    assert tiles.at(-before, -after) == 0


def test_neighbours_are_a_vector_apart():
    tiles = Tiles(1, 4, 4, 1, (1, 2, 2), (2, 2), ((1, 1), (1, 1)))
    _, row, column = np.broadcast_arrays(*tiles.coordinates())
    np.testing.assert_array_equal(row[1:], row[:-1] + 1)
    np.testing.assert_array_equal(column[:, 1:], column[:, :-1] + 1)
    assert tiles.at(0, 1) - tiles.at(0, 0) == tiles.vector


def test_prints():
    assert str(Tiles(1, 4, 4, 1, (1, 2, 2), (2, 2))) == "2x2 tiles of 2x2"
    assert str(Tiles(2, 4, 4, 1, (2, 2, 2), (2, 2), ((1, 0), (1, 0)))) == (
        "2x2x2 tiles of 2x2 +1,0,1,0"
    )
