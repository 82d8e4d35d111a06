"""What a compiled program communicates, read from its text."""

import math
import re

import jax

_SHAPE = re.compile(r"\b(?P<kind>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<dims>[\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (?P<result>.+?) (?P<name>all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)


def collective_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The bytes that each kind of collective gives, summed over the program.

    Args:
      compiled: the program. A collective in the body of a loop counts once; one that is started and
        awaited counts once too.
    """
    total: dict[str, int] = {}
    for line in (compiled.as_text() or "").splitlines():
        if found := _COLLECTIVE.search(line):
            name, size = found["name"], sum(map(_bytes, _SHAPE.finditer(found["result"])))
            total[name] = total.get(name, 0) + size
    return total


def _bytes(shape: re.Match[str]) -> int:
    sizes = [int(size) for size in shape["dims"].split(",") if size]
    return math.prod(sizes) * max(int(shape["bits"] or 8) // 8, 1)
