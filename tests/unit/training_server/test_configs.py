"""Hyperparameters: defaults, ranges with their messages, nearest names, needs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayrl_shared.errors import ConfigError
from relayrl_training_server.algorithms.configs import (
    ALGORITHMS,
    AlgorithmNeeds,
    PPOConfig,
    Range,
    build_config,
    canonical_name,
    complete_hyperparameters,
    differing_hyperparameters,
    needs,
)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_defaults_are_complete_plain_and_stable(algorithm: str) -> None:
    """Completing nothing gives every field as JSON values, and completing those again changes nothing."""
    complete = complete_hyperparameters(algorithm, {})

    assert set(complete) == set(ALGORITHMS[algorithm].__struct_fields__)
    assert json.loads(json.dumps(complete)) == complete
    assert complete_hyperparameters(algorithm, complete) == complete


def test_the_references_defaults_hold() -> None:
    """The defaults of the original that quality does not speak against are kept."""
    ppo, reinforce = complete_hyperparameters("PPO", {}), complete_hyperparameters("REINFORCE", {})

    assert [ppo[k] for k in ("gamma", "lam", "clip_ratio", "pi_lr", "train_pi_iters")] == [
        0.99,
        0.97,
        0.2,
        3e-4,
        80,
    ]
    assert [ppo[k] for k in ("target_kl", "traj_per_epoch", "ent_coef", "vf_coef")] == [0.01, 8, 0.0, 0.5]
    assert [reinforce[k] for k in ("gamma", "lam", "with_vf_baseline", "vf_lr")] == [0.98, 0.97, False, 1e-3]


@pytest.mark.parametrize(
    ("algorithm", "key", "suggestion"),
    [
        ("PPO", "gama", "gamma"),
        ("PPO", "cliprange", "clip_ratio"),
        ("REINFORCE", "traj_per_epch", "traj_per_epoch"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(algorithm: str, key: str, suggestion: str) -> None:
    """A misspelt hyperparameter is an error that names the one that was meant."""
    with pytest.raises(ConfigError, match=f"hyperparameters.{key}.*did you mean '{suggestion}'"):
        complete_hyperparameters(algorithm, {key: 1})


def test_an_unknown_algorithm_names_all_there_are() -> None:
    """A misspelt algorithm is an error that lists the known ones; case does not matter."""
    with pytest.raises(ConfigError, match=r"'PPOO' is unknown; did you mean 'PPO'.*REINFORCE"):
        canonical_name("PPOO")
    assert canonical_name("ppo") == "PPO"


def test_reinforce_refuses_rollouts_with_the_remedy() -> None:
    """REINFORCE needs whole episodes and says what to set instead."""
    with pytest.raises(ConfigError, match="whole episodes; set traj_per_epoch"):
        complete_hyperparameters("REINFORCE", {"rollout_steps": 32})


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("gamma", 1.5, r"\[0, 1\]"),
        ("gamma", float("nan"), r"\[0, 1\]"),
        ("pi_lr", 0.0, r"\(0, inf\)"),
        ("clip_ratio", 1.0, r"\(0, 1\)"),
        ("rollout_steps", 1, r"\[2, inf\)"),
        ("minibatch", 0, r"\[1, inf\)"),
        ("seed", -1, r"\[0, "),
        ("target_kl", -0.1, r"\(0, inf\)"),
        ("hidden_sizes", [0], "at most 16 sizes"),
        ("hidden_sizes", [8] * 17, "at most 16 sizes"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(key: str, value: Any, allowed: str) -> None:
    """The message holds the path and what would be allowed."""
    with pytest.raises(ConfigError, match=rf"hyperparameters\.{key}.*{allowed}"):
        build_config("PPO", {key: value})


def test_a_wrong_type_is_refused_by_name() -> None:
    """A string for a number is an error that names the field."""
    with pytest.raises(ConfigError, match=r"Expected `float`, got `str`.*gamma"):
        build_config("PPO", {"gamma": "high"})


@pytest.mark.parametrize("key", ["lr_schedule", "clip_schedule"])
def test_a_linear_schedule_needs_its_length(key: str) -> None:
    """Without total_steps a linear schedule has no end and is refused."""
    with pytest.raises(ConfigError, match="total_steps"):
        build_config("PPO", {key: "linear"})
    assert build_config("PPO", {key: "linear", "total_steps": 10}).total_steps == 10


def test_needs_follow_the_hyperparameters() -> None:
    """PPO takes rollouts unless told otherwise; REINFORCE always takes whole episodes."""
    assert needs("PPO", {"rollout_steps": 32}) == AlgorithmNeeds(True, False, 32, 32)
    assert needs("PPO", {"rollout_steps": None}) == AlgorithmNeeds(True, True, None, 1024)
    assert needs("REINFORCE", {"max_segment_steps": 100}) == AlgorithmNeeds(False, True, None, 100)


def test_only_what_is_explicit_is_compared() -> None:
    """A hello that sets two hyperparameters is compared in those two only, by value and not by spelling."""
    stored = complete_hyperparameters("PPO", {"gamma": 0.9, "hidden_sizes": [32]})

    assert differing_hyperparameters("PPO", {"gamma": 0.9, "hidden_sizes": (32,)}, stored) == {}
    assert differing_hyperparameters("PPO", {"gamma": 1, "lam": 0.97}, stored) == {"gamma": (1.0, 0.9)}


@given(st.floats(), st.booleans(), st.booleans())
def test_a_range_holds_what_it_prints(value: float, open_low: bool, open_high: bool) -> None:
    """A bound belongs to the range exactly when its bracket is square."""
    allowed = Range(0.0, 1.0, open_low, open_high)
    expected = 0.0 < value < 1.0 or (value == 0.0 and not open_low) or (value == 1.0 and not open_high)

    assert allowed.holds(value) == expected
    assert str(allowed) == f"{'(' if open_low else '['}0, 1{')' if open_high else ']'}"


def test_configs_need_no_torch() -> None:
    """Ingest and the command line import the hyperparameters without loading torch."""
    code = "import sys, relayrl_training_server.algorithms.configs; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_config_is_a_value() -> None:
    """A config cannot be changed after it was checked."""
    with pytest.raises(AttributeError):
        PPOConfig().gamma = 2.0  # type: ignore[misc]
