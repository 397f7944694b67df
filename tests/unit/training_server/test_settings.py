"""The settings of the training server."""

from __future__ import annotations

from pathlib import Path

import pytest

from relayrl_shared.errors import ConfigError
from relayrl_shared.settings import load_settings
from relayrl_training_server.settings import ENVIRONMENT_PREFIX, TrainingServerSettings


def load(**overrides: str) -> TrainingServerSettings:
    """Settings with overrides; dots as `__`."""
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_settings(TrainingServerSettings, environment_prefix=ENVIRONMENT_PREFIX, overrides=named)


def test_the_defaults_are_the_documented_ports() -> None:
    """7777, 7776, 50051 and 8082, on loopback."""
    settings = load()

    assert settings.addresses.agent_listener_address.zmq == "tcp://127.0.0.1:7777"
    assert settings.addresses.trajectory_server_address.zmq == "tcp://127.0.0.1:7776"
    assert settings.addresses.model_server_address.zmq == "tcp://127.0.0.1:50051"
    assert settings.server.http.port == 8082


def test_the_store_is_sqlite_in_the_directory_unless_it_is_named() -> None:
    """One directory holds store and runs; a URL moves the store alone."""
    settings = load(training_server_config__directory="somewhere")
    elsewhere = load(training_server_config__store="postgresql://u@h/d")

    assert settings.store_url == f"sqlite:///{Path('somewhere').absolute()}"
    assert settings.run_directory("r") == Path("somewhere").absolute() / "runs" / "r"
    assert elsewhere.store_url == "postgresql://u@h/d"


def test_the_originals_keys_are_read(tmp_path: Path) -> None:
    """A file of the original's tree, ports as strings, is understood."""
    file = tmp_path / "training_server_config.json"
    file.write_text(
        """{"training_server_config": {"config_update_polling_seconds": 5.0,
                "default_hyperparameters": {"PPO": {"clip_ratio": 0.1}}},
            "transport_config": {"zmq_addresses": {"training_addresses": {
                "trajectory_server_address": {"host": "127.0.0.1", "port": "7001"}}}}}"""
    )

    settings = load_settings(TrainingServerSettings, environment_prefix=ENVIRONMENT_PREFIX, file=file)

    assert settings.addresses.trajectory_server_address.port == 7001
    assert settings.server.default_hyperparameters == {"PPO": {"clip_ratio": 0.1}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training_server_config__ingest__commit_rows", "0"),
        ("training_server_config__ingest__heartbeat_seconds", "-1"),
        ("training_server_config__default_pacing", "sometimes"),
        ("training_server_config__ingest__comit_rows", "1"),
    ],
)
def test_what_cannot_be_is_refused_with_its_path(key: str, value: str) -> None:
    """Wrong keys, types and ranges name the dotted path."""
    with pytest.raises(ConfigError, match="training_server_config"):
        load(**{key: value})
