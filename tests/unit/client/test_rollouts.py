"""Rollouts of environments out of step: who waits for whom, and where segments are cut (contracts F1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pytest

from relayrl_client.agent import Agent
from relayrl_client.pacing import RolloutPacing
from relayrl_client.segments import ClosedSegment
from relayrl_client.testing import CheckingDelivery, offline_agent
from relayrl_shared.errors import EpisodeError, PacingTimeout

CARTPOLE = gymnasium.make("CartPole-v1")
T = 3


@dataclass
class Learner:
    """A policy that knows how many updates it comes from, and does not wait."""

    learner_update: int = 0

    def admit(self, learner_update: int, deadline: float, give_up: Callable[[], bool]) -> bool:
        """Whether it is new enough, at once."""
        return self.learner_update >= learner_update


def paced_agent(actors: int, lag: int) -> tuple[Agent, CheckingDelivery, Learner]:
    """A started agent under block, with rollouts of three ticks."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=actors, rollout_steps=T)
    agent.start()
    runtime, learner = agent.runtime, Learner()
    runtime.coordinator.admission = RolloutPacing(learner, runtime.recorder, lag, lambda: False)  # type: ignore[arg-type]
    return agent, delivery, learner


def act(agent: Agent, ids: list[str], calls: int = 1) -> None:
    """Calls of these actors with the rewards that are due."""
    for _ in range(calls):
        table = agent.runtime.table
        phases = [table.columns.phase[table.row(actor)] for actor in ids]
        rewards = [1.0 if phase & 2 else None for phase in phases]
        agent.request_action(ids, np.zeros((len(ids), 4), np.float32), reward=rewards, timeout_seconds=0.05)


def rollouts(segments: list[ClosedSegment]) -> list[tuple[int, int, int | None]]:
    """rollout_index, steps and rollout_segments of segments."""
    return [(s.metadata.rollout_index, s.steps, s.metadata.rollout_segments) for s in segments]


def ticks(segment: ClosedSegment) -> list[int]:
    """The environment steps of a segment."""
    steps: list[int] = segment.columns.environment_step.tolist()
    return steps


# -- who waits for whom ------------------------------------------------------------------------------------


def test_in_lockstep_environments_out_of_step_in_one_call_are_refused_with_the_remedy() -> None:
    """The call would wait for itself until its time is over; called apart the late one catches up."""
    agent, delivery, learner = paced_agent(2, 0)
    with agent:
        early, late = agent.get_actor_ids()
        act(agent, [early])
        act(agent, [early, late], 2)
        with pytest.raises(EpisodeError, match=rf"actor {late} of this very call.*call these apart"):
            act(agent, [early, late])
        act(agent, [late])
        learner.learner_update = 1
        act(agent, [early, late], 3)
        learner.learner_update = 2
        act(agent, [early, late])
    assert rollouts(delivery.of(early)) == rollouts(delivery.of(late)) == [(0, T, 1), (1, T, 1)]


def test_in_lockstep_a_rollout_ahead_of_another_that_begins_with_it_is_refused() -> None:
    """Both environments turn, one of them to an earlier rollout, which the learner needs first."""
    agent, _, learner = paced_agent(2, 0)
    with agent:
        early, late = agent.get_actor_ids()
        act(agent, [early], T)
        learner.learner_update = 1
        act(agent, [early], T)
        act(agent, [late], T)
        with pytest.raises(EpisodeError, match=f"actor {late} of this very call"):
            act(agent, [early, late])


@pytest.mark.parametrize("lag", [1, 2])
def test_above_lag_zero_environments_out_of_step_go_on_and_are_counted(lag: int) -> None:
    """However far they drift apart the call never waits for itself."""
    agent, delivery, _ = paced_agent(2, lag)
    with agent:
        early, late = agent.get_actor_ids()
        act(agent, [early], T * lag)
        act(agent, [early, late], T + 1)
        assert agent.runtime.coordinator.admission.counters.unpaced_rollouts_total == 1
        assert agent.runtime.coordinator.admission.counters.waits_total == 0
    assert rollouts(delivery.of(early))[:lag] == [(rollout, T, 1) for rollout in range(lag)]


def test_environments_in_step_wait_for_the_learner() -> None:
    """Nobody in the call is behind: the wait is for the learner, and its text says how to go on."""
    agent, _, _ = paced_agent(2, 0)
    with agent:
        ids = agent.get_actor_ids()
        act(agent, ids, T)
        with pytest.raises(PacingTimeout, match=r"is the learner running\?; call again with reward=None"):
            act(agent, ids)


# -- where segments are cut --------------------------------------------------------------------------------


def shared(agent: Agent) -> list[str]:
    """The actors, moved into one environment."""
    ids = agent.get_actor_ids()
    agent.new_environment(ids)
    return ids


def test_an_actor_left_out_where_a_rollout_begins_is_cut_at_its_next_call() -> None:
    """Its segment never spans two rollouts, and carries the rollout that its steps belong to."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=2, rollout_steps=T)
    with agent:
        both = shared(agent)
        always, sometimes = both
        for rollout in range(4):
            act(agent, both if rollout == 0 else [always])  # left out at each first tick
            act(agent, both, T - 1)
        act(agent, both)
    assert rollouts(delivery.of(always)) == [(rollout, T, 1) for rollout in range(4)]
    assert rollouts(delivery.of(sometimes)) == [(0, 3, 1), (1, 2, 1), (2, 2, 1), (3, 2, 1)]
    assert [ticks(s) for s in delivery.of(sometimes)] == [[0, 1, 2], [4, 5], [7, 8], [10, 11]]


def test_an_actor_left_out_for_a_whole_rollout_is_cut_where_it_left_off() -> None:
    """What it records afterwards belongs to the rollout that its environment is in by then."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=2, rollout_steps=T)
    with agent:
        always, sometimes = both = shared(agent)
        act(agent, both, 2)
        act(agent, [always], 2 * T)
        act(agent, [sometimes], 1)
        act(agent, both, 1)
    assert rollouts(delivery.of(sometimes)) == [(0, 2, 1), (2, 1, 1)]


def test_an_actor_left_out_at_the_turn_may_end_its_episode() -> None:
    """The end closes the segment of the rollout before, and says that it was the last one."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=2, rollout_steps=T)
    with agent:
        always, sometimes = both = shared(agent)
        act(agent, both, T)
        act(agent, [always])
        agent.end_episode(sometimes, 1.0, terminated=True)
        act(agent, both)
        agent.end_episode(both, 1.0, terminated=True)
    assert rollouts(delivery.of(sometimes)) == [(0, T, 1), (1, 1, None)]


def test_a_turn_during_a_call_of_another_actor_is_not_lost() -> None:
    """A call at work when the rollout turns leaves its actor marked, and the next call cuts it."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=2, rollout_steps=T)
    with agent:
        one, other = both = shared(agent)
        act(agent, both, T - 1)
        inference = agent.runtime.coordinator.inference

        class Between:
            """Lets the other actor take two calls inside of this one."""

            def __getattr__(self, name: str) -> Any:
                return getattr(inference, name)

            def act(self, *args: Any, **kwargs: Any) -> Any:
                agent.runtime.coordinator.inference = inference
                act(agent, [other], 2)
                return inference.act(*args, **kwargs)

        agent.runtime.coordinator.inference = Between()
        act(agent, [one])
        act(agent, [one])
    assert rollouts(delivery.of(one))[0] == (0, T, 1)


# -- moving ------------------------------------------------------------------------------------------------


def end(agent: Agent, ids: list[str]) -> None:
    """End the episodes of these actors."""
    agent.end_episode(ids, 1.0, terminated=True)


def test_actors_moved_in_the_middle_of_a_rollout_go_on_with_it() -> None:
    """The rollout still ends after its ticks, and its last segment says how many there were."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=2, rollout_steps=T)
    with agent:
        ids = agent.get_actor_ids()
        act(agent, ids, T + 2)
        end(agent, ids)
        agent.new_environment(ids)
        act(agent, ids, 1 + T)
        end(agent, ids)
    assert rollouts(delivery.of(ids[0])) == [(0, T, 1), (1, 2, None), (1, 1, 2), (2, T, 1)]


def test_actors_moved_between_two_rollouts_begin_the_next() -> None:
    """No rollout is repeated, and none left out."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=2, rollout_steps=T)
    with agent:
        ids = agent.get_actor_ids()
        act(agent, ids, T)
        end(agent, ids)
        agent.new_environment(ids)
        act(agent, ids, T)
        end(agent, ids)
    assert rollouts(delivery.of(ids[1])) == [(0, T, 1), (1, T, 1)]


def test_actors_in_different_places_of_a_rollout_cannot_share_an_environment() -> None:
    """One of them could not finish its rollout there: it is named, with the remedy."""
    agent, _ = offline_agent(CARTPOLE, actor_count=2, rollout_steps=T)
    with agent:
        one, other = ids = agent.get_actor_ids()
        act(agent, [one])
        end(agent, [one])
        with pytest.raises(EpisodeError, match=f"actor {one} is 1 ticks into rollout 0.*new_actors"):
            agent.new_environment(ids)
        act(agent, [other])
        end(agent, [other])
        agent.new_environment(ids)
