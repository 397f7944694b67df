"""Actors that play whole rollouts with a published policy and commit them to a store, without client or wire.

Tests and benchmarks of the learner drive them: one `play` is one rollout of a vector environment, by the
rules of contracts A7 and F1, with real ONNX inference and counter-based noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from relayrl_shared import arrow_codec
from relayrl_shared.identifiers import uuid7
from relayrl_shared.messages import ActorInfo, Pacing
from relayrl_shared.noise import NoiseSource
from relayrl_shared.policy.engine import LoadedPolicy, load_policy
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.store.interface import IncomingTrajectory, Run, TrajectoryStore
from relayrl_shared.trajectory import Columns, FinalObservation, RecordSchema, TrajectoryMetadata
from relayrl_training_server.algorithms.configs import complete_hyperparameters

Array = NDArray[Any]
VectorEnvironment = gymnasium.vector.VectorEnv[Any, Any, Any]


def make_run(
    environment: VectorEnvironment,
    algorithm: str,
    hyperparameters: dict[str, Any],
    *,
    name: str = "run",
    pacing: Pacing = "block",
    max_policy_lag: int = 0,
    seed: int = 1,
) -> Run:
    """A run for an environment, not yet in a store."""
    return Run(
        run_id=f"run-{name}",
        name=name,
        algorithm=algorithm,
        hyperparameters=complete_hyperparameters(algorithm, hyperparameters),
        observation_spec=ObservationSpec.from_gymnasium(environment.single_observation_space),
        action_spec=ActionSpec.from_gymnasium(environment.single_action_space),
        masked_leaves=(),
        pacing=pacing,
        max_policy_lag=max_policy_lag,
        seed=seed,
        allow_nan=False,
    )


@dataclass
class _OpenSegment:
    """The steps of one actor since its last cut."""

    episode_id: str
    episode_index: int = 0
    segment_index: int = 0
    first_step_index: int = 0
    in_rollout: int = 0
    rows: list[tuple[Array, Array, Array, float, float]] = field(default_factory=list)


class RolloutActors:
    """One client with one vector environment (NEXT_STEP autoreset, single-leaf spaces, no masks).

    Args:
        store: where rollouts go; the run is created in it.
        run: as `make_run` gives it.
        environment: with as many actors as it has environments.
        rollout_steps: T of F1.
        prefix: of the ids; equal prefixes give equal ids.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        run: Run,
        environment: VectorEnvironment,
        rollout_steps: int,
        prefix: str = "",
    ) -> None:
        self.run = store.create_run(run)
        self.actors = environment.num_envs
        self.returns: list[float] = []
        self.steps = 0
        self._store, self._environment, self._rollout_steps = store, environment, rollout_steps
        self._id: Callable[[], str] = uuid7 if not prefix else _counting(prefix)
        self._spool_id = self._id()
        self._infos = [
            ActorInfo(actor_id=f"{prefix}actor-{i}", actor_index=i, environment_instance_id="environment")
            for i in range(self.actors)
        ]
        first = store.learner_update(run.run_id)
        self.client_id = f"{prefix}client"
        self.client_index = store.join_client(run.run_id, self.client_id, self._infos, first)
        self._noise = NoiseSource(run.seed, self.client_index)
        self.rollout_index = first
        self._schema = RecordSchema(observation=run.observation_spec, action=run.action_spec)
        self._digest = arrow_codec.schema_digest(self._schema)
        store.put_schema(self._digest, arrow_codec.encode_schema(self._schema))
        seeds: Any = [run.seed * 10_000 + i for i in range(self.actors)]
        self._observation, _ = environment.reset(seed=seeds)
        self._resetting = np.zeros(self.actors, dtype=np.bool_)
        self._open = [_OpenSegment(self._id()) for _ in range(self.actors)]
        self._return = np.zeros(self.actors)
        self._sequence = 0
        self._reward_factor = 1.0
        self._policy: LoadedPolicy | None = None
        self._batch: list[IncomingTrajectory] = []

    def load(self, artefact: PolicyArtefact) -> None:
        """Acts with this policy from now on."""
        self._policy = load_policy(artefact, previous=self._policy)

    def scale_rewards(self, factor: float) -> None:
        """Multiplies the rewards that are recorded from now on."""
        self._reward_factor = factor

    def play(self) -> int:
        """Plays the next rollout and commits it; returns its index."""
        for tick in range(self._rollout_steps):
            # An end on the last tick but one leaves a reset tick, and nothing to wait for.
            self._step(ends_rollout=tick >= self._rollout_steps - 2)
        for actor in np.flatnonzero(~self._resetting):
            self._close(int(actor), self._observation[actor], False, False, last=True)
        self._store.commit(self._batch)
        self._batch = []
        self.rollout_index += 1
        for segment in self._open:
            segment.in_rollout = 0
        return self.rollout_index - 1

    def _step(self, *, ends_rollout: bool) -> None:
        actions, log_probs, policy_actions = self._act()
        observation, rewards, terminated, truncated, _ = self._environment.step(actions)
        for actor in np.flatnonzero(~self._resetting):
            self._open[actor].rows.append(
                (
                    self._observation[actor].copy(),
                    actions[actor],
                    policy_actions[actor],
                    float(log_probs[actor]),
                    float(rewards[actor]),
                )
            )
            self._return[actor] += rewards[actor]
            self.steps += 1
        for actor in np.flatnonzero((terminated | truncated) & ~self._resetting):
            self._close(
                int(actor),
                observation[actor],
                bool(terminated[actor]),
                bool(truncated[actor]),
                last=ends_rollout,
            )
            self.returns.append(float(self._return[actor]))
            self._return[actor] = 0.0
        self._resetting = terminated | truncated
        self._observation = observation

    def _act(self) -> tuple[Array, Array, Array]:
        """Actions, their log-probabilities and the policy actions of all actors."""
        assert self._policy is not None
        manifest = self._policy.manifest
        episodes = np.array([segment.episode_index for segment in self._open], dtype=np.int64)
        steps = np.array([s.first_step_index + len(s.rows) for s in self._open], dtype=np.int64)
        noise = self._noise.draw(manifest.noise, np.arange(self.actors, dtype=np.int64), episodes, steps)
        outputs = self._policy.run({"observation": self._observation, **noise})
        policy_action = outputs.get("policy_action", outputs["action"])
        return outputs["action"], outputs["behaviour_log_prob"], policy_action

    def _close(self, actor: int, final: Array, terminated: bool, truncated: bool, *, last: bool) -> None:
        """Ends the actor's segment. `last`: it is its last one in this rollout."""
        segment = self._open[actor]
        if not segment.rows:
            return
        segment.in_rollout += 1
        self._batch.append(self._incoming(actor, segment, final, terminated, truncated, last))
        if terminated or truncated:
            self._open[actor] = _OpenSegment(
                self._id(), segment.episode_index + 1, in_rollout=segment.in_rollout
            )
        else:
            segment.first_step_index += len(segment.rows)
            segment.segment_index += 1
            segment.rows = []

    def _incoming(
        self, actor: int, segment: _OpenSegment, final: Array, terminated: bool, truncated: bool, last: bool
    ) -> IncomingTrajectory:
        columns = self._columns(segment)
        body = arrow_codec.encode_columns(self._schema, columns)
        ending = arrow_codec.encode_final_observation(
            self._schema, FinalObservation({"observation": final.copy()}, {})
        )
        self._sequence += 1
        metadata = TrajectoryMetadata(
            trajectory_id=self._id(),
            run_id=self.run.run_id,
            policy=self.run.name,
            client_id=self.client_id,
            client_index=self.client_index,
            spool_id=self._spool_id,
            sequence=self._sequence,
            actor_id=self._infos[actor].actor_id,
            actor_index=actor,
            episode_id=segment.episode_id,
            episode_index=segment.episode_index,
            segment_index=segment.segment_index,
            first_step_index=segment.first_step_index,
            steps=len(segment.rows),
            rollout_index=self.rollout_index,
            rollout_segments=segment.in_rollout if last else None,
            environment_instance_id="environment",
            environment_episode_id=segment.episode_id,
            terminated=terminated,
            truncated=truncated,
            episode_return=float(columns.reward.sum()),
            started_at=0.0,
            ended_at=0.0,
            schema_digest=self._digest,
            body_digest=arrow_codec.body_digest(body, ending),
        )
        update = int(columns.learner_update[0])
        return IncomingTrajectory(
            metadata=metadata,
            body=body,
            final_observation=ending,
            policy_version_range=None,
            learner_update_range=(update, update),
        )

    def _columns(self, segment: _OpenSegment) -> Columns:
        assert self._policy is not None
        steps = len(segment.rows)
        observation, action, policy_action, log_prob, reward = zip(*segment.rows, strict=True)
        continuous = self.run.action_spec.leaves[0].kind == "box"
        return Columns(
            observation={"observation": np.stack(observation)},
            action={"action": np.stack(action)},
            policy_action={"action": np.stack(policy_action).astype(np.float32)} if continuous else {},
            action_mask={},
            reward=np.array(reward, dtype=np.float32) * np.float32(self._reward_factor),
            behaviour_log_prob=np.array(log_prob, dtype=np.float32),
            behaviour_log_prob_valid=np.ones(steps, dtype=np.bool_),
            leaf_log_prob={},
            value=np.zeros(steps, dtype=np.float32),
            value_valid=np.zeros(steps, dtype=np.bool_),
            policy_version=np.zeros(steps, dtype=np.int64),
            policy_version_valid=np.zeros(steps, dtype=np.bool_),
            learner_update=np.full(steps, self._policy.learner_update, dtype=np.int64),
            greedy=np.zeros(steps, dtype=np.bool_),
            fallback=np.zeros(steps, dtype=np.bool_),
            environment_step=np.arange(steps, dtype=np.int64),
        )


def _counting(prefix: str) -> Callable[[], str]:
    """Ids that are the same in every process."""
    count = iter(range(1 << 62))
    return lambda: f"{prefix}{next(count):032d}"
