"""The asking side of the wire: `Peer`, one DEALER to one server address, driven by any number of threads."""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from relayrl_shared import frames, telemetry
from relayrl_shared._zmq import DEFAULT_MAX_MESSAGE_BYTES, Context, Socket, Wake, set_common_options
from relayrl_shared.errors import (
    FrameError,
    MessageTooLarge,
    Overloaded,
    PeerLost,
    PeerTimeout,
    RelayRLError,
    from_code,
)
from relayrl_shared.frames import Buffer
from relayrl_shared.messages import AnyMessage, ErrorReply

_MONITORED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_MAX_POLL_SECONDS = 1.0
_REPLY_GRACE_SECONDS = 5.0
_DRAIN_LIMIT = 256

_log = logging.getLogger(__name__)


class OnReply(Protocol):
    """Called once a request, from the I/O thread: the answer, or None and the error. It must not block."""

    def __call__(
        self, message: AnyMessage | None, payload: list[memoryview], error: RelayRLError | None, /
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class PeerStatistics:
    """Counters of a peer since it was made."""

    sent_total: int
    answered_total: int
    """Answers of any kind that reached their request."""
    timeouts_total: int
    lost_total: int
    """Requests that were open when the connection broke."""
    unmatched_total: int
    """Answers that came after their request had ended."""
    garbage_total: int
    callback_errors_total: int
    """Exceptions out of `on_reply`."""
    connects_total: int
    in_flight: int
    connected: bool


@dataclass(slots=True)
class _Request:
    frames: Sequence[Buffer]
    on_reply: OnReply
    deadline: float
    size_bytes: int
    timeout_seconds: float
    sent: bool = False


class Peer:
    """One DEALER to one address, with an I/O thread.

    Requests wait in a bounded queue here, not in ZMQ, until there is a connection; a request that was sent
    when the connection breaks ends with `PeerLost`, one without an answer by its deadline with `PeerTimeout`.
    Nothing is sent twice: to resend is the caller's decision. Names are resolved again at every reconnection.

    Args:
        address: `tcp://host:port`.
        max_message_bytes: refuses to send or take more.
        max_queued: open requests; above it `submit` raises `Overloaded`.
        max_queued_bytes: their bytes, likewise.
        context: shares a ZMQ context (and its I/O thread) with other sockets; it is not closed here.
    """

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_queued: int = 16_384,
        max_queued_bytes: int = 512 << 20,
        context: Context | None = None,
    ) -> None:
        self.address = address
        self._max_message_bytes = max_message_bytes
        self._max_queued = max_queued
        self._max_queued_bytes = max_queued_bytes
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[int, _Request] = {}
        self._open_bytes = 0
        self._outbox: deque[int] = deque()
        self._deadlines: list[tuple[float, int]] = []
        self._counts: Counter[str] = Counter()
        self._connected = threading.Event()
        self._closing = False
        self._owned_context: Context | None = None if context else zmq.Context()
        self._wake = Wake()
        self._socket = self._connect(context or self._owned_context or zmq.Context())
        self._monitor = self._socket.get_monitor_socket(_MONITORED)
        self._thread = threading.Thread(target=self._run, name=f"peer {address}", daemon=True)
        self._thread.start()

    def _connect(self, context: Context) -> Socket:
        sock = context.socket(zmq.DEALER)
        set_common_options(sock, max_message_bytes=self._max_message_bytes, linger_ms=0)
        sock.set(zmq.IMMEDIATE, 1)  # nothing is queued for a connection that is not there
        sock.connect(self.address)
        return sock

    # ---- any thread ---------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connected.is_set()

    def wait_connected(self, timeout_seconds: float) -> bool:
        """Waits for a connection; whether there is one."""
        return self._connected.wait(timeout_seconds)

    def request(
        self, message: AnyMessage, payload: Sequence[Buffer] = (), *, timeout_seconds: float
    ) -> tuple[AnyMessage, list[memoryview]]:
        """Asks and waits for the answer.

        Raises:
            PeerTimeout: no answer within `timeout_seconds`.
            PeerLost: the connection broke meanwhile, or the peer is closed.
            Overloaded: too much is queued here, or the other side said so.
            RelayRLError: the class that the other side's error reply names.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("request() would wait for its own I/O thread; use submit() in on_reply")
        answers: queue.SimpleQueue[tuple[AnyMessage | None, list[memoryview], RelayRLError | None]]
        answers = queue.SimpleQueue()
        self.submit(
            message,
            payload,
            timeout_seconds=timeout_seconds,
            on_reply=lambda *answer: answers.put(answer),
        )
        try:
            reply, frames_of_reply, error = answers.get(timeout=timeout_seconds + _REPLY_GRACE_SECONDS)
        except queue.Empty:
            raise PeerTimeout(f"no answer from {self.address} within {timeout_seconds:g} s") from None
        if reply is None:
            raise error or PeerLost(f"no answer from {self.address}")
        return reply, frames_of_reply

    def submit(
        self,
        message: AnyMessage,
        payload: Sequence[Buffer] = (),
        *,
        timeout_seconds: float,
        on_reply: OnReply,
    ) -> int:
        """Asks without waiting; `on_reply` is called once, from the I/O thread. Returns the request id.

        Raises:
            Overloaded: too much is queued here; `on_reply` is not called.
            MessageTooLarge: above `max_message_bytes`; likewise.
            PeerLost: the peer is closed; likewise.
        """
        request_id = next(self._ids)
        traceparent = message.traceparent or telemetry.inject()
        numbered = msgspec.structs.replace(message, request_id=request_id, traceparent=traceparent)
        encoded = frames.encode(numbered, payload)
        size = sum(map(len, encoded))
        if size > self._max_message_bytes:
            raise MessageTooLarge(f"a message of {size} bytes; the limit is {self._max_message_bytes}")
        deadline = time.monotonic() + timeout_seconds
        request = _Request(encoded, on_reply, deadline, size, timeout_seconds)
        with self._lock:
            self._admit(size)
            self._open[request_id] = request
            self._open_bytes += size
            self._outbox.append(request_id)
            heapq.heappush(self._deadlines, (deadline, request_id))
        self._wake.wake()
        return request_id

    def _admit(self, size: int) -> None:
        if self._closing:
            raise PeerLost(f"the connection to {self.address} is closed")
        if len(self._open) >= self._max_queued or (
            self._open and self._open_bytes + size > self._max_queued_bytes
        ):
            raise Overloaded(f"{len(self._open)} requests to {self.address} are open already", 0.1)

    def statistics(self) -> PeerStatistics:
        """The counters now."""
        count = self._counts
        return PeerStatistics(
            sent_total=count["sent"],
            answered_total=count["answered"],
            timeouts_total=count["timeouts"],
            lost_total=count["lost"],
            unmatched_total=count["unmatched"],
            garbage_total=count["garbage"],
            callback_errors_total=count["callback_errors"],
            connects_total=count["connects"],
            in_flight=len(self._open),
            connected=self.connected,
        )

    def close(self) -> None:
        """Ends open requests with `PeerLost` and frees the socket. Safe to call twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ---- the I/O thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            for source in (self._socket, self._monitor, self._wake.fileno()):
                poller.register(source, zmq.POLLIN)
            while not self._closing:
                self._step(poller)
        finally:
            self._finish()

    def _step(self, poller: zmq.Poller) -> None:
        wants_to_send = bool(self._outbox)
        poller.register(self._socket, zmq.POLLIN | zmq.POLLOUT if wants_to_send else zmq.POLLIN)
        poller.poll(self._poll_milliseconds())
        self._wake.clear()
        self._receive()
        self._follow_connection()
        self._send()
        self._expire(time.monotonic())

    def _poll_milliseconds(self) -> int:
        with self._lock:
            deadline = self._deadlines[0][0] if self._deadlines else float("inf")
        remaining = min(max(deadline - time.monotonic(), 0.0), _MAX_POLL_SECONDS)
        return int(remaining * 1000) + 1

    def _receive(self) -> None:
        for _ in range(_DRAIN_LIMIT):
            try:
                received = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(received)

    def _take(self, received: list[bytes]) -> None:
        try:
            message, payload = frames.decode(received)
        except FrameError as error:
            self._counts["garbage"] += 1
            self._end(error.request_id, None, [], error)
            return
        if isinstance(message, ErrorReply):
            refused = from_code(message.code, message.message, message.retry_after_seconds)
            self._count_answer(self._end(message.request_id, None, [], refused))
        else:
            self._count_answer(self._end(message.request_id, message, payload, None))

    def _count_answer(self, matched: bool) -> None:
        self._counts["answered" if matched else "unmatched"] += 1

    def _follow_connection(self) -> None:
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._counts["connects"] += 1
                self._connected.set()
            else:
                self._connected.clear()
                self._lose_sent()

    def _lose_sent(self) -> None:
        self._receive()
        with self._lock:
            lost = [request_id for request_id, request in self._open.items() if request.sent]
        for request_id in lost:
            self._counts["lost"] += 1
            error = PeerLost(f"the connection to {self.address} broke")
            self._end(request_id, None, [], error)

    def _send(self) -> None:
        while self._outbox:
            request_id = self._outbox[0]
            request = self._open.get(request_id)
            if request is not None:
                try:
                    self._socket.send_multipart(request.frames, zmq.NOBLOCK)
                except zmq.Again:
                    return
                request.sent, request.frames = True, ()
                self._counts["sent"] += 1
            self._outbox.popleft()

    def _expire(self, now: float) -> None:
        while True:
            with self._lock:
                if not self._deadlines or self._deadlines[0][0] > now:
                    break
                _, request_id = heapq.heappop(self._deadlines)
                request = self._open.get(request_id)
            if request is not None:
                self._counts["timeouts"] += 1
                text = f"no answer from {self.address} within {request.timeout_seconds:g} s"
                self._end(request_id, None, [], PeerTimeout(text))
        self._forget_ended_deadlines()

    def _forget_ended_deadlines(self) -> None:
        with self._lock:
            if len(self._deadlines) > 1024 + 2 * len(self._open):
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._open]
                heapq.heapify(self._deadlines)

    def _end(
        self,
        request_id: int,
        message: AnyMessage | None,
        payload: list[memoryview],
        error: RelayRLError | None,
    ) -> bool:
        with self._lock:
            request = self._open.pop(request_id, None)
            if request is None:
                return False
            self._open_bytes -= request.size_bytes
        try:
            request.on_reply(message, payload, error)
        except Exception:  # noqa: BLE001  # a callback's fault must not end the I/O of all the others
            self._counts["callback_errors"] += 1
            _log.exception("what takes the answers of %s failed", self.address)
        return True

    def _finish(self) -> None:
        with self._lock:
            self._closing = True
            remaining = list(self._open)
        self._connected.clear()
        for request_id in remaining:
            error = PeerLost(f"the connection to {self.address} was closed")
            self._end(request_id, None, [], error)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._wake.close()
        if self._owned_context is not None:
            self._owned_context.term()
