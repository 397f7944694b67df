"""Group commit: gathers what intake has validated and makes it durable, in a thread of its own (design 8).

What is submitted is answered once, after its transaction: trajectories by `store.commit`, refused ones by
`store.quarantine`. While the store is unavailable everything is refused with a delay, at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relayrl_shared import logs, telemetry
from relayrl_shared.errors import Draining, Overloaded, RelayRLError, StoreUnavailable
from relayrl_shared.store.interface import CommitResult, IncomingTrajectory, Quarantined, TrajectoryStore
from relayrl_training_server.ingest_metrics import IngestMetrics
from relayrl_training_server.settings import IngestSettings

LOG = logs.get_logger(__name__)
TRACER = telemetry.tracer(__name__)

OnCommitted = Callable[[CommitResult | None, Exception | None], None]
"""Called once in the committing thread: the result, None for a durable quarantine row, or the error."""


@dataclass(slots=True)
class Pending:
    """Something that waits for its transaction."""

    content: IncomingTrajectory | Quarantined
    size_bytes: int
    on_committed: OnCommitted
    submitted_at: float


class Committer:
    """A bounded queue and the thread that empties it into the store."""

    def __init__(self, store: TrajectoryStore, settings: IngestSettings, metrics: IngestMetrics) -> None:
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._queue: deque[Pending] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._refuse_until = 0.0
        self.unavailable: str | None = None
        """Why the store could not be reached at the last attempt; None when it could."""
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    # ---- any thread ---------------------------------------------------------------------------------------

    def submit(
        self, content: IncomingTrajectory | Quarantined, size_bytes: int, on_committed: OnCommitted
    ) -> None:
        """Queues it.

        Raises:
            Draining: this process is about to stop.
            StoreUnavailable: the store was not there a moment ago.
            Overloaded: the queue is full.
        """
        now = time.monotonic()
        limits = self._settings.limits
        with self._changed:
            if self._closing:
                raise Draining("ingest is about to stop")
            if now < self._refuse_until:
                raise StoreUnavailable(self.unavailable or "the store could not be reached")
            if (
                len(self._queue) >= limits.max_queued
                or self._queued_bytes + size_bytes > limits.max_queued_bytes
            ):
                raise Overloaded(
                    f"{len(self._queue)} trajectories wait for the store", self._settings.retry_after_seconds
                )
            self._queue.append(Pending(content, size_bytes, on_committed, now))
            self._queued_bytes += size_bytes
            if len(self._queue) == 1 or len(self._queue) >= self._settings.commit_rows:
                self._changed.notify()

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._queue)

    def report(self, error: StoreUnavailable | None) -> None:
        """Notes what another caller of the store has seen."""
        self.unavailable = None if error is None else str(error)

    def close(self, timeout_seconds: float) -> bool:
        """Takes nothing new and commits what waits; False if time ran out first."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    # ---- the committing thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            batch = self._gather()
            if not batch:
                return
            started = time.monotonic()
            with TRACER.span("ingest.commit", links=_traceparents(batch), rows=len(batch)):
                self._commit(batch)
            self._metrics.commit_seconds.observe(time.monotonic() - started)
            self._metrics.commit_rows.observe(len(batch))

    def _gather(self) -> list[Pending]:
        """What came within the delay of the oldest, up to the limits of a commit; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return []
            until = self._queue[0].submitted_at + self._settings.commit_delay_seconds
            while len(self._queue) < self._settings.commit_rows and not self._closing:
                remaining = until - time.monotonic()
                if remaining <= 0:
                    break
                self._changed.wait(remaining)
            return self._take()

    def _take(self) -> list[Pending]:
        batch: list[Pending] = []
        size = 0
        while self._queue and len(batch) < self._settings.commit_rows:
            if batch and size + self._queue[0].size_bytes > self._settings.commit_bytes:
                break
            pending = self._queue.popleft()
            size += pending.size_bytes
            batch.append(pending)
        self._queued_bytes -= size
        return batch

    def _commit(self, batch: Sequence[Pending]) -> None:
        trajectories = [pending for pending in batch if isinstance(pending.content, IncomingTrajectory)]
        quarantined = [pending for pending in batch if isinstance(pending.content, Quarantined)]
        if trajectories:
            self._attempt(self._commit_trajectories, trajectories)
        if quarantined:
            self._attempt(self._commit_quarantined, quarantined)

    def _attempt(self, commit: Callable[[Sequence[Pending]], None], batch: Sequence[Pending]) -> None:
        """Commits a batch; if the store refuses it for what is in it, each one alone."""
        try:
            commit(batch)
        except StoreUnavailable as error:
            self._note_unavailable(error)
            _answer(batch, error)
        except Exception as error:  # whatever one row does, the others must be stored
            if len(batch) == 1:
                LOG.error("the store refused a row", exc_info=error)
                _answer(batch, error)
                return
            for pending in batch:
                self._attempt(commit, [pending])

    def _commit_trajectories(self, batch: Sequence[Pending]) -> None:
        contents = [p.content for p in batch if isinstance(p.content, IncomingTrajectory)]
        results = self._store.commit(contents)
        self.unavailable = None
        for pending, result in zip(batch, results, strict=True):
            _call(pending, result, None)

    def _commit_quarantined(self, batch: Sequence[Pending]) -> None:
        self._store.quarantine([p.content for p in batch if isinstance(p.content, Quarantined)])
        self.unavailable = None
        for pending in batch:
            _call(pending, None, None)

    def _note_unavailable(self, error: StoreUnavailable) -> None:
        if self.unavailable is None:
            LOG.warning("the store is not available; clients are told to try again", reason=str(error))
        self.unavailable = str(error)
        self._refuse_until = time.monotonic() + self._settings.retry_after_seconds


def _traceparents(batch: Sequence[Pending]) -> list[str | None]:
    return [p.content.metadata.traceparent for p in batch if isinstance(p.content, IncomingTrajectory)]


def _answer(batch: Sequence[Pending], error: Exception) -> None:
    for pending in batch:
        _call(pending, None, error)


def _call(pending: Pending, result: CommitResult | None, error: Exception | None) -> None:
    try:
        pending.on_committed(result, error)
    except RelayRLError as failure:
        LOG.error("an answer could not be given", exc_info=failure)
