"""Sends what spools hold to the trajectory server, until the server has it (contracts C).

`TransportSink` is the sink that routers write to: it encodes a segment and appends it to the client's spool.
A `TrajectorySender` with a thread of its own sends accepted entries of that spool, and of adopted ones, over
one `Peer`; what is not acknowledged is sent again, for as long as it takes.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import msgspec

from relayrl_client.segments import ClosedSegment
from relayrl_client.send_window import Parcel, SendWindow
from relayrl_client.spool import Spool
from relayrl_client.spool_index import SpoolEntry
from relayrl_shared.arrow_codec import RecordCodec, body_digest, encode_schema, schema_digest
from relayrl_shared.errors import (
    ContractError,
    FrameError,
    MessageTooLarge,
    Overloaded,
    RelayRLError,
    SpoolError,
    UnknownRun,
)
from relayrl_shared.messages import Ack, AnyMessage, Nack, Ok, PutSchema, PutTrajectory
from relayrl_shared.sockets import Peer
from relayrl_shared.trajectory import RecordSchema

DEFAULT_MAX_IN_FLIGHT = 256
DEFAULT_MAX_IN_FLIGHT_BYTES = 64 << 20
DEFAULT_REPLY_TIMEOUT_SECONDS = 10.0
UNKNOWN_SCHEMA = "unknown_schema"
RUN_IS_GONE = frozenset({"unknown_run", "run_gone"})

_CONNECT_POLL_SECONDS = 0.1
_IDLE_SECONDS = 5.0
_ROOM_SECONDS = 0.5  # how long one write waits for room; the router repeats it, and can be stopped between

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class SenderStatistics:
    """Counters of a sender since it was made, and where it stands."""

    sent_total: int = 0
    """Sends of any kind, repeated ones included."""
    acknowledged_total: int = 0
    retried_total: int = 0
    quarantined_total: int = 0
    """Terminal nacks: the server keeps them in quarantine."""
    rejected_total: int = 0
    """Moved to a spool's `rejected/`: their run is gone, or no server can take them."""
    schemas_sent_total: int = 0
    in_flight: int = 0
    waiting: int = 0
    connected: bool = False
    last_error: str = ""


_Reply = tuple["Parcel | str", AnyMessage | None, RelayRLError | None]


class TrajectorySender:
    """Sends the accepted entries of any number of spools over one peer. Thread-safe.

    Args:
        peer: the trajectory server; the sender closes it.
        max_in_flight: entries without an answer (the welcome's limit).
        max_in_flight_bytes: their bytes.
        reply_timeout_seconds: an entry without an answer for so long is sent again.
        jitter: a number in [0, 1) for the pauses.
    """

    def __init__(
        self,
        peer: Peer,
        *,
        max_in_flight: int = DEFAULT_MAX_IN_FLIGHT,
        max_in_flight_bytes: int = DEFAULT_MAX_IN_FLIGHT_BYTES,
        reply_timeout_seconds: float = DEFAULT_REPLY_TIMEOUT_SECONDS,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._peer = peer
        self._window = SendWindow(max_in_flight, max_in_flight_bytes, jitter)
        self._reply_timeout_seconds = reply_timeout_seconds
        self._changed = threading.Condition()
        self._offers: deque[tuple[Spool, Sequence[SpoolEntry]]] = deque()
        self._replies: deque[_Reply] = deque()
        self._spools: list[Spool] = []
        self._adopted: list[Spool] = []
        self._count = SenderStatistics()
        self._paused = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="trajectory sender", daemon=True)
        self._thread.start()

    # ---- any thread ---------------------------------------------------------------------------------------

    def attach(self, spool: Spool) -> None:
        """Sends what the spool holds and will hold."""
        self._spools.append(spool)
        self._watch(spool)

    def adopt(self, spools: Sequence[Spool]) -> None:
        """Sends what orphan spools hold; each is closed when it is empty, or with the sender."""
        self._spools.extend(spools)
        self._adopted.extend(spools)
        for spool in spools:
            self._watch(spool)

    def _watch(self, spool: Spool) -> None:
        self._offer(spool, spool.listen(lambda entries: self._offer(spool, entries)))

    def _offer(self, spool: Spool, entries: Sequence[SpoolEntry]) -> None:
        with self._changed:
            self._offers.append((spool, entries))
            self._changed.notify_all()

    def set_max_in_flight(self, max_in_flight: int) -> None:
        """Follows the limit of a new welcome."""
        with self._changed:
            self._window.max_in_flight = max_in_flight
            self._changed.notify_all()

    def pause(self) -> None:
        """Sends nothing until `resume`; what is in flight may still be answered."""
        self._paused = True

    def resume(self) -> None:
        """Goes on after `pause`."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def drain(self, timeout_seconds: float) -> bool:
        """Waits until the server has everything that is in the spools; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self._pending() == 0, timeout_seconds)

    def _pending(self) -> int:
        return sum(spool.pending_count() for spool in self._spools)

    def spools(self) -> list[Spool]:
        """All spools that it sends or has sent; those that were adopted and are empty now are closed."""
        return list(self._spools)

    def statistics(self) -> SenderStatistics:
        """The counters now."""
        window = self._window
        return replace(
            self._count, in_flight=window.in_flight, waiting=window.waiting, connected=self._peer.connected
        )

    def close(self) -> None:
        """Stops sending, closes the peer and the adopted spools. What is not acknowledged stays spooled."""
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._peer.close()
        for spool in self._adopted:
            spool.close()

    # ---- the sender's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                if not (self._offers or self._replies or self._stopping):
                    self._changed.wait(self._seconds_to_wait())
                if self._stopping:
                    return
                offers, replies = list(self._offers), list(self._replies)
                self._offers.clear()
                self._replies.clear()
            for spool, entries in offers:
                self._window.offer(spool, entries)
            for subject, message, error in replies:
                self._handle_safely(subject, message, error)
            if not self._paused:
                self._send_what_may_go()

    def _seconds_to_wait(self) -> float:
        """How long to wait for an event, called with the lock held."""
        if not self._window.waiting:
            return _IDLE_SECONDS
        if not self._peer.connected:
            return _CONNECT_POLL_SECONDS
        return self._window.seconds_until_ready(time.monotonic()) or _IDLE_SECONDS

    def _send_what_may_go(self) -> None:
        while self._peer.connected:
            parcel = self._window.take(time.monotonic())
            if parcel is None:
                return
            try:
                self._send(parcel)
            except SpoolError as error:
                self._unreadable(parcel, error)
            except RelayRLError as error:
                self._fail(parcel, error)

    def _send(self, parcel: Parcel) -> None:
        stored = parcel.spool.read(parcel.entry)
        if stored is None:
            self._window.done(parcel)
            return
        metadata = stored.metadata
        if self._window.is_held(metadata.schema_digest):
            self._window.hold(parcel, metadata.schema_digest)
            return
        self._peer.submit(
            PutTrajectory(trajectory=metadata, traceparent=metadata.traceparent),
            [stored.body, stored.final_observation or b""],
            timeout_seconds=self._reply_timeout_seconds,
            on_reply=lambda message, _, error: self._note_reply(parcel, message, error),
        )
        self._count.sent_total += 1

    def _note_reply(
        self, subject: Parcel | str, message: AnyMessage | None, error: RelayRLError | None
    ) -> None:
        with self._changed:
            self._replies.append((subject, message, error))
            self._changed.notify_all()

    def _handle_safely(
        self, subject: Parcel | str, message: AnyMessage | None, error: RelayRLError | None
    ) -> None:
        """A fault over one answer costs a resend of that one, never the thread that serves the others."""
        try:
            self._handle(subject, message, error)
        except Exception as fault:  # noqa: BLE001  # see above
            _log.exception("an answer could not be handled")
            if isinstance(subject, Parcel):
                self._retry(subject, repr(fault))

    def _handle(self, subject: Parcel | str, message: AnyMessage | None, error: RelayRLError | None) -> None:
        if isinstance(subject, str):
            self._handle_schema_reply(subject, message, error)
        elif isinstance(message, Ack) and (message.spool_id, message.run_id, message.sequence) == subject.key:
            self._window.succeeded()
            self._count.acknowledged_total += 1
            self._let_go(subject)
        elif isinstance(message, Nack):
            self._handle_nack(subject, message)
        else:
            self._fail(subject, error or RelayRLError(f"an answer of another kind: {message}"))

    def _handle_nack(self, parcel: Parcel, nack: Nack) -> None:
        text = f"{nack.reason}: {nack.detail}"
        if nack.reason == UNKNOWN_SCHEMA:
            self._send_schema(parcel)
        elif nack.retryable:
            self._retry(parcel, text, nack.retry_after_seconds)
        elif nack.reason in RUN_IS_GONE:
            self._reject(parcel, text, run_is_gone=True)
        else:
            _log.warning("trajectory %s is in quarantine: %s", parcel.entry.trajectory_id, text)
            self._count.quarantined_total += 1
            self._count.last_error = text
            self._let_go(parcel)

    def _fail(self, parcel: Parcel, error: RelayRLError) -> None:
        """An error in place of an answer: sent again, unless no server could ever take it.

        What is wrong with a trajectory comes as a nack. Other errors of the contract may come of bytes that
        were damaged on the way, there or back.
        """
        if isinstance(error, MessageTooLarge | UnknownRun):
            self._reject(parcel, f"{error.code}: {error}", run_is_gone=isinstance(error, UnknownRun))
        else:
            after = error.retry_after_seconds if isinstance(error, Overloaded) else None
            self._retry(parcel, f"{error.code}: {error}", after)

    def _retry(self, parcel: Parcel, why: str, retry_after_seconds: float | None = None) -> None:
        self._count.retried_total += 1
        self._count.last_error = why
        self._window.retry(parcel, time.monotonic(), retry_after_seconds)

    def _reject(self, parcel: Parcel, why: str, *, run_is_gone: bool = False) -> None:
        try:
            parcel.spool.reject(parcel.entry, why, run_is_gone=run_is_gone)
        except SpoolError as error:
            self._retry(parcel, f"{why}; {error}")
            return
        self._count.rejected_total += 1
        self._count.last_error = why
        self._finish(parcel)

    def _unreadable(self, parcel: Parcel, error: SpoolError) -> None:
        parcel.spool.give_up(parcel.entry, str(error))
        self._count.last_error = str(error)
        self._finish(parcel)

    def _let_go(self, parcel: Parcel) -> None:
        parcel.spool.acknowledge(parcel.entry.run_id, parcel.entry.sequence)
        self._finish(parcel)

    def _finish(self, parcel: Parcel) -> None:
        self._window.done(parcel)
        if parcel.spool.pending_count():
            return
        if parcel.spool in self._adopted:
            self._adopted.remove(parcel.spool)
            parcel.spool.close()
        with self._changed:
            self._changed.notify_all()

    # ---- schemas ------------------------------------------------------------------------------------------

    def _send_schema(self, parcel: Parcel) -> None:
        """The server does not know the parcel's schema: sends it, and holds everything that needs it."""
        try:
            stored = parcel.spool.read(parcel.entry)
        except SpoolError as error:
            self._unreadable(parcel, error)
            return
        if stored is None:
            self._window.done(parcel)
            return
        digest = stored.metadata.schema_digest
        encoded = parcel.spool.schema(digest)
        if encoded is None:
            self._reject(parcel, f"{UNKNOWN_SCHEMA}: nor does the spool have it")
        elif self._window.hold(parcel, digest):
            self._submit_schema(digest, encoded)

    def _submit_schema(self, digest: str, encoded: bytes) -> None:
        try:
            self._peer.submit(
                PutSchema(digest=digest),
                [encoded],
                timeout_seconds=self._reply_timeout_seconds,
                on_reply=lambda message, _, error: self._note_reply(digest, message, error),
            )
            self._count.schemas_sent_total += 1
        except RelayRLError as error:
            self._handle_schema_reply(digest, None, error)

    def _handle_schema_reply(
        self, digest: str, message: AnyMessage | None, error: RelayRLError | None
    ) -> None:
        if isinstance(error, MessageTooLarge) or (
            isinstance(error, ContractError) and not isinstance(error, FrameError)
        ):
            for parcel in self._window.withdraw(digest):  # the same schema would be refused for ever
                self._reject(parcel, f"the server refuses schema {digest}: {error}")
            return
        if not isinstance(message, Ok):
            self._count.last_error = f"schema {digest}: {error or message}"
            self._window.pause(time.monotonic())
        self._window.release(digest)


class TransportSink:
    """Encodes segments into the client's spool, from where a sender takes them to the server.

    Args:
        schema: of the segments.
        spool: the client's own; closed with the sink.
        sender: sends it; closed with the sink.
    """

    def __init__(self, schema: RecordSchema, spool: Spool, sender: TrajectorySender) -> None:
        self._codec = RecordCodec(schema)
        self._digest = schema_digest(schema)
        self.spool = spool
        self.sender = sender
        spool.put_schema(self._digest, encode_schema(schema))
        sender.attach(spool)

    def write(self, segment: ClosedSegment) -> None:
        """Encodes and spools a segment.

        Raises:
            SpoolError: the spool takes nothing now; the same call may succeed later.
            InvalidTrajectory: the columns do not fit the schema.
        """
        body = self._codec.encode_columns(segment.columns)
        final = segment.final_observation
        encoded = None if final is None else self._codec.encode_final_observation(final)
        metadata = msgspec.structs.replace(
            segment.metadata, schema_digest=self._digest, body_digest=body_digest(body, encoded)
        )
        self.spool.append(metadata, body, encoded, timeout_seconds=_ROOM_SECONDS)

    def flush(self, timeout_seconds: float) -> bool:
        """Waits until everything written is accepted (durable here, not yet at the server)."""
        return self.spool.flush(timeout_seconds)

    def drain(self, timeout_seconds: float) -> bool:
        """Waits until the server has everything; False if that takes longer."""
        return self.sender.drain(timeout_seconds)

    def close(self) -> None:
        """Stops sending and closes the spool; what the server does not have is sent by the next start."""
        self.sender.close()
        self.spool.close()
