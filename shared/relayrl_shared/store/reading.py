"""Reading trajectories: by cursor, by query, and the counters (contracts D2)."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import Connection, RowMapping, and_, select

from relayrl_shared.store import quarantine, tables
from relayrl_shared.store.interface import StoredTrajectory
from relayrl_shared.trajectory import TrajectoryMetadata

_DECODER = msgspec.msgpack.Decoder(TrajectoryMetadata)
_log, _bodies = tables.trajectory_log, tables.trajectories


def read(
    connection: Connection, run_id: str, after_position: int, limit: int, max_bytes: int
) -> list[StoredTrajectory]:
    """Trajectories after the position, in order: at most `limit`, and after the first within the bytes."""
    last = _last_within(connection, run_id, after_position, limit, max_bytes)
    if last is None:
        return []
    columns = (_bodies.c.header, _bodies.c.body, _bodies.c.final_observation)
    updates = (_bodies.c.learner_update_min, _bodies.c.learner_update_max)
    query = (
        select(_log.c.position, *columns, *updates)
        .join(_bodies, _bodies.c.trajectory_id == _log.c.trajectory_id)
        .where(_log.c.run_id == run_id, _log.c.position > after_position, _log.c.position <= last)
        .order_by(_log.c.position)
    )
    return [_stored(row) for row in connection.execute(query).mappings()]


def _last_within(
    connection: Connection, run_id: str, after_position: int, limit: int, max_bytes: int
) -> int | None:
    query = (
        select(_log.c.position, _log.c.stored_bytes)
        .where(_log.c.run_id == run_id, _log.c.position > after_position)
        .order_by(_log.c.position)
        .limit(limit)
    )
    last, total = None, 0
    for row in connection.execute(query):
        total += row.stored_bytes
        if last is not None and total > max_bytes:
            break
        last = row.position
    return last


def _stored(row: RowMapping) -> StoredTrajectory:
    return StoredTrajectory(
        position=row["position"],
        metadata=_DECODER.decode(row["header"]),
        body=row["body"],
        final_observation=row["final_observation"],
        learner_update_range=(row["learner_update_min"], row["learner_update_max"]),
    )


def find(
    connection: Connection, run_id: str, actor_id: str | None, episode_id: str | None, limit: int
) -> list[TrajectoryMetadata]:
    """Metadata of the run's trajectories that match, in order of position."""
    query = select(_bodies.c.header).join(_log, _bodies.c.trajectory_id == _log.c.trajectory_id)
    query = query.where(_log.c.run_id == run_id)
    if actor_id is not None:
        query = query.where(_bodies.c.run_id == run_id, _bodies.c.actor_id == actor_id)
    if episode_id is not None:
        query = query.where(_bodies.c.episode_id == episode_id)
    query = query.order_by(_log.c.position).limit(limit)
    return [_DECODER.decode(header) for header in connection.scalars(query)]


def counts(connection: Connection, run_id: str) -> dict[str, int]:
    """The run's counters; see `TrajectoryStore.counts`."""
    counters = tables.run_counters
    row = connection.execute(select(counters).where(counters.c.run_id == run_id)).mappings().first()
    names = ("trajectories", "steps", "episodes", "last_position")
    found = {name: int(row[name]) if row else 0 for name in names}
    return {**found, "quarantined": quarantine.count(connection, run_id)}


def last_position(connection: Connection, run_id: str) -> int:
    """The newest committed position of the run; 0 before the first."""
    counters = tables.run_counters
    found: int | None = connection.scalar(select(counters.c.last_position).where(counters.c.run_id == run_id))
    return found or 0


def stored_steps(connection: Connection, run_id: str) -> int:
    """Steps ever stored in the run."""
    counters = tables.run_counters
    found: int | None = connection.scalar(select(counters.c.steps).where(counters.c.run_id == run_id))
    return found or 0


def ids(connection: Connection, run_id: str, after_position: int, limit: int) -> Sequence[tuple[int, str]]:
    """(position, trajectory_id) after the position, in order."""
    later = and_(_log.c.run_id == run_id, _log.c.position > after_position)
    query = select(_log.c.position, _log.c.trajectory_id).where(later).order_by(_log.c.position).limit(limit)
    return [(row.position, row.trajectory_id) for row in connection.execute(query)]
