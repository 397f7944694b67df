"""Made-up trajectories for tests: of any schema, with random bits in every column. Driven by tests only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.identifiers import new_id
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.trajectory import (
    Columns,
    FinalObservation,
    RecordSchema,
    Trajectory,
    TrajectoryMetadata,
)


def small_schema(observation_size: int = 4, actions: int = 2, masked: bool = False) -> RecordSchema:
    """A float32 vector observed, one of `actions` taken."""
    observation = LeafSpec(name="observation", kind="box", shape=(observation_size,), dtype="float32")
    action = LeafSpec(name="action", kind="discrete", shape=(), dtype="int64", nvec=(actions,), start=(0,))
    return RecordSchema(
        observation=ObservationSpec(leaves=(observation,)),
        action=ActionSpec(leaves=(action,)),
        masked_leaves=("action",) if masked else (),
    )


def random_bits(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of random bytes: every NaN payload, infinity and subnormal occurs."""
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).reshape(shape).copy()


def random_columns(schema: RecordSchema, steps: int, rng: np.random.Generator) -> Columns:
    """Columns of random bits that fit the schema's dtypes and shapes; their values need not make sense."""
    single, integer, flag = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.bool_)
    action = schema.action.leaves
    hybrid = action if schema.leaf_log_probs else ()
    return Columns(
        observation={
            leaf.name: random_bits(rng, leaf.numpy_dtype, (steps, *leaf.shape))
            for leaf in schema.observation.leaves
        },
        action={leaf.name: random_bits(rng, leaf.numpy_dtype, (steps, *leaf.shape)) for leaf in action},
        policy_action={
            leaf.name: random_bits(rng, single, (steps, *leaf.shape))
            for leaf in action
            if leaf.kind == "box" and rng.integers(0, 2)
        },
        action_mask={
            name: random_bits(rng, flag, (steps, *(schema.action.leaf(name).mask_shape or ())))
            for name in schema.masked_leaves
            if rng.integers(0, 2)
        },
        reward=random_bits(rng, single, (steps,)),
        behaviour_log_prob=random_bits(rng, single, (steps,)),
        behaviour_log_prob_valid=random_bits(rng, flag, (steps,)),
        leaf_log_prob={leaf.name: random_bits(rng, single, (steps,)) for leaf in hybrid},
        value=random_bits(rng, single, (steps,)),
        value_valid=random_bits(rng, flag, (steps,)),
        policy_version=random_bits(rng, integer, (steps,)),
        policy_version_valid=random_bits(rng, flag, (steps,)),
        learner_update=random_bits(rng, integer, (steps,)),
        greedy=random_bits(rng, flag, (steps,)),
        fallback=random_bits(rng, flag, (steps,)),
        environment_step=random_bits(rng, integer, (steps,)),
        aux={name: random_bits(rng, np.dtype(dtype), (steps,)) for name, dtype in schema.aux.items()},
    )


def random_final_observation(schema: RecordSchema, rng: np.random.Generator) -> FinalObservation:
    """A final observation of random bits; its masks are all False (nothing is allowed after an end)."""
    return FinalObservation(
        observation={
            leaf.name: random_bits(rng, leaf.numpy_dtype, leaf.shape) for leaf in schema.observation.leaves
        },
        action_mask={
            name: np.zeros(schema.action.leaf(name).mask_shape or (), np.bool_)
            for name in schema.masked_leaves
        },
    )


def plausible_columns(schema: RecordSchema, steps: int, rng: np.random.Generator) -> Columns:
    """Columns that `validation.validate_trajectory` accepts: all inside the spaces, every action allowed."""
    columns = random_columns(schema, steps, rng)
    for leaf in schema.observation.leaves:
        columns.observation[leaf.name] = _inside(leaf, steps, rng)
    for leaf in schema.action.leaves:
        columns.action[leaf.name] = _inside(leaf, steps, rng)
    columns.policy_action = {
        name: np.ones(values.shape, np.float32) for name, values in columns.policy_action.items()
    }
    columns.action_mask = {name: np.ones_like(mask) for name, mask in columns.action_mask.items()}
    columns.reward = rng.standard_normal(steps).astype(np.float32)
    columns.behaviour_log_prob = -rng.random(steps).astype(np.float32)
    columns.leaf_log_prob = {name: columns.behaviour_log_prob.copy() for name in columns.leaf_log_prob}
    columns.value = rng.standard_normal(steps).astype(np.float32)
    columns.policy_version = np.ones(steps, np.int64)
    columns.learner_update = np.zeros(steps, np.int64)
    columns.environment_step = np.arange(steps, dtype=np.int64)
    return columns


def _inside(leaf: LeafSpec, steps: int, rng: np.random.Generator) -> NDArray[Any]:
    low, high = leaf.bounds()
    if leaf.kind == "box" and leaf.low is None and leaf.numpy_dtype.kind == "f":
        return rng.standard_normal((steps, *leaf.shape)).astype(leaf.numpy_dtype)
    choose_high = rng.integers(0, 2, (steps, *leaf.shape)).astype(np.bool_)
    return np.where(choose_high, high, low).astype(leaf.numpy_dtype)


def make_metadata(steps: int, **changes: Any) -> TrajectoryMetadata:
    """Metadata of a terminated one-segment episode; `changes` replace fields."""
    fields: dict[str, Any] = {
        "trajectory_id": new_id(),
        "run_id": "run",
        "policy": "policy",
        "client_id": "client",
        "client_index": 0,
        "spool_id": "spool",
        "sequence": 1,
        "actor_id": "actor",
        "actor_index": 0,
        "episode_id": new_id(),
        "episode_index": 0,
        "segment_index": 0,
        "first_step_index": 0,
        "steps": steps,
        "rollout_index": 0,
        "environment_instance_id": "instance",
        "environment_episode_id": "instance-episode",
        "terminated": True,
        "truncated": False,
        "started_at": 1.5,
        "ended_at": 2.25,
        "schema_digest": "",
        "body_digest": "",
    }
    return TrajectoryMetadata(**{**fields, **changes})


def make_trajectory(schema: RecordSchema, steps: int, seed: int = 0, **changes: Any) -> Trajectory:
    """A trajectory that passes validation, with a final observation; `changes` replace metadata fields."""
    rng = np.random.default_rng(seed)
    final = FinalObservation(
        observation={leaf.name: _inside(leaf, 1, rng)[0, ...] for leaf in schema.observation.leaves},
        action_mask={},
    )
    return Trajectory(make_metadata(steps, **changes), plausible_columns(schema, steps, rng), final)
