"""Plain counters of the serving loop, cheap to update and read by others as snapshots; driven by `server`.

Each thread that serves has its own; `total` adds them up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

LATENCY_BOUNDS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
BATCH_BOUNDS_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16_384)


@dataclass(slots=True)
class Histogram:
    """Counts by upper bound; the last one is of what is above all bounds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: Histogram) -> None:
        """Adds the counts of a histogram of the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


@dataclass(slots=True)
class ServingCounters:
    """What one serving thread has done since it began."""

    requests_total: int = 0
    """Requests taken off the socket, refused ones included."""
    answered_total: int = 0
    rows_total: int = 0
    """Rows answered with actions."""
    batches_total: int = 0
    expired_total: int = 0
    """Requests whose deadline passed before they were computed."""
    shed_total: int = 0
    """Requests refused because the queue was full."""
    errors: Counter[str] = field(default_factory=Counter)
    """Error replies by code, those above included."""
    latency: Histogram = field(default_factory=lambda: Histogram(LATENCY_BOUNDS_SECONDS))
    """Seconds from the socket to the reply, of answered requests."""
    batch_rows: Histogram = field(default_factory=lambda: Histogram(BATCH_BOUNDS_ROWS))
    inference_seconds: float = 0.0
    """Spent checking, computing and packing batches."""


def total(parts: Iterable[ServingCounters]) -> ServingCounters:
    """The sum of the counters of several threads, as a copy."""
    result = ServingCounters()
    for part in parts:
        for name in ("requests", "answered", "rows", "batches", "expired", "shed"):
            key = f"{name}_total"
            setattr(result, key, getattr(result, key) + getattr(part, key))
        result.errors.update(dict(part.errors))
        result.latency.add(part.latency)
        result.batch_rows.add(part.batch_rows)
        result.inference_seconds += part.inference_seconds
    return result
