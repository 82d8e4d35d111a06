"""A convolution's weights as its kernel reads them: lists and panels.

A list is an output channel's: a weight and the offset of its input vector, for each weight that is
not zero. A panel is that of a few neighbouring output channels, for the inputs that all of them
have a weight for: an offset and as many weights; the lists have what is left.

Offsets count vectors from a chunk's first one, the one that the first tap reads of its first
channel for the block's first pixel, so that 16 bits do for all but the largest arrays. A list is
read by words of offsets; what is left of a chunk's last word is the next chunk's.
"""

import dataclasses

import numpy as np

from feather_jax.cpu.graph import Convolution
from feather_jax.cpu.tiles import FLOAT, Tiles

ROW = 8  # bytes of a (first weight, output channel)
WORD = 8  # bytes of offsets that are read at a time


def panel_bytes(panel: int) -> int:
    """Bytes of an entry of a panel."""
    return FLOAT * (1 + panel)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Lists and panels, chunk by chunk of the input channels.

    Attributes:
      rows: int32 [chunks, output channels + 1, 2]: a list's first weight, and the channel; it ends
        where the next begins.
      weights: float32 [weights in lists].
      offsets: int16 or int32 [weights in lists, and a word], vectors behind the chunk's first.
      panel_rows: int32 [chunks, panels + 1]: a panel's first entry.
      panels: int32 [entries, 1 + panel]: offset in bytes, and the weights' bits.
      first: bytes from the block's first pixel to what the first tap reads for it.
    """

    rows: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    panel_rows: np.ndarray
    panels: np.ndarray
    first: int

    @property
    def bits(self) -> int:
        """Of an offset."""
        return 8 * self.offsets.itemsize

    @property
    def length(self) -> float:
        """Weights of a list, on average."""
        chunks, ends, _ = self.rows.shape
        return self.weights.size / (chunks * (ends - 1))

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
      ValueError: a chunk's input is so large that an offset in bytes does not fit 31 bits.
    """
    height, width, inputs, outputs = op.weights.shape
    places = _places(op, x)
    first = int(places.min())
    vectors = np.arange(inputs)[:, None, None] * (x.plane // x.vector) + places - first
    if vectors.max(initial=0) * x.vector >= 1 << 31:
        raise ValueError("A layer's input is larger than 2 GiB; compile for a smaller batch.")

    weights = op.weights.transpose(3, 2, 0, 1).reshape(outputs, -1)
    bounds = np.arange(chunks + 1) * inputs // chunks
    columns = _Columns(vectors.ravel(), bounds * height * width, bounds * (x.plane // x.vector))
    listed = weights != 0
    panel_rows, panels = np.zeros((2, 0), np.int32)
    if panel:
        count = outputs // panel
        common = listed[: count * panel].reshape(count, panel, -1).all(1)
        grouped = weights[: count * panel].reshape(count, panel, -1)
        panel_rows, panels = _pack_panels(grouped, common, columns, x.vector)
        listed[: count * panel] &= ~np.repeat(common, panel, 0)
    lists = _pack_lists(weights, listed, columns)
    return Packed(*lists, panel_rows, panels, first * x.vector)


def taps(op: Convolution, x: Tiles) -> tuple[int, ...]:
    """Where a depthwise convolution without zeros reads, in bytes behind its first tap.

    The weights of its lists are then [output channels, taps]. Empty for any other convolution.
    """
    if op.groups == 1 or op.weights.shape[2] != 1 or not op.weights.all():
        return ()
    places = _places(op, x)
    return tuple(((places - places.min()) * x.vector).ravel().tolist())


def _places(op: Convolution, x: Tiles) -> np.ndarray:
    """Where taps read, [height, width], in vectors behind a pixel."""
    (top, _), (left, _) = op.padding
    sides = zip(op.weights.shape[:2], op.dilation, (top, left), strict=True)
    down, across = (np.arange(size) * step - before for size, step, before in sides)
    return down[:, None] * x.columns + across


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The inputs of an output channel.

    Attributes:
      vectors: where they lie, in vectors behind the first.
      bounds: [chunks + 1], where chunks begin and the last one ends, among the columns.
      firsts: [chunks + 1], the vectors that lie there.
    """

    vectors: np.ndarray
    bounds: np.ndarray
    firsts: np.ndarray

    def chunk(self, column: np.ndarray) -> np.ndarray:
        """The chunk that columns are part of."""
        return np.searchsorted(self.bounds, column, "right") - 1


def _pack_lists(
    weights: np.ndarray, listed: np.ndarray, columns: _Columns
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, weights and offsets of what is `listed`, both [output channels, columns]."""
    outputs, chunks = len(weights), len(columns.bounds) - 1
    row, column = np.nonzero(listed)
    natural = np.bincount(row * chunks + columns.chunk(column), minlength=outputs * chunks)
    ends = natural.reshape(outputs, chunks).cumsum(1)
    ends[:, :-1] -= ends[:, :-1] % (WORD // 2)
    counts = np.diff(ends, axis=1, prepend=0)

    chunk = np.repeat(np.tile(np.arange(chunks), outputs), counts.ravel())
    offsets = columns.vectors[column] - columns.firsts[chunk]
    narrow = np.abs(offsets).max(initial=0) < 1 << 15
    kind = np.dtype(np.int16 if narrow else np.int32)
    order = np.argsort(chunk.astype(np.int16), kind="stable")
    padded = np.pad(offsets[order].astype(kind), (0, WORD // kind.itemsize))

    rows = np.zeros((chunks, outputs + 1, 2), np.int32)
    rows[:, :, 0] = _starts(counts.T)
    rows[:, :outputs, 1] = np.arange(outputs)
    return rows, weights[row[order], column[order]], padded


def _pack_panels(
    weights: np.ndarray, common: np.ndarray, columns: _Columns, vector: int
) -> tuple[np.ndarray, np.ndarray]:
    """Panel rows and panels of weights [panels, panel, columns] that are `common` to a panel."""
    (count, panel, _), chunks = weights.shape, len(columns.bounds) - 1
    group, column = np.nonzero(common)
    chunk = columns.chunk(column)
    counts = np.bincount(chunk * count + group, minlength=chunks * count).reshape(chunks, count)
    entries = np.empty((len(group), 1 + panel), np.int32)
    entries[:, 0] = (columns.vectors[column] - columns.firsts[chunk]) * vector
    entries[:, 1:] = weights.transpose(0, 2, 1)[group, column].view(np.int32)
    order = np.argsort(chunk, kind="stable")
    return _starts(counts).astype(np.int32), entries[order]


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each of a chunk's parts begins, and where the last ends: [chunks, parts + 1]."""
    ends = np.cumsum(counts).reshape(counts.shape)
    first = np.concatenate([[0], ends[:-1, -1]])
    return np.concatenate([first[:, None], ends], axis=1)


def in_panels(op: Convolution, panel: int) -> float:
    """The share of the weights that are not zero that panels would hold."""
    outputs = op.weights.shape[3]
    count = outputs // panel
    listed = op.weights.reshape(-1, outputs) != 0
    common = listed[:, : count * panel].reshape(-1, count, panel).all(2)
    return panel * int(np.count_nonzero(common)) / max(1, int(np.count_nonzero(listed)))
