"""What a stack tells its services: keys that they have, and addresses that meet."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from relayrl_cli.addresses import Addresses, Ports
from relayrl_cli.commands.config import settings_class
from relayrl_cli.service_settings import client_config, default_store, service_settings
from relayrl_client.settings import ENVIRONMENT_PREFIX, ClientSettings
from relayrl_inference_server.settings import InferenceServerSettings
from relayrl_model_registry.settings import ModelRegistrySettings
from relayrl_shared.settings import Settings, load_settings
from relayrl_training_server.settings import TrainingServerSettings

DIRECTORY = Path("/data/stack")
PORTS = Ports(**{name: 1000 + index for index, name in enumerate(Ports.__struct_fields__)})


def loaded(service: str) -> Settings:
    cls, prefix = settings_class(service.replace("_", "-"))
    overrides = service_settings(DIRECTORY, PORTS, default_store(DIRECTORY))[service]
    return load_settings(cls, environment_prefix=prefix, overrides=overrides)


def test_the_registry_gets_its_ports_and_directory() -> None:
    """Its state lies below the directory of the stack."""
    settings = loaded("model_registry")

    assert isinstance(settings, ModelRegistrySettings)
    ports = (settings.model_server.port, settings.model_announcer.port, settings.http.port)
    assert ports == (PORTS.model_server, PORTS.model_announcer, PORTS.registry_http)
    assert settings.directory == "/data/stack/registry"


def test_the_training_server_gets_its_ports_store_and_registry() -> None:
    """Ingest binds where clients connect, learners publish where the registry listens."""
    settings = loaded("training_server")

    assert isinstance(settings, TrainingServerSettings)
    addresses = settings.addresses
    assert addresses.agent_listener_address.port == PORTS.agent_listener
    assert addresses.trajectory_server_address.port == PORTS.trajectory_server
    assert addresses.model_server_address.port == PORTS.model_server
    assert (settings.server.http.port, settings.server.ingest.http.port) == (
        PORTS.training_http,
        PORTS.ingest_http,
    )
    assert settings.store_url == "sqlite:////data/stack/training-server"


def test_the_inference_server_gets_its_ports_and_registry() -> None:
    """It hears of versions from the registry of its stack."""
    settings = loaded("inference_server")

    assert isinstance(settings, InferenceServerSettings)
    assert settings.inference_server.port == PORTS.inference_server
    assert (settings.model_server.port, settings.model_announcer.port) == (
        PORTS.model_server,
        PORTS.model_announcer,
    )


def test_applications_get_a_configuration_file_of_their_own(tmp_path: Path) -> None:
    """The client reads it, and its addresses are those of the stack."""
    file = tmp_path / "client_config.json"
    file.write_bytes(msgspec.json.encode(client_config(DIRECTORY, PORTS)))

    settings = load_settings(ClientSettings, environment_prefix=ENVIRONMENT_PREFIX, file=file)

    addresses = settings.transport_config.zmq_addresses
    training, expected = addresses.training_addresses, Addresses.of(PORTS)
    assert f"tcp://{expected.agent_listener}" == training.agent_listener_address.zmq
    assert f"tcp://{expected.trajectory_server}" == training.trajectory_server_address.zmq
    assert f"tcp://{expected.model_server}" == training.model_server_address.zmq
    assert f"tcp://{expected.model_announcer}" == training.model_announcer_address.zmq
    inference = addresses.inference_addresses.inference_server_address
    assert f"tcp://{expected.inference_server}" == inference.zmq
    assert settings.client_config.spool.directory == "/data/stack/client/spool"


@pytest.mark.parametrize(
    ("store", "database"),
    [
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgres://u@h/d", "postgres://u@h/d"),
        ("sqlite:///d", None),
    ],
)
def test_the_registry_keeps_its_rows_in_the_same_postgres(store: str, database: str | None) -> None:
    """With SQLite each service has a file of its own."""
    settings = service_settings(Path("d"), Ports(), store)

    assert settings["model_registry"].get("database_url") == database
