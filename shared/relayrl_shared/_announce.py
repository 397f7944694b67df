"""Hints that an alias of a policy moved: `Announcer` in the registry, `AnnouncementListener` elsewhere."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import zmq

from relayrl_shared import frames
from relayrl_shared._zmq import Context, Socket, Wake, bound_port, set_common_options
from relayrl_shared.errors import ConfigError, FrameError
from relayrl_shared.messages import Announcement

_MAX_ANNOUNCEMENT_BYTES = 64 << 10

_log = logging.getLogger(__name__)


class Announcer:
    """A PUB socket. Announcements to slow subscribers are dropped: they are hints, the truth is fetched.

    Args:
        bind_address: `tcp://host:port`; port 0: any free one, then in `port`.
        context: shares a ZMQ context with other sockets; it is not closed here.
    """

    def __init__(self, bind_address: str, *, context: Context | None = None) -> None:
        self._lock = threading.Lock()
        self._owned_context: Context | None = None if context else zmq.Context()
        self._socket = (context or self._owned_context or zmq.Context()).socket(zmq.PUB)
        set_common_options(self._socket, max_message_bytes=_MAX_ANNOUNCEMENT_BYTES, linger_ms=200)
        try:
            self._socket.bind(bind_address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot bind {bind_address}: {error.strerror}; set a free port") from error
        self.port = bound_port(self._socket)

    def announce(self, announcement: Announcement) -> None:
        """Tells whoever listens now; from any thread, never waits."""
        parts = [announcement.policy.encode(), *map(bytes, frames.encode(announcement))]
        with self._lock:
            if not self._socket.closed:
                self._socket.send_multipart(parts, zmq.NOBLOCK)

    def close(self) -> None:
        """Frees the socket. Safe to call twice."""
        with self._lock:
            if self._socket.closed:
                return
            self._socket.close()
        if self._owned_context is not None:
            self._owned_context.term()


class AnnouncementListener:
    """A SUB socket and its thread, which calls `on_announcement`; exceptions out of that are logged.

    Args:
        address: of the announcer, `tcp://host:port`.
        policies: exact names; empty: all.
        on_announcement: called in the listener's thread.
        context: shares a ZMQ context with other sockets; it is not closed here.
    """

    def __init__(
        self,
        address: str,
        policies: Sequence[str],
        on_announcement: Callable[[Announcement], None],
        *,
        context: Context | None = None,
    ) -> None:
        self._policies = frozenset(policies)
        self._on_announcement = on_announcement
        self._closing = False
        self.received_total = 0
        self.garbage_total = 0
        self.callback_errors_total = 0
        self._wake = Wake()
        self._owned_context: Context | None = None if context else zmq.Context()
        self._socket = self._connect(context or self._owned_context or zmq.Context(), address)
        self._thread = threading.Thread(target=self._run, name=f"announcements {address}", daemon=True)
        self._thread.start()

    def _connect(self, context: Context, address: str) -> Socket:
        sock = context.socket(zmq.SUB)
        set_common_options(sock, max_message_bytes=_MAX_ANNOUNCEMENT_BYTES, linger_ms=0)
        for policy in self._policies or {""}:
            sock.subscribe(policy.encode())  # a prefix to ZMQ; `_take` compares the whole name
        sock.connect(address)
        return sock

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        while not self._closing:
            poller.poll(1000)
            self._wake.clear()
            self._receive()
        self._socket.close(0)
        self._wake.close()
        if self._owned_context is not None:
            self._owned_context.term()

    def _receive(self) -> None:
        while not self._closing:
            try:
                self._take(self._socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return

    def _take(self, received: list[bytes]) -> None:
        try:
            message, _ = frames.decode(received[1:])
        except FrameError:
            self.garbage_total += 1
            return
        if not isinstance(message, Announcement):
            self.garbage_total += 1
        elif not self._policies or message.policy in self._policies:
            self._tell(message)

    def _tell(self, announcement: Announcement) -> None:
        self.received_total += 1
        try:
            self._on_announcement(announcement)
        except Exception:  # noqa: BLE001  # a callback's fault must not end the listening
            self.callback_errors_total += 1
            _log.exception("the callback for announcements failed")

    def close(self) -> None:
        """Ends the thread and frees the socket. Safe to call twice, also from the callback."""
        self._closing = True
        self._wake.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
