"""A convolution's weights as its kernel reads them: lists of pairs, and panels.

A list is an output channel's: (weight, offset of the input vector) for each weight that is not
zero. A panel is that of a few neighbouring output channels, for the inputs that all of them have a
weight for: an offset and as many weights; the lists have what is left.
"""

import dataclasses
import itertools

import numpy as np

from feather_jax.cpu.graph import Convolution
from feather_jax.cpu.tiles import FLOAT, Tiles

PAIR = 8  # bytes of a (weight, offset) or a (first pair, output channel)


def panel_bytes(panel: int) -> int:
    """Bytes of an entry of a panel."""
    return FLOAT * (1 + panel)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Lists and panels, chunk by chunk of the input channels.

    Attributes:
      rows: int32 [chunks, output channels + 1, 2]: a list's first pair, and the channel; it ends
        where the next begins.
      pairs: [pairs] of weight (float32) and offset (int32, bytes).
      panel_rows: int32 [chunks, panels + 1]: a panel's first entry.
      panels: int32 [entries, 1 + panel]: offset, and the weights' bits.
    """

    rows: np.ndarray
    pairs: np.ndarray
    panel_rows: np.ndarray
    panels: np.ndarray

    def has_lists(self, panel: int) -> bool:
        """Whether any channel that is part of a panel has a weight in its list."""
        if not panel:
            return True
        covered = (self.panel_rows.shape[1] - 1) * panel
        return bool((self.rows[:, covered, 0] > self.rows[:, 0, 0]).any())


def pack(op: Convolution, x: Tiles, chunks: int, panel: int = 0) -> Packed:
    """Packs the weights of a convolution.

    Args:
      op: the convolution.
      x: the layout of its input.
      chunks: how many parts to take the input channels in; 1 if there are groups.
      panel: output channels of a panel; 0 for none.

    Raises:
      ValueError: the input is so large that an offset does not fit 31 bits.
    """
    height, width, inputs, outputs = op.weights.shape
    (top, _), (left, _) = op.padding
    down, across = (
        np.arange(taps) * step - before
        for taps, step, before in zip((height, width), op.dilation, (top, left), strict=True)
    )
    places = (down[:, None] * x.columns + across) * x.vector
    offsets = np.arange(x.channels)[:, None, None] * x.plane + places
    if np.abs(offsets).max() >= 1 << 31:
        raise ValueError("A layer's input is larger than 2 GiB; compile for a smaller batch.")

    counts, panel_counts, pairs, panels = [], [], [], []
    bounds = np.arange(chunks + 1) * inputs // chunks
    for low, high in itertools.pairwise(bounds):
        weights = op.weights[:, :, low:high].transpose(3, 2, 0, 1).reshape(outputs, -1)
        own = offsets[low:high].ravel()
        listed = weights != 0
        if panel:
            count = outputs // panel
            grouped = weights[: count * panel].reshape(count, panel, -1)
            common = listed[: count * panel].reshape(count, panel, -1).all(1)
            group, column = np.nonzero(common)
            entries = np.empty((len(group), 1 + panel), np.int32)
            entries[:, 0] = own[column]
            entries[:, 1:] = grouped.transpose(0, 2, 1)[group, column].view(np.int32)
            panels.append(entries)
            panel_counts.append(common.sum(1))
            listed[: count * panel] &= ~np.repeat(common, panel, 0)
        row, column = np.nonzero(listed)
        each = np.empty(len(row), [("weight", np.float32), ("offset", np.int32)])
        each["weight"] = weights[row, column]
        first_channel = row // (outputs // op.groups) * inputs  # of the row's group of channels
        each["offset"] = own[column] + first_channel * x.plane
        pairs.append(each)
        counts.append(listed.sum(1))

    rows = np.zeros((chunks, outputs + 1, 2), np.int32)
    rows[:, :, 0] = _starts(counts)
    rows[:, :outputs, 1] = np.arange(outputs)
    if not panel:
        return Packed(rows, np.concatenate(pairs), *np.zeros((2, 0), np.int32))
    panel_rows = _starts(panel_counts).astype(np.int32)
    return Packed(rows, np.concatenate(pairs), panel_rows, np.concatenate(panels))


def _starts(counts: list[np.ndarray]) -> np.ndarray:
    """Where each of a chunk's parts begins, and where the last ends: [chunks, parts + 1]."""
    ends = np.cumsum(counts).reshape(np.shape(counts))
    first = np.concatenate([[0], ends[:-1, -1]])
    return np.concatenate([first[:, None], ends], axis=1)


def in_panels(op: Convolution, panel: int) -> float:
    """The share of the weights that are not zero that panels would hold."""
    outputs = op.weights.shape[3]
    count = outputs // panel
    listed = op.weights.reshape(-1, outputs) != 0
    common = listed[:, : count * panel].reshape(-1, count, panel).all(2)
    return panel * int(np.count_nonzero(common)) / max(1, int(np.count_nonzero(listed)))
