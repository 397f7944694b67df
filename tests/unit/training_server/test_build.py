"""From hyperparameters and specs to an algorithm."""

from __future__ import annotations

import pytest
import torch

from relayrl_shared.errors import ConfigError
from relayrl_shared.policy.manifest import GraphOutputs
from relayrl_training_server.algorithms.build import build_algorithm, check_needs, use_deterministic_torch
from relayrl_training_server.algorithms.configs import ALGORITHMS, complete_hyperparameters, needs
from relayrl_training_server.testing.segments import ACTION, BOX_ACTION, OBSERVATION


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_algorithm_is_built_by_its_name(algorithm: str) -> None:
    """The class has the algorithm's name, and takes any case of it."""
    built = build_algorithm(algorithm.lower(), {"hidden_sizes": [4]}, OBSERVATION, ACTION)

    assert type(built).__name__ == algorithm


def test_equal_arguments_give_equal_weights() -> None:
    """The seed fixes the first weights, and only it."""
    one, other, third = (build_algorithm("PPO", {}, OBSERVATION, ACTION, seed=seed) for seed in (1, 1, 2))

    assert torch.equal(one.policy_adam.vector, other.policy_adam.vector)
    assert not torch.equal(one.policy_adam.vector, third.policy_adam.vector)


def test_the_network_follows_the_hyperparameters() -> None:
    """Sizes, activation and the first deviation of continuous actions."""
    settings = {"hidden_sizes": [5, 6], "activation": "relu", "log_std_init": -1.0}
    module = build_algorithm("PPO", settings, OBSERVATION, BOX_ACTION).module
    shapes = [tuple(layer.weight.shape) for layer in module.pi if isinstance(layer, torch.nn.Linear)]
    deviations = [p for name, p in module.heads.named_parameters() if "log_std" in name]

    assert shapes == [(5, 3), (6, 5), (2, 6)]
    assert any(isinstance(layer, torch.nn.ReLU) for layer in module.pi)
    assert deviations[0].detach().reshape(-1).tolist() == [-1.0, -1.0]


def test_what_cannot_be_is_refused() -> None:
    """Unknown hyperparameters are refused before anything is built."""
    with pytest.raises(ConfigError, match="gammma"):
        build_algorithm("PPO", {"gammma": 0.9}, OBSERVATION, ACTION)


def test_deterministic_torch_has_one_thread() -> None:
    """One thread and deterministic kernels, for the whole process (contracts F2)."""
    use_deterministic_torch()

    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


def test_a_policy_that_cannot_feed_its_algorithm_is_refused() -> None:
    """PPO needs log-probabilities of what acted, REINFORCE does not (contracts B2)."""
    deterministic = GraphOutputs(behaviour_log_prob=False, leaf_log_prob=False, value=False)
    demands = {name: needs(name, complete_hyperparameters(name, {})) for name in ALGORITHMS}
    check_needs("REINFORCE", demands["REINFORCE"], deterministic)
    with pytest.raises(ConfigError, match="behaviour_log_prob"):
        check_needs("PPO", demands["PPO"], deterministic)
