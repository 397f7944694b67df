"""The registry's settings: defaults, derived places, and the ways to set them."""

from __future__ import annotations

from pathlib import Path

import pytest

from relayrl_model_registry.settings import ENVIRONMENT_PREFIX, ModelRegistrySettings
from relayrl_shared.errors import ConfigError
from relayrl_shared.settings import load_settings


def test_defaults_are_the_ports_of_the_design() -> None:
    """Model server 50051, announcer 50052, HTTP 8084, on loopback."""
    settings = ModelRegistrySettings()

    assert settings.model_server.zmq == "tcp://127.0.0.1:50051"
    assert settings.model_announcer.zmq == "tcp://127.0.0.1:50052"
    assert settings.http.port == 8084


def test_directory_holds_database_and_blobs_by_default(tmp_path: Path) -> None:
    """One key places all state."""
    settings = ModelRegistrySettings(directory=str(tmp_path))

    assert settings.effective_database_url == f"sqlite:///{tmp_path}/registry.sqlite"
    assert settings.effective_blob_directory == tmp_path / "blobs"


def test_environment_and_command_line_set_single_keys() -> None:
    """The command line wins over the environment, and neighbours keep their values."""
    settings = load_settings(
        ModelRegistrySettings,
        environment_prefix=ENVIRONMENT_PREFIX,
        environment={
            "RELAYRL_MODEL_REGISTRY__COLLECTION__KEEP_UNALIASED_VERSIONS": "7",
            "RELAYRL_MODEL_REGISTRY__MODEL_SERVER__PORT": "1",
        },
        overrides={"model_server.port": "2", "database_url": "postgresql://x@y/z"},
    )

    assert settings.collection.keep_unaliased_versions == 7
    assert settings.collection.minimum_age_seconds == 3600
    assert settings.model_server.port == 2
    assert settings.effective_database_url == "postgresql://x@y/z"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_serve.port", "1", "did you mean 'model_server'"),
        ("limits.max_uploads", "0", "limits.max_uploads"),
        ("model_server.port", "70000", "model_server.port"),
    ],
)
def test_bad_settings_are_refused_by_their_path(key: str, value: str, message: str) -> None:
    """Unknown keys and values out of range are errors that name the key."""
    with pytest.raises(ConfigError, match=message):
        load_settings(ModelRegistrySettings, environment_prefix=ENVIRONMENT_PREFIX, overrides={key: value})
