"""How a sparse convolution goes through its pixels, channels and threads: a fixed rule."""

import numpy as np

from feather_jax.cpu.graph import Convolution
from feather_jax.cpu.pack import WORD, in_panels
from feather_jax.cpu.target import Target
from feather_jax.cpu.tiles import FLOAT, LINE, Tiles

# Bytes of input that a block of pixels should read at most, so that it stays in the first cache.
SLAB = 36_000

# The share of a layer's weights that must be in panels for panels to pay.
IN_PANELS = 0.5

# Weights of a list, on average, from which on it is gone through by words of offsets, and which pay
# for reading and storing a row's accumulators once more for another chunk.
LONG = 12

# Input channels of a chunk, at least.
LEAST_INPUTS = 8

# Cache lines that a list fetches ahead at most: a longer list is a stream that the machine sees.
MOST_LINES = 16


def choose_block(
    op: Convolution, x: Tiles, y: Tiles, target: Target
) -> tuple[tuple[int, int], int]:
    """Chooses a block of pixels, and the number of chunks of input channels.

    The block fills the registers, so that there are few blocks; of those that need as many, the one
    that reads the fewest cache lines, and the widest, whose vectors are neighbours. There
    are as many chunks as make what it reads fit the first cache, while enough non-zeros are left to
    a row.

    Returns:
      Rows and columns of the block, and the number of chunks.
    """
    (high, wide), most = y.tile, target.accumulators

    def blocks(block: tuple[int, int]) -> int:
        return -(-high // block[0]) * (wide // block[1])

    candidates = [
        (rows, columns)
        for columns in range(1, wide + 1)
        if wide % columns == 0
        for rows in range(1, high + 1)
        if rows * columns <= most
    ]
    block = min(candidates, key=lambda each: (blocks(each), _slab(op, x, each), -each[1]))
    if op.groups > 1:
        return block, 1

    inputs, outputs = op.weights.shape[2:]
    pairs, slab = np.count_nonzero(op.weights) / outputs, _slab(op, x, block)
    chunks = min(-(-slab // SLAB), int(pairs / LONG), inputs // LEAST_INPUTS)
    return block, max(1, chunks)


def _slab(op: Convolution, x: Tiles, block: tuple[int, int]) -> int:
    """Bytes of the cache lines that a block reads of all channels."""
    rows, columns = (
        np.unique(np.add.outer(np.arange(size) * stride, np.arange(taps) * step))
        for size, stride, taps, step in zip(
            block, op.strides, op.weights.shape[:2], op.dilation, strict=True
        )
    )
    vectors = np.add.outer(rows * x.columns, columns)
    return x.channels * LINE * len(np.unique(vectors * x.vector // LINE))


def choose_panel(op: Convolution, pixels: int, target: Target) -> int:
    """How many output channels share what a block of `pixels` reads; 0 where few weights would.

    Their accumulators, their weights and one vector of the input fill the registers.
    """
    outputs = op.weights.shape[3]
    panel = min(outputs, (target.registers - 1) // (pixels + 1))
    if op.groups > 1 or panel < 2 or in_panels(op, panel) < IN_PANELS:
        return 0
    return panel


def prefetch(length: float) -> int:
    """How many cache lines a list's weights are on average, and one more."""
    return min(MOST_LINES, int(FLOAT * length / LINE) + 1)


def step(length: float, bits: int) -> int:
    """How many weights of a list are multiplied at a time, for offsets of so many bits."""
    return 8 * WORD // bits if length >= LONG else 1


def by_channel(blocks: int, threads: int) -> bool:
    """Whether threads share output channels, because there are too few blocks to be shared."""
    return threads > 1 and blocks < 8 and blocks % threads != 0
