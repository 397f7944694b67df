"""Takes finished segments off the hot path: one router is a bounded queue and a thread that writes to sinks.

The recorder calls `submit`; the router's thread encodes and hands each segment to every sink, in the order of
submission, so that the segments of an actor stay in order. A sink that has no room now is asked again until
it has: the queue fills, and `submit` blocks or refuses. Nothing is dropped here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from relayrl_client.segments import ClosedSegment
from relayrl_client.sinks import Sink
from relayrl_shared.errors import Overloaded, SpoolError

AtLimit = Literal["block", "refuse"]

DEFAULT_MAX_SEGMENTS = 4096
DEFAULT_MAX_BYTES = 256 << 20
_RETRY_SECONDS = 0.1
_RETRY_LIMIT_SECONDS = 2.0
_MAX_REFUSALS = 16  # that are kept in words for the next flush

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class RouterStatistics:
    """Counters of a router since it was made, and what waits in it."""

    submitted_total: int = 0
    written_total: int = 0
    """Segments that every sink has taken or refused for good."""
    failed_total: int = 0
    """Segments that a sink refused for good; the log names them."""
    retries_total: int = 0
    """Attempts that found a sink without room."""
    refused_total: int = 0
    """Submissions refused because the queue was full."""
    queued_segments: int = 0
    queued_bytes: int = 0
    stalled_by: str = ""
    """Why the oldest segment cannot go on now; empty where it can."""


@dataclass(slots=True)
class _Queued:
    """A segment, or something to be done once those before it are written."""

    segment: ClosedSegment | None
    size_bytes: int
    action: Callable[[], None] | None = None


class Router:
    """One queue, one thread, any number of sinks. Thread-safe.

    Args:
        sinks: in the order in which they are written; may be shared by routers, and are not closed here.
        max_segments: in the queue.
        max_bytes: of their arrays.
        at_limit: what `submit` does when the queue is full: `block`, or `refuse` with an error.
        name: of the thread.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        max_segments: int = DEFAULT_MAX_SEGMENTS,
        max_bytes: int = DEFAULT_MAX_BYTES,
        at_limit: AtLimit = "block",
        name: str = "router",
    ) -> None:
        self._sinks = tuple(sinks)
        self._max_segments = max_segments
        self._max_bytes = max_bytes
        self._at_limit = at_limit
        self._changed = threading.Condition()
        self._queue: deque[_Queued] = deque()
        self._count = RouterStatistics()
        self._refusals: list[str] = []  # since the last flush
        self._asked_actions = self._done_actions = 0
        self._closing = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # ---- any thread ---------------------------------------------------------------------------------------

    def submit(self, segment: ClosedSegment, timeout_seconds: float | None = None) -> None:
        """Queues a segment; returns before it is encoded.

        Args:
            segment: nobody may write to its arrays any more.
            timeout_seconds: how long `block` waits for room; None: as long as it takes.

        Raises:
            Overloaded: the queue is full, and the policy or the time says not to wait (longer).
            SpoolError: the router is closed.
        """
        size = _size_bytes(segment)
        with self._changed:
            if not self._has_room(size):
                self._wait_for_room(size, timeout_seconds)
            if self._closing:
                raise SpoolError("the router is closed; the segment was not taken")
            self._queue.append(_Queued(segment, size))
            self._count.queued_bytes += size
            self._count.submitted_total += 1
            if len(self._queue) == 1:
                self._changed.notify_all()

    def call_after(self, action: Callable[[], None]) -> None:
        """Call this on the router's thread once all that was submitted before is written. Never waits."""
        with self._changed:
            self._queue.append(_Queued(None, 0, action))
            self._asked_actions += 1
            self._changed.notify_all()

    def take_refusals(self) -> list[str]:
        """What sinks refused for good since this was last asked: the ids with the reasons, the first few."""
        with self._changed:
            refusals, self._refusals = self._refusals, []
        return refusals

    def _has_room(self, size: int) -> bool:
        return not self._queue or (
            len(self._queue) < self._max_segments and self._count.queued_bytes + size <= self._max_bytes
        )

    def _wait_for_room(self, size: int, timeout_seconds: float | None) -> None:
        wait = timeout_seconds if self._at_limit == "block" else 0.0
        if self._changed.wait_for(lambda: self._has_room(size) or self._closing, wait):
            return
        self._count.refused_total += 1
        reason = self._count.stalled_by or "the sinks are slower than the actors"
        raise Overloaded(f"{len(self._queue)} segments wait to be written: {reason}", _RETRY_SECONDS)

    def flush(self, timeout_seconds: float) -> bool:
        """Waits until all that was submitted so far is durable in the sinks; False if not in time."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            target = self._count.submitted_total + self._asked_actions
            self._changed.wait_for(lambda: self._done() >= target or self._abandoned, timeout_seconds)
            if self._done() < target:
                return False
        return all(sink.flush(max(0.0, deadline - time.monotonic())) for sink in self._sinks)

    def _done(self) -> int:
        return self._count.written_total + self._done_actions

    def statistics(self) -> RouterStatistics:
        """The counters now."""
        with self._changed:
            return replace(self._count, queued_segments=len(self._queue))

    def close(self, timeout_seconds: float = 10.0) -> int:
        """Writes what is queued, and ends.

        Args:
            timeout_seconds: how long a sink without room may hold this up.

        Returns:
            Segments that were not written; they are lost, and named in the log.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
        self._thread.join()
        lost = [queued.segment for queued in self._queue if queued.segment is not None]
        self._queue.clear()
        for segment in lost:
            _log.error("trajectory %s was not written before the end", segment.metadata.trajectory_id)
        return len(lost)

    # ---- the router's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closing:
                    self._changed.wait()
                if not self._queue or self._abandoned:
                    return
                queued = self._queue[0]
            if queued.action is not None:
                queued.action()
            elif queued.segment is not None and not self._write(queued.segment):
                return
            with self._changed:
                self._queue.popleft()
                self._count.queued_bytes -= queued.size_bytes
                self._count.written_total += queued.action is None
                self._done_actions += queued.action is not None
                self._changed.notify_all()

    def _write(self, segment: ClosedSegment) -> bool:
        """Hands a segment to every sink; False if it was given up because the router ends."""
        failed = ""
        for sink in self._sinks:
            try:
                if not self._write_to(sink, segment):
                    return False
            except Exception as error:  # noqa: BLE001  # a sink's fault on one segment must not end the router
                failed = (
                    f"{type(sink).__name__} refused trajectory {segment.metadata.trajectory_id}: {error!r}"
                )
                _log.error("%s", failed)
        if failed:
            with self._changed:
                self._count.failed_total += 1
                if len(self._refusals) < _MAX_REFUSALS:
                    self._refusals.append(failed)
        return True

    def _write_to(self, sink: Sink, segment: ClosedSegment) -> bool:
        """Writes to one sink, again and again while it has no room; False if the router ends meanwhile."""
        pause = _RETRY_SECONDS
        while True:
            try:
                sink.write(segment)
            except (SpoolError, Overloaded) as error:
                with self._changed:
                    self._count.retries_total += 1
                    self._count.stalled_by = str(error)
                    if self._changed.wait_for(lambda: self._abandoned, pause):
                        return False
                pause = min(2 * pause, _RETRY_LIMIT_SECONDS)
            else:
                self._count.stalled_by = ""
                return True


def _size_bytes(segment: ClosedSegment) -> int:
    """Bytes of the segment's arrays."""
    total = 0
    for column in fields(segment.columns):
        value = getattr(segment.columns, column.name)
        total += sum(array.nbytes for array in value.values()) if isinstance(value, dict) else value.nbytes
    return total
