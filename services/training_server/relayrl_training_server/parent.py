"""Ends a child process when its supervisor is gone, even killed; `main` drives it for every child.

The supervisor holds the write end of a pipe whose read end each child inherits. The kernel closes the write
end with the supervisor, whatever ended that, and the child reads the end of the file.
"""

from __future__ import annotations

import os
import signal
import threading

GRACE_SECONDS = 10.0


def follow_parent(read_end: int, grace_seconds: float = GRACE_SECONDS) -> None:
    """Stops this process as SIGTERM does when the pipe closes, and by force after the grace time."""
    os.set_inheritable(read_end, False)
    thread = threading.Thread(target=_wait, args=(read_end, grace_seconds), name="parent", daemon=True)
    thread.start()


def _wait(read_end: int, grace_seconds: float) -> None:
    while os.read(read_end, 64):
        continue
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(grace_seconds)
    os._exit(1)
