"""Lets a store close while threads still use it: the calls in progress end first, later ones are refused."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from relayrl_shared.errors import StoreError


class Gate:
    """Counts who is inside; each database has one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Inside for the length of the block.

        Raises:
            StoreError: the gate is closed.
        """
        with self._changed:
            if self._closed:
                raise StoreError("this trajectory store is closed")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self, timeout_seconds: float) -> bool:
        """Lets nobody in any more; True when all have left in that time."""
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: self._inside == 0, timeout_seconds)
