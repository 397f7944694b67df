"""Agents as the command line needs them: one that trains with a stack, one that acts through its server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relayrl_cli.addresses import Addresses
from relayrl_cli.environments import make_environment
from relayrl_cli.plan import TrainingPlan
from relayrl_client.agent import Agent
from relayrl_client.builder import AgentBuilder

START_SECONDS = 180.0  # a learner's first start exports its graph, which a loaded machine makes long


def build_training_agent(plan: TrainingPlan, addresses: Addresses, directory: Path, **options: Any) -> Agent:
    """An agent that joins the plan's run, not started; its spool lies below `directory`/client.

    `options` are further ones of `AgentBuilder`.

    Raises:
        ConfigError: the environment does not exist, or its spaces cannot be recorded.
    """
    environment = make_environment(plan.environment, 1)
    try:
        builder = AgentBuilder(
            actor_count=plan.actors,
            environment=environment,
            actor_inference_mode=plan.inference,
            actor_training_data_mode="online",
            run_name=plan.run,
            algorithm=plan.algorithm,
            hyperparameters=plan.hyperparameters,
            pacing=plan.pacing,
            max_policy_lag=plan.max_policy_lag,
            seed=plan.seed,
            allow_nan=plan.allow_nan,
            spool_directory=directory / "client" / "spool",
            start_seconds=START_SECONDS,
        )
        return builder.set(**_addresses(addresses), **options).build()
    finally:
        environment.close()


def build_evaluation_agent(plan: TrainingPlan, addresses: Addresses) -> Agent:
    """An agent that acts with the newest policy of the run through the inference server; records nothing.

    Raises:
        ConfigError: as `build_training_agent`.
    """
    environment = make_environment(plan.environment, 1)
    try:
        builder = AgentBuilder(
            actor_count=0,
            environment=environment,
            actor_inference_mode="server",
            actor_training_data_mode="disabled",
            policy=plan.run,
            seed=plan.seed,
        )
        return builder.set(**_addresses(addresses)).build()
    finally:
        environment.close()


def _addresses(addresses: Addresses) -> dict[str, str]:
    return {
        "agent_listener_address": addresses.agent_listener,
        "trajectory_server_address": addresses.trajectory_server,
        "model_server_address": addresses.model_server,
        "model_announcer_address": addresses.model_announcer,
        "inference_server_address": addresses.inference_server,
    }
