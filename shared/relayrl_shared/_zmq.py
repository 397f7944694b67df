"""What all our ZMQ sockets share: options, and a way to wake a polling thread; driven by `sockets`."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import zmq

DEFAULT_MAX_MESSAGE_BYTES = 64 << 20

HEARTBEAT_INTERVAL_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 6_000
HANDSHAKE_INTERVAL_MS = 5_000
RECONNECT_INTERVAL_MS = 50
RECONNECT_INTERVAL_MAX_MS = 2_000

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]


def hard_limit_bytes(max_message_bytes: int) -> int:
    """Size above which a frame closes the connection. Between it and the limit there is an error reply."""
    return 2 * max_message_bytes + (1 << 20)


def set_common_options(sock: Socket, *, max_message_bytes: int, linger_ms: int) -> None:
    """Heartbeats, TCP keep-alive, limits and reconnection, before bind or connect."""
    sock.set(zmq.LINGER, linger_ms)
    sock.set(zmq.MAXMSGSIZE, hard_limit_bytes(max_message_bytes))
    sock.set(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    sock.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    sock.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    sock.set(zmq.HANDSHAKE_IVL, HANDSHAKE_INTERVAL_MS)
    sock.set(zmq.TCP_KEEPALIVE, 1)
    sock.set(zmq.RECONNECT_IVL, RECONNECT_INTERVAL_MS)
    sock.set(zmq.RECONNECT_IVL_MAX, RECONNECT_INTERVAL_MAX_MS)


def bound_port(sock: Socket) -> int:
    """The TCP port of a bound socket, 0 where it is not TCP."""
    endpoint: Any = sock.get(zmq.LAST_ENDPOINT)
    text = endpoint.decode() if isinstance(endpoint, bytes) else str(endpoint)
    return int(text.rpartition(":")[2].rstrip("\0")) if text.startswith("tcp://") else 0


class Wake:
    """Wakes a thread that polls `fileno()`; `wake` may be called from any thread, any number of times."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._pending = False

    def fileno(self) -> int:
        """The descriptor that becomes readable."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Makes the descriptor readable until `clear`."""
        if self._pending:
            return
        self._pending = True
        try:
            self._writer.send(b"\0")
        except OSError:  # closed, or full and so readable already
            return

    def clear(self) -> None:
        """Takes the wake-ups back; call it before looking for the work that they announced."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        self._pending = False  # last: a wake-up in between finds it set, and its work is looked for next

    def close(self) -> None:
        """Frees both descriptors."""
        self._reader.close()
        self._writer.close()
