"""Ids of trajectories, episodes, runs, clients and spools: UUIDv7, driven by whoever creates such a thing.

The ids of one process grow strictly, also when its clock steps back, so that they sort by creation.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

_RANDOM_BITS = 74
_RANDOM_LIMIT = 1 << _RANDOM_BITS
_LOW_BITS = 62
_LOW_MASK = (1 << _LOW_BITS) - 1
_VERSION_7 = 7 << 76
_VARIANT = 2 << 62
_STEP_BITS = 32


class IdentifierSource:
    """Makes UUIDv7s (RFC 9562) that grow strictly. Thread-safe.

    A second id of the same millisecond adds a random step to the 74 random bits of the one before; a clock
    that stands or steps back keeps the last millisecond that was used.
    """

    def __init__(
        self,
        clock_ns: Callable[[], int] = time.time_ns,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._clock_ns = clock_ns
        self._random_bytes = random_bytes
        self._lock = threading.Lock()
        self._milliseconds = 0
        self._random = 0

    def uuid7(self) -> str:
        """The next id, as the usual 36 characters."""
        with self._lock:
            self._advance()
            low = self._random & _LOW_MASK
            high = self._random >> _LOW_BITS
            value = self._milliseconds << 80 | _VERSION_7 | high << 64 | _VARIANT | low
        digits = f"{value:032x}"
        return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"

    def _advance(self) -> None:
        now = self._clock_ns() // 1_000_000
        if now > self._milliseconds:
            self._milliseconds = now
            self._random = self._draw(_RANDOM_BITS)
            return
        self._random += 1 + self._draw(_STEP_BITS)
        if self._random >= _RANDOM_LIMIT:
            self._milliseconds += 1
            self._random = self._draw(_RANDOM_BITS)

    def _draw(self, bits: int) -> int:
        return int.from_bytes(self._random_bytes((bits + 7) // 8), "big") & ((1 << bits) - 1)


# The promise is per process ("monotonic in a process"), so its state is, too.
_PROCESS_SOURCE = IdentifierSource()


def uuid7() -> str:
    """A new UUIDv7, greater as text than every one that this process made before."""
    return _PROCESS_SOURCE.uuid7()


def new_id() -> str:
    """A new id for anything that needs one; the same as `uuid7`."""
    return _PROCESS_SOURCE.uuid7()
