"""Turns the open segments of actors into closed ones; driven by the recorder, under its lock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from relayrl_client.actors import ROOM, ActorDetails, ActorTable
from relayrl_client.segments import ClosedSegment
from relayrl_client.storage import StepStorage
from relayrl_shared import telemetry
from relayrl_shared.identifiers import uuid7
from relayrl_shared.trajectory import Columns, FinalObservation, TrajectoryMetadata

TRACER = telemetry.tracer(__name__)


@dataclass(frozen=True, slots=True)
class RecordIdentity:
    """Whose data this is: what all segments of a client in a run share."""

    run_id: str
    policy: str
    client_id: str
    client_index: int
    schema_digest: str


@dataclass(slots=True)
class Closing:
    """A segment that is due: its first `steps` steps are kept, `final` is what the actor saw after them."""

    row: int
    detail: ActorDetails
    steps: int
    final: FinalObservation | None
    terminated: bool = False
    truncated: bool = False
    ends_rollout: bool = False


def close_segments(
    closing: Sequence[Closing],
    table: ActorTable,
    storage: StepStorage,
    identity: RecordIdentity,
    now: float,
) -> list[ClosedSegment]:
    """Copy segments out of the storage, give their pages back, and describe them.

    Args:
        closing: the segments, steps >= 1 each.
        table: the actors; their room is 0 afterwards, so that the next step begins a segment.
        storage: where the steps are.
        identity: goes into every segment.
        now: Unix seconds.
    """
    if not closing:
        return []
    columns = storage.gather([(due.detail.pages, due.steps) for due in closing])
    closed = []
    with TRACER.span("client.close_segments", segments=len(closing)):
        traceparent = telemetry.inject()
        for due, part in zip(closing, columns, strict=True):
            due.detail.rollout_segments += 1
            metadata = _metadata(due, part, table, identity, now, traceparent)
            closed.append(ClosedSegment(metadata, part, due.final))
            release(due.row, due.detail, table, storage)
            due.detail.segment_index += 1
    return closed


def release(row: int, detail: ActorDetails, table: ActorTable, storage: StepStorage) -> None:
    """Give the pages of an actor's open segment back."""
    storage.release(detail.pages)
    detail.pages = []
    table.columns.progress[row, ROOM] = 0


def _metadata(
    due: Closing,
    columns: Columns,
    table: ActorTable,
    identity: RecordIdentity,
    now: float,
    traceparent: str | None,
) -> TrajectoryMetadata:
    detail = due.detail
    return TrajectoryMetadata(
        trajectory_id=uuid7(),
        run_id=identity.run_id,
        policy=identity.policy,
        client_id=identity.client_id,
        client_index=identity.client_index,
        spool_id="",
        sequence=0,
        actor_id=detail.actor_id,
        actor_index=due.row,
        agent_id=detail.agent_id,
        episode_id=detail.episode_id,
        episode_index=int(table.columns.episode_index[due.row]),
        segment_index=detail.segment_index,
        first_step_index=detail.first_step_index,
        steps=due.steps,
        rollout_index=detail.rollout_index,
        rollout_segments=detail.rollout_segments if due.ends_rollout else None,
        environment_instance_id=detail.environment.environment_id,
        environment_episode_id=detail.episode_id,
        purpose=detail.purpose,
        terminated=due.terminated,
        truncated=due.truncated and not due.terminated,
        episode_return=float(columns.reward.sum(dtype="float64")),
        started_at=detail.started_at,
        ended_at=now,
        seed=detail.seed,
        schema_digest=identity.schema_digest,
        body_digest="",
        traceparent=traceparent,
    )
