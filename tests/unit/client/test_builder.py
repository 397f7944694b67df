"""AgentBuilder: options, the configuration file, and the combinations that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from relayrl_client.builder import AgentBuilder
from relayrl_client.settings import ClientSettings
from relayrl_shared.errors import ConfigError
from relayrl_shared.policy.artefact import save_artefact
from relayrl_shared.settings import Address, valid_keys
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.testing.policies import make_artefact

ENVIRONMENT = gymnasium.make("CartPole-v1")
OBSERVATION = ObservationSpec.from_gymnasium(ENVIRONMENT.observation_space)
ACTION = ActionSpec.from_gymnasium(ENVIRONMENT.action_space)
MODEL = make_artefact(OBSERVATION, ACTION)


def build(**options: Any) -> Any:
    return AgentBuilder(environment=ENVIRONMENT).set(**options).build().plan


def test_the_defaults_are_an_online_client_of_local_services() -> None:
    """With nothing but an environment the client joins run `default` on the default ports."""
    plan = build()
    assert plan.is_online
    assert plan.actor_inference_mode == "local"
    assert plan.run.name == "default"
    assert plan.run.algorithm is None
    assert plan.transport.zmq_addresses.training_addresses.agent_listener_address == Address(port=7777)
    assert plan.schema.observation == OBSERVATION


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    """Precedence is options, file, default; addresses are taken as text."""
    file = tmp_path / "client_config.json"
    file.write_text(
        json.dumps(
            {
                "client_config": {
                    "actor_count": 3,
                    "run": {"name": "from-file", "algorithm": "PPO"},
                    "init_hyperparameters": {"ppo": {"gamma": 0.9, "lam": 0.8}},
                },
                "transport_config": {
                    "zmq_addresses": {
                        "training_addresses": {
                            "agent_listener_address": {"host": "there", "port": "1234"},
                        }
                    }
                },
            }
        )
    )
    plan = build(
        config_path=file, run_name="mine", hyperparameters={"gamma": 0.5}, trajectory_server_address="here:5"
    )
    training = plan.transport.zmq_addresses.training_addresses
    assert plan.actor_count == 3
    assert plan.run.name == "mine"
    assert plan.run.hyperparameters == {"gamma": 0.5, "lam": 0.8}
    assert training.agent_listener_address.zmq == "tcp://there:1234"
    assert training.trajectory_server_address.zmq == "tcp://here:5"


def test_only_what_is_set_is_sent() -> None:
    """File defaults are not part of the hello (contracts K3)."""
    assert build(algorithm="PPO").run.hyperparameters == {}
    assert build().run.pacing is None


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    """A typo is an error that lists what there is."""
    with pytest.raises(ConfigError, match=r"actor_cuont.*actor_count"):
        build(actor_cuont=3)


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"actor_count": -1}, "actor_count"),
        ({"router_scale": 0}, "router_scale"),
        ({"actor_inference_mode": "cloud"}, "actor_inference_mode"),
        ({"actor_training_data_mode": "offline"}, "actor_training_data_mode"),
        ({"agent_listener_address": "nowhere"}, "address"),
        ({"agent_listener_address": "host:99999"}, "99999|65535"),
        ({"max_policy_lag": -1}, "max_policy_lag"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], path: str) -> None:
    """The error names the key that is wrong."""
    with pytest.raises(ConfigError, match=path):
        build(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"actor_training_data_mode": "offline_with_memory"}, "needs a model"),
        ({"actor_training_data_mode": "disabled"}, "needs a model"),
        ({"default_model": MODEL}, "the run's own policy acts"),
        (
            {
                "default_model": MODEL,
                "actor_inference_mode": "server",
                "actor_training_data_mode": "disabled",
            },
            "the server's policy acts",
        ),
        ({"actor_inference_mode": "server", "actor_training_data_mode": "disabled"}, "pass policy"),
        ({"policy": "other"}, "leave policy out"),
        ({"default_model": MODEL, "actor_training_data_mode": "disabled", "router_scale": 2}, "no router"),
        ({"trajectory_file_directory": "x"}, "writes no files"),
        (
            {
                "default_model": MODEL,
                "actor_training_data_mode": "offline_with_memory",
                "spool_directory": "x",
            },
            "no spool",
        ),
        (
            {"default_model": MODEL, "actor_training_data_mode": "offline_with_memory", "algorithm": "PPO"},
            "leave out algorithm",
        ),
        ({"masked_leaves": ["action.left"]}, "cannot be masked"),
    ],
)
def test_combinations_without_sense_are_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    """What cannot work together fails at build, not at the first action."""
    with pytest.raises(ConfigError, match=reason):
        build(**options)


def test_spaces_must_be_known() -> None:
    """Without an environment, spaces or a model there is nothing to record."""
    with pytest.raises(ConfigError, match="spaces are not known"):
        AgentBuilder().build()
    offline = {"actor_training_data_mode": "offline_with_memory", "default_model": MODEL}
    assert AgentBuilder(**offline).build().schema.action == ACTION


def test_a_vector_environment_gives_the_spaces_of_one() -> None:
    """The batch axis of a vector environment is no part of the record."""
    vector = gymnasium.make_vec("CartPole-v1", num_envs=3)
    assert AgentBuilder(environment=vector).build().schema.observation == OBSERVATION


def test_a_model_may_be_a_directory(tmp_path: Path) -> None:
    """default_model takes the folder of an artefact."""
    save_artefact(MODEL, tmp_path / "model")
    plan = build(default_model=tmp_path / "model", actor_training_data_mode="disabled")
    assert plan.default_model.manifest == MODEL.manifest


def test_masks_are_recorded_on_request() -> None:
    """masked_leaves=True masks every discrete leaf."""
    assert build(masked_leaves=True).schema.masked_leaves == ("action",)
    assert build().schema.masked_leaves == ()


def test_the_file_keeps_the_names_of_the_original() -> None:
    """Keys of client_config.json that still mean something are called as they were."""
    keys = set(valid_keys(ClientSettings))
    training = "transport_config.zmq_addresses.training_addresses"
    assert {
        "client_config.router_buffer_size_per_actor",
        "client_config.init_hyperparameters",
        "client_config.trajectory_file_output.directory",
        "client_config.trajectory_file_output.file_type",
        f"{training}.model_server_address.port",
        f"{training}.trajectory_server_address.host",
        f"{training}.agent_listener_address.port",
        "transport_config.zmq_addresses.inference_addresses.inference_server_address.port",
        "transport_config.local_model_module.directory",
    } <= keys


def test_an_offline_agent_keeps_trajectories_in_memory() -> None:
    """Built without helpers, an offline agent acts, records, and gives its trajectories back once."""
    agent = AgentBuilder(
        environment=ENVIRONMENT,
        actor_count=1,
        actor_training_data_mode="offline_with_memory",
        default_model=MODEL,
    ).build()
    with agent:
        actor = agent.get_actor_ids()[0]
        observation, _ = ENVIRONMENT.reset(seed=1)
        agent.request_action(actor, observation)
        agent.end_episode(actor, 1.0, terminated=True)
        agent.flush(10.0)
        assert len(agent.get_trajectory_memory()[actor]) == 1
        assert len(agent.get_trajectory_memory(drain=True)[actor]) == 1
        assert agent.get_trajectory_memory() == {}


@pytest.mark.parametrize("keep", [False, True])
def test_removed_actors_leave_the_memory_unless_asked_to_stay(keep: bool) -> None:
    """Actors that come and go do not fill the memory; what a runner recorded can still be read."""
    agent = AgentBuilder(
        environment=ENVIRONMENT,
        actor_count=1,
        actor_training_data_mode="offline_with_memory",
        default_model=MODEL,
    ).build()
    with agent:
        actor = agent.get_actor_ids()[0]
        observation, _ = ENVIRONMENT.reset(seed=1)
        agent.request_action(actor, observation)
        agent.request_action(actor, observation, reward=1.0)
        agent.remove_actors([actor], keep_trajectories=keep)
        agent.flush(10.0)
        assert list(agent.get_trajectory_memory()) == ([actor] if keep else [])
