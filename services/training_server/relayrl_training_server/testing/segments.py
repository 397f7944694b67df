"""Hand-made columns, metadata and segments for tests of batches, samplers and algorithms."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.messages import ActorInfo
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.store.interface import StoredActor
from relayrl_shared.trajectory import Columns, FinalObservation, TrajectoryMetadata
from relayrl_training_server.batches import Segment

OBSERVATION_SIZE = 3
ACTIONS = 2

OBSERVATION = ObservationSpec(
    leaves=(LeafSpec(name="observation", kind="box", shape=(OBSERVATION_SIZE,), dtype="float32"),)
)
ACTION = ActionSpec(
    leaves=(LeafSpec(name="action", kind="discrete", shape=(), dtype="int64", nvec=(ACTIONS,), start=(0,)),)
)
BOX_ACTION = ActionSpec(
    leaves=(LeafSpec(name="action", kind="box", shape=(2,), dtype="float32", low=(-1.0,), high=(1.0,)),)
)


def make_columns(steps: int, seed: int = 0, **changes: Any) -> Columns:
    """Random steps of `OBSERVATION` and `ACTION`; `changes` replace whole columns."""
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {
        "observation": {"observation": _floats(rng, steps, OBSERVATION_SIZE)},
        "action": {"action": rng.integers(0, ACTIONS, steps)},
        "policy_action": {},
        "action_mask": {},
        "reward": _floats(rng, steps),
        "behaviour_log_prob": np.full(steps, -np.log(ACTIONS), dtype=np.float32),
        "behaviour_log_prob_valid": np.ones(steps, dtype=np.bool_),
        "leaf_log_prob": {},
        "value": np.zeros(steps, dtype=np.float32),
        "value_valid": np.ones(steps, dtype=np.bool_),
        "policy_version": np.ones(steps, dtype=np.int64),
        "policy_version_valid": np.ones(steps, dtype=np.bool_),
        "learner_update": np.zeros(steps, dtype=np.int64),
        "greedy": np.zeros(steps, dtype=np.bool_),
        "fallback": np.zeros(steps, dtype=np.bool_),
        "environment_step": np.arange(steps, dtype=np.int64),
    }
    return Columns(**{**columns, **changes})


def make_metadata(steps: int, **changes: Any) -> TrajectoryMetadata:
    """Metadata of one segment of actor 0; `changes` replace fields."""
    actor = changes.get("actor_index", 0)
    episode = changes.get("episode_index", 0)
    fields: dict[str, Any] = {
        "run_id": "run",
        "policy": "run",
        "client_id": "client",
        "client_index": 0,
        "spool_id": "spool",
        "sequence": 1,
        "actor_id": f"actor-{actor}",
        "actor_index": actor,
        "episode_id": f"episode-{actor}-{episode}",
        "episode_index": episode,
        "segment_index": 0,
        "first_step_index": 0,
        "steps": steps,
        "rollout_index": 0,
        "environment_instance_id": "environment",
        "environment_episode_id": f"environment-{episode}",
        "terminated": False,
        "truncated": False,
        "started_at": 0.0,
        "ended_at": 0.0,
        "schema_digest": "schema",
        "body_digest": "body",
        **changes,
    }
    fields.setdefault("trajectory_id", f"{fields['episode_id']}/{fields['segment_index']}")
    return TrajectoryMetadata(**fields)


def make_segment(
    steps: int = 4,
    *,
    position: int = 1,
    seed: int | None = None,
    columns: dict[str, Any] | None = None,
    oldest_update: int = 0,
    **metadata: Any,
) -> Segment:
    """A segment of random steps; keyword arguments go to the metadata."""
    final = np.full(OBSERVATION_SIZE, 0.5, dtype=np.float32)
    return Segment(
        position=position,
        metadata=make_metadata(steps, **metadata),
        columns=make_columns(steps, position if seed is None else seed, **(columns or {})),
        final_observation=FinalObservation({"observation": final}, {}),
        oldest_update=oldest_update,
    )


def make_actor(index: int, *, first_rollout_index: int = 0, client_index: int = 0) -> StoredActor:
    """A live actor, named as `make_metadata` names it."""
    return StoredActor(
        info=ActorInfo(actor_id=f"actor-{index}", actor_index=index, environment_instance_id="environment"),
        client_id="client",
        client_index=client_index,
        first_rollout_index=first_rollout_index,
        last_seen_at=0.0,
    )


def _floats(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)
