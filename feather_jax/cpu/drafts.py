"""Steps while they are planned: operands in working memory have no place yet, weights are kept."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from feather_jax.cpu.graph import Node
from feather_jax.cpu.memory import ALIGNMENT, Lifetime, allocate
from feather_jax.cpu.plan import Kernel, Place


@dataclasses.dataclass(frozen=True)
class Block:
    """An operand in working memory whose place is not known yet."""

    number: int
    offset: int = 0


Operand = Place | Block


@dataclasses.dataclass
class Draft:
    """A step whose operands have no places yet, and the operand that its result may replace."""

    layer: str
    kernel: Kernel
    operands: list[Operand]
    node: Node
    nonzeros: int = 0
    macs: int = 0
    in_place: Operand | None = None


class Weights:
    """All that a program keeps: arrays one behind the other, none twice."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._known: dict[bytes, Place] = {}
        self._size = 0

    def add(self, array: np.ndarray) -> Place:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        key = raw.tobytes()
        if key not in self._known:
            self._known[key] = Place("weights", self._size)
            padded = np.pad(raw, (0, -raw.size % ALIGNMENT))
            self._arrays.append(padded)
            self._size += padded.size
        return self._known[key]

    def bytes(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.uint8), *self._arrays])


def place_blocks(drafts: Sequence[Draft], blocks: Sequence[int]) -> tuple[list[int], int]:
    """The offset of every block in working memory, and its size."""
    first, last = [len(drafts)] * len(blocks), [-1] * len(blocks)
    for number, draft in enumerate(drafts):
        for each in draft.operands:
            if isinstance(each, Block):
                first[each.number] = min(first[each.number], number)
                last[each.number] = number

    same = list(range(len(blocks)))  # the block whose memory each one has
    for number, draft in enumerate(drafts):
        old, new = draft.in_place, draft.operands[0]
        if not isinstance(old, Block) or not isinstance(new, Block):
            continue
        i, j = same[old.number], new.number
        reads = [same[each.number] for each in draft.operands[1:] if isinstance(each, Block)]
        if (
            (old.offset, new.offset) == (0, 0)
            and blocks[i] == blocks[j]
            and (last[i], first[j]) == (number, number)
            and reads.count(i) == 1
        ):
            same[j], last[i] = i, last[j]

    roots = sorted(set(same))
    lifetimes = [Lifetime(blocks[i], first[i], last[i]) for i in roots]
    offsets, size = allocate(lifetimes)
    place = dict(zip(roots, offsets, strict=True))
    return [place[each] for each in same], size
