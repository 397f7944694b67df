"""Builds a run's policy module and algorithm from its specs and hyperparameters; the learner drives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils.deterministic

from relayrl_shared.errors import ConfigError
from relayrl_shared.policy.manifest import GraphOutputs
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.store.interface import Run
from relayrl_training_server.algorithms.base import Algorithm
from relayrl_training_server.algorithms.configs import (
    AlgorithmConfig,
    AlgorithmNeeds,
    PPOConfig,
    REINFORCEConfig,
    build_config,
    needs,
)
from relayrl_training_server.algorithms.ppo import PPO
from relayrl_training_server.algorithms.reinforce import REINFORCE
from relayrl_training_server.networks import NetworkSettings
from relayrl_training_server.policy_module import PolicyModule


def build_algorithm(
    algorithm: str,
    hyperparameters: Mapping[str, Any],
    observation_spec: ObservationSpec,
    action_spec: ActionSpec,
    *,
    masked_leaves: tuple[str, ...] = (),
    allow_nan: bool = False,
    seed: int = 1,
    max_policy_lag: int = 0,
) -> Algorithm[Any]:
    """A fresh algorithm with its policy module; equal arguments give equal weights.

    Raises:
        ConfigError: hyperparameters that are unknown, out of range or do not fit the specs.
    """
    config = build_config(algorithm, hyperparameters)
    module = PolicyModule(
        observation_spec,
        action_spec,
        masked_leaves,
        _network(config),
        value_network=_has_values(config),
        allow_nan=allow_nan,
        generator=torch.Generator().manual_seed(seed),
    )
    if isinstance(config, PPOConfig):
        return PPO(config, module, seed, max_policy_lag)
    assert isinstance(config, REINFORCEConfig)
    return REINFORCE(config, module, seed, max_policy_lag)


def build_for_run(run: Run) -> Algorithm[Any]:
    """A run's algorithm, fresh.

    Raises:
        ConfigError: as `build_algorithm`, or the policy's record cannot feed the algorithm (contracts B2).
    """
    built = build_algorithm(
        run.algorithm,
        run.hyperparameters,
        run.observation_spec,
        run.action_spec,
        masked_leaves=run.masked_leaves,
        allow_nan=run.allow_nan,
        seed=run.seed,
        max_policy_lag=run.max_policy_lag,
    )
    check_needs(run.algorithm, needs(run.algorithm, run.hyperparameters), built.module.outputs)
    return built


def check_needs(algorithm: str, demands: AlgorithmNeeds, outputs: GraphOutputs) -> None:
    """Checks that the policy puts into the record what the algorithm learns from (contracts B2).

    Raises:
        ConfigError: it does not; no step of the run could be learned from.
    """
    if demands.behaviour_log_prob and not outputs.behaviour_log_prob:
        raise ConfigError(
            f"algorithm: {algorithm} needs the behaviour_log_prob of every step, and this policy has none;"
            " choose an algorithm for deterministic policies"
        )


def use_deterministic_torch() -> None:
    """One thread and deterministic kernels for the whole process (contracts F2)."""
    torch.set_num_threads(1)
    # `use_deterministic_algorithms` would do the same, and load the compiler, which takes seconds.
    torch.set_deterministic_debug_mode("error")
    # Filling fresh memory costs time, and nothing here reads what it did not write.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  # a property of a module


def _network(config: AlgorithmConfig) -> NetworkSettings:
    return NetworkSettings(
        hidden_sizes=config.hidden_sizes,
        activation=config.activation,
        squash="tanh" if config.squash else "clip",
        initial_log_std=config.log_std_init,
    )


def _has_values(config: AlgorithmConfig) -> bool:
    return not isinstance(config, REINFORCEConfig) or config.with_vf_baseline
