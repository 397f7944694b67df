"""What to train: options over presets, and what is refused."""

from __future__ import annotations

import argparse
import re

import pytest

from relayrl_cli import presets
from relayrl_cli.main import _parser
from relayrl_cli.plan import parse_hyperparameters, plan_from_arguments, plan_from_preset, run_name
from relayrl_shared.errors import ConfigError


def parse(*argv: str) -> argparse.Namespace:
    return _parser().parse_args(["train", *argv])


def test_options_go_over_the_preset() -> None:
    """What is not given stays the preset's, hyperparameter by hyperparameter."""
    preset = presets.load("cartpole-ppo")

    plan = plan_from_arguments(
        parse(
            "--preset",
            "cartpole-ppo",
            "--actors",
            "3",
            "--steps",
            "99",
            "--set",
            "pi_lr=0.5",
            "--run",
            "mine",
        )
    )

    assert (plan.run, plan.environment, plan.algorithm) == ("mine", preset.environment, preset.algorithm)
    assert (plan.actors, plan.steps, plan.pacing) == (3, 99, "block")
    assert plan.hyperparameters == preset.hyperparameters | {"pi_lr": 0.5}


def test_without_a_preset_only_what_is_said_is_explicit() -> None:
    """The server keeps its defaults for the rest (contracts K3)."""
    plan = plan_from_arguments(parse("--env", "Acrobot-v1", "--algorithm", "ppo"))

    assert (plan.environment, plan.algorithm, plan.actors) == ("Acrobot-v1", "ppo", 8)
    assert (plan.hyperparameters, plan.pacing, plan.seed, plan.allow_nan, plan.steps) == (
        {},
        None,
        None,
        None,
        None,
    )


def test_an_environment_alone_is_not_enough() -> None:
    """The message shows both ways to say it."""
    with pytest.raises(ConfigError, match=r"--env and --algorithm, or --preset with one of cartpole-ppo"):
        plan_from_arguments(parse("--env", "CartPole-v1"))


def test_actors_must_be_at_least_one() -> None:
    """With the option's name."""
    with pytest.raises(ConfigError, match="--actors 0: at least 1"):
        plan_from_arguments(parse("--preset", "cartpole-ppo", "--actors", "0"))


def test_a_step_limit_leaves_the_schedules_alone() -> None:
    """A shorter training follows the same learning-rate curve."""
    preset = presets.load("cartpole-ppo")

    plan = plan_from_preset(preset, "r", steps=10, seed=9)

    assert (plan.steps, plan.seed) == (10, 9)
    assert plan.hyperparameters["total_steps"] == 150_000


def test_hyperparameters_are_json_or_text() -> None:
    """Numbers, lists and null as JSON; words as they are."""
    parsed = parse_hyperparameters(
        ["pi_lr=3e-4", "hidden_sizes=[64,64]", "target_kl=null", "activation=tanh"]
    )

    assert parsed == {"pi_lr": 3e-4, "hidden_sizes": [64, 64], "target_kl": None, "activation": "tanh"}


@pytest.mark.parametrize("pair", ["pi_lr", "=3"])
def test_a_hyperparameter_without_name_or_value_is_refused(pair: str) -> None:
    """The message shows the form."""
    with pytest.raises(ConfigError, match=r"write NAME=VALUE"):
        parse_hyperparameters([pair])


def test_a_new_run_is_named_by_what_and_when() -> None:
    """Words that suit file names."""
    assert re.fullmatch(r"ale-pong-v5-ppo-\d{8}-\d{6}", run_name("ALE/Pong-v5", "PPO"))
