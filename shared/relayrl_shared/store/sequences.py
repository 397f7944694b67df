"""Which sequences of a spool are settled: a low watermark and the ranges above it (contracts D1).

Pure values; `spools` keeps one a (run, spool) in its row and drives it. A sequence is settled once it is
stored, quarantined or dropped: from then on it is acknowledged and never stored again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

import msgspec

Range = tuple[int, int]


class SequenceSet(msgspec.Struct, frozen=True, array_like=True):
    """All sequences from 1 to `watermark`, and the inclusive `ranges` above it, sorted and apart."""

    watermark: int = 0
    ranges: tuple[Range, ...] = ()

    def __contains__(self, sequence: int) -> bool:
        if sequence <= self.watermark:
            return True
        index = bisect_right(self.ranges, (sequence, 1 << 62)) - 1
        return index >= 0 and self.ranges[index][0] <= sequence <= self.ranges[index][1]

    def __len__(self) -> int:
        return self.watermark + sum(last - first + 1 for first, last in self.ranges)

    def add(self, ranges: Iterable[Range]) -> SequenceSet:
        """This set and the inclusive ranges of sequences from 1; empty ranges are ignored."""
        merged: list[Range] = [(1, self.watermark)] if self.watermark else []
        added = [(max(first, 1), last) for first, last in ranges if last >= max(first, 1)]
        for first, last in sorted([*self.ranges, *added]):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        if merged and merged[0][0] == 1:
            return SequenceSet(merged[0][1], tuple(merged[1:]))
        return SequenceSet(0, tuple(merged))

    def add_sequences(self, sequences: Iterable[int]) -> SequenceSet:
        """This set and the sequences."""
        return self.add((sequence, sequence) for sequence in sequences)

    def count(self, first: int, last: int) -> int:
        """How many sequences of the inclusive range are in the set."""
        below = max(0, min(last, self.watermark) - max(first, 1) + 1)
        return below + sum(max(0, min(last, b) - max(first, a) + 1) for a, b in self.ranges)


def encode(sequences: SequenceSet) -> bytes:
    """The bytes that a row keeps."""
    return msgspec.msgpack.encode(sequences)


def decode(data: bytes) -> SequenceSet:
    """The set that `encode` wrote."""
    return msgspec.msgpack.decode(data, type=SequenceSet)
