"""Which requests go into the next forward: a pure queue, driven by `server` with the time passed in.

Nothing is held back to fill a batch: whoever is idle takes what there is. Requests that can share a forward
have the same key. Expired requests are handed out apart, never for computing.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

MIN_RETRY_SECONDS = 0.01
MAX_RETRY_SECONDS = 5.0
_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Upper bounds of a batcher.

    max_batch_rows: rows of one batch; a single request above it makes a batch of its own.
    max_delay_seconds: once a request has waited for so long, no fuller batch goes before it.
    max_queued_requests, max_queued_rows: what is over either is refused.
    """

    max_batch_rows: int = 1024
    max_delay_seconds: float = 0.005
    max_queued_requests: int = 2048
    max_queued_rows: int = 65_536


@dataclass(slots=True)
class Batch(Generic[T]):
    """What to compute now, and what ran out of time while it waited. `oldest_at` is of the items."""

    key: Hashable
    items: list[T] = field(default_factory=list)
    rows: int = 0
    oldest_at: float = 0.0
    expired: list[T] = field(default_factory=list)


@dataclass(slots=True)
class _Group(Generic[T]):
    """Requests of one key: (-priority, order of arrival, rows, deadline, arrived at, item)."""

    heap: list[tuple[int, int, int, float, float, T]] = field(default_factory=list)
    rows: int = 0


class Batcher(Generic[T]):
    """A queue of requests in groups; not thread-safe. Times are monotonic seconds."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._groups: dict[Hashable, _Group[T]] = {}
        self._order = 0
        self._rows_per_second = 0.0
        self.queued_requests = 0
        self.queued_rows = 0

    def offer(
        self, key: Hashable, item: T, rows: int, *, deadline: float, now: float, priority: int = 0
    ) -> bool:
        """Queues a request; False if that is over the limit and it was not taken.

        Args:
            key: requests of equal keys can share a forward.
            item: handed out again by `take`.
            rows: of the request, at least 1.
            deadline: after it, the request is not computed.
            now: the time.
            priority: higher goes first.
        """
        full = self.queued_requests >= self._limits.max_queued_requests
        if full or (self.queued_rows and self.queued_rows + rows > self._limits.max_queued_rows):
            return False
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
        self._order += 1
        heapq.heappush(group.heap, (-priority, self._order, rows, deadline, now, item))
        group.rows += rows
        self.queued_requests += 1
        self.queued_rows += rows
        return True

    def take(self, now: float) -> Batch[T] | None:
        """The next batch, None if nothing waits. A batch may hold expired requests only."""
        if not self._groups:
            return None
        key = self._choose(now)
        group = self._groups[key]
        batch = self._fill(key, group, now)
        if not group.heap:
            del self._groups[key]
        return batch

    def _choose(self, now: float) -> Hashable:
        if len(self._groups) == 1:
            return next(iter(self._groups))
        return min(self._groups, key=lambda key: self._urgency(self._groups[key], now))

    def _urgency(self, group: _Group[T], now: float) -> tuple[int, bool, float]:
        """Smallest first: priority, then those that wait too long by age, then the fullest."""
        negative_priority, _, _, _, arrived_at, _ = group.heap[0]
        late = now - arrived_at >= self._limits.max_delay_seconds
        return negative_priority, not late, arrived_at if late else -group.rows

    def _fill(self, key: Hashable, group: _Group[T], now: float) -> Batch[T]:
        batch: Batch[T] = Batch(key, oldest_at=now)
        while group.heap:
            _, _, rows, deadline, arrived_at, item = group.heap[0]
            if deadline <= now:
                batch.expired.append(item)
            elif not batch.items or batch.rows + rows <= self._limits.max_batch_rows:
                batch.items.append(item)
                batch.rows += rows
                batch.oldest_at = min(batch.oldest_at, arrived_at)
            else:
                break
            heapq.heappop(group.heap)
            group.rows -= rows
            self.queued_requests -= 1
            self.queued_rows -= rows
        return batch

    def served(self, rows: int, seconds: float) -> None:
        """Notes how long a batch took, for `retry_after_seconds`."""
        rate = rows / max(seconds, 1e-6)
        before = self._rows_per_second
        self._rows_per_second = rate if before == 0.0 else before + _SMOOTHING * (rate - before)

    def retry_after_seconds(self) -> float:
        """When the queue of now will have been served, by the measured rate."""
        if self._rows_per_second == 0.0:
            return MIN_RETRY_SECONDS
        return min(max(self.queued_rows / self._rows_per_second, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
