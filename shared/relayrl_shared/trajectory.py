"""The trajectory record: what a client records, the wire carries, the store keeps and a learner reads.

A trajectory is the ordered steps of one actor inside one episode: a whole episode or a segment of it. This
module holds its metadata (contracts B3) and its columns as numpy arrays; `arrow_codec` turns it into bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from relayrl_shared.spaces import ActionSpec, ObservationSpec

Purpose = Literal["train", "evaluate"]


class TrajectoryMetadata(msgspec.Struct, kw_only=True, frozen=True):
    """What is known of a trajectory beside its steps (contracts B3).

    Times are Unix seconds of the client's clock and serve people only; no decision reads them.
    """

    trajectory_id: str  # UUIDv7, monotonic in a process
    run_id: str
    policy: str
    client_id: str
    client_index: int  # from the welcome
    spool_id: str
    sequence: int  # per (spool_id, run_id), from 1, without gaps
    actor_id: str
    actor_index: int  # in the client, from 0
    agent_id: str | None = None  # the environment's name of the agent, where there are several
    episode_id: str
    episode_index: int  # per actor, from 0
    segment_index: int  # in the episode, from 0
    first_step_index: int  # in the episode
    steps: int
    rollout_index: int  # contracts F1
    rollout_segments: int | None = None
    """Set on the last segment that this actor has in this rollout: how many it has there. A reader that holds
    that many has the actor's whole rollout (a reset tick at its end leaves nothing to wait for)."""
    environment_instance_id: str
    environment_episode_id: str
    purpose: Purpose = "train"
    terminated: bool
    truncated: bool
    episode_return: float = 0.0  # sum of the segment's rewards, for queries
    started_at: float
    ended_at: float
    seed: int | None = None
    schema_digest: str
    body_digest: str  # BLAKE3 of the payload frames
    traceparent: str | None = None


@dataclass(slots=True)
class Columns:
    """The steps of a trajectory, one array a column, first axis `T` (steps).

    Leaves are keyed by the names of the specs (`observation`, `observation.camera`, `action`, …). Nullable
    columns hold their values in `value` and what is null in `value_valid` (True = present).
    """

    observation: dict[str, NDArray[np.generic]]
    action: dict[str, NDArray[np.generic]]  # what the environment got, always inside the space
    policy_action: dict[str, NDArray[np.float32]]  # continuous leaves only: unclipped or pre-squash
    action_mask: dict[str, NDArray[np.bool_]]  # absent leaves: everything was allowed
    reward: NDArray[np.float32]
    behaviour_log_prob: NDArray[np.float32]
    behaviour_log_prob_valid: NDArray[np.bool_]
    leaf_log_prob: dict[str, NDArray[np.float32]]  # hybrids only, by action leaf
    value: NDArray[np.float32]
    value_valid: NDArray[np.bool_]
    policy_version: NDArray[np.int64]
    policy_version_valid: NDArray[np.bool_]
    learner_update: NDArray[np.int64]
    greedy: NDArray[np.bool_]
    fallback: NDArray[np.bool_]
    environment_step: NDArray[np.int64]  # the tick of the environment instance
    aux: dict[str, NDArray[np.generic]] = field(default_factory=dict)


@dataclass(slots=True)
class FinalObservation:
    """What the actor saw after the last step: leaves without a step axis, and the mask that came with it."""

    observation: dict[str, NDArray[np.generic]]
    action_mask: dict[str, NDArray[np.bool_]]


@dataclass(slots=True)
class Trajectory:
    """Metadata, columns and the final observation (None only where it terminated without one)."""

    metadata: TrajectoryMetadata
    columns: Columns
    final_observation: FinalObservation | None


class RecordSchema(msgspec.Struct, kw_only=True, frozen=True):
    """What fixes the columns of a trajectory; its digest names the schema on the wire and in the store."""

    observation: ObservationSpec
    action: ActionSpec
    masked_leaves: tuple[str, ...] = ()  # action leaves recorded with a mask
    leaf_log_probs: bool = False
    aux: dict[str, str] = {}  # name → numpy dtype
