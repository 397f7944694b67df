"""Random use of an agent against a naive model: a list of steps an actor, closed as the contracts say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from relayrl_client.inference import Decision
from relayrl_client.testing import offline_agent
from relayrl_shared.errors import InferenceError

ENVIRONMENT = gymnasium.make("CartPole-v1")
MAX_SEGMENT_STEPS = 2
ROLLOUT_STEPS = 3


@dataclass
class Step:
    """A step of the model; the reward comes with the next call."""

    seen: float
    action: int
    reward: float | None = None


@dataclass
class Actor:
    """The model: everything that this actor did, and what should have come out."""

    actor_id: str
    ticks: int = 0
    in_episode: bool = False
    pending: bool = False
    rollout: int = 0
    steps: list[Step] = field(default_factory=list)
    closed: list[dict[str, Any]] = field(default_factory=list)
    removed: bool = False

    def close(self, final: float | None, *, terminated: bool = False, truncated: bool = False) -> None:
        """Note the segment that must come out."""
        self.closed.append(
            {
                "seen": [step.seen for step in self.steps],
                "action": [step.action for step in self.steps],
                "reward": [step.reward for step in self.steps],
                "final": final,
                "terminated": terminated,
                "truncated": truncated,
                "rollout": self.rollout,
            }
        )
        self.steps = []

    def give_reward(self, reward: float | None) -> None:
        """Complete the last step."""
        if self.steps and not self.pending:
            self.steps[-1].reward = reward

    def arrive(self, seen: float, reward: float | None) -> None:
        """What the first half of a call does."""
        self.give_reward(reward)
        rollout = self.ticks // ROLLOUT_STEPS
        if self.steps and (len(self.steps) == MAX_SEGMENT_STEPS or rollout != self.rollout):
            self.close(seen)
        if not self.steps:
            self.rollout = rollout
        self.in_episode = True


class Breakable:
    """An inference that fails when it is told to."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def act(self, *args: Any, **kwargs: Any) -> Decision:
        """Fails, or asks the real one."""
        if self.broken:
            raise InferenceError("told to fail")
        decision: Decision = self._real.act(*args, **kwargs)
        return decision


class Recording(RuleBasedStateMachine):
    """Calls in any order, with any actors together, failures in between."""

    actors = Bundle("actors")

    def __init__(self) -> None:
        super().__init__()
        self.agent, self.delivery = offline_agent(
            ENVIRONMENT, rollout_steps=ROLLOUT_STEPS, max_segment_steps=MAX_SEGMENT_STEPS, actor_count=0
        )
        self.agent.start()
        self.inference = Breakable(self.agent.runtime.coordinator.inference)
        self.agent.runtime.coordinator.inference = self.inference
        self.models: list[Actor] = []
        self.seen = 0.0

    def teardown(self) -> None:
        """Shut down, and compare what that closed."""
        self.agent.shutdown()
        for model in self.models:
            self.leave(model)
        self.compare()

    def leave(self, model: Actor) -> None:
        """An end without the last reward drops the last step (contracts A5)."""
        if model.steps:
            final = model.steps.pop().seen
            if model.steps:
                model.close(final)
        model.steps = []
        model.in_episode = model.pending = False

    def show(self, models: list[Actor]) -> np.ndarray[Any, Any]:
        """Observations that were never shown before."""
        numbers = [self.seen + position for position in range(len(models))]
        self.seen += len(models)
        return np.array([[number, 0, 0, 0] for number in numbers], np.float32)

    def rewards(self, models: list[Actor], value: float) -> list[float | None]:
        """A reward where one is due."""
        return [value + n if m.steps and not m.pending else None for n, m in enumerate(models)]

    @rule(target=actors, count=st.integers(1, 3))
    def add(self, count: int) -> Any:
        """New actors."""
        models = [Actor(actor_id) for actor_id in self.agent.new_actors(count)]
        self.models += models
        return multiple(*models)

    @rule(
        chosen=st.lists(actors, min_size=1, max_size=4, unique_by=id),
        value=st.integers(-5, 5),
        fail=st.booleans(),
        times=st.integers(1, 5),
    )
    def act(self, chosen: list[Actor], value: int, fail: bool, times: int) -> None:
        """Calls of some actors, which may fail after their rewards were written."""
        chosen = [model for model in chosen if not model.removed]
        if chosen:
            for _ in range(times):
                self.call(chosen, value, fail)

    def call(self, chosen: list[Actor], value: int, fail: bool) -> None:
        """One call."""
        observation, rewards = self.show(chosen), self.rewards(chosen, float(value))
        self.inference.broken = fail and value > 2
        for model, row, reward in zip(chosen, observation, rewards, strict=True):
            model.arrive(float(row[0]), reward)
        ids = [model.actor_id for model in chosen]
        try:
            result = self.agent.request_action(ids, observation, reward=rewards)
        except InferenceError:
            for model in chosen:
                model.pending = True
            return
        for model, row, action in zip(chosen, observation, result.action, strict=True):
            model.pending = False
            model.ticks += 1
            model.steps.append(Step(float(row[0]), int(action)))

    @rule(
        chosen=st.lists(actors, min_size=1, max_size=3, unique_by=id),
        value=st.integers(-5, 5),
        cut=st.booleans(),
    )
    def end(self, chosen: list[Actor], value: int, cut: bool) -> None:
        """Ends of some episodes, truncated or terminated."""
        chosen = [model for model in chosen if model.in_episode]
        if not chosen:
            return
        final, rewards = self.show(chosen), self.rewards(chosen, float(value))
        self.agent.end_episode(
            [model.actor_id for model in chosen],
            rewards,
            terminated=not cut,
            truncated=cut,
            final_observation=final if cut else None,
        )
        for model, row, reward in zip(chosen, final, rewards, strict=True):
            model.give_reward(reward)
            if model.steps:
                model.close(float(row[0]) if cut else None, terminated=not cut, truncated=cut)
            model.in_episode = model.pending = False

    @rule(model=consumes(actors))
    def remove(self, model: Actor) -> None:
        """A removal, in an episode or between two."""
        self.agent.remove_actor(model.actor_id)
        self.leave(model)
        model.removed = True

    @invariant()
    def compare(self) -> None:
        """What was submitted is what the model closed, actor by actor, in order."""
        for model in self.models:
            recorded = [
                {
                    "seen": segment.columns.observation["observation"][:, 0].tolist(),
                    "action": segment.columns.action["action"].tolist(),
                    "reward": segment.columns.reward.tolist(),
                    "final": None
                    if segment.final_observation is None
                    else float(segment.final_observation.observation["observation"][0]),
                    "terminated": segment.metadata.terminated,
                    "truncated": segment.metadata.truncated,
                    "rollout": segment.metadata.rollout_index,
                }
                for segment in self.delivery.of(model.actor_id)
            ]
            assert recorded == model.closed

    @invariant()
    def memory_is_what_is_open(self) -> None:
        """A page is held exactly by the actors with an open segment."""
        if self.agent.is_running:
            used = self.agent.runtime.recorder.storage.statistics().pages_used
            table = self.agent.runtime.table
            assert used == sum(len(detail.pages) for _, detail in table.live())
            assert all(
                bool(detail.pages) >= bool(model.steps)
                for model in self.models
                if not model.removed
                for detail in [table.detail(table.row(model.actor_id))]
            )


TestRecording = pytest.mark.slow(Recording.TestCase)
TestRecording.settings = settings(
    max_examples=8, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
