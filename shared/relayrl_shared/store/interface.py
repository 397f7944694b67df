"""What a trajectory store must do. `sqlite` and `postgres` do it; ingest, learner and supervisor use it.

Methods are synchronous and may block on the database: callers run them in a thread of their own. Everything
raises `StoreUnavailable` where the database cannot be reached, and that call had no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import msgspec

from relayrl_shared.messages import ActorInfo, Pacing, SpoolReport
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.trajectory import TrajectoryMetadata

RunState = Literal["active", "paused", "finished", "failed"]
UseOutcome = Literal["used", "stale", "overlap", "incomplete", "evaluation", "greedy"]


class Run(msgspec.Struct, kw_only=True, frozen=True):
    """A run as created by the first hello (contracts K3)."""

    run_id: str
    name: str
    algorithm: str
    hyperparameters: dict[str, Any]  # complete: defaults filled in at creation
    observation_spec: ObservationSpec
    action_spec: ActionSpec
    masked_leaves: tuple[str, ...]
    pacing: Pacing
    max_policy_lag: int
    seed: int
    allow_nan: bool
    state: RunState = "active"
    state_reason: str = ""
    created_at: float = 0.0


class StoredActor(msgspec.Struct, kw_only=True, frozen=True):
    """An actor of a run. `left_at`: of its actor_change, goodbye, its client's newer hello, or silence."""

    info: ActorInfo
    client_id: str
    client_index: int
    first_rollout_index: int
    last_seen_at: float
    left_at: float | None = None


class IncomingTrajectory(msgspec.Struct, kw_only=True, frozen=True):
    """A validated trajectory on its way into the store."""

    metadata: TrajectoryMetadata
    body: bytes
    final_observation: bytes | None
    policy_version_range: tuple[int, int] | None
    learner_update_range: tuple[int, int]


class StoredTrajectory(msgspec.Struct, kw_only=True, frozen=True):
    """A committed trajectory and its position in its run's log."""

    position: int
    metadata: TrajectoryMetadata
    body: bytes
    final_observation: bytes | None
    learner_update_range: tuple[int, int]


class Quarantined(msgspec.Struct, kw_only=True, frozen=True):
    """What could not be accepted, whole. spool_id, run_id, sequence are known for trajectories only."""

    reason: str
    detail: str
    header: bytes
    payload: bytes | None  # None: dropped at the limit (contracts D4)
    run_id: str | None = None
    spool_id: str | None = None
    sequence: int | None = None
    trajectory_id: str | None = None
    received_at: float = 0.0


class CommitResult(msgspec.Struct, kw_only=True, frozen=True):
    """What became of one incoming trajectory. `position` is None for known and conflicting ones."""

    outcome: Literal["stored", "known", "conflict"]  # conflict: now in quarantine, `detail` says why
    position: int | None = None
    detail: str = ""


class Use(msgspec.Struct, kw_only=True, frozen=True):
    """What an update did with a trajectory.

    The key is (run_id, lineage_id, policy, learner_update, trajectory_id).
    """

    trajectory_id: str
    position: int
    outcome: UseOutcome


class Audit(msgspec.Struct, kw_only=True, frozen=True):
    """Contracts C2 for a run: accepted = stored + quarantined + dropped + in_spool, per reports and rows."""

    run_id: str
    accepted: int
    stored: int
    quarantined: int
    dropped: int
    in_spool: int
    missing: int  # accepted - the rest; 0 when the identity holds
    stored_twice: int
    used: int
    used_twice: int  # along the surviving lineage
    unused: dict[str, int]  # outcome → trajectories
    unread: int  # committed, not yet decided upon


class TrajectoryStore(Protocol):
    """One database. On SQLite, one process writes each group of methods (contracts D3); see `sqlite`."""

    # -- runs and clients (written by ingest)
    def create_run(self, run: Run) -> Run:
        """Stores the run, or returns the one that has this name already."""
        ...

    def run_by_name(self, name: str) -> Run | None:
        """The run of that name."""
        ...

    def run_by_id(self, run_id: str) -> Run | None:
        """The run of that id."""
        ...

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        ...

    def set_run_state(self, run_id: str, state: RunState, reason: str = "") -> None:
        """Notes the state of a run and why."""
        ...

    def join_client(
        self, run_id: str, client_id: str, actors: Sequence[ActorInfo], first_rollout_index: int
    ) -> int:
        """Registers the client's actors in place of those it had; returns its client_index, kept for ever."""
        ...

    def change_actors(
        self,
        run_id: str,
        client_id: str,
        added: Sequence[ActorInfo],
        removed: Sequence[str],
        first_rollout_index: int,
    ) -> None:
        """Notes actors that joined the client and that left it."""
        ...

    def touch_client(self, run_id: str, client_id: str, spools: Sequence[SpoolReport]) -> bool:
        """Notes the heartbeat and the spool reports; False if the client is not known or has left."""
        ...

    def leave_client(self, run_id: str, client_id: str) -> None:
        """Marks the client and its actors as left."""
        ...

    def expire_clients(self, silent_seconds: float) -> list[str]:
        """Marks actors of clients silent for so long as left; returns the client ids."""
        ...

    def live_actors(self, run_id: str) -> list[StoredActor]:
        """The actors of the run that have not left, by (client_index, actor_index)."""
        ...

    # -- schemas
    def put_schema(self, digest: str, schema: bytes) -> None:
        """Keeps the bytes behind a schema digest."""
        ...

    def schema(self, digest: str) -> bytes | None:
        """The bytes behind a schema digest."""
        ...

    # -- trajectories (written by ingest)
    def commit(self, batch: Sequence[IncomingTrajectory]) -> list[CommitResult]:
        """Stores a batch in one durable transaction (contracts D1, D2); one result an element, in order."""
        ...

    def quarantine(self, rows: Sequence[Quarantined]) -> None:
        """Durable. Advances the dedupe state for rows that name a spool and sequence."""
        ...

    def quarantined(self, run_id: str | None = None, limit: int = 100) -> list[Quarantined]:
        """Rows of quarantine, newest first; of all runs and of none where run_id is None."""
        ...

    def read(
        self, run_id: str, after_position: int, limit: int, max_bytes: int = 64 << 20
    ) -> list[StoredTrajectory]:
        """Trajectories with position > after_position, in order; misses no later commit (contracts D2)."""
        ...

    def find(
        self, run_id: str, *, actor_id: str | None = None, episode_id: str | None = None, limit: int = 100
    ) -> list[TrajectoryMetadata]:
        """Metadata of the run's trajectories that match, in order of position."""
        ...

    def counts(self, run_id: str) -> dict[str, int]:
        """`trajectories`, `steps`, `episodes` (ended), `quarantined`, `last_position`."""
        ...

    def wait(self, run_id: str, after_position: int, timeout_seconds: float) -> bool:
        """Waits until the run has a later position; True if it has. A lost wake costs one poll interval."""
        ...

    # -- learner (written by the learner of the run)
    def acquire_lease(self, run_id: str, holder: str, ttl_seconds: float) -> int:
        """A fencing token above all before; `LeaseLost` while another live holder has it (contracts G2)."""
        ...

    def renew_lease(self, run_id: str, token: int, ttl_seconds: float) -> None:
        """Moves the end of the lease; `LeaseLost` if it was given up or taken over."""
        ...

    def release_lease(self, run_id: str, token: int) -> None:
        """Ends the lease, its token stays spent; `LeaseLost` if it was given up or taken over."""
        ...

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
        """One row an update and one a trajectory that it decided upon. Idempotent by key (contracts G1)."""
        ...

    def learner_update(self, run_id: str) -> int:
        """Finished updates of the run along its newest lineage; 0 before the first."""
        ...

    def set_demand(self, run_id: str, learner_update: int, steps: int) -> None:
        """Cumulative steps that the learner wants since the run began (contracts E2)."""
        ...

    def demand(self, run_id: str) -> tuple[int, int] | None:
        """(learner_update, cumulative steps wanted), None if the learner asks for nothing."""
        ...

    # -- leases of steps (written by ingest)
    def grant_steps(self, run_id: str, client_id: str, wanted: int, used: int, ttl_seconds: float) -> int:
        """Steps granted now out of demand - stored - outstanding; expired grants return to the pool."""
        ...

    def audit(self, run_id: str) -> Audit:
        """What became of all that was accepted, and what the learner did with it."""
        ...

    def trajectory_ids(self, run_id: str) -> Iterator[str]:
        """The ids of the run's stored trajectories, in order of position."""
        ...

    def ping(self) -> None:
        """Raises `StoreUnavailable` where the database does not answer."""
        ...

    def close(self) -> None:
        """Gives back connections and locks; waits end."""
        ...
