"""Signs of life from a child to its supervisor, made by the loop that works (contracts K1).

A child's loop looks at its stop event at every turn; `LivingEvent` then writes a byte into a pipe, and the
supervisor's `children` reads the other end. A process that is stopped, or whose loop hangs, makes none.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

SIGN_SECONDS = 0.25  # signs come no faster


class LivingEvent(threading.Event):
    """A stop event whose every look is a sign of life.

    Args:
        write_end: of the supervisor's pipe; None makes no signs.
    """

    def __init__(self, write_end: int | None) -> None:
        super().__init__()
        self._write_end = write_end
        self._signed_at = float("-inf")
        if write_end is not None:
            os.set_inheritable(write_end, False)
            os.set_blocking(write_end, False)

    def is_set(self) -> bool:
        """See `threading.Event`; a sign."""
        self._sign()
        return super().is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """See `threading.Event`; a sign at its begin."""
        self._sign()
        return super().wait(timeout)

    def _sign(self) -> None:
        now = time.monotonic()
        if self._write_end is None or now - self._signed_at < SIGN_SECONDS:
            return
        self._signed_at = now
        with contextlib.suppress(OSError):  # full: signs enough are in it; broken: nobody reads any more
            os.write(self._write_end, b".")


class SignReader:
    """The supervisor's end for one child.

    Attributes:
        write_end: for the child to inherit; close it here with `started`.
    """

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)

    def started(self) -> None:
        """The child has its end."""
        os.close(self.write_end)

    def has_sign(self) -> bool:
        """Whether there was one since the last look."""
        try:
            return bool(os.read(self._read_end, 65536))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Frees the descriptor."""
        os.close(self._read_end)
