"""Tests a policy greedily through the inference server; driven by `commands.demo`."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from relayrl_cli.environments import make_environment
from relayrl_client.environment_runner import evaluate

if TYPE_CHECKING:
    from relayrl_client.agent import Agent

MAX_ENVIRONMENTS = 10
EVALUATION_SEED = 1_000_003
"""Far from the seeds of training, so that the episodes are fresh."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Returns of greedy episodes and the version that acted."""

    returns: tuple[float, ...]
    policy_version: int

    @property
    def mean(self) -> float:
        """Mean return of an episode."""
        return fmean(self.returns)


def evaluate_policy(agent: Agent, environment: str, episodes: int) -> Evaluation:
    """Runs greedy episodes with an agent that has not been started and whose steps are not recorded.

    Raises:
        RelayRLError: the inference server or the registry does not answer.
    """
    vector = make_environment(environment, min(episodes, MAX_ENVIRONMENTS))
    try:
        with agent.start():
            returns = evaluate(agent, vector, episodes, seed=EVALUATION_SEED)
            return Evaluation(tuple(returns), agent.runtime.inference.policy_version)
    finally:
        vector.close()
