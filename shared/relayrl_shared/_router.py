"""The answering side of the wire: `RouterServer`, one ROUTER socket and one thread that serves it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from relayrl_shared import frames
from relayrl_shared._zmq import DEFAULT_MAX_MESSAGE_BYTES, Context, Wake, bound_port, set_common_options
from relayrl_shared.errors import ConfigError, FrameError, MessageTooLarge, Overloaded, RelayRLError
from relayrl_shared.frames import Buffer
from relayrl_shared.messages import AnyMessage, ErrorReply

_POLL_MILLISECONDS = 200  # how late a stop is noticed
_MAX_FRAMES = 64
_LINGER_MILLISECONDS = 500

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Incoming:
    """A decoded message and the way back to who sent it."""

    peer: bytes
    message: AnyMessage
    payload: list[memoryview]
    received_at: float  # monotonic seconds
    replied: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Rejected:
    """Frames that are no message that this server takes, as they came."""

    peer: bytes
    frames: list[bytes]
    error: FrameError


@dataclass(frozen=True, slots=True)
class RouterStatistics:
    """Counters of a server since it was made."""

    received_total: int
    """Messages that decoded."""
    batches_total: int
    replies_total: int
    rejected_total: dict[str, int]
    """Messages refused before the handler saw them, by code: frame, protocol_version, message_too_large."""
    undeliverable_total: int
    """Replies to peers that had gone."""
    dropped_total: int
    """Replies that found the peer's queue, or the queue of replies from other threads, full."""
    handler_errors_total: int
    """Exceptions out of the handler."""


HandleBatch = Callable[[list[Incoming]], None]
OnRejected = Callable[[Rejected], bool]


class RouterServer:
    """Binds a ROUTER at once; `run` serves it from the calling thread until the stop event.

    Args:
        bind_address: `tcp://host:port` (port 0 or `*`: any free one, then in `port`), `ipc://…`.
        max_message_bytes: all frames of a message together. Above it the answer is an error of code
            `message_too_large`; a single frame above twice of it closes the connection.
        max_queued: messages that ZMQ queues a peer and direction, and replies queued by other threads.
        max_batch: messages handed to the handler at once, at most.
        on_rejected: told of every message that does not decode, in the serving thread; True: it has answered.
        context: shares a ZMQ context with other sockets; it is not closed here.
    """

    def __init__(
        self,
        bind_address: str,
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_queued: int = 10_000,
        max_batch: int = 256,
        on_rejected: OnRejected | None = None,
        context: Context | None = None,
    ) -> None:
        self.max_message_bytes = max_message_bytes
        self._max_queued = max_queued
        self._max_batch = max_batch
        self._on_rejected = on_rejected
        self._counts: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._outbox: deque[tuple[bytes, list[Buffer]]] = deque()
        self._thread_id = 0
        self._closed = False
        self._owned_context: Context | None = None if context else zmq.Context()
        self._socket = (context or self._owned_context or zmq.Context()).socket(zmq.ROUTER)
        self._wake = Wake()
        self._bind(bind_address)

    def _bind(self, bind_address: str) -> None:
        linger = _LINGER_MILLISECONDS
        set_common_options(self._socket, max_message_bytes=self.max_message_bytes, linger_ms=linger)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.set(zmq.RCVHWM, self._max_queued)
        self._socket.set(zmq.SNDHWM, self._max_queued)
        try:
            self._socket.bind(bind_address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot bind {bind_address}: {error.strerror}; set a free port") from error
        self.port = bound_port(self._socket)
        self.address = bind_address

    # ---- any thread ---------------------------------------------------------------------------------------

    def reply(self, incoming: Incoming, message: AnyMessage, payload: Sequence[Buffer] = ()) -> None:
        """Answers, with the request's id. Never blocks: what cannot be delivered is counted and dropped."""
        incoming.replied = True
        answer = msgspec.structs.replace(message, request_id=incoming.message.request_id)
        self._dispatch(incoming.peer, frames.encode(answer, payload))

    def reply_error(self, incoming: Incoming, error: BaseException) -> None:
        """Answers with the error's code, or `internal` where it is not one of ours."""
        self.reply(incoming, error_reply(error))

    def reply_rejected(self, rejected: Rejected, message: AnyMessage) -> None:
        """Answers frames that did not decode, to the request id that could be read."""
        answer = msgspec.structs.replace(message, request_id=rejected.error.request_id)
        self._dispatch(rejected.peer, frames.encode(answer))

    def _dispatch(self, peer: bytes, encoded: list[Buffer]) -> None:
        if threading.get_ident() == self._thread_id:
            self._send(peer, encoded)
        elif len(self._outbox) >= self._max_queued:
            self._counts["dropped"] += 1
        else:
            self._outbox.append((peer, encoded))
            self._wake.wake()

    def statistics(self) -> RouterStatistics:
        """The counters now."""
        count = self._counts
        return RouterStatistics(
            received_total=count["received"],
            batches_total=count["batches"],
            replies_total=count["replies"],
            rejected_total=dict(self._rejected),
            undeliverable_total=count["undeliverable"],
            dropped_total=count["dropped"],
            handler_errors_total=count["handler_errors"],
        )

    def close(self) -> None:
        """Frees the socket, after `run` has returned. Replies under way have half a second."""
        if self._closed:
            return
        self._closed = True
        self._socket.close()
        self._wake.close()
        if self._owned_context is not None:
            self._owned_context.term()

    def __enter__(self) -> RouterServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ---- the serving thread -------------------------------------------------------------------------------

    def run(self, handle_batch: HandleBatch, stop: threading.Event) -> None:
        """Serves until `stop` is set, then sends the replies that other threads have queued by then."""
        self._thread_id = threading.get_ident()
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        try:
            while not stop.is_set():
                batch = self._drain()
                if batch:
                    self._handle(handle_batch, batch)
                self._flush()
                if not batch:
                    poller.poll(_POLL_MILLISECONDS)
                    self._wake.clear()
            self._flush()
        finally:
            self._thread_id = 0

    def wake(self) -> None:
        """Makes `run` look at its stop event now."""
        self._wake.wake()

    def _drain(self) -> list[Incoming]:
        batch: list[Incoming] = []
        for _ in range(self._max_batch):
            try:
                received = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            incoming = self._decode(received)
            if incoming is not None:
                batch.append(incoming)
        return batch

    def _decode(self, received: list[bytes]) -> Incoming | None:
        peer = received.pop(0)
        try:
            self._check_size(received)
            message, payload = frames.decode(received)
        except FrameError as error:
            self._reject(Rejected(peer, received, error))
            return None
        self._counts["received"] += 1
        return Incoming(peer, message, payload, time.monotonic())

    def _check_size(self, received: list[bytes]) -> None:
        size = sum(map(len, received))
        if size > self.max_message_bytes:
            error: FrameError = MessageTooLarge(f"{size} bytes; the limit is {self.max_message_bytes}")
        elif len(received) > _MAX_FRAMES:
            error = FrameError(f"a message of {len(received)} frames; the limit is {_MAX_FRAMES}")
        else:
            return
        error.request_id = frames.read_request_id(received)
        raise error

    def _reject(self, rejected: Rejected) -> None:
        self._rejected[rejected.error.code] += 1
        answered = False
        if self._on_rejected is not None:
            try:
                answered = self._on_rejected(rejected)
            except Exception:  # noqa: BLE001  # the hook's fault must not stop the service of the others
                self._counts["handler_errors"] += 1
                _log.exception("the hook for rejected messages failed")
        if not answered:
            self.reply_rejected(rejected, error_reply(rejected.error))

    def _handle(self, handle_batch: HandleBatch, batch: list[Incoming]) -> None:
        self._counts["batches"] += 1
        try:
            handle_batch(batch)
        except RelayRLError as error:
            self._fail(batch, error)
        except Exception as error:  # noqa: BLE001  # one bad message must not stop the service of the others
            _log.exception("the handler failed on a batch of %d messages", len(batch))
            self._fail(batch, error)

    def _fail(self, batch: list[Incoming], error: Exception) -> None:
        self._counts["handler_errors"] += 1
        for incoming in batch:
            if not incoming.replied:
                self.reply_error(incoming, error)

    def _flush(self) -> None:
        while self._outbox:
            self._send(*self._outbox.popleft())

    def _send(self, peer: bytes, encoded: list[Buffer]) -> None:
        parts: list[Any] = [peer, *encoded]
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            self._counts["dropped"] += 1
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._counts["undeliverable"] += 1
        else:
            self._counts["replies"] += 1


def error_reply(error: BaseException) -> ErrorReply:
    """The reply that stands for an exception; the text of those that are not ours stays in the log."""
    if not isinstance(error, RelayRLError):
        return ErrorReply(code=RelayRLError.code, message="an internal error; the server's log has it")
    retry_after = error.retry_after_seconds if isinstance(error, Overloaded) else None
    text = str(error.args[0]) if error.args else str(error)
    return ErrorReply(
        code=error.code, message=text, retryable=error.retryable, retry_after_seconds=retry_after
    )
