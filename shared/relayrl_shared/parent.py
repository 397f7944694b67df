"""Ends a child process when its parent is gone, even killed; `main` of every service drives it.

The parent holds the write end of a pipe whose read end each child inherits. The kernel closes the write end
with the parent, whatever ended that, and the child reads the end of the file.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading

GRACE_SECONDS = 10.0


class ParentPipe:
    """The parent's side; give `read_end` to children as inherited descriptor, and `arguments`."""

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()
        self._closed = False

    @property
    def arguments(self) -> tuple[str, str]:
        """What a child is told on its command line."""
        return "--parent-pipe", str(self.read_end)

    def close(self) -> None:
        """Ends the children that still follow. Twice is fine."""
        if not self._closed:
            self._closed = True
            os.close(self._write_end)
            os.close(self.read_end)


def add_parent_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that `follow_parent` is for; it is not for people."""
    parser.add_argument("--parent-pipe", type=int, default=None, help=argparse.SUPPRESS)


def follow_parent(read_end: int | None, grace_seconds: float = GRACE_SECONDS) -> None:
    """Stops this process as SIGTERM does when the pipe closes, and by force after the grace time."""
    if read_end is None:
        return
    os.set_inheritable(read_end, False)
    thread = threading.Thread(target=_wait, args=(read_end, grace_seconds), name="parent", daemon=True)
    thread.start()


def _wait(read_end: int, grace_seconds: float) -> None:
    while os.read(read_end, 64):
        continue
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(grace_seconds)
    os._exit(1)
