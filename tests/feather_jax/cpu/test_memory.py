"""Working memory: what is alive at the same time does not overlap."""

from hypothesis import given
from hypothesis import strategies as st

from feather_jax.cpu.memory import ALIGNMENT, Lifetime, allocate


@st.composite
def lifetimes(draw):
    first = draw(st.integers(0, 9))
    return Lifetime(draw(st.integers(0, 1000)), first, draw(st.integers(first, 10)))


@given(st.lists(lifetimes(), max_size=12))
def test_no_overlap(blocks):
    offsets, size = allocate(blocks)
    for i, (own, start) in enumerate(zip(blocks, offsets, strict=True)):
        assert start % ALIGNMENT == 0
        assert start + own.nbytes <= size
        for other, begin in list(zip(blocks, offsets, strict=True))[:i]:
            together = own.first <= other.last and other.first <= own.last
            apart = start + own.nbytes <= begin or begin + other.nbytes <= start
            assert apart or not together


def test_what_is_dead_makes_room():
    blocks = [Lifetime(640, 0, 1), Lifetime(640, 1, 2), Lifetime(640, 2, 3)]
    offsets, size = allocate(blocks)
    assert size == 1280
    assert offsets[0] == offsets[2]
