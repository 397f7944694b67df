"""What tests of clients share: a delivery that checks its caller, an agent, an environment that counts.

The delivery refuses whatever a training server would refuse, so that a test that records a wrong step fails
at the segment and not later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from relayrl_client.agent import Agent
from relayrl_client.builder import AgentBuilder
from relayrl_client.runtime import Plan, Standing
from relayrl_client.segments import ClosedSegment
from relayrl_shared.arrow_codec import schema_digest
from relayrl_shared.errors import ContractError
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.testing.policies import make_artefact
from relayrl_shared.trajectory import RecordSchema
from relayrl_shared.validation import validate_trajectory


class CheckingDelivery:
    """Keeps segments in a list, and refuses those that break the record's rules.

    Each must be valid, of its schema, and continue the episode where the one before it left off.

    Attributes:
        segments: in the order of submission.
    """

    def __init__(self, schema: RecordSchema, *, allow_nan: bool = False) -> None:
        self.segments: list[ClosedSegment] = []
        self._schema = schema
        self._digest = schema_digest(schema)
        self._allow_nan = allow_nan
        self._expected: dict[str, tuple[int, int]] = {}  # episode_id → segment_index, first_step_index
        self._ended: set[str] = set()

    def submit(self, segment: ClosedSegment, timeout_seconds: float | None = None) -> None:
        """Check and keep a segment.

        Raises:
            ContractError: it breaks a rule.
        """
        metadata = segment.metadata
        validate_trajectory(self._schema, segment.trajectory(), self._allow_nan)
        if metadata.schema_digest != self._digest:
            raise ContractError("the segment carries another schema's digest")
        found = metadata.segment_index, metadata.first_step_index
        expected = self._expected.get(metadata.episode_id, (0, 0))
        if found != expected or metadata.episode_id in self._ended:
            raise ContractError(
                f"segment and first step are {found}, expected {expected}, in an open episode"
            )
        self._expected[metadata.episode_id] = (found[0] + 1, found[1] + metadata.steps)
        if metadata.terminated or metadata.truncated:
            self._ended.add(metadata.episode_id)
        self.segments.append(segment)

    def flush(self, timeout_seconds: float) -> None:
        """All is kept at once."""

    def drain(self, timeout_seconds: float) -> bool:
        """There is no server."""
        return True

    def close(self, timeout_seconds: float) -> None:
        """Nothing to release."""

    def of(self, actor_id: str) -> list[ClosedSegment]:
        """The segments of an actor, in order."""
        return [segment for segment in self.segments if segment.metadata.actor_id == actor_id]


def offline_agent(
    env: Any,
    *,
    actor_count: int = 1,
    masked: bool = False,
    rollout_steps: int | None = None,
    max_segment_steps: int = 1000,
    allow_nan: bool = False,
    **options: Any,
) -> tuple[Agent, CheckingDelivery]:
    """An agent that acts with a small real policy and records into a checking delivery; not yet started.

    Args:
        env: gives the spaces.
        actor_count: actors at the start.
        masked: record action masks.
        rollout_steps: cut rollouts as a training server would ask for.
        max_segment_steps: likewise.
        allow_nan: let NaN observations pass.
        options: further options of `AgentBuilder`.
    """
    observation = ObservationSpec.from_gymnasium(
        getattr(env, "single_observation_space", env.observation_space)
    )
    action = ActionSpec.from_gymnasium(getattr(env, "single_action_space", env.action_space))
    maskable = tuple(leaf.name for leaf in action.leaves if leaf.mask_shape is not None) if masked else ()
    model = make_artefact(observation, action, masked_leaves=maskable, allow_nan=allow_nan)
    chosen: dict[str, Any] = {"actor_training_data_mode": "offline_with_memory", "default_model": model}
    built = AgentBuilder(actor_count=actor_count, allow_nan=allow_nan, **(chosen | options)).build()
    delivery = CheckingDelivery(built.schema, allow_nan=allow_nan)
    rules: dict[str, Any] = {"rollout_steps": rollout_steps, "max_segment_steps": max_segment_steps}

    def standing(plan: Plan) -> Standing:
        return replace(Standing.offline(plan), **rules)

    return Agent(built.plan, lambda standing: delivery, standing), delivery


class CountingEnvironment(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Shows what it counts, so that a record proves itself. Episodes last 1, 2, … max_length steps.

    Observation float32 [3]: (episode, step in the episode, number of the environment). The reward of
    the action chosen on (episode, step) is 1000 * episode + step + 1. Every other episode is truncated,
    the others terminate. The info holds an action mask that forbids action (episode + step) % 3.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, number: int = 0, max_length: int = 5) -> None:
        self.number = number
        self.max_length = max_length
        self.episode = -1
        self.step_index = 0
        self.seeds: list[int | None] = []

    @property
    def length(self) -> int:
        """Steps of the present episode."""
        return (self.episode + self.number) % self.max_length + 1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin the next episode."""
        self.seeds.append(seed)
        self.episode += 1
        self.step_index = 0
        return self._show()

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Count a step; refuses an action that its mask forbids."""
        if action == (self.episode + self.step_index) % 3:
            raise ContractError(f"action {action} was forbidden")
        reward = 1000.0 * self.episode + self.step_index + 1
        self.step_index += 1
        ended = self.step_index >= self.length
        observation, info = self._show()
        truncates = self.episode % 2 == 1
        return observation, reward, ended and not truncates, ended and truncates, info

    def _show(self) -> tuple[NDArray[np.float32], dict[str, Any]]:
        mask = np.ones(3, np.int8)
        mask[(self.episode + self.step_index) % 3] = 0
        seen = np.array([self.episode, self.step_index, self.number], np.float32)
        return seen, {"action_mask": mask}


def counting_vector(count: int, mode: AutoresetMode, max_length: int = 5) -> SyncVectorEnv:
    """Counting environments, numbered from 0, in one vector."""

    def make(number: int) -> Any:
        return lambda: CountingEnvironment(number, max_length)

    return SyncVectorEnv([make(number) for number in range(count)], autoreset_mode=mode)


def total_steps(segments: Sequence[ClosedSegment]) -> int:
    """Steps in segments."""
    return sum(segment.steps for segment in segments)
