"""Closes the segments of actors that nobody drives any more (contracts A5); a thread that the runtime starts.

Looking costs the hot path nothing: an actor is idle whose counters did not move between two looks.
"""

from __future__ import annotations

import logging
import threading
import time

from relayrl_client.actors import BUSY, EPISODE, STEP_INDEX
from relayrl_client.coordinator import Coordinator
from relayrl_shared.errors import RelayRLError

_LOOKS_PER_LIMIT = 4

_log = logging.getLogger(__name__)


class IdleWatch:
    """Makes idle actors leave their episodes; the last step of each is dropped and counted.

    Args:
        coordinator: closes the segments.
        idle_seconds: how long an actor in an episode may go without a call.
    """

    def __init__(self, coordinator: Coordinator, idle_seconds: float) -> None:
        self._coordinator = coordinator
        self._idle_seconds = idle_seconds
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}
        self._stopping = threading.Event()
        self.closed_total = 0
        self._thread = threading.Thread(target=self._run, name="relayrl-idle", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._idle_seconds / _LOOKS_PER_LIMIT):
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """Close what has been idle since before `now - idle_seconds`."""
        moved = self._counters()
        self._seen = {
            actor_id: self._seen[actor_id]
            if self._seen.get(actor_id, ((-1, -1), 0.0))[0] == at
            else (at, now)
            for actor_id, at in moved.items()
        }
        idle = [actor for actor, (_, since) in self._seen.items() if now - since >= self._idle_seconds]
        for actor_id in idle:
            try:
                self._coordinator.drop_open([actor_id])
                self.closed_total += 1
                _log.warning(
                    "actor %s was idle for %g s: its episode is closed", actor_id, self._idle_seconds
                )
            except RelayRLError as exc:
                _log.info("actor %s came back: %s", actor_id, exc)

    def _counters(self) -> dict[str, tuple[int, int]]:
        """Where each actor stands that is in an episode and not in a call."""
        recorder = self._coordinator.recorder
        with recorder.lock:
            columns = recorder.table.columns
            return {
                detail.actor_id: (int(columns.episode_index[row]), int(columns.progress[row, STEP_INDEX]))
                for row, detail in recorder.table.live()
                if columns.phase[row] & EPISODE and not columns.phase[row] & BUSY
            }
