"""Which sequences of a spool are settled (contracts D1)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relayrl_shared.store.sequences import SequenceSet, decode, encode

RANGES = st.lists(st.tuples(st.integers(-2, 40), st.integers(-2, 40)), max_size=8)


def test_an_empty_set_holds_nothing() -> None:
    """No sequence from 1 on is in a new set."""
    assert 1 not in SequenceSet()
    assert len(SequenceSet()) == 0


def test_the_watermark_passes_what_is_complete() -> None:
    """Filling the gap above the watermark moves it over the ranges that follow."""
    gap = SequenceSet().add_sequences([1, 3, 4, 7])
    assert gap == SequenceSet(1, ((3, 4), (7, 7)))
    assert gap.add_sequences([2]) == SequenceSet(4, ((7, 7),))


def test_neighbours_join() -> None:
    """Ranges that touch become one, so that a window of unacknowledged sequences stays short."""
    assert SequenceSet().add([(5, 6), (9, 9), (7, 8)]) == SequenceSet(0, ((5, 9),))


def test_a_huge_range_costs_nothing() -> None:
    """A range of any length is two numbers."""
    assert SequenceSet().add([(2, 1 << 62)]) == SequenceSet(0, ((2, 1 << 62),))


def test_ranges_that_are_none_are_ignored() -> None:
    """Empty and negative ranges add nothing; sequences start at 1."""
    assert SequenceSet().add([(3, 2), (-5, 0)]) == SequenceSet()
    assert SequenceSet().add([(-5, 2)]) == SequenceSet(2)


@given(RANGES, RANGES)
def test_it_is_the_set_of_its_ranges(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    """Membership, size and counts are those of a plain set, however it was filled."""
    plain = {s for a, b in [*first, *second] for s in range(max(a, 1), b + 1)}
    found = SequenceSet().add(first).add(second)

    assert {s for s in range(-2, 45) if s in found and s > 0} == plain
    assert len(found) == len(plain)
    assert found.count(3, 20) == len(plain & set(range(3, 21)))


@given(RANGES)
def test_it_is_canonical_and_reads_back(ranges: list[tuple[int, int]]) -> None:
    """Equal sets are equal values, whose ranges lie apart, and read back from their bytes."""
    found = SequenceSet().add(ranges)
    edges = [found.watermark, *(edge for one in found.ranges for edge in one)]

    assert found == SequenceSet().add(reversed(ranges))
    assert all(first > before + 1 for before, first in zip(edges[::2], edges[1::2], strict=False))
    assert decode(encode(found)) == found
