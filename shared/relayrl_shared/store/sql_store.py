"""The trajectory store over any SQL database: opens transactions and lets the row modules do the work.

`sqlite.SqliteStore` and `postgres.PostgresStore` say where the tables lie and how bodies are written. Every
method is safe to call from several threads.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

from sqlalchemy import select

from relayrl_shared.errors import StoreError
from relayrl_shared.messages import ActorInfo, SpoolReport
from relayrl_shared.store import (
    audit,
    learner_rows,
    quarantine,
    reading,
    runs,
    step_leases,
    storable,
    tables,
)
from relayrl_shared.store import spools as spool_rows
from relayrl_shared.store.database import Database, upsert
from relayrl_shared.store.interface import (
    Audit,
    CommitResult,
    IncomingTrajectory,
    Quarantined,
    Run,
    RunState,
    StoredActor,
    StoredTrajectory,
    Use,
)
from relayrl_shared.store.quarantine import QuarantineLimits
from relayrl_shared.trajectory import TrajectoryMetadata

Writer = Literal["ingest", "learner", "all"]
"""Who writes through a store: the methods of that group in `interface`; None in its place only reads."""

_PAGE = 10_000  # ids read at once
_SHORTEST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.002, 0.05


class SqlStore(ABC):
    """All of `TrajectoryStore` but the database itself."""

    def __init__(self, writer_of: Writer | None, limits: QuarantineLimits) -> None:
        self._writer_of = writer_of
        self._limits = limits
        self._closed = threading.Event()

    @property
    @abstractmethod
    def _ingest(self) -> Database:
        """The tables that ingest writes."""

    @abstractmethod
    def _learner(self, run_id: str) -> Database:
        """The tables that the learner of the run writes."""

    @abstractmethod
    def _commit(self, batch: Sequence[IncomingTrajectory]) -> list[CommitResult]:
        """Commits one non-empty batch, again where it lost a race."""

    def _as_ingest(self) -> Database:
        self._check_writer("ingest")
        return self._ingest

    def _as_learner(self, run_id: str) -> Database:
        self._check_writer("learner")
        return self._learner(run_id)

    def _check_writer(self, owner: Writer) -> None:
        if self._writer_of not in (owner, "all"):
            raise StoreError(
                f"this store was opened with writer_of={self._writer_of!r}; only {owner!r} does this"
            )

    # -- runs and clients

    def create_run(self, run: Run) -> Run:
        """See `TrajectoryStore.create_run`."""
        database = self._as_ingest()
        with database.write() as connection:
            return runs.create(connection, run, database.now(connection))

    def run_by_name(self, name: str) -> Run | None:
        """The run of that name."""
        with self._ingest.read() as connection:
            return next(iter(runs.find(connection, tables.runs.c.name == name)), None)

    def run_by_id(self, run_id: str) -> Run | None:
        """The run of that id."""
        with self._ingest.read() as connection:
            return next(iter(runs.find(connection, tables.runs.c.run_id == run_id)), None)

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        with self._ingest.read() as connection:
            return runs.find(connection)

    def set_run_state(self, run_id: str, state: RunState, reason: str = "") -> None:
        """Notes the state of a run and why."""
        with self._as_ingest().write() as connection:
            runs.set_state(connection, run_id, state, reason)

    def join_client(
        self, run_id: str, client_id: str, actors: Sequence[ActorInfo], first_rollout_index: int
    ) -> int:
        """See `TrajectoryStore.join_client`."""
        database = self._as_ingest()
        with database.write() as connection:
            now = database.now(connection)
            return runs.join_client(connection, run_id, client_id, actors, first_rollout_index, now)

    def change_actors(
        self,
        run_id: str,
        client_id: str,
        added: Sequence[ActorInfo],
        removed: Sequence[str],
        first_rollout_index: int,
    ) -> None:
        """Notes actors that left the client and that joined it."""
        database = self._as_ingest()
        with database.write() as connection:
            now = database.now(connection)
            runs.change_actors(connection, run_id, client_id, added, removed, first_rollout_index, now)

    def touch_client(self, run_id: str, client_id: str, spools: Sequence[SpoolReport]) -> bool:
        """See `TrajectoryStore.touch_client`; a client that left must say hello again."""
        database = self._as_ingest()
        with database.write() as connection:
            spool_rows.report(connection, spools)
            return runs.touch_client(connection, run_id, client_id, database.now(connection))

    def leave_client(self, run_id: str, client_id: str) -> None:
        """Marks the client and its actors as left."""
        database = self._as_ingest()
        with database.write() as connection:
            runs.leave_client(connection, run_id, client_id, database.now(connection))

    def expire_clients(self, silent_seconds: float) -> list[str]:
        """See `TrajectoryStore.expire_clients`."""
        database = self._as_ingest()
        with database.write() as connection:
            now = database.now(connection)
            silent = runs.silent_clients(connection, now - silent_seconds)
            for run_id, client_id in silent:
                runs.leave_client(connection, run_id, client_id, now)
            return [client_id for _, client_id in silent]

    def live_actors(self, run_id: str) -> list[StoredActor]:
        """The actors of the run that have not left, by (client_index, actor_index)."""
        with self._ingest.read() as connection:
            return runs.live_actors(connection, run_id)

    # -- schemas

    def put_schema(self, digest: str, schema: bytes) -> None:
        """Keeps the bytes behind a schema digest."""
        with self._as_ingest().write() as connection:
            runs.put_schema(connection, digest, schema)

    def schema(self, digest: str) -> bytes | None:
        """The bytes behind a schema digest."""
        with self._ingest.read() as connection:
            return runs.schema(connection, digest)

    # -- trajectories

    def commit(self, batch: Sequence[IncomingTrajectory]) -> list[CommitResult]:
        """See `TrajectoryStore.commit`. Where it raises, send the same batch again: nothing doubles."""
        self._check_writer("ingest")
        problems = [storable.problem(item.metadata) for item in batch]
        good = [item for item, problem in zip(batch, problems, strict=True) if problem is None]
        results = iter(self._commit(good) if good else [])
        self.quarantine(
            [
                storable.conflict(item, "unstorable", problem)
                for item, problem in zip(batch, problems, strict=True)
                if problem is not None
            ]
        )
        return [
            next(results) if problem is None else CommitResult(outcome="conflict", detail=problem)
            for problem in problems
        ]

    def quarantine(self, rows: Sequence[Quarantined]) -> None:
        """See `TrajectoryStore.quarantine`. The same trajectory again adds no second row."""
        if not rows:
            return
        rows = [storable.clean(row) for row in rows]
        database = self._as_ingest()
        with database.write() as connection:
            quarantine.settle(connection, rows)
            quarantine.put(connection, rows, self._limits, database.now(connection))

    def quarantined(self, run_id: str | None = None, limit: int = 100) -> list[Quarantined]:
        """Rows of quarantine, newest first."""
        with self._ingest.read() as connection:
            return quarantine.find(connection, run_id, limit)

    def read(
        self, run_id: str, after_position: int, limit: int, max_bytes: int = 64 << 20
    ) -> list[StoredTrajectory]:
        """See `TrajectoryStore.read`. One trajectory comes even where it alone is above `max_bytes`."""
        with self._ingest.read() as connection:
            return reading.read(connection, run_id, after_position, limit, max_bytes)

    def find(
        self, run_id: str, *, actor_id: str | None = None, episode_id: str | None = None, limit: int = 100
    ) -> list[TrajectoryMetadata]:
        """Metadata of the run's trajectories that match, in order of position."""
        with self._ingest.read() as connection:
            return reading.find(connection, run_id, actor_id, episode_id, limit)

    def counts(self, run_id: str) -> dict[str, int]:
        """See `TrajectoryStore.counts`."""
        with self._ingest.read() as connection:
            return reading.counts(connection, run_id)

    def wait(self, run_id: str, after_position: int, timeout_seconds: float) -> bool:
        """See `TrajectoryStore.wait`; polls at growing intervals. False at once when the store is closed."""
        deadline, delay = time.monotonic() + timeout_seconds, _SHORTEST_POLL_SECONDS
        while not self._closed.is_set():
            if self._has_passed(run_id, after_position):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._closed.wait(min(delay, left))
            delay = min(2 * delay, _LONGEST_POLL_SECONDS)
        return False

    def _has_passed(self, run_id: str, position: int) -> bool:
        try:
            with self._ingest.read() as connection:
                return reading.last_position(connection, run_id) > position
        except StoreError:
            if self._closed.is_set():
                return False
            raise

    # -- learner

    def acquire_lease(self, run_id: str, holder: str, ttl_seconds: float) -> int:
        """See `TrajectoryStore.acquire_lease`. The holder that has it already gets a new token."""
        database = self._as_learner(run_id)
        with database.write() as connection:
            now = database.now(connection)
            return learner_rows.acquire_lease(connection, run_id, holder, now, ttl_seconds)

    def renew_lease(self, run_id: str, token: int, ttl_seconds: float) -> None:
        """Moves the end of the lease; `LeaseLost` if another has it now."""
        database = self._as_learner(run_id)
        with database.write() as connection:
            learner_rows.extend_lease(connection, run_id, token, database.now(connection) + ttl_seconds)

    def release_lease(self, run_id: str, token: int) -> None:
        """Ends the lease; its token stays spent. `LeaseLost` if another has it now."""
        with self._as_learner(run_id).write() as connection:
            learner_rows.extend_lease(connection, run_id, token, 0.0)

    def record_update(
        self,
        run_id: str,
        lineage_id: str,
        parent_lineage_id: str | None,
        policy: str,
        learner_update: int,
        policy_version: int | None,
        uses: Sequence[Use],
        fencing_token: int,
    ) -> None:
        """See `TrajectoryStore.record_update` and `learner_rows.record_update`."""
        database = self._as_learner(run_id)
        row = {
            "run_id": run_id,
            "lineage_id": lineage_id,
            "policy": policy,
            "learner_update": learner_update,
            "parent_lineage_id": parent_lineage_id,
            "policy_version": policy_version,
            "fencing_token": fencing_token,
        }
        with database.write() as connection:
            learner_rows.record_update(database, connection, row, uses)

    def learner_update(self, run_id: str) -> int:
        """See `TrajectoryStore.learner_update`."""
        with self._learner(run_id).read() as connection:
            return learner_rows.learner_update(connection, run_id)

    def set_demand(self, run_id: str, learner_update: int, steps: int) -> None:
        """See `TrajectoryStore.set_demand`."""
        row = {"run_id": run_id, "learner_update": learner_update, "steps": steps}
        with self._as_learner(run_id).write() as connection:
            upsert(connection, tables.demands, row)

    def demand(self, run_id: str) -> tuple[int, int] | None:
        """See `TrajectoryStore.demand`."""
        with self._learner(run_id).read() as connection:
            return learner_rows.demand(connection, run_id)

    # -- leases of steps

    def grant_steps(self, run_id: str, client_id: str, wanted: int, used: int, ttl_seconds: float) -> int:
        """See `TrajectoryStore.grant_steps`. Renews what the client holds; wants 0 to renew only."""
        database, demand = self._as_ingest(), self.demand(run_id)
        with database.write() as connection:
            return step_leases.grant(
                connection,
                run_id,
                client_id,
                demanded=demand[1] if demand else 0,
                wanted=wanted,
                used=used,
                now=database.now(connection),
                ttl_seconds=ttl_seconds,
            )

    def audit(self, run_id: str) -> Audit:
        """See `Audit`."""
        with self._learner(run_id).read() as connection:
            consumed = audit.consumption(connection, run_id)
        with self._ingest.read() as connection:
            delivered = audit.delivery(connection, run_id)
        return audit.combine(run_id, delivered, consumed)

    def trajectory_ids(self, run_id: str) -> Iterator[str]:
        """The ids of the run's stored trajectories, in order of position."""
        position = 0
        while True:
            with self._ingest.read() as connection:
                page = reading.ids(connection, run_id, position, _PAGE)
            if not page:
                return
            position = page[-1][0]
            yield from (trajectory_id for _, trajectory_id in page)

    def ping(self) -> None:
        """Raises `StoreUnavailable` where the database does not answer."""
        with self._ingest.read() as connection:
            connection.execute(select(1))

    @abstractmethod
    def close(self) -> None:
        """Gives back connections and locks; waits end."""
