"""Presets: each is valid for its algorithm, and a wrong name is refused with those that there are."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import pytest

from relayrl_cli import presets
from relayrl_shared.errors import ConfigError
from relayrl_training_server.algorithms import configs

ROOT = Path(__file__).parents[3]


def test_the_presets_of_the_first_release_are_there() -> None:
    """Demo, tests and benchmarks name these."""
    assert {"cartpole-ppo", "cartpole-reinforce", "pendulum-ppo"} <= set(presets.names())


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_valid_for_its_algorithm_and_environment(name: str) -> None:
    """Its hyperparameters exist and are in range, and Gymnasium knows its environment."""
    preset = presets.load(name)

    assert configs.build_config(preset.algorithm, preset.hyperparameters)
    assert gymnasium.spec(preset.environment)
    assert preset.actors >= 1
    assert preset.steps >= 1


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    """So that one can choose."""
    with pytest.raises(ConfigError, match=r"no preset 'cartpole'; there are: .*cartpole-ppo"):
        presets.load("cartpole")


def test_benchmarks_use_the_same_files() -> None:
    """Its presets are a link to those of the command line."""
    assert (ROOT / "benchmarks/presets").resolve() == Path(presets.__file__).parent
