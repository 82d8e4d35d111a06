"""Packed weights, unpacked again."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_jax.cpu.graph import Convolution
from feather_jax.cpu.pack import Packed, in_panels, pack, taps
from feather_jax.cpu.tiles import Tiles, choose_tiles

rng = np.random.default_rng(0)


def layout(channels: int) -> Tiles:
    """With a halo, so that no two taps are at the same offset."""
    tiles = choose_tiles((1, 9, 7, channels), 4)
    return dataclasses.replace(tiles, halo=((2, 2), (2, 2)))


def random(shape: tuple[int, ...], density: float) -> np.ndarray:
    return (rng.standard_normal(shape) * (rng.random(shape) < density)).astype(np.float32)


def unpacked(packed: Packed, op: Convolution, x: Tiles, panel: int) -> np.ndarray:
    """The weights that lists and panels stand for, by output, channel, row and column."""
    height, width, _, outputs = op.weights.shape
    (top, _), (left, _) = op.padding
    taps = {
        channel * x.plane
        + ((i * op.dilation[0] - top) * x.columns + j * op.dilation[1] - left) * x.vector: (
            channel,
            i,
            j,
        )
        for channel in range(x.channels)
        for i in range(height)
        for j in range(width)
    }
    result = np.zeros((outputs, x.channels, height, width), np.float32)
    chunks = len(packed.rows)
    firsts = [packed.first + x.channels * chunk // chunks * x.plane for chunk in range(chunks)]
    for first, rows in zip(firsts, packed.rows, strict=True):
        for (low, output), (high, _) in itertools.pairwise(rows):
            group = output // (outputs // op.groups) * (x.channels // op.groups)
            own = slice(low, high)
            for weight, offset in zip(packed.weights[own], packed.offsets[own], strict=True):
                assert weight
                place = first + group * x.plane + int(offset) * x.vector
                result[output, *taps[place]] += weight
    for first, starts in zip(firsts, packed.panel_rows, strict=True) if panel else ():
        for number, (low, high) in enumerate(itertools.pairwise(starts)):
            for offset, *bits in packed.panels[low:high]:
                weights = np.array(bits, np.int32).view(np.float32)
                assert weights.all()
                part = slice(number * panel, (number + 1) * panel)
                result[part, *taps[first + int(offset)]] += weights
    return result


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0, 2, 3]),
    st.integers(1, 7),
)
def test_every_weight_once(density, height, width, chunks, panel, outputs):
    op = Convolution(
        random((height, width, 8, outputs), density), padding=((1, 0), (2, 1)), dilation=(2, 1)
    )
    panel = panel if panel <= outputs else 0
    packed = pack(op, layout(8), chunks, panel)
    expected = op.weights.transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(unpacked(packed, op, layout(8), panel), expected)
    assert len(packed.rows) == chunks
    stored = len(packed.weights) + panel * len(packed.panels)
    assert stored == np.count_nonzero(op.weights)


def test_chunks_take_their_own_channels():
    op = Convolution(random((1, 1, 32, 3), 1.0))
    x = layout(32)
    packed = pack(op, x, 4)
    for rows in packed.rows:
        offsets = packed.offsets[rows[0, 0] : rows[-1, 0]]
        assert set(offsets * x.vector // x.plane) == set(range(8))


def test_lists_end_with_a_word_but_for_the_last():
    op = Convolution(random((3, 3, 32, 5), 0.4))
    x = layout(32)
    packed = pack(op, x, 4)
    lengths = np.diff(packed.rows[:, :, 0], axis=1)
    assert not (lengths[:-1] % 4).any()
    assert lengths.sum() == np.count_nonzero(op.weights)
    assert len(packed.offsets) * packed.offsets.itemsize == 2 * lengths.sum() + 8


def test_offsets_in_more_bits_where_the_input_is_large():
    wide = choose_tiles((1, 700, 700, 8), 4)  # 122,500 vectors a plane
    op = Convolution(random((1, 1, 8, 3), 1.0))
    assert pack(op, wide, 1).offsets.dtype == np.int32
    np.testing.assert_array_equal(
        unpacked(pack(op, wide, 1), op, wide, 0), op.weights.transpose(3, 2, 0, 1)
    )
    assert pack(op, layout(8), 1).offsets.dtype == np.int16


def test_groups_read_their_own_channels():
    op = Convolution(random((3, 3, 2, 8), 1.0), padding=((1, 1), (1, 1)), groups=4)
    weights = unpacked(pack(op, layout(8), 1), op, layout(8), 0)
    for output in range(8):
        own = range(output // 2 * 2, output // 2 * 2 + 2)
        np.testing.assert_array_equal(
            weights[output, own], op.weights[:, :, :, output].transpose(2, 0, 1)
        )
        assert not np.delete(weights[output], own, 0).any()


def test_taps_of_a_depthwise_convolution():
    """What they are for a channel is what its list says."""
    op = Convolution(random((3, 2, 1, 8), 1.0), padding=((1, 1), (1, 1)), groups=4)
    packed = pack(op, layout(4), 1)
    offsets = packed.offsets[: 8 * 6].reshape(8, 6) * layout(4).vector
    np.testing.assert_array_equal(offsets, np.tile(taps(op, layout(4)), (8, 1)))
    np.testing.assert_array_equal(
        packed.weights.reshape(8, 3, 2), op.weights[:, :, 0].transpose(2, 0, 1)
    )
    assert not taps(dataclasses.replace(op, groups=1), layout(1))
    some = op.weights.copy()
    some[0, 0, 0, 0] = 0
    assert not taps(dataclasses.replace(op, weights=some), layout(4))


@pytest.mark.parametrize("panel", [2, 3])
def test_share_in_panels(panel):
    assert in_panels(Convolution(random((1, 1, 8, 6), 1.0)), panel) == 1
    assert in_panels(Convolution(np.zeros((1, 1, 8, 6), np.float32)), panel) == 0
    one = np.zeros((1, 1, 2, 6), np.float32)
    one[0, 0, 0, :panel] = one[0, 0, 1, 0] = 1  # a whole panel, and a weight alone
    assert in_panels(Convolution(one), panel) == panel / (panel + 1)
    dense = Convolution(random((1, 1, 8, 6), 1.0))
    assert not pack(dense, layout(8), 1, panel).has_lists(panel)
    assert pack(Convolution(one), layout(2), 1, panel).has_lists(panel)
