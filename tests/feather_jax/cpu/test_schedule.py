"""The rule's limits: what fits registers and cache, and what threads share."""

import dataclasses
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_jax.cpu import schedule
from feather_jax.cpu.graph import Convolution
from feather_jax.cpu.target import Target
from feather_jax.cpu.tiles import choose_tiles

AVX512 = Target("x86_64-unknown-linux-gnu", "x86-64-v4", "", 16, 8, 32)


def ones(inputs: int, outputs: int, size: int = 1, groups: int = 1) -> Convolution:
    return Convolution(np.ones((size, size, inputs, outputs), np.float32), groups=groups)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 8, 256]))
def test_blocks_fit_registers_and_tiles(height, width, inputs):
    tiles = choose_tiles((1, height, width, inputs), 16)
    (rows, columns), chunks = schedule.choose_block(ones(inputs, 16), tiles, tiles, AVX512)
    assert rows * columns <= AVX512.accumulators
    assert tiles.tile[1] % columns == 0
    assert rows <= tiles.tile[0]
    blocks = -(-tiles.tile[0] // rows) * (tiles.tile[1] // columns)
    assert blocks >= math.prod(tiles.tile) / AVX512.accumulators
    assert 1 <= chunks <= max(1, inputs // schedule.LEAST_INPUTS)


def test_chunks_make_the_slab_fit():
    tiles = choose_tiles((1, 14, 14, 1024), 16)
    block, chunks = schedule.choose_block(ones(1024, 64), tiles, tiles, AVX512)
    line_bytes = 64 * math.prod(block)
    assert 1024 * line_bytes / chunks <= schedule.SLAB < 1024 * line_bytes / (chunks - 1)


def test_few_weights_are_not_cut_up():
    tiles = choose_tiles((1, 14, 14, 1024), 16)
    weights = np.zeros((1, 1, 1024, 64), np.float32)
    weights[0, 0, ::128] = 1
    assert schedule.choose_block(Convolution(weights), tiles, tiles, AVX512)[1] == 1


def test_panels_are_for_dense_layers():
    assert schedule.choose_panel(ones(64, 64), 7, AVX512) == 3
    assert schedule.choose_panel(ones(64, 64), 4, AVX512) == 6
    assert schedule.choose_panel(ones(64, 1), 7, AVX512) == 0
    assert schedule.choose_panel(ones(1, 64, groups=64), 7, AVX512) == 0
    sparse = np.zeros((1, 1, 64, 64), np.float32)
    sparse[0, 0, np.arange(64), np.arange(64)] = 1
    assert schedule.choose_panel(Convolution(sparse), 7, AVX512) == 0


def test_threads_share_channels_where_blocks_are_few():
    assert not schedule.by_channel(1, 1)
    assert schedule.by_channel(1, 2)
    assert schedule.by_channel(3, 2)
    assert not schedule.by_channel(4, 2)
    assert not schedule.by_channel(9, 2)


def test_blocks_are_of_neighbours_where_shapes_read_alike():
    tiles = choose_tiles((1, 56, 56, 64), 16)
    assert schedule.choose_block(ones(64, 64), tiles, tiles, AVX512)[0] == (1, 7)


def test_lines_between_strides_are_not_read():
    """Of 4 x 4 vectors a block of 2 x 2 with stride 2 reads 4: half of what stays in the cache."""
    x, y = choose_tiles((1, 16, 16, 1024), 16), choose_tiles((1, 8, 8, 64), 16)
    strided = dataclasses.replace(ones(1024, 64), strides=(2, 2))
    assert schedule.choose_block(strided, x, y, AVX512) == ((2, 2), 8)
    assert 4 * 1024 * 64 / 8 <= schedule.SLAB < 4 * 1024 * 64 / 7


def test_long_lists_are_read_by_words_of_offsets():
    assert [schedule.step(50, bits) for bits in (16, 32)] == [4, 2]
    assert schedule.step(5, 16) == 1
    assert schedule.prefetch(0) == 1
    assert schedule.prefetch(20) == 2  # 80 bytes
    assert schedule.prefetch(1e6) == schedule.MOST_LINES
