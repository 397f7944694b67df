"""How a batch of trajectories becomes durable, once each and in order (contracts D1, D2).

`sql_store` drives `commit` inside one transaction: lock the spools, judge each trajectory, write the bodies,
then under the run's lock give positions and write the log, then the quarantine and the spools.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
from sqlalchemy import Connection, and_, or_, select

from relayrl_shared.store import quarantine, spools, storable, tables
from relayrl_shared.store.database import Database, Row, chunks, insert, lock
from relayrl_shared.store.interface import CommitResult, IncomingTrajectory
from relayrl_shared.store.quarantine import QuarantineLimits
from relayrl_shared.store.spools import Fate, Key, Spool
from relayrl_shared.trajectory import TrajectoryMetadata

Segment = tuple[str, int]  # (episode_id, segment_index)
Place = tuple[str, str, int]  # (run_id, spool_id, sequence)
_LOOKUP = 500  # trajectories of one query

WriteBodies = Callable[[Connection, Sequence[Row]], set[str]]
"""Writes rows of `trajectories`; returns the ids that it wrote, all of them unless it skips known ones."""


@dataclass(slots=True)
class Known:
    """What the log already holds of what a batch names, and then of the batch itself."""

    digests: dict[str, str] = field(default_factory=dict)  # trajectory_id → body digest
    segments: dict[Segment, str] = field(default_factory=dict)  # → trajectory_id
    sequences: dict[Place, str] = field(default_factory=dict)  # → trajectory_id
    settled: set[Place] = field(default_factory=set)  # by the batch so far, in whatever way

    def store(self, item: TrajectoryMetadata) -> None:
        """Counts a trajectory of the batch as stored."""
        self.digests[item.trajectory_id] = item.body_digest
        self.segments[item.episode_id, item.segment_index] = item.trajectory_id
        self.sequences[_place(item)] = item.trajectory_id


@dataclass(slots=True)
class Plan:
    """The judgement on a batch: one result an element, None for those to be stored."""

    results: list[CommitResult | None]

    def fresh(self, batch: Sequence[IncomingTrajectory]) -> list[IncomingTrajectory]:
        """The trajectories to be stored, in order."""
        return [item for item, result in zip(batch, self.results, strict=True) if result is None]


@dataclass(frozen=True, slots=True)
class Options:
    """How to commit. `lock_runs_first`: for the try after a conflict, the judgement is final within a run."""

    write_bodies: WriteBodies
    limits: QuarantineLimits
    lock_runs_first: bool = False


def commit(
    database: Database, connection: Connection, batch: Sequence[IncomingTrajectory], options: Options
) -> list[CommitResult]:
    """Stores the batch; one result an element, in order."""
    now = time.time()  # for people only: no decision reads it
    rows = spools.lock(connection, [_key(item.metadata) for item in batch])
    runs = {item.metadata.run_id for item in batch}
    if options.lock_runs_first:
        lock_runs(connection, runs)
    plan = judge(batch, rows, _lookup(connection, batch, rows))
    fresh = plan.fresh(batch)
    written = options.write_bodies(connection, [body_row(item, now) for item in fresh]) if fresh else set()
    fresh = [item for item in fresh if item.metadata.trajectory_id in written]
    positions = _append_log(database, connection, fresh)
    results = _finish(connection, batch, plan, positions)
    _quarantine_conflicts(connection, batch, results, options.limits, now)
    spools.save(connection, _settled(batch, results, rows))
    return results


def _key(item: TrajectoryMetadata) -> Key:
    return (item.run_id, item.spool_id)


def _place(item: TrajectoryMetadata) -> Place:
    return (item.run_id, item.spool_id, item.sequence)


def lock_runs(connection: Connection, run_ids: Iterable[str]) -> None:
    """Takes the locks under which positions are given, in sorted order, held to commit."""
    lock(connection, "log", run_ids)


def _lookup(connection: Connection, batch: Sequence[IncomingTrajectory], rows: dict[Key, Spool]) -> Known:
    known, log = Known(), tables.trajectory_log
    indices = [item.metadata.segment_index for item in batch]
    columns = (log.c.trajectory_id, log.c.body_digest, log.c.episode_id, log.c.segment_index)
    for start in range(0, len(batch), _LOOKUP):
        part = [item.metadata for item in batch[start : start + _LOOKUP]]
        episodes = log.c.episode_id.in_(sorted({item.episode_id for item in part}))
        same_segment = and_(episodes, log.c.segment_index.between(min(indices), max(indices)))
        same_id = log.c.trajectory_id.in_(sorted({item.trajectory_id for item in part}))
        for row in connection.execute(select(*columns).where(or_(same_id, same_segment))):
            known.digests[row.trajectory_id] = row.body_digest
            known.segments[row.episode_id, row.segment_index] = row.trajectory_id
    _lookup_reused(connection, batch, rows, known)
    return known


def _lookup_reused(
    connection: Connection, batch: Sequence[IncomingTrajectory], rows: dict[Key, Spool], known: Known
) -> None:
    """Finds who holds the settled sequences that come with an id that the log does not have."""
    log = tables.trajectory_log
    for item in (entry.metadata for entry in batch):
        if item.trajectory_id in known.digests or item.sequence not in rows[_key(item)].known:
            continue
        which = and_(
            log.c.run_id == item.run_id, log.c.spool_id == item.spool_id, log.c.sequence == item.sequence
        )
        holder: str | None = connection.scalar(select(log.c.trajectory_id).where(which))
        if holder is not None:
            known.sequences[_place(item)] = holder


def judge(batch: Sequence[IncomingTrajectory], rows: dict[Key, Spool], known: Known) -> Plan:
    """Says of each trajectory whether it is known, in conflict, or (None) to be stored."""
    plan = Plan([])
    for item in (entry.metadata for entry in batch):
        result = _judge_one(item, rows[_key(item)], known)
        if result is None:
            known.store(item)
        known.settled.add(_place(item))
        plan.results.append(result)
    return plan


def _judge_one(item: TrajectoryMetadata, spool: Spool, known: Known) -> CommitResult | None:
    digest = known.digests.get(item.trajectory_id)
    if digest is not None:
        if digest == item.body_digest:
            return CommitResult(outcome="known")
        return _conflict(f"trajectory {item.trajectory_id} is stored with body digest {digest}")
    holder = known.sequences.get(_place(item))
    if holder is not None:
        return _conflict(f"sequence {item.sequence} of spool {item.spool_id} is trajectory {holder}")
    if item.sequence in spool.known or _place(item) in known.settled:
        return CommitResult(outcome="known", detail="this sequence was settled before")
    holder = known.segments.get((item.episode_id, item.segment_index))
    if holder is not None:
        return _conflict(f"segment {item.segment_index} of episode {item.episode_id} is trajectory {holder}")
    return None


def _conflict(detail: str) -> CommitResult:
    return CommitResult(outcome="conflict", detail=detail)


def body_row(item: IncomingTrajectory, now: float) -> Row:
    """The row of `trajectories`."""
    metadata, versions = item.metadata, item.policy_version_range
    return {
        "trajectory_id": metadata.trajectory_id,
        "run_id": metadata.run_id,
        "policy": metadata.policy,
        "actor_id": metadata.actor_id,
        "episode_id": metadata.episode_id,
        "steps": metadata.steps,
        "episode_return": metadata.episode_return,
        "terminated": metadata.terminated,
        "truncated": metadata.truncated,
        "purpose": metadata.purpose,
        "started_at": metadata.started_at,
        "ended_at": metadata.ended_at,
        "stored_at": now,
        "policy_version_min": versions[0] if versions else None,
        "policy_version_max": versions[1] if versions else None,
        "learner_update_min": item.learner_update_range[0],
        "learner_update_max": item.learner_update_range[1],
        "schema_digest": metadata.schema_digest,
        "header": msgspec.msgpack.encode(metadata),
        "final_observation": item.final_observation,
        "body": item.body,
    }


def _append_log(
    database: Database, connection: Connection, fresh: Sequence[IncomingTrajectory]
) -> dict[str, int]:
    """Gives positions and writes the log under the runs' locks; returns trajectory_id → position."""
    by_run: dict[str, list[IncomingTrajectory]] = defaultdict(list)
    for item in fresh:
        by_run[item.metadata.run_id].append(item)
    lock_runs(connection, by_run)
    rows: list[Row] = []
    for run_id in sorted(by_run):
        first = advance(connection, run_id, [item.metadata for item in by_run[run_id]])
        rows += [_log_row(item, first + offset) for offset, item in enumerate(by_run[run_id])]
    if rows:
        database.insert_rows(connection, tables.trajectory_log, rows)
    return {row["trajectory_id"]: row["position"] for row in rows}


def advance(connection: Connection, run_id: str, added: Sequence[TrajectoryMetadata]) -> int:
    """Counts the trajectories in the run's counter row, which stays locked; returns the first position."""
    counters = tables.run_counters
    row = {
        "last_position": len(added),
        "trajectories": len(added),
        "steps": sum(item.steps for item in added),
        "episodes": sum(item.terminated or item.truncated for item in added),
    }
    statement = insert(connection, counters).values(run_id=run_id, **row)
    changed = {name: counters.c[name] + statement.excluded[name] for name in row}
    counted = statement.on_conflict_do_update(index_elements=["run_id"], set_=changed)
    last: int = connection.execute(counted.returning(counters.c.last_position)).scalar_one()
    return last - len(added) + 1


def _log_row(item: IncomingTrajectory, position: int) -> Row:
    metadata = item.metadata
    return {
        "run_id": metadata.run_id,
        "position": position,
        "trajectory_id": metadata.trajectory_id,
        "episode_id": metadata.episode_id,
        "segment_index": metadata.segment_index,
        "first_step_index": metadata.first_step_index,
        "steps": metadata.steps,
        "spool_id": metadata.spool_id,
        "sequence": metadata.sequence,
        "body_digest": metadata.body_digest,
        "stored_bytes": len(item.body) + len(item.final_observation or b""),
    }


def _finish(
    connection: Connection,
    batch: Sequence[IncomingTrajectory],
    plan: Plan,
    positions: dict[str, int],
) -> list[CommitResult]:
    """Fills in the positions; what `write_bodies` skipped was stored by someone else meanwhile."""
    stored = [i for i, result in enumerate(plan.results) if result is None]
    skipped = {batch[i].metadata.trajectory_id for i in stored} - positions.keys()
    log, digests = tables.trajectory_log, dict[str, str]()
    for ids in chunks(skipped):
        query = select(log.c.trajectory_id, log.c.body_digest).where(log.c.trajectory_id.in_(ids))
        digests.update((row.trajectory_id, row.body_digest) for row in connection.execute(query))
    results = list(plan.results)
    for i in stored:
        results[i] = _outcome(batch[i].metadata, positions, digests)
    return [result for result in results if result is not None]


def _outcome(item: TrajectoryMetadata, positions: dict[str, int], digests: dict[str, str]) -> CommitResult:
    position = positions.get(item.trajectory_id)
    if position is not None:
        return CommitResult(outcome="stored", position=position)
    digest = digests.get(item.trajectory_id)
    if digest == item.body_digest:
        return CommitResult(outcome="known")
    return _conflict(f"trajectory {item.trajectory_id} is stored with body digest {digest}")


def _quarantine_conflicts(
    connection: Connection,
    batch: Sequence[IncomingTrajectory],
    results: Sequence[CommitResult],
    limits: QuarantineLimits,
    now: float,
) -> None:
    rows = [
        storable.conflict(item, "conflict", result.detail)
        for item, result in zip(batch, results, strict=True)
        if result.outcome == "conflict"
    ]
    if rows:
        quarantine.put(connection, rows, limits, now)


def _settled(
    batch: Sequence[IncomingTrajectory], results: Sequence[CommitResult], rows: dict[Key, Spool]
) -> list[Spool]:
    """The spools after the batch."""
    fates: dict[Key, list[tuple[int, Fate]]] = defaultdict(list)
    for item, result in zip(batch, results, strict=True):
        fates[_key(item.metadata)].append((item.metadata.sequence, result.outcome))
    return [spools.settle(rows[key], of_spool) for key, of_spool in fates.items()]
