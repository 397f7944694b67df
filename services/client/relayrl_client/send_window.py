"""Which trajectory may be sent next: order, window, back-off. A state machine that `transport` drives.

It does no I/O; time is passed in (monotonic seconds) and randomness is a function, so that every decision
can be tested.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from relayrl_client.spool import Spool
from relayrl_client.spool_index import SpoolEntry

_FIRST_BACKOFF_SECONDS = 0.05
_MAX_BACKOFF_SECONDS = 5.0


@dataclass(slots=True, order=True)
class Parcel:
    """An accepted entry on its way. Parcels compare by the order in which they were offered."""

    order: int
    spool: Spool = field(compare=False)
    entry: SpoolEntry = field(compare=False)

    @property
    def key(self) -> tuple[str, str, int]:
        """Spool, run and sequence: what an acknowledgement names."""
        return self.spool.spool_id, self.entry.run_id, self.entry.sequence


class SendWindow:
    """Parcels that wait, that are in flight, and that are held for their schema. Not thread-safe.

    Parcels go out in the order in which they were offered. One that comes back goes to the front again, and
    everything pauses for the back-off, so that those of one actor do not overtake each other more than the
    window allows (readers order by episode and segment, contracts C5).

    Args:
        max_in_flight: parcels without an answer.
        max_in_flight_bytes: their bytes; a single larger parcel may go alone.
        jitter: a number in [0, 1), drawn for every pause.
    """

    def __init__(self, max_in_flight: int, max_in_flight_bytes: int, jitter: Callable[[], float]) -> None:
        self.max_in_flight = max_in_flight
        self.max_in_flight_bytes = max_in_flight_bytes
        self._jitter = jitter
        self._orders = itertools.count()
        self._known: set[tuple[str, str, int]] = set()
        self._waiting: list[Parcel] = []
        self._in_flight: dict[int, Parcel] = {}
        self._in_flight_bytes = 0
        self._held: dict[str, list[Parcel]] = {}
        self._backoff_seconds = 0.0
        self._paused_until = float("-inf")

    @property
    def in_flight(self) -> int:
        """Parcels without an answer."""
        return len(self._in_flight)

    @property
    def waiting(self) -> int:
        """Parcels that are neither in flight nor done."""
        return len(self._waiting) + sum(map(len, self._held.values()))

    def offer(self, spool: Spool, entries: Iterable[SpoolEntry]) -> None:
        """Takes accepted entries, in order; those that are here already are passed over."""
        for entry in entries:
            parcel = Parcel(next(self._orders), spool, entry)
            if parcel.key not in self._known:
                self._known.add(parcel.key)
                heapq.heappush(self._waiting, parcel)

    def take(self, now: float) -> Parcel | None:
        """The next parcel, from now on in flight; None if none may go now."""
        if not self._waiting or now < self._paused_until or len(self._in_flight) >= self.max_in_flight:
            return None
        size = self._waiting[0].entry.size_bytes
        if self._in_flight and self._in_flight_bytes + size > self.max_in_flight_bytes:
            return None
        parcel = heapq.heappop(self._waiting)
        self._in_flight[parcel.order] = parcel
        self._in_flight_bytes += size
        return parcel

    def seconds_until_ready(self, now: float) -> float | None:
        """How long the pause still lasts; None if the next event comes from elsewhere."""
        return self._paused_until - now if self._waiting and now < self._paused_until else None

    def done(self, parcel: Parcel) -> None:
        """The parcel is delivered or given up."""
        self._land(parcel)
        self._known.discard(parcel.key)

    def succeeded(self) -> None:
        """The server took something: the next failure pauses briefly again."""
        self._backoff_seconds = 0.0

    def retry(self, parcel: Parcel, now: float, retry_after_seconds: float | None = None) -> None:
        """The parcel came back; it waits, with everything else, for the server's time or the back-off's."""
        self._land(parcel)
        heapq.heappush(self._waiting, parcel)
        self.pause(now, retry_after_seconds)

    def pause(self, now: float, retry_after_seconds: float | None = None) -> None:
        """Begins a pause, doubled at every failure in a row, or lengthens it where the server asks for it."""
        if retry_after_seconds is not None:
            self._paused_until = max(self._paused_until, now + retry_after_seconds)
            return
        if now < self._paused_until:
            return
        doubled = max(_FIRST_BACKOFF_SECONDS, 2 * self._backoff_seconds)
        self._backoff_seconds = min(doubled, _MAX_BACKOFF_SECONDS)
        self._paused_until = now + self._backoff_seconds * (0.5 + 0.5 * self._jitter())

    def hold(self, parcel: Parcel, digest: str) -> bool:
        """Keeps a parcel back until its schema is known; whether it is the first of that digest."""
        self._land(parcel)
        first = digest not in self._held
        self._held.setdefault(digest, []).append(parcel)
        return first

    def is_held(self, digest: str) -> bool:
        """Whether the schema of that digest is under way."""
        return digest in self._held

    def release(self, digest: str) -> None:
        """Lets the parcels of a schema go again."""
        for parcel in self._held.pop(digest, []):
            heapq.heappush(self._waiting, parcel)

    def withdraw(self, digest: str) -> list[Parcel]:
        """Takes the parcels of a schema out for good; whoever calls says `done` of each."""
        return self._held.pop(digest, [])

    def _land(self, parcel: Parcel) -> None:
        if self._in_flight.pop(parcel.order, None) is not None:
            self._in_flight_bytes -= parcel.entry.size_bytes
