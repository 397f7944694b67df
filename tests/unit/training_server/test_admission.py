"""Runs as their creators describe them, and what a later hello may say."""

from __future__ import annotations

from typing import Any

import pytest

from relayrl_shared.errors import ConfigError, RunMismatch, SpecMismatch
from relayrl_shared.messages import RunRequest
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.testing.trajectories import small_schema
from relayrl_training_server.admission import compare, new_run
from relayrl_training_server.settings import ServerConfig

SCHEMA = small_schema()


def request(**changes: Any) -> RunRequest:
    """A request for a small run."""
    fields: dict[str, Any] = {
        "name": "run",
        "observation_spec": SCHEMA.observation,
        "action_spec": SCHEMA.action,
    }
    return RunRequest(**{**fields, **changes})


def test_a_new_run_is_complete() -> None:
    """Everything that a request leaves open is filled in, and ids differ from run to run."""
    run, other = new_run(request(), ServerConfig()), new_run(request(), ServerConfig())

    assert (run.algorithm, run.pacing, run.max_policy_lag, run.seed, run.allow_nan) == (
        "PPO",
        "free",
        1,
        1,
        False,
    )
    assert run.hyperparameters["clip_ratio"] == 0.2
    assert run.run_id != other.run_id


def test_what_the_request_sets_goes_over_the_servers_defaults() -> None:
    """Precedence: request, server's configuration, algorithm's defaults."""
    config = ServerConfig(
        default_hyperparameters={"ppo": {"gamma": 0.5, "lam": 0.5}, "REINFORCE": {"gamma": 0.1}},
        default_pacing="block",
        default_max_policy_lag=3,
    )

    run = new_run(request(hyperparameters={"lam": 0.8}, max_policy_lag=0), config)

    assert (run.hyperparameters["gamma"], run.hyperparameters["lam"]) == (0.5, 0.8)
    assert (run.pacing, run.max_policy_lag) == ("block", 0)


@pytest.mark.parametrize(
    "action",
    [
        LeafSpec(name="action", kind="box", shape=(2,), dtype="float32", low=(-1.0,), high=(1.0,)),
        LeafSpec(name="action", kind="multi_discrete", shape=(2,), dtype="int64", nvec=(3, 4), start=(0, 0)),
        LeafSpec(name="action", kind="multi_binary", shape=(3,), dtype="int8"),
    ],
)
def test_every_kind_of_action_makes_a_run(action: LeafSpec) -> None:
    """Continuous and discrete kinds are both taken."""
    assert new_run(request(action_spec=ActionSpec(leaves=(action,))), ServerConfig()).name == "run"


@pytest.mark.parametrize(
    "changes",
    [
        {"observation_spec": ObservationSpec(leaves=())},
        {"action_spec": ActionSpec(leaves=())},
        {"action_spec": ActionSpec(leaves=(LeafSpec(name="action", kind="box", shape=(), dtype="object"),))},
        {"masked_leaves": ("action", "action")},
    ],
)
def test_specs_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    """Nothing is created from an impossible spec."""
    with pytest.raises(SpecMismatch):
        new_run(request(**changes), ServerConfig())


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    """A seed is a number from 0 that a database keeps."""
    with pytest.raises(ConfigError, match="seed"):
        new_run(request(seed=seed), ServerConfig())


def test_a_request_that_repeats_the_creators_words_is_the_same() -> None:
    """Types of another spelling, such as 1 for 1.0 or a list for a tuple, are no difference."""
    words: dict[str, Any] = {"algorithm": "ppo", "hyperparameters": {"gamma": 1, "hidden_sizes": [32, 32]}}
    run = new_run(request(**words), ServerConfig())

    compare(request(**words), run)
    compare(request(hyperparameters={"gamma": 1.0, "hidden_sizes": (32, 32)}), run)


def test_a_difference_names_both_values_and_the_remedy() -> None:
    """The message is enough to repair the caller."""
    run = new_run(request(hyperparameters={"gamma": 0.9}), ServerConfig())

    with pytest.raises(RunMismatch) as caught:
        compare(request(hyperparameters={"gamma": 0.5}), run)

    text = str(caught.value)
    assert text.startswith("hyperparameters.gamma: the hello says 0.5, run 'run' was created with 0.9")
    assert "take another run name" in text
