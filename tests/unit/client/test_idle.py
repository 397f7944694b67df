"""The idle limit: actors that nobody drives leave their episodes."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from relayrl_client.idle import IdleWatch
from relayrl_client.testing import offline_agent
from relayrl_shared.errors import InvalidReward

ENVIRONMENT = gymnasium.make("CartPole-v1")
SEEN = np.zeros(4, np.float32)


def test_an_idle_actor_leaves_its_episode_and_an_active_one_does_not() -> None:
    """Without a call for the limit, the open segment closes; a call in between begins the time anew."""
    agent, delivery = offline_agent(ENVIRONMENT, actor_count=2)
    with agent:
        idle, active = agent.get_actor_ids()
        watch = IdleWatch(agent.runtime.coordinator, 1000.0)
        for actor in (idle, active):
            agent.request_action(actor, SEEN)
            agent.request_action(actor, SEEN, reward=1.0)
        watch.look(0.0)
        watch.look(999.0)
        assert delivery.segments == []
        agent.request_action(active, SEEN, reward=1.0)
        watch.look(1000.0)
        assert [segment.metadata.actor_id for segment in delivery.segments] == [idle]
        assert delivery.segments[0].steps == 1
        assert watch.closed_total == 1
        with pytest.raises(InvalidReward, match="first call"):
            agent.request_action(idle, SEEN, reward=1.0)
        agent.request_action(idle, SEEN)
        watch.close()


def test_an_actor_between_two_episodes_is_never_idle() -> None:
    """Only open episodes have a limit."""
    agent, delivery = offline_agent(ENVIRONMENT, actor_count=1)
    with agent:
        watch = IdleWatch(agent.runtime.coordinator, 10.0)
        watch.look(0.0)
        watch.look(1e6)
        watch.close()
    assert watch.closed_total == 0
    assert delivery.segments == []
