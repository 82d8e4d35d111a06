"""Where arrays lie in the working memory: lifetimes, reuse in place, offsets."""

import dataclasses
from collections.abc import Sequence

ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Lifetime:
    """Of one block of working memory.

    Attributes:
      nbytes: its size.
      first, last: the steps that write it first and touch it last.
    """

    nbytes: int
    first: int
    last: int


def allocate(blocks: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Offsets such that blocks alive at the same time do not overlap, and the size of it all.

    Larger blocks first, each at the lowest place that is free.
    """
    offsets = [0] * len(blocks)
    placed: list[int] = []
    order = sorted(range(len(blocks)), key=lambda i: (-blocks[i].nbytes, blocks[i].first))
    for i in order:
        own = blocks[i]
        others = sorted(
            (offsets[j], offsets[j] + _round(blocks[j].nbytes))
            for j in placed
            if blocks[j].first <= own.last and own.first <= blocks[j].last
        )
        offset = 0
        for low, high in others:
            if offset + _round(own.nbytes) <= low:
                break
            offset = max(offset, high)
        offsets[i] = offset
        placed.append(i)
    size = max((offsets[i] + _round(block.nbytes) for i, block in enumerate(blocks)), default=0)
    return offsets, size


def _round(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
