"""Checks of what a trajectory says of itself, before anything is looked up by it; driven by `intake`.

The record's columns are checked by `relayrl_shared.validation`. Here: that ids and numbers fit the columns of
any store, and that the metadata does not contradict itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from relayrl_shared.errors import ContractError, InvalidTrajectory
from relayrl_shared.store.interface import Run
from relayrl_shared.trajectory import TrajectoryMetadata

MAX_ID_CHARACTERS = 256
MAX_TRACEPARENT_CHARACTERS = 128
MAX_ROLLOUTS_AHEAD = 1_000_000

_IDS = (
    "trajectory_id",
    "run_id",
    "policy",
    "client_id",
    "spool_id",
    "actor_id",
    "episode_id",
    "environment_instance_id",
    "environment_episode_id",
    "schema_digest",
    "body_digest",
)
_COUNTS = (
    "client_index",
    "actor_index",
    "episode_index",
    "segment_index",
    "first_step_index",
    "rollout_index",
)
_POSITIVE = ("sequence", "steps")
_NUMBERS = ("episode_return", "started_at", "ended_at")


def check_id(name: str, value: str) -> None:
    """Checks that an id can be a key in any store.

    Raises:
        ContractError: it is empty, too long, or holds a NUL.
    """
    if not is_id(value):
        raise ContractError(
            f"{name} {value[:64]!r}: an id has 1 to {MAX_ID_CHARACTERS} characters, none of them NUL"
        )


def is_id(value: str) -> bool:
    """Whether a text can be a key in any store."""
    return 0 < len(value) <= MAX_ID_CHARACTERS and "\0" not in value


def check_metadata(metadata: TrajectoryMetadata) -> None:
    """Checks ids, numbers and flags.

    Raises:
        InvalidTrajectory: (reason `metadata`) names the field.
    """
    for name in _IDS:
        _require(is_id(getattr(metadata, name)), name, "is no id")
    _require(metadata.agent_id is None or is_id(metadata.agent_id), "agent_id", "is no id")
    for name in _COUNTS:
        _require(0 <= getattr(metadata, name) < 2**63, name, "is out of range")
    for name in _POSITIVE:
        _require(0 < getattr(metadata, name) < 2**63, name, "is out of range")
    for name in _NUMBERS:
        _require(math.isfinite(getattr(metadata, name)), name, "is not finite")
    _require(metadata.rollout_segments is None or 0 < metadata.rollout_segments < 2**31, "rollout_segments")
    _require(metadata.seed is None or -(2**63) <= metadata.seed < 2**63, "seed")
    trace = metadata.traceparent
    _require(trace is None or (len(trace) <= MAX_TRACEPARENT_CHARACTERS and "\0" not in trace), "traceparent")


def check_policy(metadata: TrajectoryMetadata, run: Run) -> None:
    """Checks that the policy is one of the run's: `{run}` or `{run}/{agent}` (contracts H7).

    Raises:
        InvalidTrajectory: (reason `metadata`).
    """
    belongs = metadata.policy == run.name or metadata.policy.startswith(f"{run.name}/")
    _require(belongs, "policy", f"{metadata.policy!r} is none of run {run.name!r}")


def check_rollout(metadata: TrajectoryMetadata, run: Run, learner_update: Callable[[str], int]) -> None:
    """Checks that a rollout is one that a paced client may have reached: a pool waits for its turn.

    Under free pacing the number is bookkeeping, and clients may be ahead of a learner that is away.

    Args:
        metadata: of the trajectory.
        run: its run.
        learner_update: finished updates of a run; asked only above `MAX_ROLLOUTS_AHEAD`.

    Raises:
        InvalidTrajectory: (reason `metadata`).
    """
    ahead = metadata.rollout_index - MAX_ROLLOUTS_AHEAD
    if ahead <= 0 or run.pacing == "free":
        return
    update = learner_update(run.run_id)
    _require(ahead <= update, "rollout_index", f"{metadata.rollout_index} is far beyond update {update}")


def can_be_named(metadata: TrajectoryMetadata) -> bool:
    """Whether the ids and the sequence can be columns of a quarantine row."""
    ids = (metadata.run_id, metadata.spool_id, metadata.trajectory_id)
    return all(map(is_id, ids)) and 0 < metadata.sequence < 2**63


def _require(condition: bool, name: str, what: str = "is out of range") -> None:
    if not condition:
        raise InvalidTrajectory(f"{name} {what}", "metadata")
