"""Keeps what did not parse, bounded in size and rate, in quarantine; driven by both sockets of ingest."""

from __future__ import annotations

import time

from relayrl_shared.errors import RelayRLError
from relayrl_shared.sockets import Rejected
from relayrl_shared.store.interface import CommitResult, Quarantined
from relayrl_training_server.committer import Committer
from relayrl_training_server.ingest_metrics import IngestMetrics

MAX_HEADER_BYTES = 4096
ROWS_PER_SECOND = 5.0
BURST_ROWS = 50.0


class GarbageKeeper:
    """Writes rows for rejected messages at a bounded rate; more are only counted.

    The sender gets its error reply at once, from the socket: the row is for people. Used by one thread.
    """

    def __init__(self, socket: str, committer: Committer, metrics: IngestMetrics, max_bytes: int) -> None:
        self._socket = socket
        self._committer = committer
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._allowance = BURST_ROWS
        self._refilled_at = time.monotonic()

    def on_rejected(self, rejected: Rejected) -> bool:
        """Keeps the message; False: the socket answers it."""
        if not self._allowed():
            self._metrics.garbage_unkept.inc()
            return False
        row = Quarantined(
            reason=rejected.error.code,
            detail=f"on the {self._socket} socket: {rejected.error}"[:2000].replace("\0", ""),
            header=rejected.frames[0][:MAX_HEADER_BYTES] if rejected.frames else b"",
            payload=_joined(rejected.frames[1:], self._max_bytes),
        )
        try:
            self._committer.submit(row, len(row.header) + len(row.payload or b""), _nothing)
        except RelayRLError:
            self._metrics.garbage_unkept.inc()
        return False

    def _allowed(self) -> bool:
        now = time.monotonic()
        refill = (now - self._refilled_at) * ROWS_PER_SECOND
        self._allowance, self._refilled_at = min(BURST_ROWS, self._allowance + refill), now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True


def _joined(parts: list[bytes], limit: int) -> bytes:
    joined = bytearray()
    for part in parts:
        joined += part[: limit - len(joined)]
        if len(joined) >= limit:
            break
    return bytes(joined)


def _nothing(result: CommitResult | None, error: Exception | None) -> None:
    """Nobody waits for the row of garbage."""
