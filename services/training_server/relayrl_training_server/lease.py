"""The learner's hold on its run: a lock on its directory and a lease with a fencing token (contracts G2).

The learner acquires both at its start; a thread renews the lease. A process that is started again in the same
directory takes over at once, since the lock proves that the one before is gone; one elsewhere waits for the
lease to expire.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from pathlib import Path
from typing import IO

from relayrl_shared import logs
from relayrl_shared.errors import LeaseLost, StoreError, StoreUnavailable
from relayrl_shared.identifiers import new_id
from relayrl_shared.store.interface import TrajectoryStore

LEASE_SECONDS = 10.0

LOG = logs.get_logger(__name__)


class RunLease:
    """One process's hold on a run.

    Args:
        store: where the lease is.
        run_id: what is held.
        directory: of the run; made if it is not there.
        ttl_seconds: how long the lease outlives its last renewal.
    """

    def __init__(
        self, store: TrajectoryStore, run_id: str, directory: Path, ttl_seconds: float = LEASE_SECONDS
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._directory = directory
        self._ttl_seconds = ttl_seconds
        self._lock: IO[bytes] | None = None
        self._closed = threading.Event()
        self._renewed_at = 0.0
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.token = 0
        self.lost = threading.Event()
        self.waiting_for: str | None = "the lease of the run"

    def acquire(self, stop: threading.Event) -> bool:
        """Waits for the lease; False if `stop` came first.

        Raises:
            LeaseLost: another process of this machine uses the directory.
        """
        holder = self._lock_directory()
        while not stop.is_set():
            try:
                self.token = self._store.acquire_lease(self._run_id, holder, self._ttl_seconds)
            except (LeaseLost, StoreUnavailable) as error:
                self.waiting_for = str(error)
                stop.wait(min(0.25, self._ttl_seconds / 4))
                continue
            self._renewed_at = time.monotonic()
            self.waiting_for = None
            self._thread.start()
            return True
        return False

    def check(self) -> None:
        """Raises LeaseLost once the run may be another's."""
        if self.lost.is_set():
            raise LeaseLost(f"run {self._run_id}: this learner lost its lease (token {self.token})")

    def close(self) -> None:
        """Gives the lease and the directory back; closing twice is fine."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
            try:
                self._store.release_lease(self._run_id, self.token)
            except StoreError as error:
                LOG.info("lease not released", run_id=self._run_id, reason=str(error))
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _lock_directory(self) -> str:
        """Locks the directory; returns the name of whoever holds it, the same for every process after."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self._directory / "learner.lock").open("a+b")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            self._lock = None
            raise LeaseLost(
                f"{self._directory}: another learner process uses it; stop that one first"
            ) from error
        self._lock.seek(0)
        name = self._lock.read().decode()
        if not name:
            name = f"{socket.gethostname()}/{new_id()}"
            self._lock.write(name.encode())
            self._lock.flush()
            os.fsync(self._lock.fileno())
        return name

    def _renew(self) -> None:
        while not self._closed.wait(self._ttl_seconds / 4):
            try:
                self._store.renew_lease(self._run_id, self.token, self._ttl_seconds)
                self._renewed_at = time.monotonic()
            except LeaseLost:
                break
            except StoreError as error:
                LOG.warning("lease not renewed", run_id=self._run_id, reason=str(error))
                if time.monotonic() - self._renewed_at > self._ttl_seconds:
                    break
        else:
            return
        LOG.error("lease lost", run_id=self._run_id, token=self.token)
        self.lost.set()
