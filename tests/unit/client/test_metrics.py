"""Metrics: plain counters become Prometheus families with names that follow the rules."""

from __future__ import annotations

import gymnasium
import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from relayrl_client.builder import AgentBuilder
from relayrl_client.metrics import ClientMetrics
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.testing.policies import make_artefact

ENVIRONMENT = gymnasium.make("CartPole-v1")
MODEL = make_artefact(
    ObservationSpec.from_gymnasium(ENVIRONMENT.observation_space),
    ActionSpec.from_gymnasium(ENVIRONMENT.action_space),
)


def test_what_happened_is_counted() -> None:
    """Requests, steps, episodes and segments show up under the service's prefix."""
    agent = AgentBuilder(
        environment=ENVIRONMENT,
        actor_count=2,
        actor_training_data_mode="offline_with_memory",
        default_model=MODEL,
    ).build()
    registry = CollectorRegistry()
    registry.register(ClientMetrics(agent))
    assert generate_latest(registry) == b""
    with agent:
        ids = agent.get_actor_ids()
        for step in range(3):
            agent.request_action(ids, np.zeros((2, 4), np.float32), reward=1.0 if step else None)
        agent.end_episode(ids, 1.0, terminated=True)
        agent.flush(10.0)
        value = registry.get_sample_value
        assert value("relayrl_client_requests_total") == 3
        assert value("relayrl_client_steps_total") == 6
        assert value("relayrl_client_segments_total") == 2
        assert value("relayrl_client_episodes_total") == 2
        assert value("relayrl_client_actors") == 2
        assert value("relayrl_client_policy_version") == 1
        assert value("relayrl_client_router_segments_total") == 2
        names = [family.name for family in registry.collect()]
    assert all(name.startswith("relayrl_client_") for name in names)
    assert len(set(names)) == len(names)
